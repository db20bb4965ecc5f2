"""Stage 2: train one student from the packed images and the teacher store (or the online teacher)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts import ImageSet, TeacherStore, open_images
from artifacts.errors import ConfigError
from pipeline.augment import PairedAugment
from pipeline.compiled import CompiledLosses, LossesOf, StepLosses
from pipeline.config import Experiment, StudentConfig
from pipeline.data.loader import Answers, Batch, PairedRows, TrainBatches
from pipeline.data.rows import select_rows
from pipeline.evaluate import score, student_answers
from pipeline.launch import share_of_valid
from pipeline.layout import Layout
from pipeline.models import Explainable, build, load_weights
from pipeline.models.sync_norm import convert
from pipeline.precompute import open_matching_store
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.teacher import build_explainer, class_count, load_teacher
from pipeline.train import fit, kept_weights
from pipeline.warp import resample


@dataclass(frozen=True)
class StudentStep:
    """One training step's loss: L = L_KD + lambda * L_exp (paper Eq. 2), or L_KD replaced by a loss on labels.

    `teacher` is the online explainer, or None for frozen targets (paper Sec. 3.3).
    """

    settings: StudentConfig
    augment: PairedAugment
    teacher: nn.Module | None
    fabric: Fabric
    compiled: LossesOf | None = None

    def __call__(self, student: nn.Module, batch: Batch, epoch: int, step: int = 0) -> dict[str, Tensor]:
        settings = self.settings
        explain = settings.explanation_weight > 0 and step % settings.explain_every == 0
        stored_maps = batch.teacher.maps if batch.teacher and explain else None
        images, maps, _ = self.augment(batch.images, stored_maps, batch.rows, epoch)
        teacher = self._targets(batch, images, maps, explain) if settings.needs_teacher else None
        losses = self.compiled or StepLosses(settings)
        found = losses(student, images, batch.labels, teacher, explain)
        if not explain:
            return {"loss": found["logit_loss"]}
        explanation_loss = found["explanation_loss"] * share_of_valid(self.fabric, found["valid_maps"])
        total = found["logit_loss"] + settings.explanation_weight * explanation_loss
        return {"loss": total, **found, "explanation_loss": explanation_loss}

    def _targets(self, batch: Batch, images: Tensor, maps: Tensor | None, explain: bool) -> Answers:
        """As stored, the map warped with the image; or the online teacher's answers for these very images. Maps are
        for `explain` only."""
        if self.teacher is None:
            assert batch.teacher is not None
            return batch.teacher if maps is None else batch.teacher._replace(maps=maps)
        with torch.no_grad():
            answer = self.teacher(images, explain=explain)
        return Answers(
            answer.logits,
            answer.classes,
            resample(answer.maps, self.augment.map_size) if explain else answer.maps,
        )


def distill(
    experiment: Experiment, layout: Layout, fabric: Fabric, name: str, seed: int, progress: Progress
) -> dict[str, Any]:
    """Train and score student `name` with `seed`, or continue, or return the result that is there.

    Raises ConfigError where the student does not fit the data or the run was begun with other settings.
    """
    settings = experiment.students[name]
    run = Run(layout.run(name, seed))
    images = open_images(layout.images(settings.split))
    store = open_matching_store(experiment, layout, settings.split, images)
    if fabric.is_global_zero:
        run.open(_identity(experiment, settings, name, seed, images, store))
    fabric.barrier()
    if run.done:
        return run.result()

    started = time.monotonic()
    classes = class_count(experiment, images)
    data = _training_rows(settings, images, store, name)
    torch.manual_seed(seed)
    net = build(settings, classes)
    if fabric.world_size > 1:
        convert(net.net)
    explainer = build_explainer(experiment.explain, net)
    augment = _paired_augment(experiment, settings, seed, images, net)
    teacher = _online_teacher(experiment, layout, fabric, images) if settings.asks_online else None
    validation = _scored_rows(experiment, layout, experiment.evaluate.select, settings.cache_mib)
    compiled = (
        CompiledLosses(StepLosses(settings), explainer, fabric, progress.say) if settings.compile else None
    )
    fit(
        fabric,
        explainer,
        net.net,
        settings,
        seed,
        TrainBatches(
            data,
            settings.batch_size,
            seed,
            workers=settings.workers,
            rank=fabric.global_rank,
            world=fabric.world_size,
        ),
        StudentStep(settings, augment, teacher, fabric, compiled),
        run,
        validate=(lambda: _score(experiment, fabric, explainer, validation)) if validation else None,
        select=_selection_metric(images, validation),
        progress=progress,
        label=f"{name} seed {seed}",
    )
    trained = time.monotonic() - started
    result = evaluate_student(experiment, layout, fabric, name, seed)
    result["seconds"] = {
        "train": round(trained, 1),
        "evaluate": round(time.monotonic() - started - trained, 1),
    }
    if fabric.is_global_zero:
        run.finish(result)
    fabric.barrier()
    return result


def evaluate_student(
    experiment: Experiment, layout: Layout, fabric: Fabric, name: str, seed: int
) -> dict[str, Any]:
    """Scores of the run's kept weights on `evaluate.select` and `evaluate.splits`: the contents of result.json."""
    explainer = load_student(experiment, layout, name, seed).to(fabric.device)
    names = [split for split in (experiment.evaluate.select, *experiment.evaluate.splits) if split]
    splits = {}
    for split in dict.fromkeys(names):
        rows = _scored_rows(experiment, layout, split, cache_mib=0)
        assert rows is not None
        splits[split] = _score(experiment, fabric, explainer, rows)
    return {"student": name, "seed": seed, "splits": splits}


