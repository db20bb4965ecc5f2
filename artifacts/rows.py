"""What a teacher said of some images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NO_CLASS = -1
"""In `explained_class`: this sample has no further explained class."""


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
