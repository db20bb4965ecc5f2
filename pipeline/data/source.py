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
        """Raises DataError, which names the file, if the image cannot be read."""

    def describe(self) -> str:
        """One line that changes whenever the images may have changed."""


@dataclass(frozen=True)
class Reduced:
    """Less of another source: its first `count` rows (`data.limit`), or its images without labels, groups, boxes and
    masks (`also`)."""

    whole: Source
    count: int | None = None
    annotated: bool = True

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def classes(self) -> list[str]:
        return self.whole.classes if self.annotated else []

    def __len__(self) -> int:
        return len(self.whole) if self.count is None else min(self.count, len(self.whole))

    def key(self, row: int) -> str:
        return self.whole.key(row)

    def raw(self, row: int) -> RawSample:
        raw = self.whole.raw(row)
        return raw if self.annotated else RawSample(raw.key, raw.image, source=raw.source)

    def describe(self) -> str:
        rows = "" if self.count is None else f"first {len(self)} of "
        return f"{'' if self.annotated else 'without labels: '}{rows}{self.whole.describe()}"
