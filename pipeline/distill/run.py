"""Stage 2: train one student from the packed images and the teacher store (or the online teacher)."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts import ImageSet, TeacherStore, open_images
from artifacts.errors import ConfigError
from pipeline.augment.counter import mixup_share
from pipeline.augment.paired import PairedAugment
from pipeline.augment.rand_augment import rand_augment
from pipeline.augment.warp import resample
from pipeline.config import Experiment, ExplainConfig, StudentConfig
from pipeline.data.batches import Batch, PairedRows, Targets, TrainBatches
from pipeline.data.rows import select_rows
from pipeline.devices import share_of_valid
from pipeline.distill.compile import CompiledLosses, LossesOf, StepLosses
from pipeline.distill.prior import Beside, WithPrior
from pipeline.distill.prior import build as build_prior
from pipeline.distill.prior.losses import Seen
from pipeline.distill.targets import drawn_targets, mixed, mixed_targets
from pipeline.evaluate.students import evaluate_student, score_student, scored_rows
from pipeline.explain import BCos, GradCAM
from pipeline.explain.classes import class_share, drawn, positive_classes
from pipeline.models import Explainable, build
from pipeline.models.sync_norm import convert
from pipeline.precompute.answer import open_matching_store
from pipeline.progress import Progress
from pipeline.training.labels import label_targets
from pipeline.training.loop import Diverged, fit
from pipeline.training.run import Run, run_settings, student_defaults
from pipeline.training.trained import build_explainer, class_count, load_teacher
from pipeline.workspace import Layout


@dataclass(frozen=True)
class StudentStep:
    """One training step's loss: L = L_KD + lambda * L_exp (paper Eq. 2), a loss on labels in L_KD's place or beside it.

    `teacher` is the online explainer, or None for frozen targets (paper Sec. 3.3). `explained` is the config's section
    `explain`, which says what an online teacher explains; `classes` is C.
    """

    settings: StudentConfig
    explained: ExplainConfig
    augment: PairedAugment
    classes: int
    teacher: nn.Module | None
    fabric: Fabric
    compiled: LossesOf | None = None
    prior: WithPrior | None = None

    def __call__(self, student: nn.Module, batch: Batch, epoch: int, step: int = 0) -> dict[str, Tensor]:
        settings = self.settings
        explain = settings.explanation_weight > 0 and step % settings.explain_every == 0
        seed, ids = self.augment.seed, self.augment.identities(batch.rows)
        share = class_share(seed, epoch, ids)
        stored = None if batch.teacher is None else drawn_targets(batch.teacher, share)
        images, maps, _ = self.augment(
            batch.images, stored.maps if stored and explain else None, batch.rows, epoch
        )
        if settings.rand_augment is not None:
            images = rand_augment(images, settings.rand_augment, seed, epoch, ids)
        targets = stored if stored is None or maps is None else stored._replace(maps=maps)
        labels = batch.labels
        if settings.mixup:
            images, labels, targets = self._mix(images, labels, targets, epoch, step)
        more = {}
        if self.teacher is not None:
            targets, seen = self._ask(self.teacher, images, share, explain)
            more = {} if seen is None else {"beside": Beside(seen, batch.rows, epoch)}
        found = (self.compiled or StepLosses(settings))(student, images, labels, targets, explain, **more)
        total = settings.kd_weight * found["logit_loss"] + found.get("prior_loss", 0.0)
        if "label_loss" in found:
            total = total + settings.label_weight * found["label_loss"]
        if not explain:
            return {"loss": total, **(found if len(found) > 1 else {})}
        explanation_loss = found["explanation_loss"] * share_of_valid(self.fabric, found["valid_maps"])
        total = total + settings.explanation_weight * explanation_loss
        return {"loss": total, **found, "explanation_loss": explanation_loss}

    def _mix(
        self, images: Tensor, labels: Tensor, targets: Targets | None, epoch: int, step: int
    ) -> tuple[Tensor, Tensor, Targets | None]:
        """mixup: an online teacher sees the mixed images; frozen targets are mixed as the images are."""
        share = mixup_share(self.settings.mixup, self.augment.seed, epoch, step)
        if self.settings.label_loss is not None:
            labels = mixed(label_targets(self.settings.label_loss, labels, self.classes), share)
        return mixed(images, share), labels, targets and mixed_targets(targets, share)

    def _ask(
        self, teacher: nn.Module, images: Tensor, share: Tensor, explain: bool
    ) -> tuple[Targets, Seen | None]:
        """The online teacher's answers for these very images, and features for a prior method. Maps are for `explain`
        only."""

        def one_positive(logits: Tensor) -> Tensor:
            classes = positive_classes(logits, self.explained.most)
            return classes.gather(1, drawn(classes, share)[:, None])[:, 0]

        rule = one_positive if self.explained.classes == "positive" else None
        seen = None
        with torch.no_grad():
            if self.prior is None:
                answer = teacher(images, rule, explain=explain)
            else:
                answer, seen = self.prior.ask(teacher, images, rule, explain)
        maps = resample(answer.maps, self.augment.map_size) if explain else answer.maps
        return Targets(answer.logits, answer.classes, maps), seen


def distill(
    experiment: Experiment, layout: Layout, fabric: Fabric, name: str, seed: int, progress: Progress
) -> dict[str, Any]:
    """Train and score student `name` with `seed`, or continue, or return the result that is there.

    Raises ConfigError where the student does not fit the data or the run was begun with other settings, Diverged where
    training diverged, now or before with the same settings.
    """
    settings = experiment.students[name]
    run = Run(layout.run(name, seed))
    images = open_images(layout.images(settings.split))
    store = open_matching_store(experiment, layout, settings.split, images)
    if fabric.is_global_zero:
        run.open(_identity(experiment, name, seed, images, store), student_defaults(settings))
    fabric.barrier()
    if run.done:
        return run.result()
    if run.diverged:
        raise Diverged(f"{run.diverged} (earlier; to try it again: rm {run.path / 'diverged'})")
    try:
        result = _train_and_score(experiment, layout, fabric, name, seed, run, images, store, progress)
    except Diverged as error:
        if fabric.is_global_zero:
            run.write("diverged", str(error).encode())
        raise
    if fabric.is_global_zero:
        run.finish(result)
    fabric.barrier()
    return result


def _train_and_score(
    experiment: Experiment,
    layout: Layout,
    fabric: Fabric,
    name: str,
    seed: int,
    run: Run,
    images: ImageSet,
    store: TeacherStore,
    progress: Progress,
) -> dict[str, Any]:
    """The contents of result.json."""
    settings = experiment.students[name]
    classes = class_count(experiment, images)
    data = _training_rows(settings, images, store, name)
    torch.manual_seed(seed)
    net = build(settings, classes)
    if fabric.world_size > 1:
        convert(net.net)
    explainer = build_explainer(experiment.explain, net)
    augment = _paired_augment(experiment, settings, seed, images, net)
    teacher = _online_teacher(experiment, layout, fabric, images) if settings.asks_online else None
    validation = scored_rows(experiment, layout, experiment.evaluate.select, settings.cache_mib)
    prior = _with_prior(settings, fabric, explainer, net, teacher, data)
    if prior is not None and fabric.world_size > 1:
        convert(prior.method)  # ReviewKD's adapters have batch norms too
    compiled = None
    if settings.compile and prior is None:
        compiled = CompiledLosses(StepLosses(settings), explainer, fabric, progress.say)
    elif settings.compile:
        progress.say("train.compile: a prior method's step is not compiled; it runs eagerly")
    trained = fit(
        fabric,
        prior or explainer,
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
        StudentStep(settings, experiment.explain, augment, classes, teacher, fabric, compiled, prior),
        run,
        validate=(lambda: score_student(experiment, fabric, explainer, validation)) if validation else None,
        progress=progress,
        label=f"{name} seed {seed}",
    )
    started = time.monotonic()
    result = evaluate_student(experiment, layout, fabric, name, seed)
    result["seconds"] = {"train": round(trained, 1), "evaluate": round(time.monotonic() - started, 1)}
    return result


def _training_rows(settings: StudentConfig, images: ImageSet, store: TeacherStore, name: str) -> PairedRows:
    by_labels = settings.label_loss
    if any(label is None for label in images.labels) and (by_labels or settings.shots):
        raise ConfigError(
            f"student {name} needs labels ({f'for the loss {by_labels}' if by_labels else 'shots'}), "
            f"but {images.place} has unlabelled images; use loss: kd without shots or label_weight, or labelled data"
        )
    if any(isinstance(label, tuple) for label in images.labels) and (by_labels == "ce" or settings.shots):
        raise ConfigError(
            f"student {name} ({'for the loss ce' if by_labels == 'ce' else 'shots'}) needs one label an image, but "
            f"{images.place} has lists of them; use loss: bce or l2d, and rows instead of shots"
        )
    rows = select_rows(images.labels, settings.rows, settings.shots)
    _check_shots(settings, images, rows, name)
    frozen = settings.mode == "frozen" and settings.needs_teacher
    return PairedRows(images, store if frozen else None, rows=rows, cache_mib=settings.cache_mib)


def _check_shots(settings: StudentConfig, images: ImageSet, rows: np.ndarray, name: str) -> None:
    if settings.shots is None:
        return
    labels = images.labels
    seen = Counter(labels[row] for row in rows.tolist())
    few = [label for label in range(len(images.classes)) if seen[label] < settings.shots]
    if few:
        raise ConfigError(
            f"student {name} asks for shots: {settings.shots}, but class {images.classes[few[0]]} has {seen[few[0]]} "
            f"images in {images.place}{' (with rows)' if settings.rows else ''}; lower shots"
        )


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


def _with_prior(
    settings: StudentConfig,
    fabric: Fabric,
    explainer: nn.Module,
    student: Explainable,
    teacher: nn.Module | None,
    data: PairedRows,
) -> WithPrior | None:
    """The student with the modules of a prior method, where the config names one."""
    if settings.prior is None:
        return None
    assert isinstance(teacher, GradCAM | BCos)
    if settings.prior.method == "crd" and fabric.world_size > 1:
        raise ConfigError(
            "prior method crd keeps its memory in one process; train this student without torchrun"
        )
    every = data.images.labels
    labels = [every[row] for row in data.rows.tolist()]
    known = torch.tensor([label if isinstance(label, int) else -1 for label in labels])
    rows, size = torch.from_numpy(data.rows), data.images.size
    return build_prior(settings.prior, explainer, student, teacher.model, size, rows, known)


def _identity(
    experiment: Experiment, name: str, seed: int, images: ImageSet, store: TeacherStore
) -> dict[str, Any]:
    """What decides the run's weights; a run is never continued when any of it changes."""
    return {
        "student": name,
        "seed": seed,
        **run_settings(experiment, name),
        "images": images.fingerprint,
        "teacher": store.manifest.teacher.weights_sha256,
    }
