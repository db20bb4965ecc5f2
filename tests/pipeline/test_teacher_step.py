"""The teacher's step as a whole, on images that show their own masks: a mask moves as its image does.

Channel k of an image is the mask of class k, so that what guided the teacher can be read off the image it saw.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.augment.paired import PairedAugment
from pipeline.config import AugmentConfig, TeachConfig
from pipeline.data.batches import Batch
from pipeline.explain import Explained, GradCAM
from pipeline.teach.guidance import guidance_loss
from pipeline.teach.step import TeacherStep
from pipeline.training.labels import label_loss
from pipeline.training.loop import StepLoss

SIZE, ROWS, CLASSES = 16, 24, 3
KEYS = [f"image-{row}" for row in range(ROWS)]
WEIGHT = 3.0


class Teacher(nn.Module):
    """An explainer that keeps what it is given; its maps are smooth and differ between images."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(ROWS, CLASSES))
        self.maps = nn.Parameter(torch.rand(ROWS, 1, SIZE, SIZE) + 0.1)

    def forward(
        self, images: Tensor, classes: Tensor | None = None, differentiable: bool = False
    ) -> Explained:
        self.images, self.classes = images, classes
        assert differentiable
        explained = self.logits.argmax(1) if classes is None else classes
        return Explained(self.logits, self.maps, explained)


def step_of(fabric: Fabric, by: str, loss: str) -> TeacherStep:
    guide: dict[str, Any] = {"by": by, "loss": "l1", "weight": WEIGHT}
    settings = TeachConfig.model_validate({"loss": loss, "guide": guide, "seed": 0})
    augment = AugmentConfig(crop_scale=(0.3, 0.8), hflip=0.5)
    return TeacherStep(settings, PairedAugment(augment, keys=KEYS, map_size=(SIZE, SIZE)), fabric, GradCAM)


def boxes_of(row: int) -> Tensor:
    """A box of each class, f32 [3,5]: left, middle, right, at a height of the row's own."""
    top = row % 8
    return torch.tensor([[k, 5.0 * k, top, 5.0 * k + 4, top + 6] for k in range(CLASSES)])


def images_of_boxes() -> Tensor:
    """u8 [B,3,S,S]."""
    images = torch.zeros(ROWS, CLASSES, SIZE, SIZE, dtype=torch.uint8)
    for row in range(ROWS):
        for cls, x0, y0, x1, y1 in boxes_of(row).int().tolist():
            images[row, cls, y0:y1, x0:x1] = 255
    return images


def several_labels() -> Tensor:
    """f32 [B,3]: two classes each."""
    labels = torch.ones(ROWS, CLASSES)
    labels[torch.arange(ROWS), torch.arange(ROWS) % CLASSES] = 0
    return labels


def batch_of(labels: Tensor) -> Batch:
    """With the masks of channel `label`, which several labels do not use, and all boxes."""
    images, rows = images_of_boxes(), torch.arange(ROWS)
    masks = images[rows, labels if labels.dim() == 1 else 0][:, None].float() / 255
    return Batch(rows, images, labels, boxes=tuple(map(boxes_of, range(ROWS))), masks=masks)


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_mask_moves_with_its_image_and_the_label_is_explained(epoch: int, fabric: Fabric) -> None:
    teacher, labels = Teacher(), torch.arange(ROWS) % CLASSES
    found = step_of(fabric, "mask", "ce")(teacher, batch_of(labels), epoch)
    assert teacher.classes is not None
    assert teacher.classes.tolist() == labels.tolist()
    check(found, teacher, labels, "ce")


def test_several_labels_are_guided_by_the_boxes_of_one_of_them(fabric: Fabric) -> None:
    labels, guided = several_labels(), []
    for epoch in range(8):
        teacher = Teacher()
        check(step_of(fabric, "box", "bce")(teacher, batch_of(labels), epoch), teacher, labels, "bce")
        assert teacher.classes is not None
        guided.append(teacher.classes)
    chosen = torch.stack(guided, 1)
    assert (labels.gather(1, chosen) == 1).all()
    assert (chosen.amin(1) < chosen.amax(1)).float().mean() > 0.9


def check(found: StepLoss, teacher: Teacher, labels: Tensor, loss: str) -> None:
    """The step's loss is that of the labels and, WEIGHT times, that of the masks which the teacher's images show."""
    assert teacher.classes is not None
    shown = teacher.images[torch.arange(ROWS), teacher.classes][:, None]
    guidance, valid = guidance_loss("l1", teacher.maps, shown)
    classification = label_loss(loss, teacher.logits, labels)
    assert 0 < float(valid) <= 1
    expected = {"guidance": guidance, "classification": classification}
    assert found.total.item() == pytest.approx((classification + WEIGHT * guidance).item(), rel=1e-4)
    for name, value in expected.items():
        assert found.terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
