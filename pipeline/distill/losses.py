"""What a student minimises: L = L_KD + lambda * L_exp (paper Eq. 1-3).

All losses compute in float32, whatever the inputs' precision and autocast; gradients reach the student only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment.warp import resample
from pipeline.config import StudentConfig
from pipeline.data.batches import Targets
from pipeline.explain import maps


class OfMaps(NamedTuple):
    """Eq. 3 on one batch: L_exp, mean over the valid samples; their share in 0..1; mean norm of the student's maps."""

    loss: Tensor
    valid: Tensor
    map_norm: Tensor


class Terms(NamedTuple):
    """The unweighted terms of one step's loss, float32 scalars; None: not asked for.

    logits     L_KD of Eq. 1, or the labels' loss in its place (`loss: ce`, `bce`)
    labels     the labels' loss beside it
    prior      a prior method's loss, which has its weight
    explained  L_exp of Eq. 3
    """

    logits: Tensor
    labels: Tensor | None = None
    prior: Tensor | None = None
    explained: OfMaps | None = None

    @property
    def losses(self) -> list[Tensor]:
        """Those that carry gradients."""
        of_maps = None if self.explained is None else self.explained.loss
        return [term for term in (self.logits, self.labels, self.prior, of_maps) if term is not None]


LossTerms = Callable[[Callable[..., Any], Tensor, Tensor, Targets | None, bool], Terms]
"""(student, images, labels, targets, explain) -> `step.loss_terms`, as it is or compiled."""


def teacher_loss(settings: StudentConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """(student's logits, teacher's logits) -> L_KD, of one label an image (Eq. 1) or of several."""
    if settings.loss == "l2d":
        return multilabel_kd_loss
    return partial(kd_loss, temperature=settings.temperature)


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps [B,c,h,w] at the height and width of others, bilinearly."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return resample(maps, (like.shape[-2], like.shape[-1]))


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Eq. 1; Hinton et al. 2015).

    Logits [B,C] of any float type; returns a float32 scalar >= 0, in nats.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def multilabel_kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Sum over classes of the two-way KL of the sigmoids, clamped to [1e-6, 1 - 1e-6]; mean over the batch.

    Logits [B,C] of any float type; returns a float32 scalar >= 0, in nats (L2D, paper ref. 37).
    """
    total = torch.zeros((), device=student_logits.device)
    # class present, class absent; sigmoid(-x) keeps the digits that 1 - sigmoid(x) loses
    for sign in (1, -1):
        student, teacher = _probability(sign * student_logits), _probability(sign * teacher_logits.detach())
        total = total + (teacher * (teacher / student).log()).sum(1).mean()
    return total


def explanation_loss(student_maps: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine over the flattened map, mean over the valid samples (Eq. 3).

    Maps [B,...] of equal shape and any float type. A sample is left out if the student's or the teacher's map is dead
    (`explain.maps`): its cosine is undefined and would be a constant loss of 1.
    Returns (float32 scalar in 0..2, share of valid samples in 0..1). With no valid sample the loss is 0, on the graph.
    Raises ValueError if the shapes differ.
    """
    if student_maps.shape != teacher_maps.shape:
        raise ValueError(
            f"student maps {list(student_maps.shape)} and teacher maps {list(teacher_maps.shape)} differ; "
            "give PairedAugment the student's map_size, so that the teacher's maps come at its resolution"
        )
    cosine, alive = maps.cosine(student_maps, teacher_maps.detach())
    return _mean_over(1 - cosine, alive)


def _probability(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits.float()).clamp(1e-6, 1 - 1e-6)


def _mean_over(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(mean of the valid values or 0, share of valid values); invalid values pass no gradient."""
    kept = torch.where(valid, values, 0)
    return kept.sum() / valid.sum().clamp(min=1), valid.float().mean()
