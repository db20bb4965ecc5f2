"""Scores of a student, or of the teacher itself, on the canonical view of a packed split, beside the stored teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts.durable import write_atomic
from pipeline import metrics
from pipeline.data.loader import Answers, Batch, PairedRows
from pipeline.explainers import heat
from pipeline.launch import reduced
from pipeline.warp import resample

Answer = Callable[[Tensor, Tensor | None, Answers | None], tuple[Tensor, Tensor]]
"""(images f32 [B,3,S,S], classes i64 [B] or None for the top-1, the store's answers for them) -> (logits [B,C], maps
[B,c,h,w]); the map of a class that a store does not hold is all-zero."""

Samples = dict[str, Tensor]


class Scores(dict[str, float]):
    """Means over a split by name; `samples` has what they are means of, f32 [rows] each, NaN where undefined."""

    samples: Samples


def student_answers(explainer: nn.Module) -> Answer:
    def answer(images: Tensor, classes: Tensor | None, _: Answers | None) -> tuple[Tensor, Tensor]:
        explained = explainer(images, classes)
        return explained.logits, explained.maps

    return answer


def teacher_answers(images: Tensor, classes: Tensor | None, stored: Answers | None) -> tuple[Tensor, Tensor]:
    """The stored rows: scoring the teacher needs no forward pass, but only its explained classes have maps."""
    assert stored is not None
    assert classes is not None
    same = stored.classes == classes[:, None]
    return stored.logits, (stored.maps * same[:, :, None, None, None]).sum(1)


def score(fabric: Fabric, answer: Answer, data: PairedRows, batch_size: int) -> Scores:
    """Means over the split, in 0..1 (map_cosine -1..1); the rows are divided over the processes.

    accuracy, top5      label among the first 1 or 5 classes; only where every row has one label
    ece                 expected calibration error, 15 bins of the top-1's probability (Guo et al. 2017)
    f1                  micro F1 of logit >= 0; only where rows have several labels
    agreement           top-1 = teacher's top-1 (paper Eq. 4)
    group_G_accuracy, group_G_agreement, and the worst group's: where rows have groups
    epg, iou            of the map against the object, at image size; a dead map counts 0; rows without an annotation do
                        not count. Several labels: of each label's map against its boxes, mean over the labels
    dead                share of all-zero maps. Read epg beside it: a metric that skips dead maps rewards collapse
    map_cosine          cosine to the teacher's map of the same class, at the student's resolution; dead maps count 0;
                        only where both are explained alike
    """
    mine = data.rows[fabric.global_rank :: fabric.world_size]
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(mine), batch_size):
        batch = data.read(mine[start : start + batch_size]).to(fabric.device)
        for name, values in measure(answer, batch, data).items():
            parts.setdefault(name, []).append(values.float())
    samples = {name: _gathered(fabric, torch.cat(found), len(data.rows)) for name, found in parts.items()}
    scores = Scores(_summary(samples))
    scores.samples = {name: values for name, values in samples.items() if not name.startswith("_")}
    return scores


@torch.no_grad()
def measure(answer: Answer, batch: Batch, data: PairedRows) -> Samples:
    """Per-sample values [B]; names with _ are for the summary only."""
    images = batch.images.float() / 255
    logits, maps = answer(images, batch.teacher.classes[:, 0] if batch.teacher else None, batch.teacher)
    values: Samples = {"dead": metrics.dead(maps)}
    if data.multilabel:
        values |= metrics.f1_counts(logits, batch.labels)
    elif data.labelled:
        values |= _of_labels(logits, batch.labels)
    if batch.groups is not None:
        values["_group"] = batch.groups
    if batch.teacher is not None:
        values["agreement"] = logits.argmax(1) == batch.teacher.logits.argmax(1)
        values |= _cosines(answer, images, batch.teacher, maps)
    if data.multilabel and batch.boxes is not None:
        values |= _localised_by_label(answer, images, batch)
    elif batch.masks is not None:
        values |= _localised(maps, images, batch.masks)
    return values


def _of_labels(logits: Tensor, labels: Tensor) -> Samples:
    values: Samples = {"accuracy": logits.argmax(1) == labels}
    values["_confidence"] = logits.softmax(1).amax(1)
    if logits.shape[1] > 5:
        values["top5"] = metrics.in_top(logits, labels, 5)
    return values


def _cosines(answer: Answer, images: Tensor, teacher: Answers, first: Tensor) -> Samples:
    """Mean over the teacher's explained classes of each sample; none where maps are of another kind."""
    if first.shape[1] != teacher.maps.shape[2]:
        return {}
    height, width = first.shape[-2:]
    total, count = (
        torch.zeros(len(images), device=images.device),
        torch.zeros(len(images), device=images.device),
    )
    for place in range(teacher.classes.shape[1]):
        has = teacher.classes[:, place] >= 0
        if not has.any():
            break
        part = Answers(*(values[has] for values in teacher))
        maps = first[has] if place == 0 else answer(images[has], part.classes[:, place], part)[1]
        total[has] += metrics.map_cosine(maps, resample(part.maps[:, place], (height, width)))
        count[has] += 1
    return {"map_cosine": total / count}


