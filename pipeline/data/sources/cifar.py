"""CIFAR-10 and CIFAR-100 in the binary version of their authors: 32 px, nothing is unpickled.

cifar-10-batches-bin/    data_batch_1.bin ... data_batch_5.bin  test_batch.bin  batches.meta.txt
cifar-100-binary/        train.bin  test.bin  fine_label_names.txt
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import Cifar
from pipeline.data.reading.files import text_of
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.regular import is_regular, regular_size

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """A record is `before` bytes, of which the last is the label, then the pixels, channel by channel."""

    folder: str
    archive: str
    pickled: str
    names: str
    before: int
    train: tuple[str, ...]
    test: tuple[str, ...]


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-py",
        "batches.meta.txt",
        1,
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
    ),
    "cifar100": Layout(
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        "cifar-100-python",
        "fine_label_names.txt",
        2,
        ("train.bin",),
        ("test.bin",),
    ),
}


def split_names(data: Cifar) -> list[str]:
    _folder(data)
    return ["train", "test"]


def open_listing(data: Cifar, split: str) -> Listing:
    layout, folder = LAYOUTS[data.source], _folder(data)
    classes = text_of(folder / layout.names, _mend(layout)).split()
    tables = {Path(name).stem: _records(folder / name, layout, classes) for name in _files(data, split)}
    entries = [
        Entry(f"{stem}/{row:05d}", PIXELS, label)
        for stem, table in tables.items()
        for row, label in enumerate(table[:, layout.before - 1].tolist())
    ]

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        stem, _, row = entry.id.partition("/")
        pixels = tables[stem][int(row), layout.before :].reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    return Listing(classes, entries, read)


def _folder(data: Cifar) -> Path:
    """The root itself or the published folder in it."""
    layout = LAYOUTS[data.source]
    for folder in (data.root / layout.folder, data.root):
        if (folder / layout.names).exists():
            return folder
    places = (data.root / layout.pickled, data.root / "batches.meta", data.root / "meta")
    if any(place.exists() for place in places):
        raise DataError(
            f"{data.root} has the Python version, which is pickled, and e2kd unpickles nothing: {_mend(layout)}",
            path=data.root,
        )
    raise DataError(f"{data.root} has no {layout.folder}/{layout.names}; {_mend(layout)}", path=data.root)


def _mend(layout: Layout) -> str:
    return f"fetch {layout.archive} from www.cs.toronto.edu/~kriz and set data.root to {layout.folder}"


def _files(data: Cifar, split: str) -> tuple[str, ...]:
    layout = LAYOUTS[data.source]
    return layout.train if split == "train" else layout.test


def _records(file: Path, layout: Layout, classes: list[str]) -> np.ndarray:
    """u8 [images, record], mapped from the file. Raises DataError for a wrong size and a label without a class."""
    size, length = layout.before + PIXELS, regular_size(file) if is_regular(file) else 0
    if not length:
        raise DataError(f"{file} is missing or empty; {_mend(layout)}", path=file)
    if length % size:
        raise DataError(
            f"{file} has {length} bytes, not a multiple of {size}: it is damaged; {_mend(layout)}", path=file
        )
    table: np.ndarray = np.memmap(file, np.uint8, "r").reshape(-1, size)
    wrong = np.flatnonzero(table[:, layout.before - 1] >= len(classes))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{file}: image {row} has the label {table[row, layout.before - 1]}, but there are {len(classes)} classes: "
            f"it is damaged; {_mend(layout)}",
            path=file,
            rows=range(row, row + 1),
        )
    return table
