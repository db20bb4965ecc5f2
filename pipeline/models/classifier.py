"""A network that takes plain images, with its features and its head apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from artifacts.errors import ModelError
from pipeline.models.split import no_features, split


class Classifier(nn.Module):
    """A network `net` behind its own preprocessing: images float [B,3,H,W] in 0..1 -> logits [B,classes].

    `head(features(images))` is `net` applied to the normalised images, exactly. With `mean` and `std` None
    the images go in as they are. The weights are those of `net`: save and load `classifier.net.state_dict()`.
    `view` (size, resize, interpolation as in `ViewConfig`) is the canonical view that published weights were made
    for, if known: recorded with the preprocessing, not applied.

    Raises ModelError when `net` gives no spatial features.
    """

    explained_by: ClassVar[str] = "gradcam"
    """What `explain.explainer: auto` means."""
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        view: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ModelError("mean and std belong together: give both or neither")
        self.net = net
        self.view = None if view is None else dict(view)
        self._split = split(net)
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        self.classes = self._count_classes()

    def features(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in 0..1 -> features of the last stage [B,D,h,w]; ModelError if not spatial."""
        features = self._split.features(self.net, self._normalised(images))
        if not isinstance(features, Tensor) or features.dim() != 4:
            raise no_features(self.net)
        return features

    def map_size(self, image_size: int) -> tuple[int, int]:
        """Height and width of the features, and so of GradCAM maps, for square images of `image_size` px."""
        training = self.training
        with torch.no_grad():
            features = self.eval().features(torch.zeros(1, 3, image_size, image_size))
        self.train(training)
        return int(features.shape[-2]), int(features.shape[-1])

    def head(self, features: Tensor) -> Tensor:
        """Features [B,D,h,w] -> logits [B,classes]."""
        return self._split.head(self.net, features)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @property
    def preprocess(self) -> dict[str, Any]:
        """What happens to an image before `net`, as the store's manifest records it."""
        made_for = {} if self.view is None else {"view": dict(self.view)}
        if self.mean is None or self.std is None:
            return {"kind": "none", **made_for}
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return {"kind": "mean_std", "mean": mean, "std": std, **made_for}

    def _normalised(self, images: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return images
        return (images - self.mean) / self.std

    def _count_classes(self) -> int:
        """Columns of the logits, from a pass on the meta device: shapes only, nothing computed or changed."""
        tensors = chain(self.named_parameters(), self.named_buffers())
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        # timm's fixed-size nets
        size = getattr(self.net, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
        dtype = next((parameter.dtype for parameter in self.parameters()), torch.float32)
        with torch.no_grad():
            logits = functional_call(self, shapes, (torch.empty(2, *size, dtype=dtype, device="meta"),))
        return int(logits.shape[1])


def classifier(
    net: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Classifier:
    """`net` as a Classifier; one that is already a Classifier is returned unchanged.

    Without `mean` and `std` the network is expected to take what it is given (0..1, or normalised by the
    caller). Raises ModelError when it gives no spatial features.
    """
    return net if isinstance(net, Classifier) else Classifier(net, mean, std)


def _per_channel(values: Sequence[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values).reshape(1, -1, 1, 1)
