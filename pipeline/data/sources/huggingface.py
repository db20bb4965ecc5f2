"""Data set folders as on the Hugging Face hub.

    data/<split>-*.parquet, <split>-*.parquet, <split>/*.parquet    columns image (bytes), label; see parquet.py
    metadata.jsonl, or <split>/metadata.jsonl      {"file_name": "a.jpg", "label": 3} a line, beside the images

A label is a class index, a class name, a list of them, or null; -1 is the hub's mark for unlabelled. Names are those
that a parquet file's schema gives, else the sorted names in use, in all splits; else the numbers. Lines of
metadata.jsonl may have "objects": {"bbox": [[x, y, width, height]], "categories": [class index]}. The split
`validation` is our `val`; if one metadata.jsonl is at the root, a split is the first folder of file_name, or train.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import HuggingFace
from pipeline.data.reading.annotations import At, boxes_of, check_range, label_of, numbered, size_below
from pipeline.data.reading.files import text_of
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.parquet import GroupCache, ParquetFile, files_by_split
from pipeline.data.reading.photo import decode_photo, read_photo
from pipeline.data.source import Label

METADATA = "metadata.jsonl"
SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}


class Row(NamedTuple):
    """An image as its table says it: `number` of `file`, the label as written, boxes of (class, x0, y0, x1, y1)."""

    file: Path
    number: int
    id: str
    size: int
    value: Any
    boxes: np.ndarray | None

    @property
    def at(self) -> At:
        if self.file.name == METADATA:
            return At(self.file, line=self.number)
        return At(self.file, key=f"row {self.number}")


@dataclass(frozen=True)
class Tables:
    """All splits of a data set; `names` of the classes, if a schema gives them."""

    rows: Mapping[str, list[Row]]
    names: list[str]
    read: Callable[[Row, int | None], Image.Image]


def split_names(data: HuggingFace) -> list[str]:
    files = files_by_split(data.root)
    names = _renamed(files) if files else _metadata(data)
    return sorted(names, key=lambda name: (("train", "val", "test", name).index(name), name))


def open_listing(data: HuggingFace, split: str) -> Listing:
    files = _renamed(files_by_split(data.root))
    tables = _from_parquet(data, files) if files else _from_folder(data)
    classes = tables.names or _classes(row for rows in tables.rows.values() for row in rows)
    rows = {row.id: row for row in tables.rows[split]}
    if len(rows) < len(tables.rows[split]):
        raise DataError(
            f"{tables.rows[split][0].file} names an image twice; remove one of its lines",
            path=tables.rows[split][0].file,
        )
    index = {name: number for number, name in enumerate(classes)}

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        return tables.read(rows[entry.id], shorter_side if entry.boxes is None else None)

    return Listing(classes, [_entry(row, classes, index) for row in rows.values()], read)


def _entry(row: Row, classes: list[str], index: Mapping[str, int]) -> Entry:
    label = _label(row, index)
    check_range(label, row.boxes, classes, row.at)
    return Entry(row.id, row.size, label, boxes=row.boxes)


def _label(row: Row, index: Mapping[str, int]) -> Label:
    """Names to numbers; -1 to None."""
    if row.value == -1:
        return None
    several = [index.get(one, one) if isinstance(one, str) else one for one in _several(row.value)]
    return label_of(several if isinstance(row.value, list) else several[0], row.at)


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _classes(rows: Iterable[Row]) -> list[str]:
    """The sorted names in use; or the numbers, as many as the labels say. Raises DataError for a mixture."""
    names, numbers = set(), set()
    for row in rows:
        for one in _several(row.value):
            names |= {one} if isinstance(one, str) else set()
            numbers |= {one} if isinstance(one, int) else set()
        if names and numbers:
            raise row.at.wrong(
                ": labels are names here and numbers before, or the other way; write one of them"
            )
    return sorted(names) or numbered(numbers)


def _renamed(splits: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's `validation` is our `val`."""
    if {"val", "validation"} <= set(splits):
        raise DataError("the data set has both a split val and a split validation; rename one", key="data")
    return {SPLITS.get(name, name): found for name, found in splits.items()}


# --- parquet


