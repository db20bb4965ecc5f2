"""SUN397: a/abbey/sun_x.jpg, ClassName.txt, and the published partitions Training_01.txt, Testing_01.txt ...

The partitions lie in the folder itself, in `Partitions/`, or beside it. Each has 50 images a class for training and 50
for testing.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import Sun397
from pipeline.data.reading.annotations import At, size_below
from pipeline.data.reading.files import each_once, text_of
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.photo import read_photo

MEND = "set data.root to SUN397/, with ClassName.txt and the lists Training_01.txt ... in it"
LISTS = {"train": "Training", "test": "Testing"}


def split_names(data: Sun397) -> list[str]:
    _classes(data.root)
    return list(LISTS)


def open_listing(data: Sun397, split: str) -> Listing:
    classes = _classes(data.root)
    labels = {name: label for label, name in enumerate(classes)}
    file = _list_file(data.root, f"{LISTS[split]}_{data.partition:02d}.txt")
    entries = []
    for line in _lines(file):
        path = line.lstrip("/")
        name = f"/{path.rpartition('/')[0]}"
        if name not in labels:
            raise DataError(
                f"{file}: {line} is of the class {name}, which is not in ClassName.txt; {MEND}",
                path=file,
                key=line,
            )
        entries.append(Entry(path, size_below(data.root, path, At(file)), labels[name]))

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        return read_photo(data.root / entry.id, shorter_side)

    return Listing([name.strip("/").partition("/")[2] for name in classes], entries, read)


def _classes(root: Path) -> list[str]:
    """`/a/abbey` ... in the published order."""
    names = _lines(root / "ClassName.txt")
    if not names:
        raise DataError(f"{root / 'ClassName.txt'} is empty; {MEND}", path=root / "ClassName.txt")
    return names


def _lines(file: Path) -> list[str]:
    return each_once((line.strip() for line in text_of(file, MEND).splitlines() if line.strip()), file)


def _list_file(root: Path, name: str) -> Path:
    places = (root, root / "Partitions", root.parent, root.parent / "Partitions")
    return next((folder / name for folder in places if (folder / name).exists()), root / name)
