"""The prior methods' losses, as their papers define them. Each class is a module: what it trains are its parameters.

AT        Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017
ReviewKD  Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021
CAT-KD    Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023
CRD       Tian et al., "Contrastive Representation Distillation", ICLR 2020
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from artifacts.errors import DataError

T = TypeVar("T")


class Seen(NamedTuple):
    """What one network computed of a batch: features [B,D,h,w] from shallow to deep, class activation maps [B,C,h,w]
    (None: not asked for)."""

    features: list[Tensor]
    maps: Tensor | None


class AttentionTransfer(nn.Module):
    """Squared distance of normalised attention maps, mean over places, sum over stages."""

    def forward(self, student: Seen, teacher: Seen, rows: Tensor, epoch: int) -> Tensor:
        """Teacher's features of another size are brought to the student's, bilinearly (half-pixel). Scalar >= 0."""
        total = student.features[0].new_zeros(())
        for own, theirs in paired(student.features, teacher.features):
            total = total + (attention(own) - attention(_resized(theirs, own))).square().mean()
        return total


def attention(features: Tensor) -> Tensor:
    """Mean over channels of the squared features (p = 2), divided by its norm: [B,D,h,w] -> [B,h*w]."""
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1)


class ClassAttentionTransfer(nn.Module):
    """Squared distance of class activation maps, average-pooled to `pool` x `pool` and normalised class by class."""

    def __init__(self, pool: int) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, student: Seen, teacher: Seen, rows: Tensor, epoch: int) -> Tensor:
        """Maps of all classes, of any size. Scalar in 0..4 / pool^2."""
        assert student.maps is not None
        assert teacher.maps is not None
        return F.mse_loss(self._pooled(student.maps), self._pooled(teacher.maps))

    def _pooled(self, maps: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(maps.float(), self.pool)
        return F.normalize(pooled.flatten(2), dim=2)


RAMP = 20
"""Epochs over which ReviewKD's loss is raised to its full weight (its CIFAR recipe; its ImageNet recipe has none)."""


class KnowledgeReview(nn.Module):
    """Student levels, fused from deep to shallow, against the teacher's in a pyramid of resolutions.

    The levels are the stages and, deepest of all, the last one's spatial mean. That one is normalised over the batch
    alone, which must have two samples at least.
    """

    def __init__(self, student: list[torch.Size], teacher: list[torch.Size], ramp: int = RAMP) -> None:
        """Shapes [1,D,h,w] of the stages from shallow to deep. Epochs of the ramp; 0: full weight from the first."""
        super().__init__()
        self.ramp = ramp
        pairs = paired(*([*shapes, torch.Size([1, shapes[-1][1], 1, 1])] for shapes in (student, teacher)))
        middle = min(512, pairs[-1][0][1])
        self.fusions = nn.ModuleList(
            Fusion(own[1], middle, theirs[1], fuse=index < len(pairs) - 1)
            for index, (own, theirs) in enumerate(pairs)
        )

    def forward(self, student: Seen, teacher: Seen, rows: Tensor, epoch: int) -> Tensor:
        """Scalar >= 0, times the share of the ramp that `epoch` (0 first) has reached."""
        pairs = paired(_levels(student.features), _levels(teacher.features))
        total, deeper = student.features[0].new_zeros(()), None
        for fusion, (own, theirs) in reversed(list(zip(self.fusions, pairs, strict=True))):
            out, deeper = fusion(own, deeper, theirs.shape[-2:])
            total = total + pyramid_distance(out, theirs)
        return total * (min(epoch / self.ramp, 1.0) if self.ramp else 1.0)


def _levels(features: list[Tensor]) -> list[Tensor]:
    return [*features, features[-1].mean((2, 3), keepdim=True)]


