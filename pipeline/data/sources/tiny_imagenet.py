"""Tiny-ImageNet-200 as Stanford's CS231n published it: 64 px, a box for every image.

    wnids.txt  words.txt
    train/<wnid>/images/<wnid>_0.JPEG     train/<wnid>/<wnid>_boxes.txt    name x0 y0 x1 y1
    val/images/val_0.JPEG                 val/val_annotations.txt          name wnid x0 y0 x1 y1

Its `val` is our split `test`, because the published test has no labels. The corners of boxes are the first and last
pixel in them: of the 110,000 published ones none has a 64, and 259 have x0 = x1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import TinyImageNet
from pipeline.data.reading.annotations import At, size_below
from pipeline.data.reading.files import each_once, text_of
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.photo import read_photo

MEND = "set data.root to tiny-imagenet-200"


def split_names(data: TinyImageNet) -> list[str]:
    _wnids(data)
    return ["train", "test"]


def open_listing(data: TinyImageNet, split: str) -> Listing:
    wnids = _wnids(data)
    entries = _train(data.root, wnids) if split == "train" else _val(data.root, wnids)

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        image = read_photo(data.root / entry.id)  # not at a reduced scale: boxes are in px of the file
        _check_inside(entry, image.size, data.root)
        return image

    return Listing(_names(data.root, wnids), list(entries), read)


def _check_inside(entry: Entry, size: tuple[int, int], root: Path) -> None:
    """Raises DataError if a box leaves its image."""
    assert entry.boxes is not None
    corners = entry.boxes[0, 1:] - (0, 0, 1, 1)
    if (corners[2:] >= size).any():
        x0, y0, x1, y1 = corners.tolist()
        raise DataError(
            f"{root / entry.id} has {size[0]} x {size[1]} px, but its box {x0:g} {y0:g} {x1:g} {y1:g} leaves them; "
            "correct the box, or unpack Tiny-ImageNet again",
            path=root / entry.id,
            key=entry.id,
        )


def _wnids(data: TinyImageNet) -> list[str]:
    file = data.root / "wnids.txt"
    found = each_once(text_of(file, MEND).split(), file)
    wrong = next((wnid for wnid in found if not wnid.isalnum()), None)
    if wrong is not None:
        raise At(file, key=wrong).wrong(": is no wnid, as n01443537; correct it")
    if data.classes is not None and data.classes > len(found):
        raise DataError(
            f"{file} has {len(found)} classes, data.classes asks for {data.classes}",
            path=file,
            key="data.classes",
        )
    return found[: data.classes]


def _names(root: Path, wnids: list[str]) -> list[str]:
    """The first word of each class; the wnid if words.txt is missing."""
    words = root / "words.txt"
    lines = (line.partition("\t") for line in text_of(words, MEND).splitlines()) if words.exists() else ()
    known = {wnid: names.split(",")[0].strip() for wnid, _, names in lines}
    return [known.get(wnid, wnid) for wnid in wnids]


def _train(root: Path, wnids: list[str]) -> Iterator[Entry]:
    for label, wnid in enumerate(wnids):
        boxes = root / "train" / wnid / f"{wnid}_boxes.txt"
        for name, *corners in _rows(boxes, 5):
            yield _entry(root, f"train/{wnid}/images/{name}", label, corners, boxes)


def _val(root: Path, wnids: list[str]) -> Iterator[Entry]:
    labels, annotations = (
        {wnid: label for label, wnid in enumerate(wnids)},
        root / "val" / "val_annotations.txt",
    )
    every = set(text_of(root / "wnids.txt", MEND).split())
    for name, wnid, *corners in _rows(annotations, 6):
        if wnid not in every:
            raise DataError(
                f"{annotations}: {name} has the class {wnid}, which is not in wnids.txt",
                path=annotations,
                key=name,
            )
        if wnid in labels:
            yield _entry(root, f"val/images/{name}", labels[wnid], corners, annotations)


def _entry(root: Path, path: str, label: int, corners: list[str], source: Path) -> Entry:
    try:
        x0, y0, x1, y1 = (float(corner) for corner in corners)
    except ValueError:
        raise DataError(
            f"{source}: the box of {Path(path).name} is not four numbers: {' '.join(corners)}; correct it",
            path=source,
            key=path,
        ) from None
    if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
        raise DataError(
            f"{source}: the box of {Path(path).name} is empty: {' '.join(corners)}; correct it",
            path=source,
            key=path,
        )
    box = np.array([[label, x0, y0, x1 + 1, y1 + 1]], np.float32)
    return Entry(path, size_below(root, path, At(source)), label, boxes=box)


def _rows(file: Path, fields: int) -> list[list[str]]:
    """One for each image. Raises DataError for a wrong number of fields, and for an image named twice."""
    rows = list(_lines(file, fields))
    each_once((row[0] for row in rows), file)
    return rows


def _lines(file: Path, fields: int) -> Iterator[list[str]]:
    for number, line in enumerate(text_of(file, MEND).splitlines(), 1):
        if not line.strip():
            continue
        row = line.split("\t")
        if len(row) != fields:
            raise DataError(
                f"{file}, line {number}: {len(row)} fields instead of {fields}; correct it",
                path=file,
                line=number,
            )
        yield row
