"""What every source of images gives: raw samples by row, under stable keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

Label = int | tuple[int, ...] | None
"""A class, several of them (multi-label), or unlabelled."""


@dataclass(frozen=True)
class RawSample:
    """One source image before the canonical view.

    image is RGB of any size; boxes f32 [N,5] of (class, x0, y0, x1, y1) in its pixels, the right and lower edge
    exclusive; mask is mode L of the same size, 0..255. None: the source has no such annotation.
    """

    key: str
    image: Image.Image
    label: Label = None
    group: int | None = None
    boxes: np.ndarray | None = None
    mask: Image.Image | None = None
    source: str | None = None


class Source(Protocol):
    """One split of one data set. Row i is the same image for ever, whatever was read before it."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty when unlabelled."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """Unique in the split, of [A-Za-z0-9_-] only."""

    def raw(self, row: int) -> RawSample:
        """Raises DataError naming the file if the image cannot be read."""

    def describe(self) -> str:
        """One line that changes whenever the images may have changed."""


@dataclass(frozen=True)
class FirstRows:
    """The first `count` rows of another source (`data.limit`)."""

    whole: Source
    count: int

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def classes(self) -> list[str]:
        return self.whole.classes

    def __len__(self) -> int:
        return min(self.count, len(self.whole))

    def key(self, row: int) -> str:
        return self.whole.key(row)

    def raw(self, row: int) -> RawSample:
        return self.whole.raw(row)

    def describe(self) -> str:
        return f"first {len(self)} of {self.whole.describe()}"
