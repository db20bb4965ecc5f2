"""What explanation maps are compared by: which maps are dead, their unit scale, the cosine of two of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from artifacts.rows import DEAD


class UnitMaps(NamedTuple):
    """Maps divided by their largest magnitude, and which of them are alive.

    flat   [B,n]  float32 (float64 for float64 maps), the largest magnitude 1; dead maps are zero
    alive  [B]    bool
    """

    flat: Tensor
    alive: Tensor


class Cosine(NamedTuple):
    """The cosine float32 [B] in -1..1 of two batches of maps, 0 if either is dead; bool [B]: both are alive."""

    value: Tensor
    alive: Tensor


def dead(maps: Tensor) -> Tensor:
    """Which maps [B,...] of any float type are dead, their largest magnitude below `DEAD`: bool [B].

    A NaN map is alive, so that a diverged network shows.
    """
    return _largest(maps)[:, 0] < DEAD


def unit_scale(maps: Tensor) -> UnitMaps:
    """Divide maps [B,...] by their largest magnitude, so that tiny ones compare as exactly as large ones.

    B-cos maps are about 1e-7, and squares of smaller ones underflow. The magnitude carries no gradient, because what
    is computed of the maps ignores their scale.
    """
    largest = _largest(maps)
    alive = ~(largest < DEAD)
    return UnitMaps(maps.flatten(1) / torch.where(alive, largest, torch.inf), alive[:, 0])


def cosine(a: Tensor, b: Tensor) -> Cosine:
    """Cosine of two batches of maps [B,...] of equal shape and any float type, computed in float32.

    ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"maps of different shapes cannot be compared: {list(a.shape)} and {list(b.shape)}")
    one, other = unit_scale(a.float()), unit_scale(b.float())
    return Cosine(F.cosine_similarity(one.flat, other.flat, dim=1, eps=1e-6), one.alive & other.alive)


def _largest(maps: Tensor) -> Tensor:
    """[B,1] of maps [B,...], without gradients; float32 at least, because `DEAD` is 0 in float16."""
    largest = maps.detach().flatten(1).abs().amax(1, keepdim=True)
    return largest.to(torch.promote_types(maps.dtype, torch.float32))
