"""GradCAM (Selvaraju et al. 2017; the paper's Sec. 3.2 explanation for standard networks), cheap enough to
train with.

The map is about the features A of the last stage: relu(sum_d w_d A_d), w_d the spatial mean of d logit / d
A_d. One evaluation of the head, by `torch.func.vjp`, gives logits and weights alike, dropout included, for
any head; the cost over a plain forward pass is that of the head. Nothing before the features is
differentiated twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline.explain.explainer import Classes, Explained, Explainer, cotangent, explained_classes, wide
from pipeline.models import BCosClassifier, Classifier, classifier


class GradCAM(Explainer):
    """Maps [B,1,h,w] >= 0 at the resolution of the features.

    Softmax cannot see a constant added to all logits, so a two-class network is free to write its evidence
    for one class as negative evidence for the other, where GradCAM's relu hides it; `centred` takes that
    freedom away.
    """

    channels = 1
    model: Classifier

    @classmethod
    def accept(cls, model: nn.Module) -> Classifier:
        if isinstance(model, BCosClassifier):
            raise ModelError(
                "a B-cos network explains itself: set explain.explainer to bcos (or leave it out)"
            )
        return classifier(model)

    def explain(self, images: Tensor, classes: Classes, differentiable: bool) -> Explained:
        with torch.set_grad_enabled(differentiable):
            features = self.model.features(images)
            logits, pull = torch.func.vjp(self.model.head, features)  # type: ignore[misc]  # two: no aux
            classes = explained_classes(classes, logits)
            (gradient,) = pull(cotangent(self.logit, logits, classes))
            return Explained(logits, _weighted_sum(gradient, features), classes)


def _weighted_sum(gradient: Tensor, features: Tensor) -> Tensor:
    """relu(sum_d mean(gradient_d) * features_d): two [B,D,h,w] -> [B,1,h,w], at least in fp32."""
    with torch.autocast(features.device.type, enabled=False):
        weights = wide(gradient).mean((2, 3), keepdim=True)
        return torch.relu((weights * wide(features)).sum(1, keepdim=True))
