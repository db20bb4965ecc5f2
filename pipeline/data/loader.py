"""Batches of (image, teacher row) pairs, read by row in an order that is a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from artifacts import ImageSet, Sample, TeacherStore
from artifacts.errors import DataError
from pipeline.draws import epoch_order
from pipeline.metrics import boxes_to_mask


class Answers(NamedTuple):
    """What the teacher said of B images: logits f32 [B,C], explained classes i64 [B], maps f32 [B,c,h,w]."""

    logits: Tensor
    classes: Tensor
    maps: Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of one packed split; what the stage does not need is None.

    rows i64 [B]; images u8 [B,3,S,S]; labels i64 [B], -1 where unlabelled; masks f32 [B,1,S,S] in 0..1;
    the teacher's stored answers for the canonical view.
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    masks: Tensor | None = None
    teacher: Answers | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            rows=self.rows.to(device, non_blocking=True),
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            masks=None if self.masks is None else self.masks.to(device, non_blocking=True),
            teacher=None if self.teacher is None else Answers(*(part.to(device) for part in self.teacher)),
        )


class PairedRows(Dataset[Batch]):
    """The chosen rows of an image set with the same rows of a teacher store; `read(rows)` gives a Batch.

    `masks` asks for object masks: "mask" (the packed mask), "box" (the boxes, filled) or "any" (mask, else boxes; none
    at all where the first sample has neither). A sample without its mask is a DataError.
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
        self.masks = masks if masks != "any" or _annotated(images[int(self.rows[0])]) else None
        self._labels = np.array([label if isinstance(label, int) else -1 for label in images.labels])
        self._mask_cache: dict[int, np.ndarray] = {}
        self._cached: np.ndarray | None = None
        if len(self.rows) * 3 * images.size**2 <= cache_mib * 2**20:
            self._cached = images.read_images(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labelled(self) -> bool:
        """Whether every row has a label (one class)."""
        return bool((self._labels[self.rows] >= 0).all())

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        return self.read(np.asarray(rows))

    def read(self, rows: np.ndarray) -> Batch:
        batch = Batch(
            rows=torch.from_numpy(np.ascontiguousarray(rows)),
            images=torch.from_numpy(self._images(rows)),
            labels=torch.from_numpy(self._labels[rows]),
            masks=self._masks(rows) if self.masks else None,
        )
        if self.store is None:
            return batch
        stored = self.store.read(rows)
        parts = (stored.logits[:, 0], stored.explained_class[:, 0, 0], stored.maps[:, 0, 0])
        return replace(batch, teacher=Answers(*map(torch.from_numpy, parts)))

    def _images(self, rows: np.ndarray) -> np.ndarray:
        if self._cached is None:
            return self.images.read_images(rows)
        return self._cached[np.searchsorted(self.rows, rows)]

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
        sample = self.images[row]
        if sample.mask is not None and self.masks in ("mask", "any"):
            return sample.mask
        if sample.boxes is not None and len(sample.boxes) and self.masks in ("box", "any"):
            return (
                boxes_to_mask(torch.from_numpy(sample.boxes), self.images.size).numpy().astype(np.uint8) * 255
            )
        wanted = "mask or box" if self.masks == "any" else self.masks
        raise DataError(
            f"{self.images.place}: sample {sample.key!r} (row {row}) has no {wanted}, which guidance and EPG need of "
            "every image; annotate it, or remove teacher.train.guide and the annotations"
        )


def _annotated(sample: Sample) -> bool:
    return sample.mask is not None or (sample.boxes is not None and len(sample.boxes) > 0)


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
