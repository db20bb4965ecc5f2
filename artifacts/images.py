"""ImageSet: the canonical views as WebDataset tar shards, written and read by row.

images/<split>/shard-000000.tar        <key>.png, <key>.json[, <key>.mask.png] per sample: plain WebDataset
               shard-000000.rows.json  per row: key, label, group, and its members' places and checksums
               packing.json            what is being packed; a resumed pack must be the same
               index.json              written last: without it the set is incomplete
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import mmap
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from artifacts.durable import naming, sha256_file, sync_file, sync_folder, write_atomic
from artifacts.errors import ImageSetError
from artifacts.rowlist import Label, Row, locate_rows, read_rows, row_list

SCHEMA_VERSION = 1
_KEY = re.compile(r"[A-Za-z0-9_-]+")


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

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self.view: dict[str, Any] = index["view"]
        self.classes: list[str] = index["classes"]
        self.rows_per_shard: int = index["rows_per_shard"]
        self.size: int = self.view["size"]
        starts = range(0, self.rows_per_shard * len(index["shards"]), self.rows_per_shard)
        self.shards = [
            ShardInfo(**shard, start=start) for shard, start in zip(index["shards"], starts, strict=True)
        ]
        self.fingerprint = _fingerprint(index)
        self._rows: dict[int, tuple[Row, ...]] = {}
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def keys(self) -> list[str]:
        return [row.key for row in self._all_rows()]

    @property
    def labels(self) -> list[Label]:
        return [row.label for row in self._all_rows()]

    @property
    def groups(self) -> list[int | None]:
        return [row.group for row in self._all_rows()]

    def shard_rows(self, shard: int) -> range:
        info = self.shards[shard]
        return range(info.start, info.start + info.rows)

    def shard_keys(self, shard: int) -> list[str]:
        return [row.key for row in self._shard_list(shard)]

    def keys_sha256(self, shard: int) -> str:
        """Hash of the shard's keys in row order; a store's commit record must name the same."""
        return hashlib.sha256("\n".join(self.shard_keys(shard)).encode()).hexdigest()

    def __getitem__(self, row: int) -> Sample:
        """Raises IndexError past the end, ImageSetError where the bytes cannot be decoded."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        entry, about = self._row(row), self._about(row)
        boxes = about.get("boxes")
        return Sample(
            key=entry.key,
            image=self._pixels(row),
            label=entry.label,
            group=entry.group,
            boxes=None if boxes is None else np.asarray(boxes, np.float32).reshape(-1, 5),
            mask=self._decoded(row, "mask.png", "L") if "mask.png" in entry.members else None,
            source=about.get("source"),
        )

    def read_images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Only the pixels of some rows: u8 [B,3,S,S]."""
        return np.stack([self._pixels(int(row)) for row in rows])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # open files do not travel to data-loader workers

    def _shard_list(self, shard: int) -> tuple[Row, ...]:
        if shard not in self._rows:
            info = self.shards[shard]
            self._rows[shard] = read_rows(row_list(self.path / info.name), info.rows_sha256)
        return self._rows[shard]

    def _all_rows(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(map(self._shard_list, range(len(self.shards))))

    def _row(self, row: int) -> Row:
        shard, position = divmod(row, self.rows_per_shard)
        return self._shard_list(shard)[position]

    def _pixels(self, row: int) -> np.ndarray:
        extension = next(name for name in ("png", "jpg", "webp") if name in self._row(row).members)
        return np.ascontiguousarray(self._decoded(row, extension, "RGB").transpose(2, 0, 1))

    def _decoded(self, row: int, extension: str, mode: str) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self._member(row, extension))) as image:
                pixels = np.asarray(image.convert(mode))
        except ImageSetError:
            raise
        except Exception as error:  # Pillow raises whatever its decoders raise
            raise self._damaged(row, error) from None
        if pixels.shape[:2] != (self.size, self.size):
            raise self._damaged(row, f"it has {pixels.shape[:2]} pixels, not {self.size} x {self.size}")
        return pixels

    def _about(self, row: int) -> dict[str, Any]:
        try:
            about: dict[str, Any] = json.loads(self._member(row, "json"))
        except ValueError as error:
            raise self._damaged(row, error) from None
        return about

    def _damaged(self, row: int, what: object) -> ImageSetError:
        name = self.shards[row // self.rows_per_shard].name
        return ImageSetError(
            f"{self.path / name}: row {row} cannot be decoded ({what}); the file is damaged, "
            f"delete {name} and index.json and run: e2kd pack CONFIG"
        )

    def _member(self, row: int, extension: str) -> bytes:
        """Raises ImageSetError where the bytes are not those that were packed."""
        shard = row // self.rows_per_shard
        if shard not in self._maps:
            with (self.path / self.shards[shard].name).open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        member = self._row(row).members[extension]
        data = self._maps[shard][member.offset : member.offset + member.length]
        if zlib.crc32(data) != member.crc32:
            raise self._damaged(row, f"the checksum of its {extension} differs")
        return data


def open_images(url: str | Path) -> ImageSet:
    """Open a packed split. Raises ImageSetError: missing, incomplete, damaged sizes, or a newer format."""
    images = load_images(url)
    for shard, what in wrong_tars(images).items():
        rows = images.shard_rows(shard)
        raise ImageSetError(
            f"{images.path / images.shards[shard].name} (rows {rows.start} to {rows.stop - 1}) {what}; delete "
            f"{images.path / 'index.json'} and run: e2kd pack CONFIG"
        )
    return images


def load_images(url: str | Path) -> ImageSet:
    """`open_images` without a look at the tars."""
    path = local_path(url)
    file = path / "index.json"
    if not file.exists():
        state = "was not finished" if (path / "packing.json").exists() else "is not there"
        raise ImageSetError(f"the image set {path} {state}; run: e2kd pack CONFIG")
    try:
        index = json.loads(file.read_text())
        if (schema := index["schema_version"]) > SCHEMA_VERSION:
            raise ImageSetError(f"{file} has schema {schema}, this e2kd reads {SCHEMA_VERSION}; update e2kd")
        return ImageSet(path, index)
    except (ValueError, KeyError, TypeError) as error:
        raise ImageSetError(f"{file} is damaged ({error!r}); delete it and run: e2kd pack CONFIG") from None


def wrong_tars(images: ImageSet) -> dict[int, str]:
    """Shard -> what is wrong with the size of its tar, or with its row list."""
    wrong = {}
    for number, shard in enumerate(images.shards):
        tar = images.path / shard.name
        found = tar.stat().st_size if tar.exists() else None
        if found != shard.bytes:
            wrong[number] = "is missing" if found is None else f"has {found} bytes, not {shard.bytes}"
        elif not row_list(tar).exists():
            wrong[number] = "has no row list"
    return wrong


def write_images(
    url: str | Path,
    *,
    count: int,
    get: Callable[[int], Sample],
    view: dict[str, Any],
    classes: Sequence[str],
    source: str,
    rows_per_shard: int,
    image_format: str = "png",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Pack rows 0..count-1 that `get(row)` gives, or continue where an interrupted pack of the same stopped.

    Shards that are finished are not asked for again; a finished set of the same description is left alone.
    Raises ImageSetError for unfit or repeated keys, or where the folder holds a set of something else.
    """
    path = local_path(url)
    plan = {
        "view": view,
        "classes": list(classes),
        "source": source,
        "count": count,
        "rows_per_shard": rows_per_shard,
    }
    plan |= {"schema_version": SCHEMA_VERSION, "format": image_format}
    _begin(path, plan)
    seen: dict[str, int] = {}
    for start in range(0, count, rows_per_shard):
        rows = range(start, min(start + rows_per_shard, count))
        name = f"shard-{start // rows_per_shard:06d}.tar"
        finished = _finished(path / name, len(rows))
        if finished is None:
            (path / "index.json").unlink(missing_ok=True)
            row_list(path / name).unlink(missing_ok=True)
            _write_shard(path / name, rows, get, image_format, seen, progress)
            continue
        for row, entry in zip(rows, finished, strict=True):
            _claim(seen, entry.key, row, path)
        if progress:
            progress(len(rows))
    if not (path / "index.json").exists():
        write_atomic(path / "index.json", json.dumps(_index(path, plan), indent=1).encode())


