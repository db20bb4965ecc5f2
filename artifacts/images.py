"""ImageSet: the canonical views as WebDataset tar shards, written and read by row.

images/<split>/shard-000000.tar        <key>.png, <key>.json[, <key>.mask.png] per sample: plain WebDataset
               shard-000000.rows.json  per row: key, label, group, and its members' places and checksums
               packing.json            what is being packed; a resumed pack must be the same
               index.json              written last: without it the set is incomplete
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from artifacts.errors import ImageSetError
from artifacts.index import FORMATS, SCHEMA_VERSION, About, Index
from artifacts.places import Place, Url, place
from artifacts.rowlist import Label, RowList, read_about, read_row_list, row_list
from artifacts.sealed import NewerSchema, reason, unseal

_MASK = {"mask.png": "PNG"}


@dataclass(frozen=True)
class Sample:
    """One packed image.

    key     stable id, [A-Za-z0-9_-]+
    image   u8 [3,S,S], RGB
    label   class index, several of them, or None
    group   e.g. 2 * class + background, or None
    boxes   f32 [N,5] of (class, x0, y0, x1, y1) in px of the canvas, or None
    mask    u8 [S,S], 0..255 = share of the pixel that is object, or None
    source  where it came from, or None
    """

    key: str
    image: np.ndarray
    label: Label = None
    group: int | None = None
    boxes: np.ndarray | None = None
    mask: np.ndarray | None = None
    source: str | None = None


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the set. `start` is its first row."""

    name: str
    rows: int
    bytes: int
    sha256: str
    rows_sha256: str
    start: int


