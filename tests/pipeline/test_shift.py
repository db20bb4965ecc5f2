"""The shift curve (paper Fig. 5): 1 for explanations that move with the image, the period of patches otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts import ImageSet, Sample, open_images
from artifacts.packing import Packing, write_images
from pipeline.config import EvaluateConfig, Experiment
from pipeline.evaluate.shift import shift_curve
from pipeline.explain import Explained
from pipeline.order.runs import distill_all
from pipeline.workspace import SHIFT_CURVE, Layout, Workspace

SHIFTS = tuple(range(17))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Noise that has all frequencies."""
    rng = np.random.default_rng(0)
    write_images(
        tmp_path / "images",
        Packing(
            count=5,
            get=lambda row: Sample(f"s{row}", rng.integers(0, 256, (3, 48, 48), np.uint8)),
            view={"size": 48},
            classes=[],
            source="noise",
            rows_per_shard=5,
        ),
    )
    return open_images(tmp_path / "images")


class Pixelwise(nn.Module):
    """Explains by the pixels themselves; `patch` > 1: by the mean of each patch of a fixed grid."""

    def __init__(self, patch: int = 1) -> None:
        super().__init__()
        self.patch, self.asked = patch, []

    def forward(self, images: Tensor, classes: Tensor | None = None, explain: bool = True) -> Explained:
        logits = images.mean((2, 3))
        self.asked.append(classes)
        maps = F.avg_pool2d(images.mean(1, keepdim=True) - 0.5, self.patch)
        return Explained(logits, F.interpolate(maps, scale_factor=float(self.patch)), logits.argmax(1))


def curve(explainer: nn.Module, images: ImageSet, **settings: Any) -> list[float]:
    config = EvaluateConfig(shifts=SHIFTS, **settings)
    found = shift_curve(explainer, images, config, torch.device("cpu"))
    assert found["shifts"] == list(SHIFTS)
    return found["cosine"]


def test_what_moves_with_the_image_is_1_at_every_shift(images: ImageSet) -> None:
    assert curve(Pixelwise(), images) == pytest.approx([1.0] * 17)


def test_patches_show_their_period(images: ImageSet) -> None:
    found = curve(Pixelwise(8), images)
    assert found[0] == found[8] == found[16] == pytest.approx(1)
    assert max(found[2:7] + found[10:15]) < 0.6


def test_the_explained_class_is_that_of_the_unshifted_image(images: ImageSet) -> None:
    explainer = Pixelwise()
    curve(explainer, images, shift_images=3)
    first, *others = explainer.asked
    assert first is None
    assert all(torch.equal(classes, others[0]) for classes in others)
    assert len(others[0]) == 3


def test_small_maps_are_compared_at_the_images_size(images: ImageSet) -> None:
    class Coarse(Pixelwise):
        def forward(self, images: Tensor, classes: Tensor | None = None, explain: bool = True) -> Explained:
            found = super().forward(images, classes)
            return found._replace(maps=F.avg_pool2d(found.maps, 8))

    found = curve(Coarse(), images)
    assert found[0] == pytest.approx(1)
    assert found[8] > 0.85  # but for the border
    assert found[4] < found[8]


def test_it_stands_in_the_results_and_beside_the_stores(
    prepared: Layout, experiment_of: Callable[..., Experiment], fabric: Fabric
) -> None:
    experiment = experiment_of(evaluate__shifts=[0, 2], evaluate__shift_images=8, train__epochs=1)
    distill_all(Workspace(experiment, prepared, fabric), ["kd-frozen"], [0])
    result = json.loads((prepared.run("kd-frozen", 0) / "result.json").read_text())
    teacher = json.loads(prepared.stores("gradcam-centred").read(SHIFT_CURVE))
    for found in (result["shift"], teacher):
        assert found["split"] == "test-ood"
        assert found["shifts"] == [0, 2]
        assert found["cosine"][0] == pytest.approx(1, abs=1e-4)
