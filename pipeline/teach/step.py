"""One training step of a teacher: the labels, and guidance to look at the object (Rao et al., ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.augment.paired import PairedAugment
from pipeline.config import TeachConfig
from pipeline.data.batches import Batch
from pipeline.devices import share_of_valid
from pipeline.explain import Explainer
from pipeline.teach.guidance import class_masks, guidance_loss, guided_classes
from pipeline.training.labels import label_loss
from pipeline.training.loop import StepLoss


@dataclass(frozen=True)
class TeacherStep:
    """The labels' loss + weight * guidance_loss(map of a label's class, its mask or boxes).

    An image with several labels is guided about one of them a step, drawn anew in each epoch.
    `explainer`: the kind of the maps.
    """

    settings: TeachConfig
    augment: PairedAugment
    fabric: Fabric
    explainer: type[Explainer]

    def __call__(self, teacher: nn.Module, batch: Batch, epoch: int, step: int = 0) -> StepLoss:
        guide = self.settings.guide
        if guide is None:
            images, _, _ = self.augment(batch.images, None, batch.rows, epoch)
            return StepLoss(label_loss(self.settings.loss, teacher(images), batch.labels), {})
        ids = self.augment.identities(batch.rows)
        classes = guided_classes(batch.labels, ids, self.settings.seed, epoch)
        images, masks, _ = self.augment(batch.images, _masks(batch, classes), batch.rows, epoch)
        assert masks is not None
        explained = teacher(images, classes, differentiable=True)
        classification = label_loss(self.settings.loss, explained.logits, batch.labels)
        guidance, valid = guidance_loss(guide.loss, self.explainer.heat(explained.maps, images), masks)
        guidance = guidance * share_of_valid(self.fabric, valid)
        total = classification + guide.weight * guidance
        return StepLoss(total, {"classification": classification, "guidance": guidance, "valid_maps": valid})


def _masks(batch: Batch, classes: Tensor) -> Tensor:
    """The image's mask, or with several labels an image the boxes of the guided class: f32 [B,1,S,S] in 0..1."""
    assert batch.masks is not None
    if not batch.labels.is_floating_point():
        return batch.masks
    assert batch.boxes is not None
    return class_masks(batch.boxes, classes, batch.images.shape[-1])
