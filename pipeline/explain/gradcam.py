"""GradCAM (Selvaraju et al. 2017; the paper's Sec. 3.2 explanation for standard networks), cheap enough to
train with.

The map is about the features A of the last stage: relu(sum_d w_d A_d), w_d the spatial mean of d logit / d
A_d. One evaluation of the head, by `torch.func.vjp`, gives logits and weights alike, dropout included, for
any head; the cost over a plain forward pass is that of the head. Nothing before the features is
differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.classifier import Classifier

LOGITS = ("raw", "centred")

Classes = Tensor | Callable[[Tensor], Tensor] | None
"""What is explained: one class each (int64 [B]), a weighted sum of class logits (float [B,C]), either as a function of
the logits [B,C], or None for the top-1."""


class Explained(NamedTuple):
    """A decision and its explanation. A named tuple, which distributed wrappers look into for tensors.

    logits  [B,C]      fp32 (fp64 for an fp64 model)
    maps    [B,c,h,w]  likewise; GradCAM: c = 1, >= 0, at the resolution of the features
    classes [B] int64  the explained class of each map; float [B,C] where weights were asked for
    """

    logits: Tensor
    maps: Tensor
    classes: Tensor


class GradCAM(nn.Module):
    """Explains a logit of `model` (`raw`), or that logit minus the mean logit (`centred`).

    Softmax cannot see a constant added to all logits, so a two-class network is free to write its evidence
    for one class as negative evidence for the other, where GradCAM's relu hides it; `centred` takes that
    freedom away.
    """

    channels = 1
    """Of its maps."""

    def __init__(self, model: Classifier, *, logit: str = "raw") -> None:
        super().__init__()
        self.model = model
        self.logit = logit

    def forward(
        self,
        images: Tensor,
        classes: Classes = None,
        differentiable: bool = False,
        explain: bool = True,
    ) -> Explained:
        """Explain images float [B,3,H,W] in 0..1 for `classes` [B] int64 (None: top-1 of the logits;
        `Classes` says what else).

        With `differentiable` logits and maps carry gradients to every parameter; else they carry none and no
        graph is kept. Without `explain` the logits alone, with gradients where enabled, and `unexplained` maps.
        """
        if not explain:
            return unexplained(self.model(images), self.channels)
        with torch.set_grad_enabled(differentiable):
            features = self.model.features(images)
            logits, pull = torch.func.vjp(self.model.head, features)  # type: ignore[misc]  # two: no aux
            classes = explained_classes(classes, logits)
            (gradient,) = pull(cotangent(self.logit, logits, classes))
            return Explained(_wide(logits), _weighted_sum(gradient, features), classes)


def explained_classes(classes: Classes, logits: Tensor) -> Tensor:
    """int64 [B] or float [B,C], whatever was asked for."""
    if classes is None:
        return logits.argmax(1)
    return classes if isinstance(classes, Tensor) else classes(logits.detach())


def cotangent(logit: str, logits: Tensor, classes: Tensor) -> Tensor:
    """d explained quantity / d logits [B,C]: one-hot or the given weights (`raw`), minus their mean (`centred`)."""
    one_hot = classes if classes.is_floating_point() else F.one_hot(classes, logits.shape[1])
    base = one_hot.to(logits.dtype)
    return base if logit == "raw" else base - base.mean(1, keepdim=True)


def _weighted_sum(gradient: Tensor, features: Tensor) -> Tensor:
    """relu(sum_d mean(gradient_d) * features_d): two [B,D,h,w] -> [B,1,h,w], at least in fp32."""
    with torch.autocast(features.device.type, enabled=False):
        weights = _wide(gradient).mean((2, 3), keepdim=True)
        return torch.relu((weights * _wide(features)).sum(1, keepdim=True))


def unexplained(logits: Tensor, channels: int) -> Explained:
    """The decision alone: maps are empty [B,channels,0,0]."""
    wide = _wide(logits)
    return Explained(wide, wide.detach().new_empty(len(logits), channels, 0, 0), logits.argmax(1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
