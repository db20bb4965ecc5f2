"""The online teacher: it answers for the very images that the student gets (paper Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.augment.warp import Size, resample
from pipeline.config import ExplainConfig
from pipeline.data.batches import Targets
from pipeline.distill.prior import Beside, WithPrior
from pipeline.distill.prior.losses import Seen
from pipeline.explain.classes import drawn, positive_classes


class Asked(NamedTuple):
    """An online teacher's answers, and its features if a prior method compares them."""

    targets: Targets
    features: Seen | None

    def beside(self, student: nn.Module, rows: Tensor, epoch: int) -> Callable[..., Any]:
        """The student; with a prior method, one that compares its own features with these."""
        if self.features is None:
            return student
        return partial(student, beside=Beside(self.features, rows, epoch))


@dataclass(frozen=True)
class OnlineTeacher:
    """`explainer` of the teacher's network, asked for what the config's section `explain` says.

    Its maps come at `map_size`, the student's.
    """

    explainer: nn.Module
    explain: ExplainConfig
    map_size: Size | int | None
    prior: WithPrior | None = None

    def ask(self, images: Tensor, share: Tensor, explain: bool) -> Asked:
        """The answers for images f32 [B,3,S,S] in 0..1, with maps if `explain`.

        `share` [B] in 0..1: which of a sample's positive classes is explained.
        """

        def one_positive(logits: Tensor) -> Tensor:
            classes = positive_classes(logits, self.explain.most)
            return classes.gather(1, drawn(classes, share)[:, None])[:, 0]

        rule = one_positive if self.explain.classes == "positive" else None
        features = None
        with torch.no_grad():
            if self.prior is None:
                answer = self.explainer(images, rule, explain=explain)
            else:
                answer, features = self.prior.ask(self.explainer, images, rule, explain)
        maps = resample(answer.maps, self.map_size) if explain else answer.maps
        return Asked(Targets(answer.logits, answer.classes, maps), features)