def _begin(path: Path, plan: dict[str, Any]) -> None:
    file = path / "packing.json"
    if file.exists():
        old = json.loads(file.read_text())
        differing = [key for key in plan if old.get(key) != plan[key]]
        if not differing:
            return
        if (path / "index.json").exists():
            lines = "\n".join(f"  {key}: packed {old.get(key)!r}, config {plan[key]!r}" for key in differing)
            raise ImageSetError(
                f"{path} holds other images than the config asks for:\n{lines}\n"
                f"use another folder (--out DIR), or delete it: rm -r {path}"
            )
        shutil.rmtree(path)  # an unfinished pack of something else: nothing in it was ever usable
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(plan, indent=1).encode())


def _write_shard(
    tar: Path,
    rows: range,
    get: Callable[[int], Sample],
    image_format: str,
    seen: dict[str, int],
    progress: Callable[[int], None] | None,
) -> None:
    from webdataset import TarWriter  # it imports torch

    partial = tar.with_name(tar.name + ".partial")
    with (
        naming(tar),
        partial.open("wb") as file,
        TarWriter(file, mtime=0, user="e2kd", group="e2kd", encoder=False) as writer,
    ):
        for row in rows:
            sample = get(row)
            _claim(seen, sample.key, row, tar.parent)
            writer.write(_members(sample, image_format))
            if progress:
                progress(1)
    sync_file(partial)
    partial.replace(tar)
    sync_folder(tar.parent)
    write_atomic(row_list(tar), json.dumps(locate_rows(tar)).encode())


