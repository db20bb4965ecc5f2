"""Guiding a teacher to look at the object: four losses of its map against a mask (Rao et al., ICCV 2023).

A is the map of one class, M the mask in 0..1, both at the map's resolution; A+ = max(A, 0), n = h w.

energy  1 - sum(M A+) / sum(A+)                        raises EPG
l1      1/n sum |A+ / max A+  -  M|                    raises IoU: the whole object, nothing else
ppce    -sum(M log(A+ / max A+)) / sum M               the whole object; says nothing about the rest
rrr     1/n sum (1 - M) (A / max |A|)^2                RRR*: nothing outside; negative evidence counts too

The authors' code sums `rrr` over the pixels and all losses over the batch; here both are means, so that a weight serves
any map and batch size (their lambda = ours / batch size, for `rrr` / n too). The maximum carries its gradient, as in
their code: the losses ignore a map's scale, and so do their gradients; held constant it would let `rrr` and `l1` shrink
the whole map to death. A crop may cut the object out: such a sample guides nothing and is left out, like a dead map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.augment.counter import GUIDED_CLASS_COLUMN, Ids, uniform
from pipeline.data.masks import boxes_to_mask
from pipeline.explain.maps import UnitMaps, unit_scale

Kind = Literal["energy", "l1", "ppce", "rrr"]

_FAINT = 1e-4
"""`ppce` takes the logarithm of this share of the maximum at least: the gradient stays below 1 / it."""


def guidance_loss(kind: Kind, maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss `kind` of maps [B,1,h,w] and masks [B,1,h,w] in 0..1, mean over the valid samples.

    A sample is left out if the map (for all but `rrr`: its positive part) is dead or the mask is empty.
    Returns (scalar >= 0, share of valid samples in 0..1), float32, or float64 for float64 maps; the scalar is at most 1
    (`ppce`: -log 1e-4). With no valid sample it is 0, on the graph. Raises ValueError if the sizes differ.
    """
    if maps.shape != masks.shape or maps.dim() != 4 or maps.shape[1] != 1:
        raise ValueError(
            f"guidance needs maps and masks [B,1,h,w] of the same size, got {list(maps.shape)} and "
            f"{list(masks.shape)}; give PairedAugment the model's map_size, so that the masks come at its resolution"
        )
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    unit, alive = _unit_maximum(wide if kind == "rrr" else wide.clamp(min=0))
    mask = masks.detach().to(unit.dtype).flatten(1)
    area = mask.sum(1)
    valid = alive & (area > 0)
    kept = torch.where(valid, _per_sample(kind, unit, mask, torch.where(valid, area, 1)), 0)
    return kept.sum() / valid.sum().clamp(min=1), valid.to(unit.dtype).mean()


def guided_classes(labels: Tensor, ids: Ids, seed: int, epoch: int) -> Tensor:
    """The class whose map is guided in this step: i64 [B] on the labels' device.

    Labels i64 [B]: themselves. Labels float [B,C] of 0 and 1: one of each image's classes, all equally likely, a pure
    function of (seed, epoch, the sample's id); 0 if an image has none.
    """
    if not labels.is_floating_point():
        return labels
    present = labels > 0
    draw = torch.from_numpy(uniform(seed, epoch, ids, [GUIDED_CLASS_COLUMN])).to(labels.device)
    rank = (draw * present.sum(1, keepdim=True)).long()
    return (present & (present.cumsum(1) - 1 == rank)).int().argmax(1)


def class_masks(boxes: Sequence[Tensor], classes: Tensor, size: int) -> Tensor:
    """The union of each image's boxes of its guided class: f32 [B,1,size,size] of 0 and 1.

    Boxes f32 [N,5] of (class, x0, y0, x1, y1) in px per image; classes i64 [B].
    """
    own = [found * (found[:, :1] == cls) for found, cls in zip(boxes, classes, strict=True)]  # others: empty
    return torch.stack([boxes_to_mask(found, size) for found in own])[:, None].float()


def _per_sample(kind: Kind, unit: Tensor, mask: Tensor, area: Tensor) -> Tensor:
    """[B] of maps [B,n] divided by their maximum, masks [B,n] and their areas [B] > 0."""
    match kind:
        case "energy":
            total = unit.sum(1)
            return 1 - (unit * mask).sum(1) / torch.where(total == 0, 1, total)
        case "l1":
            return (unit - mask).abs().mean(1)
        case "ppce":
            return -(mask * unit.clamp(min=_FAINT).log()).sum(1) / area
        case "rrr":
            return ((1 - mask) * unit.square()).mean(1)


def _unit_maximum(maps: Tensor) -> UnitMaps:
    """`unit_scale` of maps [B,1,h,w], divided again by the maximum that is left: it is 1 and carries the gradient."""
    unit, alive = unit_scale(maps)
    largest = unit.abs().amax(1, keepdim=True)
    return UnitMaps(unit / torch.where(alive[:, None], largest, 1), alive)