class Fusion(nn.Module):
    """Attention-based fusion of a stage with what came from the deeper ones (ReviewKD, Fig. 3 a)."""

    def __init__(self, channels: int, middle: int, out: int, fuse: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None
        for layers in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(layers.get_parameter("0.weight"), a=1)

    def forward(
        self, features: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """-> (features in the teacher's channels and `size`, what the next shallower stage gets)."""
        x = self.reduce(features)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            shares = self.attention(torch.cat([x, deeper], 1))
            x = x * shares[:, :1] + deeper * shares[:, 1:]
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


def pyramid_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss: squared distance at full size and, with weights 1/2, 1/4, 1/8, pooled to 4, 2, 1.

    Only sizes below the features' own count; the sum is divided by the weights'. Two of [B,D,h,w] -> scalar.
    """
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= student.shape[-2]:
            continue
        weight /= 2
        distance = F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
        total, weights = total + weight * distance, weights + weight
    return total / weights


class Contrast(nn.Module):
    """Noise-contrastive estimation between the student's and the teacher's embedding of the same image.

    Negatives come from memories of both networks' embeddings of all training rows, a slot for each row: drawn
    uniformly, with replacement, of other classes if labels are known and of other images if not. The normalising
    constants are estimated in the first batch. In fp32 under autocast too. One process only: the memories are not
    shared.
    """

    normaliser: Tensor
    memory: Tensor
    slots: Tensor
    spans: Tensor

    def __init__(
        self, student: int, teacher: int, rows: Tensor, labels: Tensor, negatives: int, *, width: int = 128
    ) -> None:
        """Channels of the last features; rows of the image set i64 [N]; their labels i64 [N], -1: unlabelled.

        Raises DataError if an image has no negatives.
        """
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Linear(student, width), nn.Linear(teacher, width)])
        slots, spans = _by_class(rows, labels)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("spans", spans, persistent=False)
        scale = (width / 3) ** -0.5
        self.register_buffer("memory", (torch.rand(2, len(rows), width) * 2 - 1) * scale)
        self.register_buffer("normaliser", torch.full((2,), -1.0))
        self.negatives = negatives

    def forward(self, student: Seen, teacher: Seen, rows: Tensor, epoch: int) -> Tensor:
        """Of rows i64 [B] of the image set. Scalar >= 0; in training mode the memories then take the embeddings."""
        with torch.autocast(rows.device.type, enabled=False):
            pooled = [seen.features[-1].float().mean((2, 3)) for seen in (student, teacher)]
            embedded = [
                F.normalize(layer(x), dim=1) for layer, x in zip(self.embeddings, pooled, strict=True)
            ]
            slot = self.slots[rows]
            chosen = torch.cat([slot[:, None], self._other_classes(slot)], 1)
            total = self._side(0, embedded[0], chosen) + self._side(1, embedded[1], chosen)
            if self.training:
                self._remember(slot, embedded)
            return total

    def _side(self, side: int, embedded: Tensor, chosen: Tensor) -> Tensor:
        """One network's embeddings [B,E] against the other's memory at the slots i64 [B,1+K], the positive first."""
        count = self.memory.shape[1]
        contrasts = self.memory[1 - side][chosen]
        scores = torch.exp(torch.einsum("bkd,bd->bk", contrasts, embedded) / TEMPERATURE)
        # Cloned, because the buffer changes in place.
        before = self.normaliser[side].clone()
        constant = torch.where(before < 0, scores.detach().mean() * count, before)
        self.normaliser[side] = constant
        return contrast_loss(scores / constant, count)

    def _other_classes(self, slot: Tensor) -> Tensor:
        """Slots i64 [B,K], uniform over other classes' rows; rows are sorted by class, so those are two spans."""
        first, count = self.spans[:, slot]
        others = self.memory.shape[1] - count
        draws = torch.rand(len(slot), self.negatives, device=slot.device, dtype=torch.float64)
        chosen = (draws * others[:, None]).long()
        return torch.where(chosen >= first[:, None], chosen + count[:, None], chosen)

    @torch.no_grad()
    def _remember(self, slot: Tensor, embedded: list[Tensor]) -> None:
        for side in (0, 1):
            mixed = MOMENTUM * self.memory[side][slot] + (1 - MOMENTUM) * embedded[side]
            self.memory[side][slot] = F.normalize(mixed, dim=1)


def _by_class(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by class: the slot of each row [max + 1] (-1: not among them), and for each slot the first slot
    and the count of what is not a negative of it [2,N]: its class, or the sample alone if it is unlabelled."""
    order = torch.argsort(labels, stable=True)
    labels = labels[order]
    slots = torch.full((int(rows.max()) + 1,), -1)
    slots[rows[order]] = torch.arange(len(rows))
    first = torch.searchsorted(labels, labels, right=False)
    count = torch.searchsorted(labels, labels, right=True) - first
    unlabelled = labels < 0
    first = torch.where(unlabelled, torch.arange(len(rows)), first)
    count = torch.where(unlabelled, 1, count)
    if int(count.max()) == len(rows):
        raise DataError(
            "prior method crd needs images of two classes to contrast, but the student's training rows have one; use "
            "more rows or another prior method"
        )
    return slots, torch.stack([first, count])


TEMPERATURE, MOMENTUM = 0.07, 0.5


def contrast_loss(scores: Tensor, rows: int) -> Tensor:
    """-(log h(positive) + sum over negatives of log(1 - h)), mean over the batch (CRD, Eq. 17, 18).

    Scores [B,1+K], the positive first, > 0; h = score / (score + K / rows).
    """
    noise = (scores.shape[1] - 1) / rows
    positive = torch.log(scores[:, 0] / (scores[:, 0] + noise))
    negative = torch.log(noise / (scores[:, 1:] + noise))
    return -(positive + negative.sum(1)).mean()


def paired(student: list[T], teacher: list[T]) -> list[tuple[T, T]]:
    """Stages side by side, the deepest with the deepest; the surplus of the longer list is left out."""
    count = min(len(student), len(teacher))
    return list(zip(student[-count:], teacher[-count:], strict=True))


def _resized(features: Tensor, like: Tensor) -> Tensor:
    if features.shape[-2:] == like.shape[-2:]:
        return features
    return F.interpolate(features, like.shape[-2:], mode="bilinear", align_corners=False)
