"""toyshapes: ten silhouettes on backgrounds that say nothing about the class, 48x48, drawn from a seed.

`teach` is for the teacher; `train`, disjoint from it, has `train_per_class` images of each class for few-shot students.
In every split each run of ten rows has each class once, so the first 10 n rows have n of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from pipeline.config.data import ToyShapes
from pipeline.data.toys.blocks import Block, DrawnSource, block_rng, shuffled_rounds
from pipeline.data.toys.drawing import Array, Pose, backgrounds, paint_objects, soft_mask, to_bytes

SPLITS = ("teach", "train", "val", "test")
Silhouette = Callable[[Array, Array], Array]


def split_names(data: ToyShapes) -> list[str]:
    return list(SPLITS)


def open_split(data: ToyShapes, split: str) -> DrawnSource:
    counts = {"teach": 4000, "train": 10 * data.train_per_class, "val": 500, "test": 1000}
    draw = partial(draw_block, data.seed, split)
    return DrawnSource("toyshapes", split, data.seed, list(SILHOUETTES), counts[split], draw)


@lru_cache(maxsize=8)
def draw_block(seed: int, split: str, number: int) -> Block:
    """Block `number` of a split: a pure function of its arguments."""
    rng = block_rng("toyshapes", split, seed, number)
    labels = shuffled_rounds(rng, len(SILHOUETTES))
    background = backgrounds(rng, rng.integers(0, 3, len(labels)))
    mask = soft_mask(_shapes(rng, labels))
    return Block(paint_objects(rng, background, mask), to_bytes(mask), labels)


def _shapes(rng: np.random.Generator, labels: npt.NDArray[np.int64]) -> Array:
    """Signed distances [B,S,S] in px, positive inside.

    Smaller or freely turned shapes leave few-shot students at chance, with and without explanations.
    """
    pose = Pose.draw(rng, len(labels), extent=(0.32, 0.44), degrees=20)
    x, y = pose.coordinates()
    distance = np.empty_like(x)
    for label, silhouette in enumerate(SILHOUETTES.values()):
        chosen = labels == label
        distance[chosen] = silhouette(x[chosen], y[chosen])
    return pose.pixels(distance)


# --- silhouettes: about the signed distance to the outline, within the unit disc ------------------------------------


def _circle(x: Array, y: Array) -> Array:
    return 0.85 - np.hypot(x, y)


def _ring(x: Array, y: Array) -> Array:
    return 0.22 - np.abs(np.hypot(x, y) - 0.74)


def _square(x: Array, y: Array) -> Array:
    return 0.72 - np.maximum(np.abs(x), np.abs(y))


def _triangle(x: Array, y: Array) -> Array:
    side = 0.866 * np.abs(x) - 0.5 * y
    return 0.52 - np.maximum(side, y)


def _star(x: Array, y: Array) -> Array:
    """Five points: folded into one tenth, then the distance to one edge."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1], tip[0] - notch[0]]) / np.hypot(*(tip - notch))
    along = radius * np.cos(angle), radius * np.sin(angle)
    return np.float32(normal[0]) * (1 - along[0]) - np.float32(normal[1]) * along[1]


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(0.95 - np.maximum(x, y), 0.28 - np.minimum(x, y))


def _crescent(x: Array, y: Array) -> Array:
    return np.minimum(0.95 - np.hypot(x, y), np.hypot(x - 0.5, y) - 0.75)


def _heart(x: Array, y: Array) -> Array:
    """Two discs and the wedge of their common tangents."""
    x = np.abs(x)
    discs = 0.47 - np.hypot(x - 0.40, y + 0.30)
    wedge = np.minimum(0.537 - (0.70 * x + 0.71 * y), y + 0.06 + 0.6 * np.maximum(0.4 - x, 0))
    return np.maximum(discs, wedge)


def _hourglass(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(0.8 - y, 0.85 * (0.06 + 0.75 * y - x))


def _bar(x: Array, y: Array) -> Array:
    return np.minimum(0.97 - np.abs(x), 0.24 - np.abs(y))


SILHOUETTES: dict[str, Silhouette] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "hourglass": _hourglass,
    "bar": _bar,
}
