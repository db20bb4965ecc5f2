"""Batches of (image, teacher row) pairs, read by row in an order that is a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from artifacts import ImageSet, TeacherStore
from artifacts.errors import DataError
from pipeline.augment.counter import epoch_order
from pipeline.data.masks import boxes_to_mask
from pipeline.data.source import Label


class Answers(NamedTuple):
    """What the teacher said of B images: logits f32 [B,C], K explained classes each i64 [B,K], maps f32 [B,K,c,h,w].

    The highest class comes first; an image with fewer than K has class -1 and an all-zero map in the last places.
    """

    logits: Tensor
    classes: Tensor
    maps: Tensor


class Targets(NamedTuple):
    """What a step asks of a student: logits f32 [B,C]; what is explained, i64 [B], or weights f32 [B,C]; maps f32
    [B,c,h,w]."""

    logits: Tensor
    classes: Tensor
    maps: Tensor


ANNOTATED_WITHIN = 100
"""A split with masks or boxes has them within so many rows."""


@dataclass(frozen=True)
class Batch:
    """B samples of one packed split; what the stage does not need is None.

    rows i64 [B]; images u8 [B,3,S,S]; labels i64 [B], -1 where unlabelled, or f32 [B,C] of 0 and 1 where the set is
    multi-label; groups i64 [B], -1 where unknown; boxes: f32 [N,5] of (class, x0, y0, x1, y1) in px per sample;
    masks f32 [B,1,S,S] in 0..1; the teacher's stored answers for the canonical view.
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    groups: Tensor | None = None
    boxes: tuple[Tensor, ...] | None = None
    masks: Tensor | None = None
    teacher: Answers | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            rows=self.rows.to(device, non_blocking=True),
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            groups=None if self.groups is None else self.groups.to(device, non_blocking=True),
            boxes=None if self.boxes is None else tuple(boxes.to(device) for boxes in self.boxes),
            masks=None if self.masks is None else self.masks.to(device, non_blocking=True),
            teacher=None if self.teacher is None else Answers(*(part.to(device) for part in self.teacher)),
        )