def load_student(experiment: Experiment, layout: Layout, name: str, seed: int) -> nn.Module:
    """The explainer of a trained student, in eval mode on the CPU."""
    run = Run(layout.run(name, seed))
    settings = experiment.students[name]
    net = build(settings, class_count(experiment, open_images(layout.images(settings.split))))
    load_weights(net.net, kept_weights(run))
    return build_explainer(experiment.explain, net.eval())


def _score(
    experiment: Experiment, fabric: Fabric, explainer: nn.Module, rows: PairedRows
) -> dict[str, float]:
    explainer.eval()
    return score(fabric, student_answers(explainer), rows, experiment.evaluate.batch_size)


def _scored_rows(
    experiment: Experiment, layout: Layout, split: str | None, cache_mib: int
) -> PairedRows | None:
    if split is None:
        return None
    images = open_images(layout.images(split))
    store = open_matching_store(experiment, layout, split, images)
    return PairedRows(images, store, masks="any", cache_mib=cache_mib)


def _training_rows(settings: StudentConfig, images: ImageSet, store: TeacherStore, name: str) -> PairedRows:
    unlabelled = any(label is None for label in images.labels)
    if unlabelled and (settings.loss != "kd" or settings.shots):
        raise ConfigError(
            f"student {name} needs labels ({f'loss: {settings.loss}' if settings.loss != 'kd' else 'shots'}), "
            f"but {images.place} has unlabelled images; use loss: kd without shots, or labelled data"
        )
    rows = select_rows(images.labels, settings.rows, settings.shots)
    frozen = settings.mode == "frozen" and settings.needs_teacher
    return PairedRows(images, store if frozen else None, rows=rows, cache_mib=settings.cache_mib)


def _paired_augment(
    experiment: Experiment, settings: StudentConfig, seed: int, images: ImageSet, net: Explainable
) -> PairedAugment:
    """At the student's own resolution a perfect student scores 1; at the images' it is the authors' comparison."""
    size = (images.size, images.size)
    if experiment.explain.compare_at == "student":
        size = net.map_size(images.size)
    return PairedAugment(settings.augment, seed=seed, keys=images.keys, map_size=size)


def _online_teacher(experiment: Experiment, layout: Layout, fabric: Fabric, images: ImageSet) -> nn.Module:
    return build_explainer(experiment.explain, load_teacher(experiment, layout, images)).to(fabric.device)


def _selection_metric(images: ImageSet, validation: PairedRows | None) -> str:
    labelled = validation is None or all(label is not None for label in validation.images.labels)
    return "accuracy" if labelled else "agreement"


def _identity(
    experiment: Experiment,
    settings: StudentConfig,
    name: str,
    seed: int,
    images: ImageSet,
    store: TeacherStore,
) -> dict[str, Any]:
    """What decides the run's weights; a run is never continued when any of it changes."""
    return {
        "student": name,
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
        "explain": experiment.explain.model_dump(mode="json"),
        "select": experiment.evaluate.select,
        "images": images.fingerprint,
        "teacher": store.manifest.teacher.weights_sha256,
    }
