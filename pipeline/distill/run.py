"""Stage 2: one run trains one student from the packed images and the teacher store, or beside the online teacher."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from artifacts import ImageSet, TeacherStore
from artifacts.errors import ConfigError, Diverged
from pipeline.augment.paired import PairedAugment
from pipeline.config import StudentConfig
from pipeline.data.batches import PairedRows, TrainBatches
from pipeline.data.protocol import select_rows
from pipeline.distill.compile import CompiledLosses
from pipeline.distill.online import OnlineTeacher
from pipeline.distill.prior import TrainingRows, WithPrior
from pipeline.distill.prior import build as build_prior
from pipeline.distill.step import StudentStep, loss_terms
from pipeline.evaluate.students import evaluate_student, score_student, scored_rows
from pipeline.explain import Explainer
from pipeline.models import Explainable, build, weights_sha256
from pipeline.models.sync_norm import convert
from pipeline.provenance import check_network, class_count, matching_store
from pipeline.training.loop import Training, fit
from pipeline.training.run import Run, run_settings, student_defaults
from pipeline.training.trained import build_explainer, load_teacher
from pipeline.workspace import Workspace


def distill(workspace: Workspace, name: str, seed: int) -> dict[str, Any]:
    """Train and score student `name` with `seed`, or continue, or return the result that is there.

    Raises ConfigError if the student does not fit the data or the run was begun with other settings, Diverged if
    training diverged, now or before with the same settings.
    """
    fabric = workspace.fabric
    settings = workspace.experiment.candidates[name].settings
    run = Run(workspace.layout.run(name, seed))
    images = workspace.open_images(settings.split)
    store = matching_store(workspace, settings.split, images)
    if fabric.is_global_zero:
        run.open(_identity(workspace, name, seed, store), student_defaults(settings))
    fabric.barrier()
    if run.done:
        return run.result()
    if run.diverged:
        raise Diverged(f"{run.diverged} (earlier; to try it again: rm {run.path / 'diverged'})")
    try:
        trained = fit(_training(workspace, name, seed, images, store), fabric, workspace.progress)
        started = time.monotonic()
        result = evaluate_student(workspace, name, seed)
    except Diverged as error:
        if fabric.is_global_zero:
            run.write("diverged", str(error).encode())
        raise
    result["seconds"] = {"train": round(trained, 1), "evaluate": round(time.monotonic() - started, 1)}
    if fabric.is_global_zero:
        run.finish(result)
    fabric.barrier()
    return result


@dataclass(frozen=True)
class _Parts:
    """What the steps of one run work with."""

    data: PairedRows
    net: Explainable
    explainer: Explainer
    teacher: Explainer | None
    prior: WithPrior | None


def _training(workspace: Workspace, name: str, seed: int, images: ImageSet, store: TeacherStore) -> Training:
    """The student, what it sees, and what its steps minimise."""
    fabric, select = workspace.fabric, workspace.experiment.evaluate.select
    settings = workspace.experiment.candidates[name].settings
    data = _training_rows(settings, images, store, name)
    parts = _parts(workspace, settings, seed, data, store)
    rank, world = fabric.global_rank, fabric.world_size
    validation = scored_rows(workspace, select, settings.cache_mib) if select else None
    return Training(
        module=parts.prior or parts.explainer,
        net=parts.net.net,
        settings=settings,
        seed=seed,
        batches=TrainBatches(
            parts.data, settings.batch_size, seed, workers=settings.workers, rank=rank, world=world
        ),
        loss=_step(workspace, settings, seed, parts),
        run=Run(workspace.layout.run(name, seed)),
        label=f"{name} seed {seed}",
        validate=(lambda: score_student(workspace, parts.explainer, validation).means)
        if validation
        else None,
    )


def _parts(
    workspace: Workspace, settings: StudentConfig, seed: int, data: PairedRows, store: TeacherStore
) -> _Parts:
    experiment, device = workspace.experiment, workspace.fabric.device
    torch.manual_seed(seed)
    net = build(settings, class_count(experiment, data.images))
    if workspace.fabric.world_size > 1:
        convert(net.net)
    explainer = build_explainer(experiment.explain, net)
    teacher = None
    if settings.asks_online:
        network = load_teacher(workspace, data.images)
        check_network(workspace, store, weights_sha256(network))
        teacher = build_explainer(experiment.explain, network).to(device)
    parts = _Parts(data, net, explainer, teacher, None)
    return replace(parts, prior=_with_prior(workspace, settings, parts)) if settings.prior else parts


def _step(workspace: Workspace, settings: StudentConfig, seed: int, parts: _Parts) -> StudentStep:
    explain, images = workspace.experiment.explain, parts.data.images
    # At the student's own resolution a perfect student scores 1; at the images' it is the authors' comparison.
    size = (images.size, images.size)
    if explain.compare_at == "student":
        size = parts.explainer.map_size(images.size)
    augment = PairedAugment(settings.augment, seed=seed, keys=images.keys, map_size=size)
    teacher = None
    if parts.teacher is not None:
        teacher = OnlineTeacher(parts.teacher, explain, size, parts.prior)
    compiled = None
    if settings.compile and parts.prior is None:
        losses = partial(loss_terms, settings)
        compiled = CompiledLosses(losses, parts.explainer, workspace.fabric, workspace.progress.say)
    elif settings.compile:
        workspace.progress.say("train.compile: a prior method's step is not compiled; it runs eagerly")
    classes = class_count(workspace.experiment, images)
    return StudentStep(settings, classes, augment, workspace.fabric, teacher, compiled)


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


def _with_prior(workspace: Workspace, settings: StudentConfig, parts: _Parts) -> WithPrior:
    """The student with the modules of its prior method."""
    assert settings.prior is not None
    assert parts.teacher is not None
    distributed, data = workspace.fabric.world_size > 1, parts.data
    if settings.prior.method == "crd" and distributed:
        raise ConfigError(
            "prior method crd keeps its memory in one process; train this student without torchrun"
        )
    labels = torch.from_numpy(data.images.label_column[data.rows])
    images = TrainingRows(data.images.size, torch.from_numpy(data.rows), labels)
    prior = build_prior(settings.prior, parts.explainer, parts.net, parts.teacher.model, images)
    if distributed:
        # ReviewKD's adapters have batch norms too
        convert(prior.method)
    return prior


def _identity(workspace: Workspace, name: str, seed: int, store: TeacherStore) -> dict[str, Any]:
    """What decides the run's weights; a run is never continued when any of it changes."""
    return {
        "student": name,
        "seed": seed,
        **run_settings(workspace.experiment, name),
        "images": store.manifest.images,
        "teacher": store.manifest.teacher.weights_sha256,
    }
