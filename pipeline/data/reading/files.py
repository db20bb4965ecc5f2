"""What the readers of data sets share: text files, tables and image files, with errors that name them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from artifacts.errors import DataError
from pipeline.data.reading.photo import SUFFIXES
from pipeline.data.reading.regular import regular_size


def text_of(file: Path, mend: str) -> str:
    """Raises DataError, which ends with `mend`, if the file is missing or not UTF-8."""
    try:
        regular_size(file)
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {file} ({getattr(error, 'strerror', None) or error}); {mend}", path=file
        ) from None


def each_once(names: Iterable[str], file: Path) -> list[str]:
    """The names that a file lists. Raises DataError if one is there twice."""
    found = list(names)
    twice = next((name for name, times in Counter(found).items() if times > 1), None)
    if twice is not None:
        raise DataError(f"{file} names {twice} twice; remove one line", path=file, key=twice)
    return found


def folders_in(folder: Path, mend: str) -> list[str]:
    """Names of the folders in a folder, sorted. Raises DataError if there are none."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(f"cannot list {folder} ({error.strerror}); {mend}", path=folder) from None
    if not names:
        raise DataError(f"{folder} has no class folders; {mend}", path=folder)
    return names


def images_in(folder: Path, on_bad_image: str) -> Iterator[tuple[str, int]]:
    """(name, bytes) of the image files in one folder. One stat each."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield entry.name, image_size(entry, on_bad_image)


def image_size(image: os.DirEntry[str] | Path, on_bad_image: str) -> int:
    """Bytes. A link to nowhere, or a FIFO, is a DataError, or 0 if unreadable images are left out (`skip`)."""
    try:
        return regular_size(image)
    except OSError as error:
        if on_bad_image == "skip":
            return 0
        name = os.fspath(image)
        raise DataError(
            f"cannot read the image {name} ({error.strerror}); remove or replace it", path=name
        ) from None
