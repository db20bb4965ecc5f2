"""What a data set on disk is before anything is cut or read: its images by id, with their annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.source import Label


@dataclass(frozen=True, slots=True)
class Entry:
    """One image that was not read yet.

    id      unique in the data set and stable: the path below the root, or the place in a table or tar
    size    its bytes, so that `describe()` changes with the file
    boxes   f32 [N,5] of (class, x0, y0, x1, y1) in px of the image, right and lower edge exclusive; None: not annotated
    """

    id: str
    size: int
    label: Label = None
    group: int | None = None
    boxes: np.ndarray | None = None


@dataclass(frozen=True)
class Listing:
    """One published split of a data set.

    classes     names by label; empty: unlabelled
    read        (entry, shorter side of the view in px or None) -> upright RGB; DataError naming the file
    mask        entry -> mode L mask of the image's size, or None if the data set has none
    """

    classes: Sequence[str]
    entries: Sequence[Entry]
    read: Callable[[Entry, int | None], Image.Image]
    mask: Callable[[Entry], Image.Image | None] | None = None