def _localised(maps: Tensor, images: Tensor, masks: Tensor) -> Samples:
    full = nn.functional.interpolate(
        heat(maps, images).float(), size=masks.shape[-2:], mode="bilinear", align_corners=False
    )
    inside = masks > 0.5
    annotated = inside.flatten(1).any(1)
    found = {"epg": metrics.epg(full, inside), "iou": metrics.iou(full, inside)}
    return {name: torch.where(annotated, values, torch.nan) for name, values in found.items()}


def _localised_by_label(answer: Answer, images: Tensor, batch: Batch) -> Samples:
    """EPG and IoU of each label's map against the union of its boxes (Rao et al. 2023), mean over a sample's labels.

    For the teacher's own stored maps only labels that it explains count.
    """
    assert batch.boxes is not None
    size, count = images.shape[-1], len(images)
    sums = {name: torch.zeros(count, device=images.device) for name in ("epg", "iou", "labels")}
    for label in range(batch.labels.shape[1]):
        has = batch.labels[:, label] > 0
        if answer is teacher_answers and batch.teacher is not None:
            has = has & (batch.teacher.classes == label).any(1)
        rows = has.nonzero()[:, 0]
        if not len(rows):
            continue
        stored = None if batch.teacher is None else Answers(*(values[rows] for values in batch.teacher))
        asked = torch.full((len(rows),), label, device=images.device)
        masks = torch.stack([metrics.boxes_to_mask(batch.boxes[row], size, label) for row in rows.tolist()])
        found = _localised(answer(images[rows], asked, stored)[1], images[rows], masks[:, None].float())
        known = ~found["epg"].isnan()
        sums["labels"][rows] += known
        for name in ("epg", "iou"):
            sums[name][rows] += found[name].nan_to_num()
    return {
        name: sums[name] / torch.where(sums["labels"] > 0, sums["labels"], torch.nan)
        for name in ("epg", "iou")
    }


def _gathered(fabric: Fabric, mine: Tensor, rows: int) -> Tensor:
    """f32 [rows] on the CPU of every process, from each one's every world-th row."""
    whole = torch.zeros(rows, device=fabric.device)
    whole[fabric.global_rank :: fabric.world_size] = mine
    return whole.cpu() if fabric.world_size == 1 else reduced(fabric, whole, "sum").cpu()


def _summary(samples: Samples) -> dict[str, float]:
    means = {
        name: float(values.double().nanmean())
        for name, values in samples.items()
        if not name.startswith(("_", "f1_")) and not values.isnan().all()
    }
    if "f1_hits" in samples:
        hits, predicted, true = (
            float(samples[f"f1_{name}"].double().sum()) for name in ("hits", "predicted", "true")
        )
        means["f1"] = 2 * hits / max(predicted + true, 1.0)
    if "_confidence" in samples:
        means["ece"] = metrics.calibration_error(samples["_confidence"], samples["accuracy"])
    if "_group" in samples:
        means |= _by_group(samples)
    return means


def _by_group(samples: Samples) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in ("accuracy", "agreement"):
        if metric not in samples:
            continue
        groups = {int(g): samples["_group"] == g for g in samples["_group"].unique() if g >= 0}
        of_group = {g: float(samples[metric][rows].double().mean()) for g, rows in groups.items()}
        found |= {f"group_{g}_{metric}": value for g, value in of_group.items()}
        if of_group:
            found[f"worst_group_{metric}"] = min(of_group.values())
    return found


def samples_file(folder: Path, split: str) -> Path:
    return folder / f"scores-{split.replace('/', '--')}.safetensors"


def save_samples(path: Path, samples: Samples) -> None:
    """Per-row scores, f32 [rows] by name, for paired comparisons between runs."""
    write_atomic(
        path, safetensors.torch.save({name: values.contiguous() for name, values in samples.items()})
    )


def read_samples(path: Path) -> Samples:
    return safetensors.torch.load_file(path)
