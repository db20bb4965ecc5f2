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

from pipeline.explain.explainer import Classes, Explained, Explainer, cotangent, explained_classes
from pipeline.models.bcos import BCosClassifier, bcos_classifier
from pipeline.models.bcos_layers import compilable, constant_in_backward, constant_in_forward, logits_and_pull


class BCos(Explainer):
    """Maps W(x) [B,6,H,W]. For a convolutional network W(x) [x, 1 - x] is the explained logit minus its bias, exactly;
    a ViT's positional embedding adds a part that belongs to no pixel.

    One thread at a time. Inside `torch.compile` it takes a form without a flag if `differentiable`, and is left to
    eager mode (or raises with `fullgraph=True`) if not.
    """

    channels = 6
    codec = "int6"
    """Maps of the size of the images are quantised."""
    model: BCosClassifier

    @classmethod
    def accept(cls, model: nn.Module) -> BCosClassifier:
        return bcos_classifier(model)

    def decide(self, images: Tensor) -> Tensor:
        x = self.model.add_inverse(images)
        return compilable(self.model.net, x) if torch.compiler.is_compiling() else self.model.net(x)

    def explain(self, images: Tensor, classes: Classes, differentiable: bool) -> Explained:
        if not differentiable:
            return self._constant(images, classes)
        compiling = torch.compiler.is_compiling()
        return self._compilable(images, classes) if compiling else self._trainable(images, classes)

    @staticmethod
    def heat(maps: Tensor, images: Tensor) -> Tensor:
        """W(x) * [x, 1 - x] summed over channels: what each pixel adds to the logit; [B,1,H,W] of the maps' dtype."""
        return (maps * BCosClassifier.add_inverse(images)).sum(1, keepdim=True)

    @staticmethod
    def picture(maps: Tensor, images: Tensor) -> Tensor:
        """`colour`, smoothed over a fifteenth of the image."""
        return colour(maps.float(), images, smooth=max(images.shape[-1] // 15, 1) | 1)

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


def colour(maps: Tensor, images: Tensor, smooth: int = 15, percentile: float = 99.5) -> Tensor:
    """W(x) as a picture (Böhle et al. 2022, Fig. 1): RGBA float [B,4,H,W] in 0..1, no gradients.

    Maps [B,6,H,W] of images float [B,3,H,W] in 0..1, both float32 at least. The colour is the one that the
    positive weights ask for: red = r / (r + (1 - r)'s), and so on. The opacity is the norm of W(x) where the
    pixel speaks for the class, averaged over `smooth` x `smooth` pixels (odd; 1: not at all), and full from
    each image's `percentile` on.
    """
    with torch.no_grad():
        speaks_for = BCos.heat(maps, images) >= 0
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
