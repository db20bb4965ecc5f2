"""What each sample's step is about: which of its explained classes, and mixup (paper Sec. 4.2, Zhang et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment.counter import CLASS_COLUMN, Ids, uniform
from pipeline.data.batches import Answers, Targets


def drawn_targets(answers: Answers, share: Tensor) -> Targets:
    """The answers about one of each sample's explained classes, see `drawn`."""
    chosen = drawn(answers.classes, share)
    row = torch.arange(len(chosen), device=chosen.device)
    return Targets(answers.logits, answers.classes[row, chosen], answers.maps[row, chosen])


def drawn(classes: Tensor, share: Tensor) -> Tensor:
    """Which of its explained classes [B,K] each sample's step is about: floor(share * how many it has), i64 [B].

    `share` [B] in 0..1, from `class_share`.
    """
    count = (classes >= 0).sum(1)
    return torch.minimum((share.to(classes.device) * count).long(), (count - 1).clamp(min=0))


def class_share(seed: int, epoch: int, ids: Ids) -> Tensor:
    """Uniform in 0..1 per sample, a pure function of (seed, epoch, key): float32 [B]."""
    return torch.from_numpy(uniform(seed, epoch, ids, [CLASS_COLUMN])[:, 0])


def positive_classes(logits: Tensor, most: int) -> Tensor:
    """The classes with a logit above 0, the highest first, at most `most`, and at least the top-1: i64 [B,most].

    Logits [B,C]. -1 where a sample has fewer.
    """
    values, classes = logits.topk(min(most, logits.shape[1]), dim=1)
    positive = values > 0
    positive[:, 0] = True
    found = torch.where(positive, classes, -1)
    return F.pad(found, (0, most - found.shape[1]), value=-1)


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
