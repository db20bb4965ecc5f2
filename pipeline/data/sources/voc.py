"""PASCAL VOC (Everingham et al., 2010) as published, with every object's box.

    VOC2007/ImageSets/Main/{train,val,trainval,test}.txt    an image's name a line; the splits are those that exist
    VOC2007/Annotations/<name>.xml                          objects: name, difficult, bndbox in px from 1, inclusive
    VOC2007/JPEGImages/<name>.jpg

`data.root` is VOC2007, VOCdevkit or the folder that holds VOCdevkit. An image's label is the sorted classes of its
objects; with `difficult: drop` it may be empty, and the image stays.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import Voc
from pipeline.data.reading.annotations import At, size_below
from pipeline.data.reading.files import each_once, text_of
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.photo import read_photo

CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
SPLITS = ("train", "val", "trainval", "test")
MEND = "unpack VOC again"
EDGES = ("xmin", "ymin", "xmax", "ymax")


def split_names(data: Voc) -> list[str]:
    lists = _base(data) / "ImageSets" / "Main"
    names = [name for name in SPLITS if (lists / f"{name}.txt").is_file()]
    if not names:
        raise DataError(
            f"{lists} has none of {', '.join(f'{name}.txt' for name in SPLITS)}; unpack VOC again", path=lists
        )
    return names


def open_listing(data: Voc, split: str) -> Listing:
    base, keep = _base(data), data.difficult == "keep"
    listed = base / f"ImageSets/Main/{split}.txt"
    found = {name: _annotated(base, listed, name, keep) for name in _listed(listed)}
    sizes = {entry.id: size for entry, size in found.values()}

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        image = read_photo(base / entry.id)  # whole, whatever the view: the boxes are in its px
        if image.size != sizes[entry.id]:
            written, seen = (f"{width:g} x {height:g}" for width, height in (sizes[entry.id], image.size))
            raise DataError(
                f"{base / entry.id} has {seen} px, its annotation says {written}; {MEND}",
                path=base / entry.id,
            )
        return image

    return Listing(CLASSES, [entry for entry, _ in found.values()], read)


def _base(data: Voc) -> Path:
    """The folder of the year, from any of the three that a user may name."""
    year = f"VOC{data.year}"
    places = (data.root / "VOCdevkit" / year, data.root / year, data.root)
    found = next((place for place in places if (place / "ImageSets" / "Main").is_dir()), None)
    if found is None:
        raise DataError(
            f"{data.root} has no {year}/ImageSets/Main; set data.root to VOCdevkit", path=data.root
        )
    if found.name.startswith("VOC2") and found.name != year:
        raise DataError(
            f"data.root {found} is not {year}; set data.year to its year, or data.root to VOCdevkit",
            path=found,
            key="data.year",
        )
    return found


def _listed(file: Path) -> list[str]:
    """The image names of a list, in its order. Raises DataError if one is named twice."""
    return each_once((line.split()[0] for line in text_of(file, MEND).splitlines() if line.strip()), file)


def _annotated(
    base: Path, listed: Path, name: str, keep_difficult: bool
) -> tuple[Entry, tuple[float, float]]:
    """An image that `listed` names, and the (width, height) in px that its annotation says."""
    path, file = f"JPEGImages/{name}.jpg", base / "Annotations" / f"{name}.xml"
    size = size_below(base, path, At(listed))
    annotation = _parse(file)
    width, height = (_number(annotation, f"size/{side}", file) for side in ("width", "height"))
    boxes = _boxes(annotation, width, height, file, keep_difficult)
    label = tuple(sorted({int(box[0]) for box in boxes}))
    return Entry(path, size, label, boxes=np.array(boxes, np.float32).reshape(-1, 5)), (width, height)


def _boxes(
    annotation: ElementTree.Element, width: float, height: float, file: Path, keep_difficult: bool
) -> list[tuple[float, ...]]:
    """(class, x0, y0, x1, y1) of each object, in px from 0, right and lower edge exclusive."""
    objects = annotation.findall("object")
    if not objects:
        raise DataError(f"{file} has no object; unpack VOC again", path=file)
    return [
        (_class(found, file), *_corners(found, width, height, file))
        for found in objects
        if keep_difficult or found.findtext("difficult", "0").strip() != "1"
    ]


def _class(found: ElementTree.Element, file: Path) -> int:
    name = found.findtext("name", "").strip()
    if name not in CLASSES:
        raise DataError(
            f"{file} has an object of the class {name!r}, which is none of VOC's 20; correct it", path=file
        )
    return CLASSES.index(name)


def _corners(found: ElementTree.Element, width: float, height: float, file: Path) -> tuple[float, ...]:
    """Raises DataError for an empty box, or one outside the image. A box from pixel 0 is taken as from 1; of one pixel,
    both its edges are that pixel."""
    x0, y0, x1, y1 = (_number(found, f"bndbox/{edge}", file) for edge in EDGES)
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height and x1 > 0 and y1 > 0):
        raise DataError(
            f"{file}: the box {x0:g} {y0:g} {x1:g} {y1:g} is empty or outside the image of {width:g} x {height:g} px; "
            "correct it",
            path=file,
        )
    return max(x0 - 1, 0), max(y0 - 1, 0), x1, y1


def _number(found: ElementTree.Element, path: str, file: Path) -> float:
    text = found.findtext(path, "")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{file}: {path} is {text!r}, not a number; unpack VOC again", path=file)
    return number


def _parse(file: Path) -> ElementTree.Element:
    """The root of an annotation. No document type is let in, so no entity can be defined and expand.

    The text is decoded here, and the parser told so: another encoding cannot hide a declaration.
    """
    text = text_of(file, MEND)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(
            f"{file} declares a document type or entities, VOC's annotations do not; unpack VOC again",
            path=file,
        )
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file} is no XML ({error}); unpack VOC again", path=file) from None
