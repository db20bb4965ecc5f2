"""Waterbirds in the folder layout of group_DRO (Sagawa et al., 2020), boxes and masks from CUB-200-2011.

    metadata.csv    img_id,img_filename,y,split,place,place_filename    split: 0 train, 1 val, 2 test
    001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg       img_filename as in CUB

y is 0 landbird, 1 waterbird; place is 0 land, 1 water; group = 2 y + place. In `-id` splits bird and place belong
together (groups 0 and 3), in `-ood` ones they do not (1 and 2). The birds lie in their image where they lie in CUB's,
so CUB's box (x y width height) and segmentation of the same name are theirs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from artifacts.access import reading_from
from artifacts.errors import DataError
from pipeline.config.data import Waterbirds
from pipeline.data.reading.annotations import At, size_below
from pipeline.data.reading.files import text_of
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.photo import read_mask, read_photo

CLASSES = ("landbird", "waterbird")
PUBLISHED = {"train": 0, "val": 1, "test": 2}
GROUPS = {"": (0, 1, 2, 3), "id": (0, 3), "ood": (1, 2)}
SLACK = 0.02
"""Of a side, by which an annotator's box may leave its image."""
COLUMNS = ("img_filename", "y", "split", "place")


class Row(NamedTuple):
    """A line of metadata.csv."""

    at: At
    name: str
    y: int
    split: int
    place: int


def split_names(data: Waterbirds) -> list[str]:
    list(_rows(data.root))
    return [*PUBLISHED, *(f"{split}-{which}" for split in ("test", "val") for which in ("id", "ood"))]


def open_listing(data: Waterbirds, split: str) -> Listing:
    boxes = None if data.cub is None else _boxes(data.cub)
    masks = None if data.cub is None else _segmentations(data.cub)
    entries = [_entry(data.root, row, boxes, masks) for row in _of_split(data.root, split)]

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        image = read_photo(data.root / entry.id, shorter_side if data.cub is None else None)
        if entry.boxes is not None:
            _check_inside(entry.boxes[0, 1:], image.size, data.root / entry.id)
        return image

    def mask(entry: Entry) -> Image.Image | None:
        assert masks is not None
        file = _mask_file(masks, entry.id)
        return read_mask(file, str(file), read(entry, None).size)

    return Listing(CLASSES, entries, read, None if masks is None else mask)


def _check_inside(box: np.ndarray, size: tuple[int, int], file: Path) -> None:
    """Raises DataError if a box leaves its image by more than SLACK: the image is not of CUB's size."""
    beyond = box[2:] - np.array(size) * (1 + SLACK)
    if (box[:2] < 0).any() or (beyond > 0).any():
        width, height = size
        x0, y0, x1, y1 = box.tolist()
        raise DataError(
            f"{file} has {width} x {height} px, but CUB's box of it ends at {x1:g}, {y1:g} (begins at {x0:g}, {y0:g}): "
            "the images must have CUB's own size, as group_DRO makes them; make them again, or remove data.cub",
            path=file,
        )


def _of_split(root: Path, split: str) -> Iterator[Row]:
    published, _, which = split.partition("-")
    for row in _rows(root):
        if row.split == PUBLISHED[published] and 2 * row.y + row.place in GROUPS[which]:
            yield row


def _entry(root: Path, row: Row, boxes: dict[str, np.ndarray] | None, masks: Path | None) -> Entry:
    size = size_below(root, row.name, row.at)
    if masks is not None:
        size += size_below(masks, _mask_file(Path(), row.name).as_posix(), row.at)
    if boxes is not None and row.name not in boxes:
        raise row.at.wrong(
            f": CUB's images.txt or bounding_boxes.txt does not list {row.name}; set data.cub to the whole "
            "CUB_200_2011"
        )
    box = None if boxes is None else np.array([[row.y, *boxes[row.name]]], np.float32)
    return Entry(row.name, size, row.y, 2 * row.y + row.place, box)


def _rows(root: Path) -> Iterator[Row]:
    """All lines. Raises DataError for a missing file or column, a wrong number, and an image named twice."""
    file, seen = root / "metadata.csv", set()
    reader = csv.DictReader(
        text_of(file, "set data.root to the folder of group_DRO's Waterbirds").splitlines()
    )
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]}; set data.root to group_DRO's Waterbirds",
            path=file,
            key=missing[0],
        )
    for line in _lines(reader, file):
        at = At(file, line=reader.line_num)
        numbers = (_number(line, name, below, at) for name, below in (("y", 2), ("split", 3), ("place", 2)))
        if line["img_filename"] in seen:
            raise at.wrong(f": {line['img_filename']} is named twice; remove one line")
        seen.add(line["img_filename"])
        yield Row(at, line["img_filename"], *numbers)


def _lines(reader: csv.DictReader[str], file: Path) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"{file}, line {reader.line_num} is no CSV ({error}); unpack the data set again",
            path=file,
            line=reader.line_num,
        ) from None


def _number(line: dict[str, str], column: str, below: int, at: At) -> int:
    allowed = [str(number) for number in range(below)]
    if line[column] not in allowed:
        raise at.wrong(f": {column} is {line[column]!r}, not one of {', '.join(allowed)}; correct it")
    return int(line[column])


def _boxes(cub: Path) -> dict[str, np.ndarray]:
    """By CUB's relative name: f32 [4] of (x0, y0, x1, y1), right and lower edge exclusive."""
    names = dict(_fields(cub / "images.txt", 2))
    corners = {}
    for number, x, y, width, height in _fields(cub / "bounding_boxes.txt", 5):
        try:
            box = np.array([x, y, width, height], np.float32)
        except ValueError:
            box = np.zeros(4, np.float32)
        if number not in names:
            raise DataError(
                f"{cub / 'bounding_boxes.txt'} has image {number}, which images.txt does not list; unpack CUB again",
                path=cub / "bounding_boxes.txt",
            )
        if not np.isfinite(box).all() or (box[2:] <= 0).any():
            raise DataError(
                f"{cub / 'bounding_boxes.txt'}: the line of image {number} is wrong; unpack CUB again",
                path=cub / "bounding_boxes.txt",
            )
        corners[names[number]] = np.concatenate([box[:2], box[:2] + box[2:]])
    return corners


def _fields(file: Path, count: int) -> Iterator[list[str]]:
    for number, line in enumerate(text_of(file, "set data.cub to CUB_200_2011").splitlines(), 1):
        row = line.split()
        if not row:
            continue
        if len(row) != count:
            raise DataError(
                f"{file}, line {number}: {len(row)} fields instead of {count}", path=file, line=number
            )
        yield row


def _segmentations(cub: Path) -> Path | None:
    """CUB publishes them as a tar of its own, to be unpacked in its folder or beside it."""
    folders = [at / "segmentations" for at in (cub, cub.parent)]
    with reading_from(cub.parent, DataError):
        return next((folder for folder in folders if folder.is_dir()), None)


def _mask_file(masks: Path, name: str) -> Path:
    return (masks / name).with_suffix(".png")
