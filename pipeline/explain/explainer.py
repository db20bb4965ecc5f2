"""What every explainer is: a module that answers with logits and maps, and says how its maps are stored and shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import Explainable, classifier

LOGITS = ("raw", "centred")

Classes = Tensor | Callable[[Tensor], Tensor] | None
"""What is explained: one class each (int64 [B]), a weighted sum of class logits (float [B,C]), either as a function of
the logits [B,C], or None for the top-1."""


class Explained(NamedTuple):
    """A decision and its explanation. A named tuple, which distributed wrappers look into for tensors.

    logits  [B,C]      fp32 (fp64 for an fp64 model)
    maps    [B,c,h,w]  likewise
    classes [B] int64  the explained class of each map; float [B,C] if weights were asked for
    prior_loss []      a prior method's weighted loss, if the step has one
    """

    logits: Tensor
    maps: Tensor
    classes: Tensor
    prior_loss: Tensor | None = None


class Explainer(nn.Module, ABC):
    """Explains a logit of `model` (`raw`), or that logit minus the mean logit (`centred`), by maps [B,c,h,w].

    A call runs the network inside the forward pass, so that distributed wrappers see all of it. The state dict is
    `model`'s under `model.`. An explainer says its `channels` and writes `explain`; what else it may change has a
    default: `codec`, `accept`, `map_size`, `decide`, `heat`, `picture`.
    """

    channels: ClassVar[int]
    """Of its maps: c."""
    codec: ClassVar[str] = "fp16"
    """What `store.maps: auto` means: fp16 is exact enough for maps of the size of the features, and cheap there."""

    model: Explainable
    __call__: Callable[..., Explained]

    def __init__(self, model: nn.Module, *, logit: str = "raw") -> None:
        super().__init__()
        self.model = self.accept(model)
        self.logit = logit

    def forward(
        self,
        images: Tensor,
        classes: Classes = None,
        differentiable: bool = False,
        explain: bool = True,
    ) -> Explained:
        """Explain images float [B,3,H,W] in 0..1 for `classes` [B] int64 (None: top-1 of the logits; `Classes` says
        what else).

        With `differentiable` logits and maps carry gradients to every parameter; else they carry none and no graph is
        kept. Without `explain` the logits alone, with gradients if these are enabled, and maps [B,c,0,0].
        """
        if not explain:
            logits = wide(self.decide(images))
            return Explained(
                logits, logits.detach().new_empty(len(logits), self.channels, 0, 0), logits.argmax(1)
            )
        explained = self.explain(images, classes, differentiable)
        return explained._replace(logits=wide(explained.logits), maps=wide(explained.maps))

    @abstractmethod
    def explain(self, images: Tensor, classes: Classes, differentiable: bool) -> Explained:
        """As `forward` with `explain`; logits and maps of any float type."""

    def decide(self, images: Tensor) -> Tensor:
        """The logits [B,C] of images [B,3,H,W] in 0..1, without an explanation."""
        return self.model(images)

    @classmethod
    def accept(cls, model: nn.Module) -> Explainable:
        """`model` as this explainer takes it, a bare network with its preprocessing. ModelError if it does not fit."""
        return model if isinstance(model, Explainable) else classifier(model)

    def map_size(self, image_size: int) -> tuple[int, int]:
        """Height and width of the maps, for square images of `image_size` px."""
        return self.model.map_size(image_size)

    @staticmethod
    def heat(maps: Tensor, images: Tensor) -> Tensor:
        """What each place adds to the explained logit, for metrics, guidance and pictures: [B,1,h,w], any sign.

        Maps [B,c,h,w] of images float [B,3,H,W] in 0..1; here of one channel, which is its own heat.
        """
        return maps

    @staticmethod
    def picture(maps: Tensor, images: Tensor) -> Tensor | None:
        """The maps in colours of their own, RGBA float [B,4,H,W] in 0..1, to be laid on white; None if `heat` over the
        grey image is the picture. Maps [B,c,h,w] of images float [B,3,H,W] in 0..1.
        """
        return None


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


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
