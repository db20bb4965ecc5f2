"""A student's losses on one batch, and the same compiled: logits, explanation and both terms in one graph.

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

from pipeline.augment.warp import resample
from pipeline.config import StudentConfig
from pipeline.data.batches import Targets
from pipeline.distill import losses
from pipeline.distill.prior import Beside
from pipeline.training.labels import label_loss

Say = Callable[[str], None]
LossesOf = Callable[[nn.Module, Tensor, Tensor, Targets | None, bool], dict[str, Tensor]]
"""(student, images, labels, teacher, explain) -> scalars: StepLosses or CompiledLosses."""


class StepLosses:
    """Both terms of the student's loss (paper Eq. 2), unweighted: the settings and nothing that changes."""

    def __init__(self, settings: StudentConfig) -> None:
        self.settings = settings

    def __call__(
        self,
        student: nn.Module,
        images: Tensor,
        labels: Tensor,
        teacher: Targets | None,
        explain: bool,
        beside: Beside | None = None,
    ) -> dict[str, Tensor]:
        """`student` is an explainer, bare or wrapped; with `beside` a `methods.WithPrior`.

        {"logit_loss"}, with a label weight {"label_loss"}, with `explain` {"explanation_loss", "valid_maps",
        "map_norm"}, with `beside` {"prior_loss"} too: float scalars.
        """
        more = {} if beside is None else {"beside": beside}
        if not explain:
            explained = student(images, explain=False, **more)
            return self._of_logits(explained.logits, labels, teacher) | _prior(explained, beside)
        assert teacher is not None
        explained = student(images, teacher.classes, differentiable=True, **more)
        maps = explained.maps
        if maps.shape[-2:] != teacher.maps.shape[-2:]:  # compare_at: input
            maps = resample(maps, (teacher.maps.shape[-2], teacher.maps.shape[-1]))
        distance, valid = losses.explanation_loss(maps, teacher.maps)
        found = self._of_logits(explained.logits, labels, teacher)
        found |= {
            "explanation_loss": distance,
            "valid_maps": valid,
            "map_norm": explained.maps.detach().flatten(1).norm(dim=1).mean(),
        }
        return found | _prior(explained, beside)

    def _of_logits(self, logits: Tensor, labels: Tensor, teacher: Targets | None) -> dict[str, Tensor]:
        settings = self.settings
        of_labels = {}
        if settings.label_loss is not None:
            of_labels = {"label_loss": label_loss(settings.label_loss, logits, labels)}
        if settings.loss in ("ce", "bce"):
            return {"logit_loss": of_labels["label_loss"]}
        assert teacher is not None
        if settings.loss == "l2d":
            return {"logit_loss": losses.multilabel_kd_loss(logits, teacher.logits)} | of_labels
        return {"logit_loss": losses.kd_loss(logits, teacher.logits, settings.temperature)} | of_labels


def _prior(explained: Any, beside: Beside | None) -> dict[str, Tensor]:
    return {} if beside is None else {"prior_loss": explained.prior_loss}


class CompiledLosses:
    """StepLosses through `torch.compile`, as one graph each with and without an explanation; else eager.

    The first batch of each kind is rehearsed, forward and backward, which takes a minute or two and leaves the
    student and the random state as they were. What cannot be compiled runs eagerly from then on, and `say` is told
    once; so do several processes, and a batch of another shape than the first (an epoch's last).
    """

    def __init__(
        self,
        losses: StepLosses,
        explainer: nn.Module,
        fabric: Fabric,
        say: Say,
        *,
        backend: str | Callable[..., object] = "inductor",
    ) -> None:
        """`explainer` is the module inside the wrapper that calls bring, and `fabric` what wrapped it."""
        self.eager, self.explainer, self.fabric, self.say = losses, explainer, fabric, say
        self._backend = backend
        self._compiled: dict[bool, Callable[..., dict[str, Tensor]]] = {}
        self._shapes: dict[bool, torch.Size] = {}
        self.serves = fabric.world_size == 1
        if not self.serves:
            say("train.compile: several processes are not compiled; they run eagerly")

    def __call__(
        self, student: nn.Module, images: Tensor, labels: Tensor, teacher: Targets | None, explain: bool
    ) -> dict[str, Tensor]:
        """As StepLosses. `student` is used as it is where the step runs eagerly."""
        if self.serves and explain not in self._compiled:
            self._prepare(images, labels, teacher, explain)
        if not self.serves or images.shape != self._shapes[explain]:
            return self.eager(student, images, labels, teacher, explain)
        with self.fabric.autocast():
            return self._compiled[explain](self.explainer, images, labels, teacher, explain)

    def _prepare(self, images: Tensor, labels: Tensor, teacher: Targets | None, explain: bool) -> None:
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
                    found = self._compiled[explain](self.explainer, images, labels, teacher, explain)
                total = [value for name, value in found.items() if name.endswith("_loss")]
                torch.autograd.grad(total, parameters, allow_unused=True)
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
