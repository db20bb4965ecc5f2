"""Every loss against a float64 numpy reference; gradients stay finite where maps vanish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.distill.losses import explanation_loss, kd_loss, multilabel_kd_loss

Array = np.ndarray[Any, np.dtype[np.float64]]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def reference_kd(student: Array, teacher: Array, temperature: float) -> float:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return float(temperature**2 * (p * np.log(p / q)).sum(1).mean())


def reference_multilabel(student: Array, teacher: Array) -> float:
    p, q = (np.clip(1 / (1 + np.exp(-x)), 1e-6, 1 - 1e-6) for x in (teacher, student))
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1).mean())


def reference_explanation(student: Array, teacher: Array) -> tuple[float, float]:
    distances = []
    for s, t in zip(student.reshape(len(student), -1), teacher.reshape(len(teacher), -1), strict=True):
        if s.any() and t.any():
            distances.append(1 - s @ t / np.sqrt((s @ s) * (t @ t)))
    return float(np.mean(distances)) if distances else 0.0, len(distances) / len(student)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(size=shape) * scale


def tensor(array: Array, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(array, dtype=dtype, requires_grad=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 12), st.sampled_from([0.5, 1.0, 5.0, 20.0]))
def test_kd_equals_the_reference(seed: int, batch: int, classes: int, temperature: float) -> None:
    student, teacher = (
        normal(batch, classes, seed=seed, scale=4),
        normal(batch, classes, seed=seed + 1, scale=4),
    )
    found = kd_loss(tensor(student), tensor(teacher), temperature)
    assert found.item() == pytest.approx(
        reference_kd(student, teacher, temperature), rel=1e-4, abs=1e-6 * temperature**2
    )


def test_kd_by_hand() -> None:
    """Teacher (.75, .25), student (.5, .5): .75 ln 1.5 + .25 ln .5."""
    teacher = torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32)
    assert float(kd_loss(torch.zeros(1, 2), teacher, 1)) == pytest.approx(
        0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 20), st.sampled_from([1.0, 30.0]))
def test_multilabel_kd_equals_the_reference(seed: int, batch: int, classes: int, scale: float) -> None:
    student, teacher = (normal(batch, classes, seed=seed + i, scale=scale) for i in range(2))
    found = multilabel_kd_loss(tensor(student), tensor(teacher))
    assert found.item() == pytest.approx(reference_multilabel(student, teacher), rel=1e-4, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1.0, 1e-7, 1e-12, 1e6]), st.integers(0, 7))
def test_explanation_equals_the_reference(seed: int, batch: int, scale: float, dead: int) -> None:
    student, teacher = normal(batch, 2, 4, 3, seed=seed, scale=scale), normal(batch, 2, 4, 3, seed=seed + 1)
    student[dead & 1 :: 3] *= dead % 2
    teacher[dead & 2 :: 3] *= dead > 3
    found, valid = explanation_loss(tensor(student), tensor(teacher))
    expected, share = reference_explanation(student, teacher)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert valid.item() == pytest.approx(share)


LOSSES: list[tuple[str, Callable[[Tensor, Tensor], Any], tuple[int, ...]]] = [
    ("kd", lambda s, t: kd_loss(s, t, 5.0), (3, 4)),
    ("multilabel", multilabel_kd_loss, (3, 4)),
    ("explanation", lambda s, t: explanation_loss(s, t)[0], (3, 1, 4, 4)),
]


@pytest.mark.parametrize(("name", "loss", "shape"), LOSSES, ids=[name for name, *_ in LOSSES])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_in_float32_with_gradients_for_the_student_only(
    name: str, loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    student, teacher = tensor(normal(*shape), dtype), tensor(normal(*shape, seed=1), dtype)
    exact = loss(student.detach().float(), teacher.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.shape == ()
    torch.testing.assert_close(value, exact)
    value.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.any()


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30, 1e-12, 1e-7])
def test_vanishing_maps_have_finite_gradients(scale: float) -> None:
    maps, other = tensor(np.abs(normal(4, 1, 7, 7)) * scale), torch.rand(4, 1, 7, 7)
    value, valid = explanation_loss(maps, other)
    value.backward()
    assert value.isfinite()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    assert torch.linalg.vector_norm(maps.grad).isfinite()  # gradient clipping squares it
    assert valid.item() == (1.0 if scale >= 1e-12 else 0.0)


def test_half_precision_maps_of_1e_12_are_zero_and_left_out() -> None:
    maps = tensor(np.full((2, 1, 3, 3), 1e-12), torch.float16)
    value, valid = explanation_loss(maps, torch.rand(2, 1, 3, 3))
    value.backward()
    assert valid.item() == 0
    assert maps.grad is not None
    assert not maps.grad.any()


def test_dead_samples_do_not_change_the_others_loss_or_gradient() -> None:
    student, teacher = normal(4, 1, 5, 5), normal(4, 1, 5, 5, seed=1)
    alone = tensor(student[:2])
    expected, _ = explanation_loss(alone, tensor(teacher[:2]))
    expected.backward()
    student[2], teacher[3] = 0, 0
    mixed = tensor(student)
    value, valid = explanation_loss(mixed, tensor(teacher))
    value.backward()
    assert valid.item() == 0.5
    torch.testing.assert_close(value, expected)
    assert alone.grad is not None
    assert mixed.grad is not None
    torch.testing.assert_close(mixed.grad[:2], alone.grad)
    assert not mixed.grad[2:].any()


def test_a_perfect_student_has_no_loss() -> None:
    maps, logits = tensor(normal(3, 1, 4, 4)), tensor(normal(3, 5))
    assert explanation_loss(maps, maps * 7)[0].item() == pytest.approx(0, abs=1e-6)
    assert kd_loss(logits, logits, 5).item() == pytest.approx(0, abs=1e-6)
    assert multilabel_kd_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)


def test_a_nan_map_shows_in_the_loss() -> None:
    maps = torch.rand(2, 1, 3, 3)
    maps[0, 0, 1, 1] = torch.nan
    assert explanation_loss(maps, torch.rand(2, 1, 3, 3))[0].isnan()


def test_maps_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="map_size"):
        explanation_loss(torch.rand(2, 1, 7, 7), torch.rand(2, 1, 14, 14))
