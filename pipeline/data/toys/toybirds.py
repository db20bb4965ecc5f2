"""toybirds: Waterbirds-100 in miniature, 48x48, drawn from a seed.

Two silhouettes (label 0 landbird, 1 waterbird) on land or water (place 0, 1); group = 2 label + place. The background
is the class in `train` and `test-id` and its reverse in `test-ood`; `val` has both halves, as Waterbirds' own.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from pipeline.config.data import ToyBirds
from pipeline.data.toys.blocks import Block, DrawnSource, block_rng, shuffled_rounds
from pipeline.data.toys.drawing import Array, Pose, backgrounds, paint_objects, soft_mask, to_bytes, uniform

CLASSES = ["landbird", "waterbird"]
SPLITS = {"train": 2000, "val": 1000, "test-id": 1000, "test-ood": 1000}
GROUPS = {"train": (0, 3), "val": (0, 1, 2, 3), "test-id": (0, 3), "test-ood": (1, 2)}

# Ellipses (centre x, centre y, half axes a and b, degrees): body, head, beak, tail, then leg or neck.
LANDBIRD = np.array(
    [
        (0.00, 0.10, 0.62, 0.46, 15),
        (0.48, -0.38, 0.30, 0.28, 0),
        (0.82, -0.36, 0.17, 0.08, 10),
        (-0.72, 0.34, 0.40, 0.13, 25),
        (0.05, 0.62, 0.06, 0.22, 0),
    ],
    np.float32,
)
WATERBIRD = np.array(
    [
        (-0.20, 0.30, 0.70, 0.34, 0),
        (0.40, -0.12, 0.13, 0.52, 20),
        (0.62, -0.62, 0.24, 0.18, 0),
        (0.92, -0.56, 0.26, 0.06, 8),
        (-0.82, 0.16, 0.24, 0.12, -30),
    ],
    np.float32,
)


def split_names(data: ToyBirds) -> list[str]:
    return list(SPLITS)


def open_split(data: ToyBirds, split: str) -> DrawnSource:
    return DrawnSource(
        "toybirds", split, data.seed, CLASSES, SPLITS[split], partial(draw_block, data.seed, split)
    )


@lru_cache(maxsize=8)
def draw_block(seed: int, split: str, number: int) -> Block:
    """Block `number` of a split: a pure function of its arguments."""
    rng = block_rng("toybirds", split, seed, number)
    groups = np.array(GROUPS[split])[shuffled_rounds(rng, len(GROUPS[split]))]
    labels, places = groups // 2, groups % 2
    background = backgrounds(rng, places)
    mask = soft_mask(_birds(rng, labels))
    return Block(paint_objects(rng, background, mask), to_bytes(mask), labels, groups)


def _birds(rng: np.random.Generator, labels: npt.NDArray[np.int64]) -> Array:
    """Signed distances [B,S,S] in px, positive inside."""
    pose = Pose.draw(rng, len(labels), extent=(0.26, 0.38), degrees=30)
    distance = np.empty((len(labels), *pose.coordinates()[0].shape[1:]), np.float32)
    for label, ellipses in enumerate((LANDBIRD, WATERBIRD)):
        chosen = labels == label
        posed = pose[chosen]
        distance[chosen] = posed.pixels(
            _union(*posed.coordinates(), _varied(rng, ellipses, int(chosen.sum())))
        )
    return distance


def _varied(rng: np.random.Generator, ellipses: Array, count: int) -> Array:
    """[B,E,5]: centres +- .04, axes +- 12 %, angles +- 8 degrees."""
    varied = np.repeat(ellipses[None], count, axis=0)
    varied[..., 0:2] += uniform(rng, -0.04, 0.04, count, len(ellipses), 2)
    varied[..., 2:4] *= uniform(rng, 0.88, 1.12, count, len(ellipses), 2)
    varied[..., 4] += uniform(rng, -8, 8, count, len(ellipses))
    return varied


def _union(x: Array, y: Array, ellipses: Array) -> Array:
    """Maximum over ellipses of (1 - rho) min(a, b), about the signed distance: [B,S,S]."""
    distance = np.full_like(x, -np.inf)
    for cx, cy, a, b, degrees in ellipses.transpose(1, 2, 0)[..., None, None]:
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        dx, dy = x - cx, y - cy
        rho = np.sqrt(((cos * dx + sin * dy) / a) ** 2 + ((cos * dy - sin * dx) / b) ** 2)
        np.maximum(distance, (1 - rho) * np.minimum(a, b), out=distance)
    return distance
