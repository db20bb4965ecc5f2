"""How well a student answers, agrees with the teacher, and looks at the right place.

Per-sample metrics return float32 or bool [B], so that a caller can average over any split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.explain.maps import cosine


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of samples whose top-1 is the label: logits [B,C], labels int [B] -> scalar in 0..1."""
    return (logits.argmax(1) == labels).float().mean()


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Share of samples on which both top-1 classes are equal (Eq. 4): logits [B,C] -> scalar in 0..1."""
    return accuracy(student_logits, teacher_logits.argmax(1))


def f1(logits: Tensor, labels: Tensor) -> Tensor:
    """Micro F1 of multi-label predictions (logit >= 0): logits [B,C], labels 0/1 [B,C] -> scalar in 0..1."""
    predicted, true = logits >= 0, labels > 0
    hits = (predicted & true).sum()
    return 2 * hits / (predicted.sum() + true.sum()).clamp(min=1)


def f1_counts(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What micro F1 = 2 hits / (predicted + true) sums up: logits [B,C], labels 0/1 [B,C] -> int64 [B] each."""
    predicted, true = logits >= 0, labels > 0
    counts = {"hits": predicted & true, "predicted": predicted, "true": true}
    return {f"f1_{name}": values.sum(1) for name, values in counts.items()}


def in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Which labels int [B] are among the k highest logits [B,C]: bool [B]."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(1)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): mean over samples of |accuracy - mean confidence| of their bin.

    `bins` of equal width (low, high] of the top-1's probability; confidence and correct [N] in 0..1 -> 0..1.
    """
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    error = torch.zeros(bins, dtype=torch.float64)
    error.scatter_add_(0, place, correct.double() - confidence.double())
    return float(error.abs().sum()) / max(len(confidence), 1)


def epg(maps: Tensor, masks: Tensor) -> Tensor:
    """Energy pointing game: positive energy inside the mask / all positive energy (Wang et al. 2020).

    Maps [B,c,h,w], masks [B,1,h,w] or [B,h,w], bool or 0..1 -> float32 [B] in 0..1. Energy below 1e-7 counts 0.
    """
    positive, mask = maps.float().clamp(min=0), _masks_like(maps, masks)
    total = positive.flatten(1).sum(1)
    inside = (positive * mask).flatten(1).sum(1)
    return torch.where(total < 1e-7, 0, inside / total.clamp(min=1e-7))


def iou(maps: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """IoU of the mask and the map's part above `threshold`, after clamping at 0 and scaling min..max to 0..1.

    Maps [B,1,h,w], masks [B,1,h,w] or [B,h,w], bool or 0..1 (above 0.5 is inside) -> float32 [B] in 0..1.
    A constant map has no part above the threshold and counts 0.
    """
    positive = maps.float().clamp(min=0)
    low, high = positive.amin((1, 2, 3), keepdim=True), positive.amax((1, 2, 3), keepdim=True)
    above = (positive - low) > threshold * (high - low)
    mask = _masks_like(maps, masks) > 0.5
    union = (above | mask).flatten(1).sum(1)
    return (above & mask).flatten(1).sum(1) / union.clamp(min=1)


def shift_similarity(explain_fn: Callable[[Tensor], Tensor], images: Tensor, shifts: Sequence[int]) -> Tensor:
    """Do explanations move with the image? Cosine of the maps of an image and of its diagonal shift (Fig. 5).

    The image [B,3,S,S] moves `shift` px right and down, its border repeated; both maps (explain_fn: images ->
    [B,c,h,w]) are brought to S x S and compared on the area that both show, pixels 0 to S - shift of the image.
    Returns float32 [len(shifts), B] in -1..1. Raises ValueError for a shift below 0 or with nothing left, S or more.
    """
    size = images.shape[-1]
    if not all(0 <= shift < size for shift in shifts):
        raise ValueError(f"shifts must be 0 to {size - 1} px for images of {size} px, got {list(shifts)}")
    still = _upsample(explain_fn(images), size)
    rows = []
    for shift in shifts:
        moved = F.pad(images, (shift, 0, shift, 0), mode="replicate")[..., :size, :size]
        there = _upsample(explain_fn(moved), size)
        after = there[..., shift:, shift:]
        rows.append(cosine(still[..., : size - shift, : size - shift], after).value)
    return torch.stack(rows)


def _masks_like(maps: Tensor, masks: Tensor) -> Tensor:
    """Masks as float32 [B,1,h,w]; ValueError unless they have the maps' size."""
    masks = masks[:, None] if masks.dim() == 3 else masks
    if masks.shape != (len(maps), 1, *maps.shape[-2:]):
        raise ValueError(
            f"maps {list(maps.shape)} need masks [B,1,h,w] of the same size, got {list(masks.shape)}; "
            "upsample the maps to the masks' size"
        )
    return masks.float()


def _upsample(maps: Tensor, size: int) -> Tensor:
    if maps.shape[-2:] == (size, size):
        return maps
    return F.interpolate(maps.float(), (size, size), mode="bilinear", align_corners=False)
