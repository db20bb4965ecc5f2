"""Generated data sets: images are drawn in blocks of 100, each from its own seed, so that any row can be read alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.data.source import RawSample

BLOCK = 100


@dataclass(frozen=True)
class Block:
    """B drawn images: u8 [B,S,S,3], masks u8 [B,S,S], labels and groups i64 [B]."""

    images: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64] | None = None


def block_rng(data: str, split: str, seed: int, number: int) -> np.random.Generator:
    """The random stream of one block of one split."""
    return np.random.default_rng([zlib.crc32(f"{data}/{split}".encode()), seed, number])


def shuffled_rounds(rng: np.random.Generator, members: int) -> npt.NDArray[np.int64]:
    """[BLOCK] of 0..members-1, each once in every run of `members` rows: any prefix is balanced."""
    return rng.permuted(np.tile(np.arange(members), (BLOCK // members, 1)), axis=1).ravel()


def mask_box(mask: npt.NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) in px around mask > .5, right and lower edge exclusive."""
    columns, rows = np.flatnonzero((mask > 127).any(0)), np.flatnonzero((mask > 127).any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class DrawnSource:
    """One split of a generated data set; `draw(number)` gives its block of that number and should be cached."""

    name: str
    split: str
    seed: int
    classes: list[str]
    count: int
    draw: Callable[[int], Block]

    def __len__(self) -> int:
        return self.count

    def key(self, row: int) -> str:
        return f"{self.split}-{row:05d}"

    def raw(self, row: int) -> RawSample:
        number, at = divmod(row, BLOCK)
        block = self.draw(number)
        label = int(block.labels[at])
        return RawSample(
            key=self.key(row),
            image=Image.fromarray(block.images[at]),
            label=label,
            group=None if block.groups is None else int(block.groups[at]),
            boxes=np.array([[label, *mask_box(block.masks[at])]], np.float32),
            mask=Image.fromarray(block.masks[at]),
            source=f"{self.describe()} row {row}",
        )

    def describe(self) -> str:
        return f"{self.name} {self.split}, seed {self.seed}"
