"""Annotations as data sets write them in tables and JSON, checked: labels, boxes, and the files they name.

An error names the place: the file and the line, member or row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from artifacts.errors import DataError
from artifacts.names import shown
from pipeline.data.reading.regular import regular_size
from pipeline.data.source import Label

MOST = 2**17
"""Classes that are made up from labels; a higher label is out of range, whatever the file says."""
FARTHEST = 2**24
"""px, and classes: what a 32-bit float still counts exactly."""


@dataclass(frozen=True)
class At:
    """A place in a file that says something about an image: a line, counted from 1, or a member or row by its name."""

    file: Path
    line: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        inside = f"line {self.line}" if self.line is not None else self.key
        return f"{self.file}, {inside}" if inside else str(self.file)

    def wrong(self, message: str) -> DataError:
        """The error for what is said here; `message` goes on after the place's name."""
        return DataError(f"{self}{message}", path=self.file, line=self.line, key=self.key)


def label_of(value: Any, at: At) -> Label:
    """An int, a list of them (sorted, each once) or None. Raises DataError for all else, out of range too."""
    if value is None:
        return None
    several = value if isinstance(value, list) else [value]
    for one in several:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < FARTHEST:
            raise at.wrong(f": the label {shown(one)} is not a class index (0, 1, ...); correct it")
    return tuple(sorted(set(several))) if isinstance(value, list) else int(value)


def boxes_of(rows: Any, at: At) -> np.ndarray:
    """f32 [N,5] of (class, x0, y0, x1, y1). Raises DataError for what is no list of boxes, or an empty box."""
    try:
        boxes = np.asarray(rows if len(rows) else np.zeros((0, 5)), np.float64)
    except (TypeError, ValueError, OverflowError):
        boxes = np.zeros(0)
    if boxes.ndim != 2 or boxes.shape[1] != 5 or not (abs(boxes) < FARTHEST).all():
        raise at.wrong(": boxes are no list of [class, x0, y0, x1, y1]; correct them")
    boxes, classes = boxes.astype(np.float32), boxes[:, 0]
    if (boxes[:, 1:3] >= boxes[:, 3:]).any() or (classes != classes.astype(np.int64)).any():
        raise at.wrong(": a box is empty, or its class is no integer; correct it")
    return boxes


def check_range(label: Label, boxes: np.ndarray | None, classes: Sequence[str], at: At) -> None:
    """Raises DataError if a label, or the class of a box, is not below the number of classes."""
    labels = [label] if isinstance(label, int) else list(label or ())
    labels += [] if boxes is None or not classes else boxes[:, 0].astype(int).tolist()
    wrong = [one for one in labels if not 0 <= one < len(classes)]
    if wrong:
        raise at.wrong(f": class {wrong[0]} is out of range, there are {len(classes)} classes; correct it")


def numbered(labels: Iterable[Label]) -> list[str]:
    """Class names "0", "1", ... as many as the labels say, at most MOST; none if there is no label."""
    known = (one for label in labels for one in ([label] if isinstance(label, int) else label or ()))
    return [str(number) for number in range(min(max(known, default=-1) + 1, MOST))]


def size_below(root: Path, name: str, at: At) -> int:
    """Bytes of a file that a list names below `root`. Raises DataError if it is missing, outside or a FIFO."""
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise at.wrong(f" names {name!r}, which is not a file below {root}; correct it")
    try:
        return regular_size(root / name)
    # a NUL, or half a surrogate pair
    except ValueError:
        raise at.wrong(f" names {name!r}, which no file can be called; correct it") from None
    except OSError as error:
        raise at.wrong(
            f" names {root / name}, which cannot be read ({error.strerror}); unpack the data set again"
        ) from None
