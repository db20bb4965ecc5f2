"""The losses on labels: cross-entropy, and the binary one of B-cos networks and of several labels an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_loss(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Classification loss of logits [B,C]: float32 scalar, mean over the batch.

    Labels int [B], or targets float [B,C] in 0..1 (several labels an image, mixed labels). `ce`: cross-entropy. `bce`:
    binary cross-entropy, mean over the classes too.
    """
    if kind == "ce":
        return F.cross_entropy(logits.float(), labels)
    targets = label_targets(kind, labels, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def label_targets(kind: str, labels: Tensor, classes: int) -> Tensor:
    """Labels int [B] as targets float32 [B,C]; float labels are targets already.

    `ce`: one-hot. `bce`: 1 for the label and 1/C for every other class, as B-cos networks are trained (Böhle et al.
    2022).
    """
    if labels.is_floating_point():
        return labels
    off = 0.0 if kind == "ce" else 1 / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    return targets.scatter(1, labels[:, None], 1.0)
