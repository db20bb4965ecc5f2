"""What a step asks of a student: the answers about one explained class a sample; mixup (paper Sec. 4.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment.counter import mixup_share
from pipeline.config import StudentConfig
from pipeline.data.batches import Answers, Targets
from pipeline.explain.classes import drawn
from pipeline.training.labels import label_targets


def drawn_targets(answers: Answers, share: Tensor) -> Targets:
    """The answers about one of each sample's explained classes, see `drawn`."""
    chosen = drawn(answers.classes, share)
    row = torch.arange(len(chosen), device=chosen.device)
    return Targets(answers.logits, answers.classes[row, chosen], answers.maps[row, chosen])


def mixup(settings: StudentConfig, classes: int, seed: int, epoch: int, step: int) -> Mix:
    """mixup of one step: (images, labels, targets) -> the same, mixed alike. An online teacher sees mixed images."""
    share = mixup_share(settings.mixup, seed, epoch, step)

    def mix(images: Tensor, labels: Tensor, targets: Targets | None) -> tuple[Tensor, Tensor, Targets | None]:
        if settings.label_loss is not None:
            labels = mixed(label_targets(settings.label_loss, labels, classes), share)
        return mixed(images, share), labels, targets and mixed_targets(targets, share)

    return mix


Mix = Callable[[Tensor, Tensor, Targets | None], tuple[Tensor, Tensor, Targets | None]]


def mixed(values: Tensor, share: float) -> Tensor:
    """share * values + (1 - share) * values of the batch rolled by one, as the authors pair samples: [B,...] float."""
    return share * values + (1 - share) * values.roll(1, 0)


def mixed_targets(targets: Targets, share: float) -> Targets:
    """Frozen targets under mixup: logits and maps mixed linearly, and the explained quantity with them.

    Our extension (the authors' code refuses it). A B-cos explanation is linear in what it explains, so the student
    explains share * logit a + (1 - share) * logit b; GradCAM's relu makes it an approximation.
    """
    weights = F.one_hot(targets.classes, targets.logits.shape[1]).float()
    return Targets(mixed(targets.logits, share), mixed(weights, share), mixed(targets.maps, share))
