"""Scores of a student, or of the teacher itself, on the canonical view of a packed split, beside the stored teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts.access import reading_from
from artifacts.durable import write_atomic
from artifacts.errors import DataError, Diverged
from artifacts.names import in_file_name
from pipeline.augment.warp import resample
from pipeline.data.batches import Answers, Batch, PairedRows
from pipeline.data.masks import boxes_to_mask
from pipeline.data.reading.regular import regular_size
from pipeline.devices import reduced
from pipeline.evaluate import metrics
from pipeline.explain import Explainer, by_name
from pipeline.explain.maps import cosine, dead

Ask = Callable[[Tensor, Tensor | None, Answers | None], tuple[Tensor, Tensor]]
"""(images f32 [B,3,S,S], classes i64 [B] or None for the top-1, the store's answers for them) -> (logits [B,C], maps
[B,c,h,w]); the map of a class that a store does not hold is all-zero."""


@dataclass(frozen=True)
class Answer:
    """Who is scored: `ask` gives logits and maps, `explainer` is the kind of these maps."""

    ask: Ask
    explainer: type[Explainer]


Samples = dict[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """`means` over a split by name; `samples` has what they are means of, f32 [rows] each, NaN if undefined.

    F1 is there as its three counts per row (`f1_hits`, `f1_predicted`, `f1_true`), the calibration error as the top-1's
    probability (`confidence`), scores of groups as each row's `group`. Where rows have several labels, `localised` says
    how many of a row's labels its epg and iou are means of: the split's are means over all labels.
    """

    means: dict[str, float]
    samples: Samples


def student_answers(explainer: Explainer) -> Answer:
    """Of the network itself. Asking raises Diverged for logits or maps that are not finite."""

    def ask(images: Tensor, classes: Tensor | None, _: Answers | None) -> tuple[Tensor, Tensor]:
        explained = explainer(images, classes)
        if not (explained.logits.isfinite().all() and explained.maps.isfinite().all()):
            raise Diverged(
                "the network answers with NaN or infinity; train it with a lower lr or with clip_norm"
            )
        return explained.logits, explained.maps

    return Answer(ask, type(explainer))


def teacher_answers(explainer: type[Explainer]) -> Answer:
    """Of the store: scoring the teacher needs no forward pass, but only its explained classes have maps."""
    return Answer(_stored, explainer)


def _stored(images: Tensor, classes: Tensor | None, stored: Answers | None) -> tuple[Tensor, Tensor]:
    assert stored is not None
    assert classes is not None
    same = stored.classes == classes[:, None]
    return stored.logits, (stored.maps * same[:, :, None, None, None]).sum(1)


def teacher_answers_beyond(explainer: Explainer) -> Answer:
    """`teacher_answers`, and the teacher itself, `explainer`, for the map of a class that the store does not hold."""

    def ask(images: Tensor, classes: Tensor | None, stored: Answers | None) -> tuple[Tensor, Tensor]:
        logits, maps = _stored(images, classes, stored)
        assert stored is not None
        assert classes is not None
        unknown = ~(stored.classes == classes[:, None]).any(1)
        if unknown.any():
            maps[unknown] = explainer(images[unknown], classes[unknown]).maps
        return logits, maps

    return Answer(ask, type(explainer))


def score(fabric: Fabric, answer: Answer, data: PairedRows, batch_size: int) -> Scores:
    """Means over the split, in 0..1 (map_cosine -1..1); the rows are divided over the processes.

    accuracy, top5      label among the first 1 or 5 classes; only if every row has one label
    ece                 expected calibration error, 15 bins of the top-1's probability (Guo et al. 2017); as accuracy
    f1                  micro F1 of logit >= 0; only if every row is labelled and has several labels
    agreement           top-1 = teacher's top-1 (paper Eq. 4), also if rows have several labels
    group_G_accuracy, group_G_agreement, and the worst group's: if rows have groups
    epg, iou            of the map against the object, at image size; a dead map counts 0; rows without an annotation do
                        not count. Several labels: of each label's map against the union of its boxes, mean over all
                        (image, label) pairs (Rao et al. 2023); masks do not say whose they are and are not used
    dead                share of dead maps. Read epg beside it: a metric that skips dead maps rewards collapse
    map_cosine          cosine to the teacher's map of the same class, at the student's resolution; dead maps count 0;
                        only if both are explained alike
    """
    mine = data.rows[fabric.global_rank :: fabric.world_size]
    # a process without rows must still know every name, or the others wait for it for ever
    asked = mine if len(mine) else data.rows[:1]
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(asked), batch_size):
        batch = data.read(asked[start : start + batch_size]).to(fabric.device)
        for name, values in measure(answer, batch, data).items():
            parts.setdefault(name, []).append(values.float())
    own = {name: torch.cat(found)[: len(mine)] for name, found in parts.items()}
    samples = {name: _gathered(fabric, values, len(data.rows)) for name, values in own.items()}
    return Scores(_summary(samples), samples)


@torch.no_grad()
def measure(answer: Answer, batch: Batch, data: PairedRows) -> Samples:
    """Per-sample values [B], the same names for every batch of a split: what `Scores.samples` has."""
    images = batch.images.float() / 255
    logits, maps = answer.ask(images, batch.teacher.classes[:, 0] if batch.teacher else None, batch.teacher)
    values: Samples = {"dead": dead(maps)}
    if data.labelled and data.multilabel:
        values |= metrics.f1_counts(logits, batch.labels)
    elif data.labelled:
        values |= _of_labels(logits, batch.labels)
    if batch.groups is not None:
        values["group"] = batch.groups
    if batch.teacher is not None:
        values["agreement"] = logits.argmax(1) == batch.teacher.logits.argmax(1)
        if data.store is not None and answer.explainer is by_name(data.store.manifest.explainer.name):
            values["map_cosine"] = _cosines(answer, images, batch.teacher, maps)
    if batch.masks is not None and data.multilabel:
        values |= _localised_by_label(answer, images, batch)
    elif batch.masks is not None:
        values |= _localised(answer.explainer.heat(maps, images), batch.masks)
    return values


def _of_labels(logits: Tensor, labels: Tensor) -> Samples:
    values: Samples = {"accuracy": logits.argmax(1) == labels}
    values["confidence"] = logits.softmax(1).amax(1)
    if logits.shape[1] > 5:
        values["top5"] = metrics.in_top(logits, labels, 5)
    return values


def _cosines(answer: Answer, images: Tensor, teacher: Answers, first: Tensor) -> Tensor:
    """The mean cosine over the teacher's explained classes of each sample [B]; `first`: maps of their first classes."""
    height, width = first.shape[-2:]
    total, count = torch.zeros(2, len(images), device=images.device)
    for k in range(teacher.classes.shape[1]):
        has = teacher.classes[:, k] >= 0
        if not has.any():
            break
        part = Answers(*(values[has] for values in teacher))
        maps = first[has] if k == 0 else answer.ask(images[has], part.classes[:, k], part)[1]
        total[has] += cosine(maps, resample(part.maps[:, k], (height, width))).value
        count[has] += 1
    return total / count


