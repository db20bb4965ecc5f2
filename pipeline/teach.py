"""Train the experiment's teacher on labels, optionally guided to look at the object (Rao et al., ICCV 2023)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts import open_images
from artifacts.errors import ConfigError
from pipeline import losses
from pipeline.augment import PairedAugment
from pipeline.config import Experiment, GuideConfig, TeachConfig
from pipeline.data.loader import Batch, PairedRows, TrainBatches
from pipeline.evaluate import score, student_answers
from pipeline.explainers import heat
from pipeline.launch import share_of_valid
from pipeline.layout import Layout
from pipeline.models import build
from pipeline.models.sync_norm import convert
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.teacher import build_explainer, class_count
from pipeline.train import fit


@dataclass(frozen=True)
class TeacherStep:
    """The labels' loss + weight * (1 - share of the label's map energy inside the object)."""

    loss: str
    guide: GuideConfig | None
    augment: PairedAugment
    fabric: Fabric

    def __call__(self, teacher: nn.Module, batch: Batch, epoch: int, step: int = 0) -> dict[str, Tensor]:
        images, masks, _ = self.augment(batch.images, batch.masks, batch.rows, epoch)
        if self.guide is None or masks is None:
            return {"loss": losses.label_loss(self.loss, teacher(images), batch.labels)}
        explained = teacher(images, batch.labels, differentiable=True)
        classification = losses.label_loss(self.loss, explained.logits, batch.labels)
        outside, valid = losses.energy_guidance_loss(heat(explained.maps, images), masks)
        outside = outside * share_of_valid(self.fabric, valid)
        total = classification + self.guide.weight * outside
        return {"loss": total, "classification": classification, "outside": outside, "valid_maps": valid}


def teach(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> dict[str, Any]:
    """Train the teacher, or continue, or return the result that is there.

    Raises ConfigError where the config names a pretrained teacher, DataError where guidance lacks a mask or box.
    """
    settings = experiment.teacher.train
    if settings is None:
        raise ConfigError(
            f"the teacher is pretrained (weights: {experiment.teacher.weights}); nothing to teach"
        )
    images = open_images(layout.images(settings.split))
    run = Run(layout.teacher)
    if fabric.is_global_zero:
        run.open({"teacher": experiment.teacher.model_dump(mode="json"), "images": images.fingerprint})
    fabric.barrier()
    if run.done:
        return run.result()

    started = time.monotonic()
    torch.manual_seed(settings.seed)
    net = build(experiment.teacher, class_count(experiment, images))
    if fabric.world_size > 1:
        convert(net.net)
    explainer = build_explainer(experiment.explain, net)
    data = PairedRows(
        images, masks=settings.guide.by if settings.guide else None, cache_mib=settings.cache_mib
    )
    validation = _validation_rows(experiment, layout, settings)
    fit(
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
            settings.loss,
            settings.guide,
            PairedAugment(
                settings.augment, seed=settings.seed, keys=images.keys, map_size=net.map_size(images.size)
            ),
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
        progress=progress,
        label="teach",
    )
    result = {"seconds": {"train": round(time.monotonic() - started, 1)}}
    if fabric.is_global_zero:
        run.finish(result)
    fabric.barrier()
    return result


def _validation_rows(experiment: Experiment, layout: Layout, settings: TeachConfig) -> PairedRows | None:
    """The selection split without a store: there is none before the teacher is trained."""
    if experiment.evaluate.select is None:
        return None
    images = open_images(layout.images(experiment.evaluate.select))
    return PairedRows(images, masks="any", cache_mib=settings.cache_mib)
