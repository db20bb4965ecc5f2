"""The prior methods that the paper compares with (Tables 1 and 2): losses on the online teacher's features.

They need the teacher's network in every step, and compare features that a store does not hold. A method is a row of
`METHODS`, a name and its settings in `config.PriorConfig`, and a module that computes its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import PriorConfig
from pipeline.config.training import PriorName
from pipeline.distill.prior.feature_stages import Stages
from pipeline.distill.prior.losses import (
    AttentionTransfer,
    ClassAttentionTransfer,
    Contrast,
    KnowledgeReview,
    Seen,
)
from pipeline.explain import Classes, Explained
from pipeline.models import Explainable

__all__ = ["METHODS", "Beside", "TrainingRows", "WithPrior", "build"]


class TrainingRows(NamedTuple):
    """What a student trains on: the side of its images in px, their rows i64 [N] of the image set, and their labels
    i64 [N], -1: unlabelled."""

    image_size: int
    rows: Tensor
    labels: Tensor


class Pair(NamedTuple):
    """What a prior method compares: the feature stages of both networks, on the images that the student trains on."""

    student: Stages
    teacher: Stages
    images: TrainingRows


@dataclass(frozen=True)
class PriorMethod:
    """A row of the table.

    weight      of the loss, if the config says none
    build       (settings, pair) -> the loss, a module called with (student: Seen, teacher: Seen, rows, epoch)
    class_maps  whether the loss compares class activation maps, `Seen.maps`
    """

    weight: float
    build: Callable[[PriorConfig, Pair], nn.Module]
    class_maps: bool = False


def _at(settings: PriorConfig, pair: Pair) -> nn.Module:
    return AttentionTransfer()


def _reviewkd(settings: PriorConfig, pair: Pair) -> nn.Module:
    return KnowledgeReview(pair.student.shapes, pair.teacher.shapes, settings.ramp)


def _catkd(settings: PriorConfig, pair: Pair) -> nn.Module:
    pair.student.need_activation_maps()
    pair.teacher.need_activation_maps()
    return ClassAttentionTransfer(settings.pool)


def _crd(settings: PriorConfig, pair: Pair) -> nn.Module:
    channels = pair.student.shapes[-1][1], pair.teacher.shapes[-1][1]
    return Contrast(*channels, pair.images.rows, pair.images.labels, settings.negatives)


METHODS: Mapping[PriorName, PriorMethod] = {
    "at": PriorMethod(1000.0, _at),
    "reviewkd": PriorMethod(1.0, _reviewkd),
    "catkd": PriorMethod(1.0, _catkd, class_maps=True),
    "crd": PriorMethod(0.8, _crd),
}


class Beside(NamedTuple):
    """What a prior method's loss wants of a step besides the images: the teacher's features and the rows i64 [B]."""

    teacher: Seen
    rows: Tensor
    epoch: int


class WithPrior(nn.Module):
    """A student's explainer together with a method's own modules: one forward pass of the student gives logits, map and
    the method's loss. `explainer` stays what is kept and scored."""

    def __init__(self, settings: PriorConfig, explainer: nn.Module, pair: Pair) -> None:
        super().__init__()
        row = METHODS[settings.method]
        self.explainer, self.method = explainer, row.build(settings, pair)
        self.weight = row.weight if settings.weight is None else settings.weight
        self._student, self._teacher, self._class_maps = pair.student, pair.teacher, row.class_maps

    def forward(
        self,
        images: Tensor,
        classes: Classes = None,
        differentiable: bool = False,
        explain: bool = True,
        beside: Beside | None = None,
    ) -> Explained:
        with self._student.recording() as outputs:
            explained = self.explainer(images, classes, differentiable=differentiable, explain=explain)
        if beside is None:
            return explained
        seen = self._seen(self._student, outputs)
        loss = self.method(seen, beside.teacher, beside.rows, beside.epoch)
        return explained._replace(prior_loss=self.weight * loss)

    @torch.no_grad()
    def ask(
        self, teacher: nn.Module, images: Tensor, classes: Classes, explain: bool
    ) -> tuple[Explained, Seen]:
        """The online teacher's answer and features for these images."""
        with self._teacher.recording() as outputs:
            answer = teacher(images, classes, explain=explain)
        return answer, self._seen(self._teacher, {name: output.detach() for name, output in outputs.items()})

    def _seen(self, stages: Stages, outputs: dict[str, Tensor]) -> Seen:
        return Seen(stages.features(outputs), stages.activation_maps(outputs) if self._class_maps else None)


def build(
    settings: PriorConfig,
    explainer: nn.Module,
    student: Explainable,
    teacher: Explainable,
    images: TrainingRows,
) -> WithPrior:
    """The student with its method.

    New parameters are drawn from torch's generator. Raises ModelError if a network has no stages to compare, or for
    catkd no class activation maps; DataError if crd has no negatives.
    """
    size = images.image_size
    return WithPrior(settings, explainer, Pair(Stages(student, size), Stages(teacher, size), images))