class PairedRows(Dataset[Batch]):
    """The chosen rows of an image set with the same rows of a teacher store; `read(rows)` gives a Batch.

    `masks` asks for object masks and boxes: "mask" (the packed mask), "box" (the boxes, filled) or "any" (mask, else
    boxes, else all-zero; none at all if no sample has either). Otherwise a sample without its mask is a DataError.
    `multilabel`: some label is a list; `labelled`: every row has a label or a list, which may be empty.
    Decoded images are kept in memory when they fit into `cache_mib`.
    """

    def __init__(
        self,
        images: ImageSet,
        store: TeacherStore | None = None,
        *,
        rows: np.ndarray | None = None,
        masks: str | None = None,
        cache_mib: int = 0,
    ) -> None:
        self.images, self.store = images, store
        self.rows = np.arange(len(images)) if rows is None else np.sort(np.asarray(rows))
        self.masks = masks if masks != "any" or _annotated(images, self.rows) else None
        self.multilabel = images.multilabel
        self.labelled = all(images.labels[row] is not None for row in self.rows.tolist())
        self._labels = (
            _label_table(images.labels, len(images.classes)) if self.multilabel else images.label_column
        )
        self._groups = None if set(images.groups) <= {None} else images.group_column
        self._mask_cache: dict[int, np.ndarray] = {}
        self._box_cache: dict[int, np.ndarray | None] = {}
        self._cached: np.ndarray | None = None
        if len(self.rows) * 3 * images.size**2 <= cache_mib * 2**20:
            self._cached = images.read_images(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        return self.read(np.asarray(rows))

    def read(self, rows: np.ndarray) -> Batch:
        batch = Batch(
            rows=torch.from_numpy(np.ascontiguousarray(rows)),
            images=torch.from_numpy(self._images(rows)),
            labels=torch.from_numpy(self._labels[rows]),
            groups=None if self._groups is None else torch.from_numpy(self._groups[rows]),
            boxes=self._boxes(rows) if self.masks in ("box", "any") else None,
            masks=self._masks(rows) if self.masks else None,
        )
        if self.store is None:
            return batch
        stored = self.store.read(rows)
        parts = (stored.logits[:, 0], stored.explained_class[:, 0], stored.maps[:, 0])
        return replace(batch, teacher=Answers(*map(torch.from_numpy, parts)))

    def _images(self, rows: np.ndarray) -> np.ndarray:
        if self._cached is None:
            return self.images.read_images(rows)
        return self._cached[np.searchsorted(self.rows, rows)]

    def _boxes(self, rows: np.ndarray) -> tuple[Tensor, ...] | None:
        """None where none of these rows has any."""
        found = [self._boxes_of(int(row)) for row in rows]
        if all(boxes is None for boxes in found):
            return None
        nothing = np.empty((0, 5), np.float32)
        return tuple(torch.from_numpy(nothing if boxes is None else boxes) for boxes in found)

    def _boxes_of(self, row: int) -> np.ndarray | None:
        """f32 [N,5] or None."""
        if row not in self._box_cache:
            boxes = self.images.read_boxes(row)
            if self._cached is None:
                return boxes
            self._box_cache[row] = boxes
        return self._box_cache[row]

    def _masks(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([self._mask(int(row)) for row in rows]))[:, None].float() / 255

    def _mask(self, row: int) -> np.ndarray:
        """u8 [S,S], 0..255."""
        if row not in self._mask_cache:
            mask = self._read_mask(row)
            if self._cached is None:
                return mask
            self._mask_cache[row] = mask
        return self._mask_cache[row]

    def _read_mask(self, row: int) -> np.ndarray:
        sample, size = self.images[row], self.images.size
        if sample.mask is not None and self.masks in ("mask", "any"):
            return sample.mask
        if (
            sample.boxes is not None
            and (len(sample.boxes) or self.multilabel)
            and self.masks in ("box", "any")
        ):
            return boxes_to_mask(torch.from_numpy(sample.boxes), size).numpy().astype(np.uint8) * 255
        if self.masks == "any":
            return np.zeros((size, size), np.uint8)
        raise DataError(
            f"{self.images.place}: sample {sample.key!r} (row {row}) has no {self.masks}, which guidance needs of "
            "every image; annotate it, or remove teacher.train.guide",
            path=self.images.place,
            key=sample.key,
            rows=range(row, row + 1),
        )


def _label_table(labels: Sequence[Label], classes: int) -> np.ndarray:
    """f32 [rows, classes] of 0 and 1."""
    table = np.zeros((len(labels), classes), np.float32)
    for row, label in enumerate(labels):
        present = label if isinstance(label, tuple) else () if label is None else (label,)
        table[row, list(present)] = 1
    return table


def _annotated(images: ImageSet, rows: np.ndarray) -> bool:
    """Whether any of the first rows has a mask or boxes."""
    samples = (images[row] for row in rows[:ANNOTATED_WITHIN].tolist())
    return any(sample.mask is not None or sample.boxes is not None for sample in samples)


def batches_per_epoch(count: int, batch_size: int, world: int) -> int:
    """Full batches only; a set smaller than one batch is one batch (trimmed to a multiple of `world`)."""
    return max(count // min(batch_size, count - count % world), 1)


class EpochBatches:
    """A batch sampler: this rank's slice of every global batch of `epoch`.

    The global batches depend on (rows, batch_size, seed, epoch) alone; rank r of w takes every w-th of each,
    so any number of processes that divides the batch sees the same global batches.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size % world:
            raise DataError(f"batch_size {batch_size} must be a multiple of the {world} processes")
        if len(rows) < world:
            raise DataError(f"{len(rows)} rows cannot be split over {world} processes")
        self.rows, self.seed, self.rank, self.world = rows, seed, rank, world
        self.batch_size = min(batch_size, len(rows) - len(rows) % world)
        self.epoch = 0

    def __len__(self) -> int:
        return batches_per_epoch(len(self.rows), self.batch_size, self.world)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.rows[epoch_order(len(self.rows), self.seed, self.epoch)]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world].tolist()


class TrainBatches:
    """Iterates one epoch after another over a PairedRows: `for batch in batches.epoch(7)`."""

    def __init__(
        self, data: PairedRows, batch_size: int, seed: int, *, workers: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.data = data
        self.sampler = EpochBatches(data.rows, batch_size, seed, rank, world)
        self.loader: DataLoader[Batch] = DataLoader(
            data,
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=_already_a_batch,
            persistent_workers=workers > 0,
            pin_memory=False,
        )

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.sampler)

    def epoch(self, number: int) -> Iterator[Batch]:
        self.sampler.epoch = number
        return iter(self.loader)


def _already_a_batch(batch: Any) -> Any:
    return batch
