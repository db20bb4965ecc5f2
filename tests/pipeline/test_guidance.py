"""The four guidance losses by hand and against numpy; exact, finite gradients; which class of an image is guided."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.augment.counter import key_ids
from pipeline.teach.guidance import Kind, class_masks, guidance_loss, guided_classes

Array = np.ndarray[Any, np.dtype[np.float64]]
KINDS: tuple[Kind, ...] = get_args(Kind)


def reference(kind: Kind, one: Array, mask: Array) -> float:
    positive = np.maximum(one, 0)
    match kind:
        case "energy":
            return float(1 - (mask * positive).sum() / positive.sum())
        case "l1":
            return float(np.abs(positive / positive.max() - mask).mean())
        case "ppce":
            return float(-(mask * np.log(np.maximum(positive / positive.max(), 1e-4))).sum() / mask.sum())
        case "rrr":
            return float(((1 - mask) * (one / np.abs(one).max()) ** 2).mean())


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(size=shape) * scale


def tensor(array: Array, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(array, dtype=dtype, requires_grad=True)


MAP = torch.tensor([[[[4.0, 2.0], [1.0, -8.0]]]])
MASK = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("energy", 1 - 6 / 7),  # inside 4 + 2, in all 7; -8 is no positive energy
        ("l1", (0 + 0.5 + 0.25 + 0) / 4),  # 1, .5, .25, 0 against 1, 1, 0, 0
        ("ppce", np.log(2) / 2),  # -log 1 and -log .5
        ("rrr", ((1 / 8) ** 2 + 1) / 4),  # outside: 1/8 and -1 of the largest magnitude
    ],
)
def test_by_hand(kind: Kind, expected: float) -> None:
    value, valid = guidance_loss(kind, MAP, MASK)
    assert value.item() == pytest.approx(expected)
    assert valid.item() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_that_is_its_mask_has_no_loss(kind: Kind) -> None:
    assert guidance_loss(kind, 3e-7 * MASK, MASK)[0].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1.0, 1e-7, 1e-12, 1e6]))
def test_equals_the_reference(kind: Kind, seed: int, batch: int, scale: float) -> None:
    """Every third map has no positive part, every fifth mask is empty: left out."""
    maps, masks = normal(batch, 1, 5, 4, seed=seed, scale=scale), normal(batch, 1, 5, 4, seed=seed + 1) > 0.3
    masks[:, :, 0, 0] = True
    maps[1::3] = -np.abs(maps[1::3]) if kind != "rrr" else 0
    masks[2::5] = False
    value, valid = guidance_loss(kind, tensor(maps), torch.tensor(masks))
    found = [
        reference(kind, one, mask.astype(float))
        for row, (one, mask) in enumerate(zip(maps, masks, strict=True))
        if row % 3 != 1 and row % 5 != 2
    ]
    assert value.item() == pytest.approx(np.mean(found), abs=1e-4)
    assert valid.item() == pytest.approx(len(found) / batch)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_exact(kind: Kind) -> None:
    """Central differences in float64, masks soft, as they are after a warp; the gradient does not change the scale."""
    maps = tensor(normal(3, 1, 4, 5), torch.float64)
    masks = torch.rand(3, 1, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: guidance_loss(kind, given, masks)[0], (maps,), eps=1e-7)
    (gradient,) = torch.autograd.grad(guidance_loss(kind, maps, masks)[0], maps)
    assert gradient.abs().max() > 1e-3
    assert (gradient * maps).flatten(1).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-30, 1e-12, 1e-7])
def test_vanishing_maps_have_finite_gradients(kind: Kind, scale: float) -> None:
    maps, masks = tensor(np.abs(normal(4, 1, 7, 7)) * scale), torch.rand(4, 1, 7, 7)
    value, valid = guidance_loss(kind, maps, masks)
    value.backward()
    assert value.isfinite()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    assert torch.linalg.vector_norm(maps.grad).isfinite()  # gradient clipping squares it
    assert valid.item() == (1.0 if scale >= 1e-12 else 0.0)
    assert maps.grad.any() == (scale >= 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_b_cos_sized_maps_give_the_loss_and_gradient_of_their_large_copies(kind: Kind) -> None:
    values, grads = [], []
    for scale in (1.0, 1e-7):
        maps = tensor(normal(2, 1, 6, 6) * scale)
        value, _ = guidance_loss(kind, maps, torch.ones(2, 1, 6, 6).triu())
        value.backward()
        assert maps.grad is not None
        values.append(value.detach())
        grads.append(maps.grad * scale)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_left_out_do_not_change_the_others_gradient(kind: Kind) -> None:
    maps, masks = normal(4, 1, 5, 5), np.ones((4, 1, 5, 5)) * (normal(4, 1, 5, 5, seed=1) > 0)
    alone = tensor(maps[:2])
    guidance_loss(kind, alone, torch.tensor(masks[:2]))[0].backward()
    maps[2], masks[3] = 0, 0
    mixed = tensor(maps)
    value, valid = guidance_loss(kind, mixed, torch.tensor(masks))
    value.backward()
    assert valid.item() == 0.5
    assert alone.grad is not None
    assert mixed.grad is not None
    torch.testing.assert_close(mixed.grad[:2], alone.grad)
    assert not mixed.grad[2:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_in_float32(kind: Kind, dtype: torch.dtype) -> None:
    maps, masks = tensor(normal(3, 1, 4, 4), dtype), torch.rand(3, 1, 4, 4)
    exact = guidance_loss(kind, maps.detach().float(), masks)[0]
    with torch.autocast("cpu", torch.bfloat16):
        value = guidance_loss(kind, maps, masks)[0]
    assert value.dtype == torch.float32
    assert value.shape == ()
    torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_map_shows_in_the_loss(kind: Kind) -> None:
    maps = torch.rand(2, 1, 3, 3)
    maps[0, 0, 1, 1] = torch.nan
    assert guidance_loss(kind, maps, torch.ones(2, 1, 3, 3))[0].isnan()


@pytest.mark.parametrize("shape", [(2, 7, 7), (2, 1, 14, 14), (1, 1, 7, 7)])
def test_masks_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="map_size"):
        guidance_loss("energy", torch.rand(2, 1, 7, 7), torch.rand(shape))


def test_the_guided_class_is_one_of_the_images_own_all_equally_often() -> None:
    ids = key_ids([f"image-{row}" for row in range(3000)])
    labels = torch.zeros(3000, 5)
    labels[:, [0, 2, 4]] = 1
    found = guided_classes(labels, ids, seed=0, epoch=0)
    assert (torch.bincount(found, minlength=5) / 3000 - torch.tensor([1, 0, 1, 0, 1]) / 3).abs().max() < 0.03
    for other in (guided_classes(labels, ids, 1, 0), guided_classes(labels, ids, 0, 1)):
        assert 0.25 < (found == other).float().mean() < 0.42


def test_the_guided_class_does_not_depend_on_the_batch() -> None:
    ids = key_ids([f"image-{row}" for row in range(64)])
    labels = (torch.rand(64, 20, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    labels[:, 7] = 1
    order = np.random.default_rng(0).permutation(64)
    whole = guided_classes(labels, ids, 3, 5)
    assert torch.equal(guided_classes(labels[order], ids[order], 3, 5), whole[order])
    assert labels[torch.arange(64), whole].all()


def test_an_image_without_labels_guides_nothing() -> None:
    classes = guided_classes(torch.zeros(1, 3), key_ids(["a"]), 0, 0)
    masks = class_masks([torch.empty(0, 5)], classes, 4)
    value, valid = guidance_loss("energy", torch.rand(1, 1, 4, 4), masks)
    assert value.item() == valid.item() == 0


def test_a_single_label_is_the_guided_class() -> None:
    labels = torch.tensor([2, 0])
    assert guided_classes(labels, key_ids(["a", "b"]), 0, 0) is labels


def test_masks_are_the_boxes_of_the_guided_class() -> None:
    boxes = torch.tensor([[1.0, 0, 0, 2, 1], [0, 0, 0, 4, 4], [1, 3, 3, 4, 4]])
    masks = class_masks([boxes, boxes, boxes], torch.tensor([1, 0, 2]), 4)
    expected = torch.zeros(4, 4)
    expected[0, :2] = expected[3, 3] = 1
    assert masks.dtype == torch.float32
    assert torch.equal(masks[0, 0], expected)
    assert masks[1].all()
    assert not masks[2].any()
