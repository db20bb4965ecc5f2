"""Scores of a student, or of the teacher itself, on the canonical view of a packed split, beside the stored teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline import metrics
from pipeline.data.loader import Batch, PairedRows
from pipeline.explainers import heat
from pipeline.launch import reduced
from pipeline.warp import resample

Answer = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
"""(batch, images f32 [B,3,S,S]) -> (logits [B,C], maps [B,c,h,w] for the teacher's explained classes)."""


def student_answers(explainer: nn.Module) -> Answer:
    def answer(batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
        explained = explainer(images, batch.teacher.classes if batch.teacher else None)
        return explained.logits, explained.maps

    return answer


def teacher_answers(batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
    """The stored rows: scoring the teacher needs no forward pass."""
    assert batch.teacher is not None
    return batch.teacher.logits, batch.teacher.maps


def score(fabric: Fabric, answer: Answer, data: PairedRows, batch_size: int) -> dict[str, float]:
    """Means over the split, in 0..1 (map_cosine -1..1); the rows are divided over the processes.

    accuracy      top-1 = label; only where the split is labelled
    agreement     top-1 = teacher's top-1 (paper Eq. 4)
    epg           share of the map's positive energy inside the object, at image size; a dead map counts 0;
                  only where the split has masks or boxes
    dead          share of all-zero maps. Read epg beside it: a metric that skips dead maps rewards collapse
    map_cosine    cosine to the teacher's map of the same class, at the student's resolution; dead maps count 0;
                  only where both are explained alike
    """
    totals: dict[str, Tensor] = {}
    mine = data.rows[fabric.global_rank :: fabric.world_size]
    for start in range(0, len(mine), batch_size):
        batch = data.read(mine[start : start + batch_size]).to(fabric.device)
        for name, values in _measure(answer, batch, data.labelled).items():
            totals[name] = (
                totals.get(name, torch.zeros((), dtype=torch.float64)) + values.double().sum().cpu()
            )
    names = list(totals)
    sums = reduced(fabric, torch.stack([totals[name] for name in names]).float().to(fabric.device), "sum")
    return {name: float(value) / len(data.rows) for name, value in zip(names, sums.cpu(), strict=True)}


@torch.no_grad()
def _measure(answer: Answer, batch: Batch, labelled: bool) -> dict[str, Tensor]:
    """Per-sample values [B]."""
    images = batch.images.float() / 255
    logits, maps = answer(batch, images)
    values: dict[str, Tensor] = {"dead": metrics.dead(maps)}
    if labelled:
        values["accuracy"] = logits.argmax(1) == batch.labels
    if batch.teacher is not None:
        values["agreement"] = logits.argmax(1) == batch.teacher.logits.argmax(1)
        height, width = maps.shape[-2:]
        if maps.shape[1] == batch.teacher.maps.shape[1]:  # explained alike
            values["map_cosine"] = metrics.map_cosine(maps, resample(batch.teacher.maps, (height, width)))
    if batch.masks is not None:
        size = batch.masks.shape[-2:]
        full = nn.functional.interpolate(
            heat(maps, images).float(), size=size, mode="bilinear", align_corners=False
        )
        values["epg"] = metrics.epg(full, batch.masks > 0.5)
    return values
