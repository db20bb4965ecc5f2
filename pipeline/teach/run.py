"""Train the experiment's teacher on labels, optionally guided to look at the object (Rao et al., ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts import ImageSet, open_images
from artifacts.durable import write_atomic
from artifacts.errors import ConfigError, DataError
from pipeline.augment.counter import Ids, key_ids
from pipeline.augment.paired import PairedAugment
from pipeline.config import Experiment, TeachConfig
from pipeline.data.batches import Batch, PairedRows, TrainBatches
from pipeline.devices import share_of_valid
from pipeline.evaluate.scores import score, student_answers
from pipeline.explain import heat
from pipeline.models import build, start_from
from pipeline.models.sync_norm import convert
from pipeline.progress import Progress
from pipeline.teach.guidance import class_masks, guidance_loss, guided_classes
from pipeline.training.labels import label_loss
from pipeline.training.loop import fit
from pipeline.training.pareto import ParetoFront
from pipeline.training.run import Run, teacher_defaults
from pipeline.training.trained import build_explainer, class_count
from pipeline.workspace import Layout


@dataclass(frozen=True)
class TeacherStep:
    """The labels' loss + weight * guidance_loss(map of a label's class, its mask or boxes).

    An image with several labels is guided about one of them a step, drawn anew in each epoch. `ids`: of the image set's
    keys, by row.
    """

    settings: TeachConfig
    augment: PairedAugment
    ids: Ids
    fabric: Fabric

    def __call__(self, teacher: nn.Module, batch: Batch, epoch: int, step: int = 0) -> dict[str, Tensor]:
        guide = self.settings.guide
        if guide is None:
            images, _, _ = self.augment(batch.images, None, batch.rows, epoch)
            return {"loss": label_loss(self.settings.loss, teacher(images), batch.labels)}
        classes = guided_classes(batch.labels, self.ids[batch.rows.cpu().numpy()], self.settings.seed, epoch)
        images, masks, _ = self.augment(batch.images, _masks(batch, classes), batch.rows, epoch)
        assert masks is not None
        explained = teacher(images, classes, differentiable=True)
        classification = label_loss(self.settings.loss, explained.logits, batch.labels)
        guidance, valid = guidance_loss(guide.loss, heat(explained.maps, images), masks)
        guidance = guidance * share_of_valid(self.fabric, valid)
        total = classification + guide.weight * guidance
        return {"loss": total, "classification": classification, "guidance": guidance, "valid_maps": valid}


def _masks(batch: Batch, classes: Tensor) -> Tensor:
    """The image's mask, or with several labels an image the boxes of the guided class: f32 [B,1,S,S] in 0..1."""
    assert batch.masks is not None
    if not batch.labels.is_floating_point():
        return batch.masks
    assert batch.boxes is not None
    return class_masks(batch.boxes, classes, batch.images.shape[-1])


def teach(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> dict[str, Any]:
    """Train the teacher, or continue, or return the result that is there.

    Raises ConfigError where the config names a pretrained teacher or settings that do not fit the labels, DataError
    where an image lacks a label, or the mask or box that guidance needs.
    """
    settings = experiment.teacher.train
    if settings is None:
        raise ConfigError(
            f"the teacher is pretrained (weights: {experiment.teacher.weights}); nothing to teach"
        )
    images = open_images(layout.images(settings.split))
    _check_labels(images, settings)
    run = Run(layout.teacher)
    if fabric.is_global_zero:
        identity = {"teacher": experiment.teacher.model_dump(mode="json"), "images": images.fingerprint}
        run.open(identity, teacher_defaults())
    fabric.barrier()
    if run.done:
        return run.result()

    torch.manual_seed(settings.seed)
    net = build(experiment.teacher, class_count(experiment, images))
    if settings.init:
        start_from(net, experiment.teacher, settings.init)
    if fabric.world_size > 1:
        convert(net.net)
    explainer = build_explainer(experiment.explain, net)
    front = ParetoFront(run.path, settings.pareto) if settings.pareto else None
    data = PairedRows(
        images, masks=settings.guide.by if settings.guide else None, cache_mib=settings.cache_mib
    )
    validation = _validation_rows(experiment, layout, settings)
    trained = fit(
        fabric,
        explainer if settings.guide else net,
        net.net,
        settings,
        settings.seed,
        TrainBatches(
            data,
            settings.batch_size,
            settings.seed,
            workers=settings.workers,
            rank=fabric.global_rank,
            world=fabric.world_size,
        ),
        TeacherStep(
            settings,
            PairedAugment(
                settings.augment, seed=settings.seed, keys=images.keys, map_size=net.map_size(images.size)
            ),
            key_ids(images.keys),
            fabric,
        ),
        run,
        validate=(
            lambda: score(
                fabric, student_answers(explainer.eval()), validation, experiment.evaluate.batch_size
            )
        )
        if validation
        else None,
        front=front,
        progress=progress,
        label="teach",
    )
    result = {"seconds": {"train": round(trained, 1)}}
    if fabric.is_global_zero:
        _keep_within(run, front, settings)
        run.finish(result)
    fabric.barrier()
    return result


def _keep_within(run: Run, front: ParetoFront | None, settings: TeachConfig) -> None:
    """Make the front's epoch that `within` asks for the run's result."""
    if front is not None and settings.within is not None and settings.best_by is not None:
        epoch = front.best(run.history(), settings.best_by, settings.within)
        write_atomic(run.path / "best.safetensors", front.weights(epoch).read_bytes())


def _check_labels(images: ImageSet, settings: TeachConfig) -> None:
    """Raises DataError or ConfigError where labels and settings do not go together."""
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


def _validation_rows(experiment: Experiment, layout: Layout, settings: TeachConfig) -> PairedRows | None:
    """The selection split without a store: there is none before the teacher is trained."""
    if experiment.evaluate.select is None:
        return None
    images = open_images(layout.images(experiment.evaluate.select))
    return PairedRows(images, masks="any", cache_mib=settings.cache_mib)
