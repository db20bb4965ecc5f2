"""One training step of a student, on one page: draw, warp, ask, explain, lose.

    L     = L_KD + lambda * L_exp                                             (Eq. 2)
    L_KD  = tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau))                (Eq. 1)
    L_exp = 1 - cos(E_T, E_S),  E the maps of the teacher's top-1 class       (Eq. 3)

`losses` has the equations, `online` asks a teacher, `compile` compiles `loss_terms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.augment.paired import PairedAugment
from pipeline.augment.rand_augment import rand_augment
from pipeline.config import StudentConfig
from pipeline.data.batches import Batch, Targets
from pipeline.devices import share_of_valid
from pipeline.distill.losses import LossTerms, OfMaps, Terms, explanation_loss, resized, teacher_loss
from pipeline.distill.online import OnlineTeacher
from pipeline.distill.targets import drawn_targets, mixup
from pipeline.explain.classes import class_share
from pipeline.training.labels import label_loss
from pipeline.training.loop import StepLoss


@dataclass(frozen=True)
class StudentStep:
    """`step(student, batch, epoch, number)` gives what the step minimises; `student` is an explainer.

    `teacher`: asked in each step; None: the batch brings frozen targets, or there is no teacher. C `classes`.
    """

    settings: StudentConfig
    classes: int
    augment: PairedAugment
    fabric: Fabric
    teacher: OnlineTeacher | None = None
    losses: LossTerms | None = None

    def __call__(self, student: nn.Module, batch: Batch, epoch: int, step: int = 0) -> StepLoss:
        settings, seed = self.settings, self.augment.seed
        explain = settings.explanation_weight > 0 and step % settings.explain_every == 0

        # Draw: which explained class a sample's step is about. Draws are functions of (seed, epoch, key).
        ids = self.augment.identities(batch.rows)
        share = class_share(seed, epoch, ids)
        targets = None if batch.teacher is None else drawn_targets(batch.teacher, share)

        # Warp: one geometry for an image and its frozen map (Sec. 3.3). Colours and RandAugment are the image's alone.
        frozen = targets.maps if targets is not None and explain else None
        images, maps, _ = self.augment(batch.images, frozen, batch.rows, epoch)
        if targets is not None and maps is not None:
            targets = targets._replace(maps=maps)
        if settings.rand_augment is not None:
            images = rand_augment(images, settings.rand_augment, seed, epoch, ids)
        labels = batch.labels
        if settings.mixup:
            mix = mixup(settings, self.classes, seed, epoch, step)
            images, labels, targets = mix(images, labels, targets)

        # Ask: an online teacher answers for the very images that the student gets (Sec. 3.1).
        explainer: Callable[..., Any] = student
        if self.teacher is not None:
            asked = self.teacher.ask(images, share, explain)
            targets, explainer = asked.targets, asked.beside(student, batch.rows, epoch)

        # Explain and lose.
        losses = self.losses or partial(loss_terms, settings)
        return self._weighed(losses(explainer, images, labels, targets, explain))

    def _weighed(self, terms: Terms) -> StepLoss:
        """Eq. 2 with the weights of its terms; the explanation's mean is over the valid samples of all processes."""
        settings = self.settings
        total, logged = settings.kd_weight * terms.logits, {"logit_loss": terms.logits}
        if terms.prior is not None:
            total, logged["prior_loss"] = total + terms.prior, terms.prior
        if terms.labels is not None:
            total, logged["label_loss"] = total + settings.label_weight * terms.labels, terms.labels
        if terms.explained is not None:
            loss, valid, norm = terms.explained
            explanation = loss * share_of_valid(self.fabric, valid)
            total = total + settings.explanation_weight * explanation
            logged |= {"explanation_loss": explanation, "valid_maps": valid, "map_norm": norm}
        return StepLoss(total, logged if len(logged) > 1 else {})


def loss_terms(
    settings: StudentConfig,
    student: Callable[..., Any],
    images: Tensor,
    labels: Tensor,
    targets: Targets | None,
    explain: bool,
) -> Terms:
    """One forward pass of the student gives its logits and its map of the very class that the teacher explains."""
    of_labels, of_maps = None, None
    if not explain:
        explained = student(images, explain=False)
    else:
        assert targets is not None
        explained = student(images, targets.classes, differentiable=True)
        loss, valid = explanation_loss(resized(explained.maps, targets.maps), targets.maps)
        of_maps = OfMaps(loss, valid, explained.maps.detach().flatten(1).norm(dim=1).mean())
    if settings.label_loss is not None:
        of_labels = label_loss(settings.label_loss, explained.logits, labels)
    if settings.loss in ("ce", "bce"):
        assert of_labels is not None
        return Terms(of_labels, prior=explained.prior_loss, explained=of_maps)
    assert targets is not None
    logit_loss = teacher_loss(settings)
    return Terms(logit_loss(explained.logits, targets.logits), of_labels, explained.prior_loss, of_maps)
