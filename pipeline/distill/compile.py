"""The terms of a student's loss compiled: logits, explanation and both terms in one graph.

Eagerly a B-cos explanation is an inner backward pass under a flag (`models.bcos_layers`), which no compiler may see.
Compiled, the explainers take their functional form: `torch.func.vjp` of GradCAM's head; for B-cos the network linear
in its input, made of the recorded dynamic weights. Values and gradients are those of eager mode up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.data.batches import Targets
from pipeline.distill.losses import LossTerms, Terms

Say = Callable[[str], None]


class CompiledLosses:
    """`step.loss_terms` through `torch.compile`, as one graph each with and without an explanation; else eager.

    The first batch of each kind is rehearsed, forward and backward, which takes a minute or two and leaves the
    student and the random state as they were. What cannot be compiled runs eagerly from then on, and `say` is told
    once; so do several processes, and a batch of another shape than the first (an epoch's last).
    """

    def __init__(
        self,
        losses: LossTerms,
        explainer: nn.Module,
        fabric: Fabric,
        say: Say,
        *,
        backend: str | Callable[..., object] = "inductor",
    ) -> None:
        """`explainer` is the module inside the wrapper that calls bring, and `fabric` what wrapped it."""
        self.eager, self.explainer, self.fabric, self.say = losses, explainer, fabric, say
        self._backend = backend
        self._compiled: dict[bool, LossTerms] = {}
        self._shapes: dict[bool, torch.Size] = {}
        self.serves = fabric.world_size == 1
        if not self.serves:
            say("train.compile: several processes are not compiled; they run eagerly")

    def __call__(
        self,
        student: Callable[..., Any],
        images: Tensor,
        labels: Tensor,
        targets: Targets | None,
        explain: bool,
    ) -> Terms:
        """As `step.loss_terms`. `student` is used as it is if the step runs eagerly."""
        if self.serves and explain not in self._compiled:
            self._prepare(images, labels, targets, explain)
        if not self.serves or images.shape != self._shapes[explain]:
            return self.eager(student, images, labels, targets, explain)
        with self.fabric.autocast():
            return self._compiled[explain](self.explainer, images, labels, targets, explain)

    def _prepare(self, images: Tensor, labels: Tensor, targets: Targets | None, explain: bool) -> None:
        self._compiled[explain] = torch.compile(
            self.eager, backend=self._backend, fullgraph=True, dynamic=False
        )
        self._shapes[explain] = images.shape
        if len(self._compiled) == 1:
            self.say("train.compile: compiling the step; its first batch takes a minute or two")
        parameters = [parameter for parameter in self.explainer.parameters() if parameter.requires_grad]
        with _as_before(self.explainer, images.device):
            try:
                with self.fabric.autocast():
                    terms = self._compiled[explain](self.explainer, images, labels, targets, explain)
                torch.autograd.grad(terms.losses, parameters, allow_unused=True)
            except Exception as error:  # whatever a compiler raises, training must go on
                reason = " ".join(str(error).split()) or type(error).__name__
                self.say(f"train.compile: this step cannot be compiled and runs eagerly ({reason[:300]})")
                self.serves = False


@contextmanager
def _as_before(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards the module's buffers (running statistics) and the random state are those of before."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
