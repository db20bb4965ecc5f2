"""WebDataset shards: tars in which the files of a sample stand together and share their name up to the first dot.

    0001.jpg|jpeg|png|webp    the image
    0001.cls                  its label, a number as text
    0001.json                 or: {"label": 3 | [1, 4] | null, "boxes": [[class, x0, y0, x1, y1]], "group": 0}
    0001.mask.png             mode L, of the image's size

The headers of a tar are read once (a million samples: two minutes and 1 GB of memory); an image is then read from
its place in the file. Other members are left alone.
"""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from artifacts.errors import ConfigError, DataError
from pipeline.config.data import WebShards
from pipeline.data.reading.annotations import At, boxes_of, check_range, label_of, numbered
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.photo import decode_photo, read_mask
from pipeline.data.reading.regular import is_regular
from pipeline.data.source import Label

IMAGES = ("jpg", "jpeg", "png", "webp")
MASK = "mask.png"
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""A sample's name and an extension, as WebDataset cuts them."""
RANGE = re.compile(r"\{(-?[0-9]+|[A-Za-z])\.\.(-?[0-9]+|[A-Za-z])(?:\.\.-?[0-9]+)?\}")
LETTERS = 52
"""At most in a range as {a..Z}."""
MOST_TARS, MOST_BRACES, LONGEST = 100_000, 8, 1000
"""Names, pairs of braces and letters of a split's pattern."""
MOST_SAID = 2**20
"""Bytes of a sample's .cls or .json."""
META = re.compile(r"__[^/]*__($|/)")
"""WebDataset's own members."""


class Piece(NamedTuple):
    """A member: its name, and `length` bytes from `offset` of the tar. `data` of annotations only."""

    name: str
    offset: int
    length: int
    data: bytes | None


@dataclass(frozen=True)
class Sample:
    """A sample of a tar, not decoded; `pieces` by extension in small letters."""

    tar: Path
    key: str
    pieces: Mapping[str, Piece]
    label: Label = None
    group: int | None = None
    boxes: np.ndarray | None = field(default=None, compare=False)

    @property
    def image(self) -> Piece:
        return next(self.pieces[name] for name in IMAGES if name in self.pieces)

    @property
    def at(self) -> At:
        """The tar and the member that says the label."""
        said = self.pieces.get("cls") or self.pieces.get("json") or self.image
        return At(self.tar, key=said.name)

    def read(self, piece: Piece) -> bytes:
        try:
            with self.tar.open("rb") as file:
                file.seek(piece.offset)
                return file.read(piece.length)
        except OSError as error:
            raise DataError(
                f"cannot read {self.tar} ({error.strerror}); copy it again", path=self.tar, key=self.key
            ) from error


def split_names(data: WebShards) -> list[str]:
    """Raises DataError if a tar is of two splits: a student would be tested on what it learnt from."""
    split_of: dict[Path, str] = {}
    for split in data.shards:
        for name in _tars(data, split):
            other = split_of.setdefault((data.root / name).resolve(), split)
            if other != split:
                raise DataError(
                    f"{data.root / name} is in both data.shards.{other} and data.shards.{split}; take it out of one",
                    path=data.root / name,
                )
    return list(data.shards)


def open_listing(data: WebShards, split: str) -> Listing:
    samples = dict(_samples(data, split))
    classes = list(data.classes) or numbered(
        sample.label for other in data.shards for _, sample in _samples(data, other)
    )
    for sample in samples.values():
        check_range(sample.label, sample.boxes, classes, sample.at)

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        sample = samples[entry.id]
        whole = sample.boxes is not None or MASK in sample.pieces
        return decode_photo(
            sample.read(sample.image), f"{sample.tar}, {sample.image.name}", None if whole else shorter_side
        )

    def mask(entry: Entry) -> Image.Image | None:
        return _mask(samples[entry.id], read(entry, None).size) if MASK in samples[entry.id].pieces else None

    masked = any(MASK in sample.pieces for sample in samples.values())
    return Listing(classes, [_entry(*item) for item in samples.items()], read, mask if masked else None)


def _entry(name: str, sample: Sample) -> Entry:
    size = sum(piece.length for piece in sample.pieces.values())
    return Entry(name, size, sample.label, sample.group, sample.boxes)


def _mask(sample: Sample, size: tuple[int, int]) -> Image.Image:
    piece = sample.pieces[MASK]
    return read_mask(io.BytesIO(sample.read(piece)), f"{sample.tar}, {piece.name}", size)


def _samples(data: WebShards, split: str) -> Iterator[tuple[str, Sample]]:
    """(tar's name below the root / sample's name, sample) of a split."""
    for name in _tars(data, split):
        path = data.root / name
        about = path.stat()
        for sample in _indexed(path, about.st_size, about.st_mtime_ns):
            yield f"{name.removesuffix('.tar')}/{_plain(sample.key)}", sample


def _tars(data: WebShards, split: str) -> list[str]:
    """Names below the root, in order. Raises DataError if a file is missing or a pattern fits none."""
    pattern = data.shards[split]
    parts = _expanded(pattern, f"data.shards.{split}")
    names = [name for part in parts for name in _matching(data.root, part)]
    missing = next((name for name in names if not is_regular(data.root / name)), None)
    if missing or not names:
        raise DataError(
            f"{data.root / (missing or pattern)} does not exist; set data.root and data.shards.{split} to the tars",
            path=data.root / (missing or pattern),
            key=f"data.shards.{split}",
        )
    return list(dict.fromkeys(names))