class ImageSet:
    """A packed split. `[row]` is a Sample; row i is image i for ever."""

    def __init__(self, where: Place, index: Index) -> None:
        self.place = where
        self.view: dict[str, Any] = index.view
        self.classes: list[str] = index.classes
        self.rows_per_shard: int = index.rows_per_shard
        self.size: int = index.view["size"]
        self.shards = [
            ShardInfo(**dict(entry), start=shard * index.rows_per_shard)
            for shard, entry in enumerate(index.shards)
        ]
        self.fingerprint = _fingerprint(index)
        self._lists: dict[int, RowList] = {}

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def keys(self) -> Sequence[str]:
        """By row."""
        return [key for rows in self._all_lists() for key in rows.keys]

    @cached_property
    def labels(self) -> Sequence[Label]:
        """By row."""
        return [label for rows in self._all_lists() for label in rows.labels]

    @cached_property
    def groups(self) -> Sequence[int | None]:
        """By row."""
        return [group for rows in self._all_lists() for group in rows.groups]

    @cached_property
    def multilabel(self) -> bool:
        """Whether some image has a list of labels, which may be empty."""
        return any(isinstance(label, tuple) for label in self.labels)

    @cached_property
    def label_column(self) -> np.ndarray:
        """i64 [rows], read-only: the label, -1 for an image without one and for one with a list of labels."""
        return _column(label if isinstance(label, int) else None for label in self.labels)

    @cached_property
    def group_column(self) -> np.ndarray:
        """i64 [rows], read-only: the group, -1 for an image without one."""
        return _column(self.groups)

    def shard_rows(self, shard: int) -> range:
        info = self.shards[shard]
        return range(info.start, info.start + info.rows)

    def shard_keys(self, shard: int) -> list[str]:
        return list(self._list(shard).keys)

    def keys_sha256(self, shard: int) -> str:
        """Hash of the shard's keys in row order; a store's commit record must name the same."""
        return hashlib.sha256("\n".join(self.shard_keys(shard)).encode()).hexdigest()

    def __getitem__(self, row: int) -> Sample:
        """Raises IndexError past the end, ImageSetError if the bytes cannot be decoded."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        (rows, position), about = self._find(row), self._about(row)
        return Sample(
            key=rows.keys[position],
            image=self._pixels(row),
            label=rows.labels[position],
            group=rows.groups[position],
            boxes=_boxes(about),
            mask=self._decoded(row, "mask.png", "L") if "mask.png" in rows.extensions(position) else None,
            source=about.source,
        )

    def read_images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Only the pixels of some rows: u8 [B,3,S,S]."""
        return np.stack([self._pixels(int(row)) for row in rows])

    def read_boxes(self, row: int) -> np.ndarray | None:
        """Only the boxes of a row: f32 [N,5], or None if it has none annotated."""
        return _boxes(self._about(row))

    def _list(self, shard: int) -> RowList:
        if shard not in self._lists:
            info = self.shards[shard]
            found = read_row_list(self.place, info.name, info.rows_sha256)
            if (len(found.keys), found.bytes, found.sha256) != (info.rows, info.bytes, info.sha256):
                raise self._unfit(info, "it is that of another tar")
            if self.classes and _highest(found.labels) >= len(self.classes):
                raise self._unfit(info, f"it has labels that are none of the {len(self.classes)} classes")
            self._lists[shard] = found
        return self._lists[shard]

    def _unfit(self, info: ShardInfo, what: str) -> ImageSetError:
        file = f"{self.place}/{row_list(info.name)}"
        return ImageSetError(
            f"{file} is damaged ({what}); run: e2kd verify --repair {self.place}",
            path=file,
            shard=self.shards.index(info),
        )

    def _all_lists(self) -> Iterator[RowList]:
        return map(self._list, range(len(self.shards)))

    def _find(self, row: int) -> tuple[RowList, int]:
        shard, position = divmod(row, self.rows_per_shard)
        return self._list(shard), position

    def _extensions(self, row: int) -> list[str]:
        rows, position = self._find(row)
        return rows.extensions(position)

    def _pixels(self, row: int) -> np.ndarray:
        extension = next(name for name in self._extensions(row) if name in FORMATS)
        return np.ascontiguousarray(self._decoded(row, extension, "RGB").transpose(2, 0, 1))

    def _decoded(self, row: int, extension: str, mode: str) -> np.ndarray:
        """A packed image, of its extension's format and of S x S px: both are known before a pixel is decoded."""
        try:
            data = self._member(row, extension)
            with Image.open(io.BytesIO(data), formats=[(FORMATS | _MASK)[extension]]) as image:
                if image.size == (self.size, self.size):
                    return np.asarray(image.convert(mode))
                what: object = f"it has {image.size} pixels, not {self.size} x {self.size}"
        except ImageSetError:
            raise
        # Pillow raises whatever its decoders raise
        except Exception as error:
            what = error
        raise self._damaged(row, what)

    def _about(self, row: int) -> About:
        try:
            return read_about(self._member(row, "json"))
        except ValueError as error:
            raise self._damaged(row, reason(error)) from None

    def members(self, row: int) -> dict[str, bytes]:
        """The packed files of a row by extension, as they are in the tar. Raises ImageSetError for changed bytes."""
        return {extension: self._member(row, extension) for extension in self._extensions(row)}

    def _damaged(self, row: int, what: object) -> ImageSetError:
        (rows, position), shard = self._find(row), row // self.rows_per_shard
        name = self.shards[shard].name
        return ImageSetError(
            f"{self.place}/{name}: row {row} cannot be decoded ({what}); the file is damaged, "
            f"run: e2kd verify --repair {self.place}",
            path=f"{self.place}/{name}",
            shard=shard,
            rows=range(row, row + 1),
            key=rows.keys[position],
        )

    def _member(self, row: int, extension: str) -> bytes:
        """Raises ImageSetError if they are not those that were packed."""
        info = self.shards[row // self.rows_per_shard]
        rows, position = self._find(row)
        member = rows.member(position, extension)
        for attempt in range(2):
            try:
                view = self.place.view(info.name, info.bytes, info.sha256)
            except FileNotFoundError:
                raise self._damaged(row, "the tar is missing") from None
            data = view[member.offset : member.offset + member.length]
            if zlib.crc32(data) == member.crc32:
                return data
            if attempt or not self.place.distrust(info.name, info.sha256):
                break
        raise self._damaged(row, f"the checksum of its {extension} differs")


def _column(values: Iterable[int | None]) -> np.ndarray:
    column = np.array([-1 if value is None else value for value in values], np.int64)
    column.setflags(write=False)
    return column


def _boxes(about: About) -> np.ndarray | None:
    return None if about.boxes is None else np.asarray(about.boxes, np.float32).reshape(-1, 5)


def _highest(labels: Sequence[Label]) -> int:
    """The highest label of all; -1 if there is none."""
    every = (label if isinstance(label, tuple) else (label,) for label in labels)
    return max((one for some in every for one in some if one is not None), default=-1)


def open_images(url: Url) -> ImageSet:
    """Open a packed split, at a path or an fsspec URL.

    Raises ImageSetError: missing, incomplete, damaged sizes, or a newer format; PlaceError: the URL cannot be reached.
    """
    images = load_images(url)
    for shard, what in wrong_tars(images).items():
        rows = images.shard_rows(shard)
        raise ImageSetError(
            f"{images.place}/{images.shards[shard].name} (rows {rows.start} to {rows.stop - 1}) {what}; "
            f"run: e2kd verify --repair {images.place}",
            path=f"{images.place}/{images.shards[shard].name}",
            shard=shard,
            rows=rows,
        )
    return images


def load_images(url: Url) -> ImageSet:
    """`open_images` without a look at the tars."""
    where = place(url)
    if not where.exists("index.json"):
        state = "was not finished" if where.exists("packing.json") else "is not there"
        raise ImageSetError(f"the image set {where} {state}; run: e2kd pack CONFIG", path=where)
    file = f"{where}/index.json"
    try:
        return ImageSet(where, Index.model_validate(unseal(where.read("index.json"), SCHEMA_VERSION)))
    except NewerSchema as error:
        raise ImageSetError(
            f"{file} has schema {error}, this e2kd reads {SCHEMA_VERSION}; update e2kd",
            path=file,
            fields={"schema_version": (error.args[0], SCHEMA_VERSION)},
        ) from None
    except ValueError as error:
        raise ImageSetError(
            f"{file} is damaged ({reason(error)}); delete it and run: e2kd pack CONFIG", path=file
        ) from None


def wrong_tars(images: ImageSet) -> dict[int, str]:
    """Shard -> what is wrong with the size of its tar, or with its row list."""
    wrong, sizes = {}, images.place.sizes()
    for number, shard in enumerate(images.shards):
        size = sizes.get(shard.name)
        if size != shard.bytes:
            wrong[number] = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
        elif row_list(shard.name) not in sizes:
            wrong[number] = "has no row list"
    return wrong


def _fingerprint(index: Index) -> str:
    parts = [index.view, index.classes, [[entry.rows, entry.sha256] for entry in index.shards]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
