"""What a network computes on its way: the features at the end of each of its stages, found by their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline.models import BCosClassifier, Explainable

MOST = 4
"""Stages looked at: the last ones, as the prior methods do with ResNets."""


class Stages:
    """The last module of each spatial size in a network, and for B-cos networks the one that gives class maps.

    Of the modules whose output has a size, the outermost counts, and of those the last to finish. Sizes of 1 x 1 are
    left out. Raises ModelError where a network has no such features.
    """

    def __init__(self, model: Explainable, image_size: int) -> None:
        self._model = model
        sizes = _outputs(model, image_size)
        self.class_maps = _class_maps(model, sizes) if isinstance(model, BCosClassifier) else None
        chosen: dict[tuple[int, int], str] = {}
        for name, shape in sizes.items():  # in the order in which modules finish
            size = (shape[2], shape[3])
            if name == self.class_maps or size == (1, 1):
                continue
            if size not in chosen or name.count(".") <= chosen[size].count("."):
                chosen[size] = name
        self.names = [name for name in sizes if name in chosen.values()][-MOST:]
        self.shapes = [sizes[name] for name in self.names]
        if not self.names or (isinstance(model, BCosClassifier) and self.class_maps is None):
            raise ModelError(
                f"{type(model.net).__name__} has no spatial features in its stages, which prior methods compare; use a "
                "convolutional network"
            )

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Inside, a forward pass of the network leaves its stages' outputs in the dict, by module name."""
        found: dict[str, Tensor] = {}
        modules = dict(self._model.net.named_modules())
        wanted = [*self.names, *([self.class_maps] if self.class_maps else [])]
        with ExitStack() as hooks:
            for name in wanted:
                hooks.callback(modules[name].register_forward_hook(partial(_keep, found, name)).remove)
            yield found

    def features(self, found: dict[str, Tensor]) -> list[Tensor]:
        """The stages' features [B,D,h,w] of a recorded pass, from shallow to deep."""
        return [found[name] for name in self.names]

    def activation_maps(self, found: dict[str, Tensor]) -> Tensor:
        """Class activation maps [B,C,h,w] (Zhou et al. 2016): the last linear layer at every place of the features.

        What lies between pooling and that layer is left out. B-cos networks compute such maps themselves. Raises
        ModelError where the layer does not take the last stage's channels.
        """
        if self.class_maps is not None:
            return found[self.class_maps]
        features = found[self.names[-1]]
        for module in reversed(list(self._model.net.modules())):
            if isinstance(module, nn.Linear) and module.in_features == features.shape[1]:
                return torch.einsum("bdhw,cd->bchw", features, module.weight)
        raise ModelError(f"catkd: {type(self._model.net).__name__} has no linear layer on its last features")


def _keep(found: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    found[name] = output


def _outputs(model: Explainable, image_size: int) -> dict[str, torch.Size]:
    """The shapes of all 4-dim outputs on the way to the head, by module name, in the order in which modules finish."""
    sizes: dict[str, torch.Size] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        square = isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] == output.shape[3]
        if square:  # channels-last inside ConvNeXt's blocks is not
            sizes.pop(name, None)
            sizes[name] = output.shape

    training, device = model.training, next(model.parameters()).device
    images = torch.zeros(1, 3, image_size, image_size, device=device)
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.net.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(partial(note, name)).remove)
        model.eval()
        if isinstance(model, BCosClassifier):
            model(images)
        else:
            model.features(images)
        model.train(training)
    return sizes


def _class_maps(model: BCosClassifier, sizes: dict[str, torch.Size]) -> str | None:
    """The module whose output is one map for each class: the head, applied before pooling."""
    maps = [name for name, shape in sizes.items() if shape[1] == model.classes and shape[2] > 1]
    return maps[-1] if maps and maps[-1] == list(sizes)[-1] else _last_head(maps, sizes)


def _last_head(maps: list[str], sizes: dict[str, torch.Size]) -> str | None:
    """Where pooling follows the head: the last one-map-a-class output of the last spatial size."""
    last = [shape[2:] for shape in sizes.values() if shape[2] > 1][-1]
    return next((name for name in reversed(maps) if sizes[name][2:] == last), None)