def _localised(heat: Tensor, masks: Tensor) -> Samples:
    """EPG and IoU [B] of heat [B,1,h,w] at the size of the masks [B,1,S,S]; NaN for an empty mask."""
    full = nn.functional.interpolate(
        heat.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False
    )
    inside = masks > 0.5
    annotated = inside.flatten(1).any(1)
    values = {"epg": metrics.epg(full, inside), "iou": metrics.iou(full, inside)}
    return {name: torch.where(annotated, value, torch.nan) for name, value in values.items()}


def _localised_by_label(answer: Answer, images: Tensor, batch: Batch) -> Samples:
    """EPG and IoU of each label's map against the union of its boxes (Rao et al. 2023), mean over a sample's labels.

    `localised`: over how many; a label without a box does not count.
    """
    total = torch.zeros(3, len(images), device=images.device)  # epg, iou, how many
    for classes in _asked_labels(batch.labels).T:
        rows = (classes >= 0).nonzero()[:, 0]
        asked = classes[rows]
        stored = None if batch.teacher is None else Answers(*(values[rows] for values in batch.teacher))
        heat = answer.explainer.heat(answer.ask(images[rows], asked, stored)[1], images[rows])
        scores = _localised(heat, _masks_of(batch, rows, asked, images.shape[-1]))
        known = ~scores["epg"].isnan()
        total[:, rows] += torch.stack([scores["epg"], scores["iou"], known.float()]).nan_to_num()
    epg, iou, count = total
    times = torch.where(count > 0, count, torch.nan)
    return {"epg": epg / times, "iou": iou / times, "localised": count}