def _expanded(pattern: str, key: str) -> list[str]:
    """The names or globs that a pattern stands for. Raises ConfigError if they are too many, or not below the root."""
    from braceexpand import braceexpand  # comes with webdataset

    if len(pattern) > LONGEST or pattern.count("{") > MOST_BRACES or _count(pattern) > MOST_TARS:
        raise ConfigError(
            f"{key}: {pattern[:100]!r} is too much: {MOST_TARS:,} names, {MOST_BRACES} pairs of braces and {LONGEST} "
            "letters at most; use a glob, as train-*.tar",
            key=key,
        )
    try:
        parts = list(braceexpand(pattern))
    except ValueError:
        raise ConfigError(f"{key}: the braces of {pattern!r} do not match; correct them", key=key) from None
    outside = next((part for part in parts if Path(part).is_absolute() or ".." in Path(part).parts), None)
    if outside is not None or any("\0" in part for part in parts):
        raise ConfigError(f"{key}: {pattern!r} is not below data.root; give tars below it", key=key)
    return parts


def _count(pattern: str) -> int:
    """At least as many as the names that a brace pattern stands for; counted without making one."""
    count, commas = 1, [0]
    for letter in pattern:
        if letter == "{":
            commas.append(0)
        elif letter == ",":
            commas[-1] += 1
        elif letter == "}" and len(commas) > 1:
            count *= commas.pop() + 1
    for first, last in RANGE.findall(pattern):
        count *= abs(int(last) - int(first)) + 1 if first.lstrip("-").isdigit() else LETTERS
    return count


def _matching(root: Path, name: str) -> list[str]:
    return sorted(glob.glob(name, root_dir=root, recursive=True)) if glob.has_magic(name) else [name]


def _plain(key: str) -> str:
    """Tars of `tar c .` call their members ./NAME."""
    return key.removeprefix("./")


@cache
def _indexed(tar: Path, size: int, changed: int) -> tuple[Sample, ...]:
    """All samples of a tar with an image, in its order; `size` and `changed` tell a tar from its former self."""
    pieces = groupby(_pieces(tar), key=lambda found: found[0])
    samples = [found for key, group in pieces if (found := _sample(tar, key, group)) is not None]
    seen: set[str] = set()
    for key in (_plain(sample.key) for sample in samples):
        if key in seen:
            raise DataError(
                f"{tar} has two samples {key}, not beside each other; write it again", path=tar, key=key
            )
        seen.add(key)
    return tuple(samples)


def _pieces(tar: Path) -> Iterator[tuple[str, str, Piece]]:
    """(sample, extension, member) of each file that has both. Raises DataError naming a truncated tar."""
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                match = MEMBER.fullmatch(member.name)
                if match and member.isreg() and not member.issparse() and not META.match(member.name):
                    yield match[1], match[2].lower(), _piece(archive, member, match[2].lower())
            _check_end(archive, tar)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"cannot read {tar} ({error}): cut off, damaged or compressed; copy it again", path=tar
        ) from None


def _piece(archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> Piece:
    said = extension in ("cls", "json")
    if said and member.size > MOST_SAID:
        raise tarfile.ReadError(
            f"{member.name} has {member.size} bytes, {MOST_SAID} at most are an annotation"
        )
    file = archive.extractfile(member) if said else None
    return Piece(member.name, member.offset_data, member.size, None if file is None else file.read())


def _check_end(archive: tarfile.TarFile, tar: Path) -> None:
    """tarfile takes a cut or damaged header for the end; a tar really ends with a block of zeros."""
    with tar.open("rb") as file:
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end at byte {archive.offset}")


def _sample(tar: Path, key: str, group: Iterable[tuple[str, str, Piece]]) -> Sample | None:
    """None for files without image and annotation: they are something else."""
    pieces: dict[str, Piece] = {}
    for _, extension, piece in group:
        if extension in pieces:
            raise DataError(
                f"{tar}, {piece.name}: the sample has two files .{extension}; write it again",
                path=tar,
                key=piece.name,
            )
        pieces[extension] = piece
    if not any(name in pieces for name in IMAGES):
        if "cls" in pieces or "json" in pieces:
            raise DataError(
                f"{tar}: the sample {key} has no image ({', '.join(IMAGES)}); write the tar again",
                path=tar,
                key=key,
            )
        return None
    return Sample(tar, key, pieces, **_annotations(tar, pieces))


def _annotations(tar: Path, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """label, group and boxes; the label of .cls before that of .json."""
    about = _json(tar, pieces["json"]) if "json" in pieces else {}
    at = At(tar, key=pieces["json"].name if "json" in pieces else None)
    label = _number(tar, pieces["cls"]) if "cls" in pieces else label_of(about.get("label"), at)
    group, boxes = about.get("group"), about.get("boxes")
    if group is not None and not isinstance(label_of(group, at), int):
        raise at.wrong(f": the group {group!r} is not a number (0, 1, ...); correct it")
    return {"label": label, "group": group, "boxes": None if boxes is None else boxes_of(boxes, at)}


def _json(tar: Path, piece: Piece) -> dict[str, Any]:
    try:
        about = json.loads(piece.data or b"")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{tar}, {piece.name} is no JSON ({error}); write it again", path=tar, key=piece.name
        ) from None
    if not isinstance(about, dict):
        raise DataError(
            f"{tar}, {piece.name} is no JSON object with a label; write it again", path=tar, key=piece.name
        )
    return about


def _number(tar: Path, piece: Piece) -> int:
    text = (piece.data or b"").decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise DataError(
            f"{tar}, {piece.name}: the label {text!r} is not a class index (0, 1, ...); correct it",
            path=tar,
            key=piece.name,
        )
    return int(text)
