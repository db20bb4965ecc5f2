"""What a teacher said of some images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NO_CLASS = -1
"""In `explained_class`: this sample has no further explained class."""

DEAD = 1e-15
"""A map is dead if its largest magnitude is below. The losses divide by that magnitude: below 1e-15 the square of their
gradient's norm can overflow float32 (at 1e-16 guidance's `ppce` does), and above lie all live maps: those of randomly
initialised B-cos DenseNet-169s, the faintest known, reach 1e-14 to 2e-13."""


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's answers for B rows.

    logits f32 [B,V,C]; explained_class i64 [B,V,K]; maps f32 [B,V,K,c,h,w]. V views (1: the canonical view),
    K explained classes (1: the teacher's top-1). With K > 1 the highest comes first, and a sample with fewer has
    `NO_CLASS` and all-zero maps in its last places.
    """

    logits: np.ndarray
    explained_class: np.ndarray
    maps: np.ndarray


def dead_rows(maps: np.ndarray) -> np.ndarray:
    """Which rows of maps [B,...] have nothing but dead maps: bool [B]. NaN is alive."""
    flat = maps.reshape(len(maps), -1)
    largest = np.maximum(flat.max(1), -flat.min(1))
    return np.asarray(largest < DEAD)
