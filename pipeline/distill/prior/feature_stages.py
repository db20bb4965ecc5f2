"""What a network computes on its way: the features at the end of each of its stages, found by their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline.models import BCosClassifier, Explainable

MOST = 4
"""Stages looked at: the last ones, as the prior methods do with ResNets."""


class Stages:
    """The last block of each spatial size in a network, and for B-cos networks the module that gives class maps.

    A size's blocks are modules with modules of their own, or, if it has none, single layers. What a block computes
    on its way to a smaller size (the first convolutions of a bottleneck) ends no stage. The last stage is what the head
    is given. Sizes of 1 x 1 are left out. Raises ModelError if a network has no such features.
    """

    def __init__(self, model: Explainable, image_size: int) -> None:
        self._model = model
        steps, outputs, given = _rehearsal(model, image_size)
        head = _class_maps(model, steps) if isinstance(model, BCosClassifier) else None
        steps = [step for step in steps if head is None or not _inside(step.name, head)]
        steps = [step for step in steps if step.side > 1]
        if not steps or (isinstance(model, BCosClassifier) and head is None):
            raise _no_stages(model)
        self.class_maps = head
        chosen = _ends(steps, model.net)[-MOST:]
        self.names, self.shapes = [step.name for step in chosen], [step.shape for step in chosen]
        self._rectified = _is_rectified(outputs[self.names[-1]], given, model)

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Inside, a forward pass of the network leaves its stages' outputs in the dict, by module name."""
        outputs: dict[str, Tensor] = {}
        modules = dict(self._model.net.named_modules())
        wanted = [*self.names, *([self.class_maps] if self.class_maps else [])]
        with ExitStack() as hooks:
            for name in wanted:
                hooks.callback(modules[name].register_forward_hook(partial(_keep, outputs, name)).remove)
            yield outputs

    def features(self, outputs: dict[str, Tensor]) -> list[Tensor]:
        """The stages' features [B,D,h,w] of a recorded pass, from shallow to deep."""
        features = [outputs[name] for name in self.names]
        return [*features[:-1], torch.relu(features[-1])] if self._rectified else features

    def need_activation_maps(self) -> None:
        """Raises ModelError if `activation_maps` has no linear layer to apply."""
        if self.class_maps is None:
            self._linear()

    def activation_maps(self, outputs: dict[str, Tensor]) -> Tensor:
        """Class activation maps [B,C,h,w] (Zhou et al. 2016): the last linear layer at every place of the features.

        Its bias, and what lies between pooling and that layer, are left out. B-cos networks compute such maps
        themselves.
        """
        if self.class_maps is not None:
            return outputs[self.class_maps]
        return torch.einsum("bdhw,cd->bchw", self.features(outputs)[-1], self._linear().weight)

    def _linear(self) -> nn.Linear:
        shape = (self._model.classes, self.shapes[-1][1])
        for module in reversed(list(self._model.net.modules())):
            if isinstance(module, nn.Linear) and module.weight.shape == shape:
                return module
        raise ModelError(
            f"{type(self._model.net).__name__} has no linear layer from its last features to the classes, which prior "
            "method catkd needs; use another network or another method"
        )


class _Step(NamedTuple):
    """A module's part in a forward pass: the side of its square input (None: it has none) and its output's shape."""

    name: str
    entered: int | None
    shape: torch.Size

    @property
    def side(self) -> int:
        return self.shape[-1]


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    outputs[name] = output


def _square(value: Any) -> bool:
    """Whether this is one map per channel; what is kept channels last (inside ConvNeXt's blocks) is not."""
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == value.shape[3]


def _rehearsal(model: Explainable, size: int) -> tuple[list[_Step], dict[str, Tensor], Tensor]:
    """A pass without gradients up to the head (a B-cos network's maps follow it): what the modules did, in the order in
    which they finish; their outputs; and what the pass gave. The model and the random state stay as they were."""
    steps: dict[str, _Step] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if _square(output):
            steps.pop(name, None)
            entered = args[0].shape[-1] if args and _square(args[0]) else None
            steps[name], outputs[name] = _Step(name, entered, output.shape), output

    training, device = model.training, next(model.parameters()).device
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.net.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(partial(note, name)).remove)
        model.eval()
        given = model(images) if isinstance(model, BCosClassifier) else model.features(images)
        model.train(training)
    return list(steps.values()), outputs, given


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _ends(steps: list[_Step], net: nn.Module) -> list[_Step]:
    """The last block of each size, in the order in which they finish; of the last size, the last module of any kind."""
    modules = dict(net.named_modules())
    # An nn.Sequential is a mere chain.
    reducing = [step for step in steps if type(modules[step.name]) is not nn.Sequential]
    chosen: dict[int, _Step] = {}
    for step in steps:
        if any(_inside(step.name, block.name) and _passes(step, block) for block in reducing):
            continue
        before = chosen.get(step.side)
        if before is None or _is_block(modules[step.name]) or not _is_block(modules[before.name]):
            chosen[step.side] = step
    chosen[steps[-1].side] = steps[-1]
    return [step for step in steps if step in chosen.values()]


def _passes(step: _Step, block: _Step) -> bool:
    """Whether `step` still has the size at which `block` begins and which it leaves."""
    return block.entered == step.side > block.side


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_rectified(last: Tensor, given: Tensor, model: Explainable) -> bool:
    """Whether the head is given the relu of the last module's output, applied by no module (DenseNet)."""
    if isinstance(model, BCosClassifier) or torch.equal(last, given):
        return False
    if last.shape != given.shape or not torch.equal(F.relu(last), given):
        raise _no_stages(model)
    return True


def _no_stages(model: Explainable) -> ModelError:
    return ModelError(
        f"{type(model.net).__name__} has no spatial features in its stages, which prior methods compare; use a "
        "convolutional network"
    )


def _class_maps(model: BCosClassifier, steps: list[_Step]) -> str | None:
    """The module whose output is one map for each class: the head, applied before pooling."""
    spatial = [step for step in steps if step.side > 1]
    last = [step for step in spatial if step.side == spatial[-1].side]
    return next((step.name for step in reversed(last) if step.shape[1] == model.classes), None)
