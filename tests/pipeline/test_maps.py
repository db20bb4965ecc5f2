"""Dead maps, unit scale and cosine by hand; the threshold keeps every live map and every loss's gradient finite."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from artifacts.rows import DEAD, dead_rows
from pipeline.config import ModelConfig
from pipeline.distill.losses import explanation_loss
from pipeline.explain import build as build_explainer
from pipeline.explain.maps import cosine, dead, unit_scale
from pipeline.models import build
from pipeline.teach.guidance import Kind, guidance_loss


def spikes(*heights: float) -> Tensor:
    """Maps [B,2,2,2] that are zero but for one pixel."""
    maps = torch.zeros(len(heights), 2, 2, 2)
    maps[:, 1, 0, 0] = torch.tensor(heights)
    return maps


def test_a_map_is_dead_if_no_magnitude_reaches_the_threshold() -> None:
    maps = spikes(0, -0.9 * DEAD, -DEAD, 1, torch.nan, torch.inf)
    expected = [True, True, False, False, False, False]
    assert dead(maps).tolist() == expected
    assert dead(maps.double()).tolist() == expected
    assert dead_rows(maps.numpy()).tolist() == expected
    assert unit_scale(maps).alive.tolist() == [not is_dead for is_dead in expected]


def test_zero_maps_of_half_precision_are_dead() -> None:
    """The threshold itself is 0 in float16."""
    maps = spikes(0, 6e-8).half()
    assert dead(maps).tolist() == [True, False]
    assert unit_scale(maps).flat.dtype == torch.float32


def test_unit_scale_by_hand() -> None:
    maps = torch.tensor([[1.0, -4.0], [3e-12, 6e-12], [1e-16, 0.0], [0.0, 0.0]], requires_grad=True)
    unit = unit_scale(maps)
    assert unit.flat.tolist() == [[0.25, -1.0], [0.5, 1.0], [0.0, 0.0], [0.0, 0.0]]
    (gradient,) = torch.autograd.grad(unit.flat.sum(), maps)
    assert gradient[0].tolist() == [0.25, 0.25]
    assert not gradient[2:].any()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e25])
def test_cosine_by_hand(scale: float) -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).reshape(4, 1, 1, 2)
    b = torch.tensor([[4.0, 3.0], [0.0, 2.0], [1.0, 1.0], [-1.0, -1.0]]).reshape(4, 1, 1, 2)
    value, alive = cosine(a * scale, b)
    torch.testing.assert_close(value, torch.tensor([0.96, 0.0, 0.0, -1.0]))
    assert alive.tolist() == [True, True, False, True]


def test_maps_of_other_sizes_are_not_compared() -> None:
    with pytest.raises(ValueError, match="shapes"):
        cosine(torch.rand(2, 1, 7, 7), torch.rand(2, 1, 6, 6))


@pytest.mark.parametrize("kind", ["explanation", *get_args(Kind)])
def test_at_the_threshold_the_worst_gradient_can_still_be_squared(kind: str) -> None:
    """The worst map has one peak, and the object lies where the map is faint; `ppce` divides by 1e-4 of the peak."""
    maps, mask = torch.full((1, 1, 7, 7), 1.01e-4 * DEAD), torch.zeros(1, 1, 7, 7)
    maps[..., 0, 0], mask[..., 6, 6] = 1.001 * DEAD, 1
    maps.requires_grad_()
    loss = explanation_loss(maps, mask) if kind == "explanation" else guidance_loss(kind, maps, mask)  # type: ignore[arg-type]
    loss[0].backward()
    assert loss[1].item() == 1
    assert maps.grad is not None
    assert 0 < torch.linalg.vector_norm(maps.grad) < torch.inf


def test_the_faintest_known_maps_are_alive() -> None:
    torch.manual_seed(0)
    explainer = build_explainer("auto", build(ModelConfig(model="bcos/densenet169"), 100).eval())
    maps = explainer(torch.rand(1, 3, 64, 64)).maps
    assert maps.abs().max() < 1e-11
    assert not dead(maps).any()
    assert not dead_rows(np.asarray(maps)).any()
