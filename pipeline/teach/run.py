"""Train the experiment's teacher on labels, guided to look at the object if the config says so."""

from __future__ import annotations

from typing import Any

import torch

from artifacts import ImageSet
from artifacts.durable import write_atomic
from artifacts.errors import ConfigError, DataError
from pipeline.augment.paired import PairedAugment
from pipeline.config import TeachConfig
from pipeline.data.batches import PairedRows, TrainBatches
from pipeline.evaluate.scores import score, student_answers
from pipeline.explain import Explainer
from pipeline.models import build, start_from
from pipeline.models.sync_norm import convert
from pipeline.provenance import class_count
from pipeline.teach.step import TeacherStep
from pipeline.training.loop import Training, Validate, fit
from pipeline.training.pareto import ParetoFront
from pipeline.training.run import Run, teacher_defaults
from pipeline.training.trained import build_explainer
from pipeline.workspace import Workspace


def teach(workspace: Workspace) -> dict[str, Any]:
    """Train the teacher, or continue, or return the result that is there.

    Raises ConfigError if the config names a pretrained teacher or settings that do not fit the labels, DataError
    if an image lacks a label, or the mask or box that guidance needs.
    """
    experiment, fabric = workspace.experiment, workspace.fabric
    settings = experiment.teacher.train
    if settings is None:
        raise ConfigError(
            f"the teacher is pretrained (weights: {experiment.teacher.weights}); nothing to teach"
        )
    images = workspace.open_images(settings.split)
    _check_labels(images, settings)
    run = Run(workspace.layout.teacher)
    if fabric.is_global_zero:
        identity = {"teacher": experiment.teacher.model_dump(mode="json"), "images": images.fingerprint}
        run.open(identity, teacher_defaults())
    fabric.barrier()
    if run.done:
        return run.result()
    training = _training(workspace, settings, images)
    result = {"seconds": {"train": round(fit(training, fabric, workspace.progress), 1)}}
    if fabric.is_global_zero:
        _keep_within(run, training.front, settings)
        run.finish(result)
    fabric.barrier()
    return result


def _training(workspace: Workspace, settings: TeachConfig, images: ImageSet) -> Training:
    """The teacher, what it sees, and what its steps minimise."""
    experiment, fabric, run = workspace.experiment, workspace.fabric, Run(workspace.layout.teacher)
    torch.manual_seed(settings.seed)
    net = build(experiment.teacher, class_count(experiment, images))
    if settings.init:
        start_from(net, experiment.teacher, settings.init)
    if fabric.world_size > 1:
        convert(net.net)
    explainer = build_explainer(experiment.explain, net)
    guided = settings.guide.by if settings.guide else None
    data = PairedRows(images, masks=guided, cache_mib=settings.cache_mib)
    size = explainer.map_size(images.size)
    augment = PairedAugment(settings.augment, seed=settings.seed, keys=images.keys, map_size=size)
    rank, world = fabric.global_rank, fabric.world_size
    return Training(
        module=explainer if settings.guide else net,
        net=net.net,
        settings=settings,
        seed=settings.seed,
        batches=TrainBatches(
            data, settings.batch_size, settings.seed, workers=settings.workers, rank=rank, world=world
        ),
        loss=TeacherStep(settings, augment, fabric, type(explainer)),
        run=run,
        label="teach",
        validate=_validation(workspace, settings, explainer),
        front=ParetoFront(run.path, settings.pareto) if settings.pareto else None,
    )


def _validation(workspace: Workspace, settings: TeachConfig, explainer: Explainer) -> Validate | None:
    """Scores on the selection split without a store: there is none before the teacher is trained."""
    evaluate = workspace.experiment.evaluate
    if evaluate.select is None:
        return None
    rows = PairedRows(workspace.open_images(evaluate.select), masks="any", cache_mib=settings.cache_mib)

    def validate() -> dict[str, float]:
        return score(workspace.fabric, student_answers(explainer.eval()), rows, evaluate.batch_size).means

    return validate


def _keep_within(run: Run, front: ParetoFront | None, settings: TeachConfig) -> None:
    """Make the front's epoch that `within` asks for the run's result."""
    if front is not None and settings.within is not None and settings.best_by is not None:
        epoch = front.best(run.history(), settings.best_by, settings.within)
        write_atomic(run.path / "best.safetensors", front.weights(epoch).read_bytes())


def _check_labels(images: ImageSet, settings: TeachConfig) -> None:
    """Raises DataError or ConfigError if labels and settings do not go together."""
    labels, guide = images.labels, settings.guide
    if any(label is None for label in labels):
        raise DataError(
            f"{images.place} has unlabelled images, and a teacher learns from labels; use labelled data"
        )
    if not any(isinstance(label, tuple) for label in labels):
        return
    if settings.loss == "ce":
        raise ConfigError(f"{images.place} has several labels an image: set teacher.train.loss to bce")
    if guide and guide.by == "mask":
        raise ConfigError(
            f"{images.place} has several labels an image, and a mask does not say whose it is: set "
            "teacher.train.guide.by to box"
        )
