"""The prior methods that the paper compares with (Tables 1 and 2): losses on the online teacher's features.

They need the teacher's network in every step, and compare features that a store does not hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import PriorConfig
from pipeline.distill.prior.feature_stages import Stages
from pipeline.distill.prior.losses import (
    AttentionTransfer,
    ClassAttentionTransfer,
    Contrast,
    KnowledgeReview,
    Seen,
)
from pipeline.explain import Classes
from pipeline.explain import Explained as Answer
from pipeline.models import Explainable

WEIGHTS = {"at": 1000.0, "reviewkd": 1.0, "catkd": 1.0, "crd": 0.8}

__all__ = ["Beside", "Explained", "WithPrior", "build"]


class Beside(NamedTuple):
    """What a prior method's loss wants of a step besides the images: the teacher's features and the rows i64 [B]."""

    teacher: Seen
    rows: Tensor
    epoch: int


class Explained(NamedTuple):
    """As `explainers.Explained`, with the method's weighted loss (None where it was not asked for)."""

    logits: Tensor
    maps: Tensor
    classes: Tensor
    prior_loss: Tensor | None = None


class WithPrior(nn.Module):
    """A student's explainer together with a method's own modules: one forward pass of the student gives logits, map and
    the method's loss. `explainer` stays what is kept and scored."""

    def __init__(
        self, settings: PriorConfig, explainer: nn.Module, method: nn.Module, student: Stages, teacher: Stages
    ) -> None:
        super().__init__()
        self.explainer, self.method = explainer, method
        self._student, self._teacher = student, teacher
        self._maps = settings.method == "catkd"
        self.weight = WEIGHTS[settings.method] if settings.weight is None else settings.weight

    def forward(
        self,
        images: Tensor,
        classes: Classes = None,
        differentiable: bool = False,
        explain: bool = True,
        beside: Beside | None = None,
    ) -> Explained:
        with self._student.recording() as found:
            explained = self.explainer(images, classes, differentiable=differentiable, explain=explain)
        if beside is None:
            return Explained(explained.logits, explained.maps, explained.classes)
        loss = self.method(self._seen(self._student, found), beside.teacher, beside.rows, beside.epoch)
        return Explained(explained.logits, explained.maps, explained.classes, self.weight * loss)

    @torch.no_grad()
    def ask(self, teacher: nn.Module, images: Tensor, classes: Classes, explain: bool) -> tuple[Answer, Seen]:
        """The online teacher's answer and features for these images."""
        with self._teacher.recording() as found:
            answer = teacher(images, classes, explain=explain)
        return answer, self._seen(self._teacher, {name: output.detach() for name, output in found.items()})

    def _seen(self, stages: Stages, found: dict[str, Tensor]) -> Seen:
        return Seen(stages.features(found), stages.activation_maps(found) if self._maps else None)


def build(
    settings: PriorConfig,
    explainer: nn.Module,
    student: Explainable,
    teacher: Explainable,
    image_size: int,
    rows: Tensor,
    labels: Tensor,
) -> WithPrior:
    """The student with its method. `rows` i64 [N] of the image set that it trains on, `labels` i64 [N], -1 unlabelled.

    New parameters are drawn from torch's generator. Raises ModelError where a network has no stages to compare, or for
    catkd no class activation maps; DataError where crd has no negatives.
    """
    own, theirs = Stages(student, image_size), Stages(teacher, image_size)
    match settings.method:
        case "at":
            method: nn.Module = AttentionTransfer()
        case "catkd":
            own.need_activation_maps()
            theirs.need_activation_maps()
            method = ClassAttentionTransfer(settings.pool)
        case "reviewkd":
            method = KnowledgeReview(own.shapes, theirs.shapes, settings.ramp)
        case "crd":
            last = own.shapes[-1][1], theirs.shapes[-1][1]
            method = Contrast(*last, rows, labels, settings.negatives)
    return WithPrior(settings, explainer, method, own, theirs)
