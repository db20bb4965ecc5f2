"""Which classes of an image are explained, and which of them a step is about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment.counter import CLASS_COLUMN, Ids, uniform


def positive_classes(logits: Tensor, most: int) -> Tensor:
    """The classes with a logit above 0, the highest first, at most `most`, and at least the top-1: i64 [B,most].

    Logits [B,C]. -1 if a sample has fewer.
    """
    values, classes = logits.topk(min(most, logits.shape[1]), dim=1)
    positive = values > 0
    positive[:, 0] = True
    found = torch.where(positive, classes, -1)
    return F.pad(found, (0, most - found.shape[1]), value=-1)


def drawn(classes: Tensor, share: Tensor) -> Tensor:
    """Which of its explained classes [B,K] each sample's step is about: floor(share * how many it has), i64 [B].

    `share` [B] in 0..1, from `class_share`.
    """
    count = (classes >= 0).sum(1)
    return torch.minimum((share.to(classes.device) * count).long(), (count - 1).clamp(min=0))


def class_share(seed: int, epoch: int, ids: Ids) -> Tensor:
    """Uniform in 0..1 per sample, a pure function of (seed, epoch, key): float32 [B]."""
    return torch.from_numpy(uniform(seed, epoch, ids, [CLASS_COLUMN])[:, 0])