def _from_parquet(data: HuggingFace, splits: Mapping[str, list[Path]]) -> Tables:
    cache = GroupCache()
    opened = {
        split: [ParquetFile(path, data.image, cache) for path in paths] for split, paths in splits.items()
    }
    files = {file.path: file for found in opened.values() for file in found}
    named = (
        {tuple(file.names(data.label)): file.path for file in files.values()}
        if data.label
        else {(): data.root}
    )
    if len(named) > 1:
        raise DataError(
            f"{' and '.join(map(str, named.values()))} name different classes; download them again",
            path=data.root,
        )

    def read(row: Row, shorter_side: int | None) -> Image.Image:
        return decode_photo(files[row.file].encoded(row.number), str(row.at), shorter_side)

    rows = {
        split: [row for file in found for row in _parquet_rows(data, file)] for split, found in opened.items()
    }
    return Tables(rows, list(next(iter(named))), read)


def _parquet_rows(data: HuggingFace, file: ParquetFile) -> Iterator[Row]:
    """`size` is that of the file: a row's own would cost reading all images."""
    name, size = file.path.relative_to(data.root).with_suffix("").as_posix(), file.path.stat().st_size
    values = file.values(data.label) if data.label else [None] * len(file)
    for number, value in enumerate(values):
        yield Row(file.path, number, f"{name}/{number:08d}", size, value, None)


# --- images with metadata.jsonl


def _from_folder(data: HuggingFace) -> Tables:
    def read(row: Row, shorter_side: int | None) -> Image.Image:
        return read_photo(data.root / row.id, shorter_side)

    tables = _metadata(data)
    return Tables(
        {split: [_folder_row(data, *line) for line in lines] for split, lines in tables.items()}, [], read
    )


Line = tuple[Path, int, dict[str, Any]]


def _metadata(data: HuggingFace) -> dict[str, list[Line]]:
    """The lines of each split. Raises DataError if there is no metadata.jsonl."""
    files = (
        [data.root / METADATA]
        if (data.root / METADATA).is_file()
        else sorted(data.root.glob(f"*/{METADATA}"))
    )
    splits: dict[str, list[Line]] = {}
    for file in files:
        for number, about in _lines(file):
            folder = file.parent.name if file.parent != data.root else about["file_name"].partition("/")[0]
            split = folder if file.parent != data.root or folder in SPLITS else "train"
            splits.setdefault(split, []).append((file, number, about))
    if not splits:
        raise DataError(
            f"{data.root} has no {METADATA} with images, and no parquet files; set data.root to the data set",
            path=data.root,
        )
    return _renamed(splits)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_of(file, "make it readable").split("\n"), 1):
        try:
            about = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}, line {number} is no JSON ({error}); correct it", path=file, line=number
            ) from None
        if about is None:
            continue
        if not isinstance(about, dict) or not isinstance(about.get("file_name"), str):
            raise DataError(f"{file}, line {number} has no file_name; correct it", path=file, line=number)
        yield number, about


def _folder_row(data: HuggingFace, file: Path, number: int, about: dict[str, Any]) -> Row:
    at = At(file, line=number)
    size = size_below(file.parent, about["file_name"], at)
    if data.label is not None and data.label not in about:
        raise DataError(
            f"{at} has no {data.label!r}; set data.label to one of {', '.join(about)}, or to null",
            path=file,
            line=number,
            key="data.label",
        )
    path = (file.parent / about["file_name"]).relative_to(data.root).as_posix()
    value = None if data.label is None else about[data.label]
    return Row(file, number, path, size, value, _boxes(about.get("objects"), at))


def _boxes(objects: Any, at: At) -> np.ndarray | None:
    """f32 [N,5] of (class, x0, y0, x1, y1) from {"bbox": [[x, y, width, height]], "categories": [class]}."""
    if objects is None:
        return None
    try:
        pairs = zip(objects["categories"], objects["bbox"], strict=True)
        rows = [[number, x, y, x + width, y + height] for number, (x, y, width, height) in pairs]
    except (KeyError, TypeError, ValueError):
        raise at.wrong(": objects are no bbox [x, y, width, height] and categories; correct them") from None
    return boxes_of(rows, at)