def _asked_labels(labels: Tensor) -> Tensor:
    """The labels whose maps are asked for, ascending: i64 [B, the most of any sample], -1 if a sample has fewer."""
    present = labels > 0
    first, classes = present.byte().sort(dim=1, descending=True, stable=True)
    return torch.where(first > 0, classes, -1)[:, : int(present.sum(1).max())]


def _masks_of(batch: Batch, rows: Tensor, classes: Tensor, size: int) -> Tensor:
    """The union of the boxes of one class of each of some rows: f32 [b,1,size,size] of 0 and 1."""
    boxes = batch.boxes or (classes.new_zeros(0, 5).float(),) * len(batch.labels)
    pairs = zip(rows.tolist(), classes.tolist(), strict=True)
    return torch.stack([boxes_to_mask(boxes[row], size, cls) for row, cls in pairs])[:, None].float()


def _gathered(fabric: Fabric, mine: Tensor, rows: int) -> Tensor:
    """f32 [rows] on the CPU of every process, from each one's every world-th row."""
    whole = torch.zeros(rows, device=fabric.device)
    whole[fabric.global_rank :: fabric.world_size] = mine
    return whole.cpu() if fabric.world_size == 1 else reduced(fabric, whole, "sum").cpu()


def _summary(samples: Samples) -> dict[str, float]:
    means = {
        name: float(values.double().nanmean())
        for name, values in samples.items()
        if not name.startswith(("f1_", "localised", "group", "confidence")) and not values.isnan().all()
    }
    if "f1_hits" in samples:
        hits, predicted, true = (
            float(samples[f"f1_{name}"].double().sum()) for name in ("hits", "predicted", "true")
        )
        means["f1"] = 2 * hits / max(predicted + true, 1.0)
    if "confidence" in samples:
        means["ece"] = metrics.calibration_error(samples["confidence"], samples["accuracy"])
    if "localised" in samples:
        means |= _over_labels(samples)
    if "group" in samples:
        means |= _by_group(samples)
    return means


def _over_labels(samples: Samples) -> dict[str, float]:
    """Means over all (image, label) pairs, from the images' own means; nothing if no label was localised."""
    times = samples["localised"].double()
    sums = {name: float((samples[name].double().nan_to_num() * times).sum()) for name in ("epg", "iou")}
    return {name: value / float(times.sum()) for name, value in sums.items() if times.any()}


def _by_group(samples: Samples) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in ("accuracy", "agreement"):
        if metric not in samples:
            continue
        groups = {int(g): samples["group"] == g for g in samples["group"].unique() if g >= 0}
        of_group = {g: float(samples[metric][rows].double().mean()) for g, rows in groups.items()}
        found |= {f"group_{g}_{metric}": value for g, value in of_group.items()}
        if of_group:
            found[f"worst_group_{metric}"] = min(of_group.values())
    return found


def samples_file(folder: Path, split: str) -> Path:
    return folder / f"scores-{in_file_name(split)}.safetensors"


def save_samples(path: Path, samples: Samples) -> None:
    """Per-row scores, f32 [rows] by name, for paired comparisons between runs."""
    write_atomic(
        path, safetensors.torch.save({name: values.contiguous() for name, values in samples.items()})
    )


def read_samples(path: Path) -> Samples:
    """What `save_samples` wrote. Raises DataError for a damaged file, FileNotFoundError for none."""
    try:
        with reading_from(path, DataError):
            regular_size(path)
            return _checked(safetensors.torch.load(path.read_bytes()))
    except (safetensors.SafetensorError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}); run e2kd evaluate CONFIG, which writes it again", path=path
        ) from None


MOST_GROUPS = 1000


def _checked(samples: Samples) -> Samples:
    """Raises ValueError if they are no f32 [rows] each, of the same rows, with what is needed beside each other."""
    if any(values.dtype != torch.float32 or values.ndim != 1 for values in samples.values()):
        raise ValueError("it holds more than f32 per row")
    if len({len(values) for values in samples.values()}) > 1:
        raise ValueError("its scores are not of the same rows")
    if "confidence" in samples and "accuracy" not in samples:
        raise ValueError("it has a confidence without an accuracy")
    group = samples.get("group")
    if group is not None and (not group.isfinite().all() or len(group.unique()) > MOST_GROUPS):
        raise ValueError("its groups are no groups")
    return samples