def _claim(seen: dict[str, int], key: str, row: int, path: Path) -> None:
    if seen.setdefault(key, row) != row:
        raise ImageSetError(f"{path}: rows {seen[key]} and {row} have the same key {key}")


def _finished(tar: Path, count: int) -> tuple[Row, ...] | None:
    """The rows of a shard whose tar and row list are there in full, else None."""
    try:
        size, rows = tar.stat().st_size, read_rows(row_list(tar))
    except (OSError, ImageSetError):
        return None
    end = max(member.offset + member.length for row in rows for member in row.members.values())
    blocks = -(-end // tarfile.BLOCKSIZE) + 2  # two empty blocks end a tar
    records = -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE)
    return rows if len(rows) == count and size == records * tarfile.RECORDSIZE else None


def _members(sample: Sample, image_format: str) -> dict[str, Any]:
    if not _KEY.fullmatch(sample.key):
        raise ImageSetError(f"key {sample.key!r} of {sample.source}: use only letters, digits, _ and -")
    about: dict[str, Any] = {"label": sample.label}
    if sample.group is not None:
        about["group"] = sample.group
    if sample.boxes is not None:
        about["boxes"] = np.asarray(sample.boxes, np.float64).tolist()
    if sample.source is not None:
        about["source"] = sample.source
    members = {"__key__": sample.key, image_format: _encode(sample.image.transpose(1, 2, 0), image_format)}
    members["json"] = json.dumps(about).encode()
    if sample.mask is not None:
        members["mask.png"] = _encode(sample.mask, "png")
    return members


def _encode(pixels: np.ndarray, image_format: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {
        "png": {"format": "PNG", "compress_level": 6},
        "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
        "webp": {"format": "WEBP", "lossless": True},
    }[image_format]
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def _index(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    shards = []
    for tar in sorted(path.glob("shard-*.tar")):
        shards.append(
            {
                "name": tar.name,
                "rows": len(read_rows(row_list(tar))),
                "bytes": tar.stat().st_size,
                "sha256": sha256_file(tar),
                "rows_sha256": sha256_file(row_list(tar)),
            }
        )
    kept = ("schema_version", "view", "classes", "rows_per_shard")
    return {**{key: plan[key] for key in kept}, "rows": plan["count"], "shards": shards}


def _fingerprint(index: dict[str, Any]) -> str:
    parts = [index["view"], index["classes"], [[shard["rows"], shard["sha256"]] for shard in index["shards"]]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def local_path(url: str | Path) -> Path:
    return Path(str(url).removeprefix("file://"))
