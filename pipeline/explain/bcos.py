"""B-cos explanations W(x) (Böhle et al. 2022, 2024; the paper's Sec. 3.2), exact and trainable.

A B-cos network's logit is W(x) [x, 1 - x] + bias. W(x) is the gradient of the logit with the layers' dynamic
weights held constant: one inner backward pass through the forward pass that also gives the logits. For a
student that pass keeps its graph, and one final backward pass then follows both terms of the loss, through
the dynamic weights too (`models.bcos_layers`). A student's step costs about twice that of plain distillation;
a teacher's W(x) costs one backward pass to the input, about 0.6 of a forward pass, and keeps no graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.explain.gradcam import Classes, Explained, cotangent, explained_classes, unexplained
from pipeline.models.bcos import BCosClassifier
from pipeline.models.bcos_layers import compilable, constant_in_backward, constant_in_forward, logits_and_pull


class BCos(nn.Module):
    """Explains a logit of `model` (`raw`), or that logit minus the mean logit (`centred`), by W(x) [B,6,H,W].

    Same state dict as `model`'s under `model.`. One thread at a time. Inside `torch.compile` it takes a form
    without a flag where `differentiable`, and is left to eager mode (or raises with `fullgraph=True`) where not.
    """

    channels = 6
    """Of its maps."""

    def __init__(self, model: BCosClassifier, *, logit: str = "raw") -> None:
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
        `gradcam.Classes` says what else).

        Maps are W(x) [B,6,H,W]. For a convolutional network W(x) [x, 1 - x] is the explained logit minus its
        bias, exactly; a ViT's positional embedding adds a part that belongs to no pixel. With
        `differentiable` logits and maps carry gradients to every parameter; else they carry none and no graph
        is kept. Without `explain` the logits alone, with gradients where enabled, and `unexplained` maps.
        """
        compiling = torch.compiler.is_compiling()
        if not explain:
            x = self.model.add_inverse(images)
            logits = compilable(self.model.net, x) if compiling else self.model.net(x)
            return unexplained(logits, self.channels)
        trainable = self._compilable if compiling else self._trainable
        logits, maps, classes = (trainable if differentiable else self._constant)(images, classes)
        return Explained(_wide(logits), _wide(maps), classes)

    def _trainable(self, images: Tensor, classes: Classes) -> Explained:
        with torch.enable_grad():
            x, logits, classes = self._decide(images, classes)
            with constant_in_backward():
                (maps,) = torch.autograd.grad(
                    logits, x, cotangent(self.logit, logits, classes), create_graph=True
                )
        return Explained(logits, maps, classes)

    def _compilable(self, images: Tensor, classes: Classes) -> Explained:
        """As `_trainable`, the same values and gradients, without a flag and an inner call of autograd."""
        logits, pull = logits_and_pull(self.model.net, self.model.add_inverse(images.detach()))
        classes = explained_classes(classes, logits)
        return Explained(logits, pull(cotangent(self.logit, logits, classes)), classes)

    def _constant(self, images: Tensor, classes: Classes) -> Explained:
        with torch.inference_mode(False), torch.enable_grad(), constant_in_forward():
            x, logits, classes = self._decide(images, classes)
            (maps,) = torch.autograd.grad(logits, x, cotangent(self.logit, logits, classes))
        return Explained(logits.detach(), maps, classes)

    def _decide(self, images: Tensor, classes: Classes) -> tuple[Tensor, Tensor, Tensor]:
        x = self.model.add_inverse(images.detach()).requires_grad_()
        logits = self.model.net(x)
        return x, logits, explained_classes(classes, logits)


def contributions(maps: Tensor, images: Tensor) -> Tensor:
    """W(x) * [x, 1 - x] summed over channels: what each pixel adds to the logit, for metrics and pictures.

    Maps [B,6,H,W] of images float [B,3,H,W] in 0..1 -> [B,1,H,W] of the maps' dtype, any sign.
    """
    return (maps * BCosClassifier.add_inverse(images)).sum(1, keepdim=True)


def colour(maps: Tensor, images: Tensor, smooth: int = 15, percentile: float = 99.5) -> Tensor:
    """W(x) as a picture (Böhle et al. 2022, Fig. 1): RGBA float [B,4,H,W] in 0..1, no gradients.

    Maps [B,6,H,W] of images float [B,3,H,W] in 0..1, both float32 at least. The colour is the one that the
    positive weights ask for: red = r / (r + (1 - r)'s), and so on. The opacity is the norm of W(x) where the
    pixel speaks for the class, averaged over `smooth` x `smooth` pixels (odd; 1: not at all), and full from
    each image's `percentile` on.
    """
    with torch.no_grad():
        speaks_for = contributions(maps, images) >= 0
        strength = maps.norm(dim=1, keepdim=True) * speaks_for
        strength = F.avg_pool2d(strength, smooth, stride=1, padding=smooth // 2)
        opaque = torch.quantile(strength.flatten(1), percentile / 100, dim=1)[:, None, None, None]
        return torch.cat([_hue(maps), (strength / opaque.clamp(min=_TINY)).clamp(max=1)], 1)


_TINY = 1e-30


def _hue(maps: Tensor) -> Tensor:
    """[B,6,H,W] -> [B,3,H,W] in 0..1: each channel's share of its and its inverse's positive weight."""
    direction = (maps / maps.abs().amax(1, keepdim=True).clamp(min=_TINY)).clamp(min=0)
    channel, inverse = direction[:, :3], direction[:, 3:]
    return channel / (channel + inverse + 1e-12)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
