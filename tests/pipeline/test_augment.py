"""Paired augmentation: image and map stay paired, Kornia's geometry, and the same result in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TV

from pipeline.augment.counter import key_ids
from pipeline.augment.paired import _NOMINAL, PairedAugment, _params, warp
from pipeline.augment.warp import coverage, inside, sampling_grid, shrink
from pipeline.config import AugmentConfig

COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.3}
MOVES = {"rotate": 25.0, "translate": 0.1, "shear": 5.0}
EVERYTHING = AugmentConfig(**COLOUR, **MOVES, vflip=0.3)
KEYS = [f"bird-{i}" for i in range(200)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pixels(batch: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)


def drawn_boxes(augment: PairedAugment, ids: Any, canvas: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Kornia's crop (x0, y0, x1, y1, in px edges) and whether it is mirrored, straight from its parameters."""
    crop, flip = _params(augment._geometry, augment.seed, epoch, ids, canvas, 0)
    corners = crop.data["src"].double()
    return torch.cat([corners[:, 0], corners[:, 2] + 1], 1), flip.data["batch_prob"] > 0.5


def crop_positions(boxes: Tensor, mirrored: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Exact source x and y (px edges) of the centres of `size` output cells: float64 [B,size] each."""
    cells = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    across = torch.where(mirrored[:, None], 1 - cells, cells)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return boxes[:, :1] + across * width[:, None], boxes[:, 1:2] + cells * height[:, None]


@pytest.mark.parametrize("source", [7, 12, 14, 28])
@pytest.mark.parametrize("target", [7, 12, 14, 28])
def test_a_map_of_coordinates_is_cropped_where_the_image_is(source: int, target: int) -> None:
    canvas, batch = 224, 24
    augment = PairedAugment(AugmentConfig(), seed=1, map_size=target)
    centres = (torch.arange(source) + 0.5) * canvas / source
    maps = torch.stack(torch.meshgrid(centres, centres, indexing="xy")).expand(batch, 2, source, source)
    _, warped, _ = augment(pixels(batch, canvas), maps, torch.arange(batch), epoch=5)
    boxes, mirrored = drawn_boxes(augment, np.arange(batch, dtype=np.uint64), canvas, 5)
    assert warped is not None
    # Within half a cell of the frame there is no neighbour to interpolate with: values repeat the border's.
    margin = canvas / source / 2 + (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / target / 2
    for axis, expected in enumerate(crop_positions(boxes, mirrored, target)):
        found = warped[:, axis].mean(1 + axis).double()  # constant along the other axis
        known = (expected > margin) & (expected < canvas - margin)
        assert (found - expected)[known].abs().max() <= 1e-3
        assert known.any()


def test_the_geometry_is_kornias_own() -> None:
    """Kornia crops first, so it repeats the crop's border where we read on: compared half a pixel further in."""
    images, ids = pixels(16, 48), np.arange(16, dtype=np.uint64)
    augment = PairedAugment(AugmentConfig(crop_scale=(0.3, 1.0)), seed=2, size=_NOMINAL)
    ours, _, _ = augment(images, None, ids, epoch=1)
    params = _params(augment._geometry, 2, 1, ids, 48, 0)
    theirs = augment._geometry(images.float() / 255, params=params)
    boxes, mirrored = drawn_boxes(augment, ids, 48, 1)
    x, y = crop_positions(boxes, mirrored, _NOMINAL)
    inner_x = (x > boxes[:, :1] + 0.5) & (x < boxes[:, 2:3] - 0.5)
    inner_y = (y > boxes[:, 1:2] + 0.5) & (y < boxes[:, 3:] - 0.5)
    inner = (inner_y[:, :, None] & inner_x[:, None])[:, None]
    assert ((ours - theirs).abs() * inner).max() < 1e-4
    assert inner.float().mean() > 0.9


def test_rotation_is_kornias_own() -> None:
    images, ids = pixels(8, 48), np.arange(8, dtype=np.uint64)
    augment = PairedAugment(AugmentConfig(crop_scale=None, hflip=0.0, fill=0.0, **MOVES), seed=2)
    ours, _, theta = augment(images, None, ids, epoch=1)
    theirs = augment._geometry(images.float() / 255, params=_params(augment._geometry, 2, 1, ids, 48, 0))
    well_inside = (sampling_grid(theta, (48, 48)).abs() < 1 - 1 / 48).all(-1)[:, None]
    assert ((ours - theirs).abs() * well_inside).max() < 1e-4
    assert ours[~inside(theta, (48, 48)).expand_as(ours)].abs().max() == 0


@pytest.mark.parametrize(
    ("config", "canvas", "size"),
    [(AugmentConfig(), 48, None), (EVERYTHING, 37, None), (AugmentConfig(), 260, 64), (EVERYTHING, 260, 64)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_is_bit_identical_in_any_batch(
    config: AugmentConfig, canvas: int, size: int | None, threads: int
) -> None:
    batch = 11
    images, maps, rows = pixels(batch, canvas), torch.rand(batch, 2, 14, 14), torch.arange(batch) * 7
    whole = PairedAugment(config, seed=5, keys=KEYS, size=size, map_size=7)(images, maps, rows, 3)
    torch.set_num_threads(threads)
    order = torch.randperm(batch)
    for part in (1, 3, 8):
        torch.rand(part)  # torch's own generator has no say
        augment = PairedAugment(config, seed=5, keys=KEYS, size=size, map_size=7)
        parts = [augment(images[rows_], maps[rows_], rows[rows_], 3) for rows_ in order.split(part)]
        for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert expected is not None
            torch.testing.assert_close(torch.cat(found), expected[order], rtol=0, atol=0)


def test_draws_leave_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    PairedAugment(EVERYTHING)(pixels(4, 48), None, [0, 1, 2, 3], 0)
    assert torch.equal(state, torch.get_rng_state())


def test_the_key_is_the_identity_not_the_row() -> None:
    images = pixels(3, 48)
    forward, backward = (
        PairedAugment(AugmentConfig(), keys=KEYS),
        PairedAugment(AugmentConfig(), keys=KEYS[::-1]),
    )
    theta = forward(images, None, [0, 1, 2], 0)[2]
    assert torch.equal(backward(images, None, [199, 198, 197], 0)[2], theta)
    by_id = PairedAugment(AugmentConfig())(images, None, key_ids(KEYS[:3]), 0)[2]
    assert torch.equal(by_id, theta)


def test_epochs_seeds_and_samples_differ() -> None:
    images = pixels(1, 48)
    thetas = {
        tuple(PairedAugment(AugmentConfig(), seed=seed)(images, None, [row], epoch)[2].flatten().tolist())
        for seed in range(3)
        for epoch in range(3)
        for row in range(3)
    }
    assert len(thetas) == 27


def test_flips_and_crops_follow_their_settings() -> None:
    images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    config = AugmentConfig(crop_scale=(0.25, 0.5), hflip=0.5, vflip=0.2)
    theta = PairedAugment(config)(images, None, torch.arange(2000), 0)[2]
    assert abs((theta[:, 0, 0] < 0).float().mean() - 0.5) < 0.04
    assert abs((theta[:, 1, 1] < 0).float().mean() - 0.2) < 0.04
    area = (theta[:, 0, 0] * theta[:, 1, 1]).abs()
    assert 0.22 < area.min() < 0.27
    assert 0.47 < area.max() < 0.53  # whole pixels


def test_disabled_is_the_canonical_view() -> None:
    images, maps = pixels(5, 48), torch.rand(5, 2, 6, 6)
    found = PairedAugment(AugmentConfig(enabled=False, **COLOUR))(images, maps, torch.arange(5), 9)
    assert torch.equal(found[0], images.float() / 255)
    assert torch.equal(found[1], maps)
    assert torch.equal(found[2], torch.eye(2, 3).expand(5, 2, 3))
    smaller = PairedAugment(AugmentConfig(enabled=False), map_size=3)(images, maps, torch.arange(5), 9)[1]
    torch.testing.assert_close(smaller, F.avg_pool2d(maps, 2), atol=0.2, rtol=0)


def test_colour_changes_images_only() -> None:
    images, maps, rows = pixels(6, 48), torch.rand(6, 1, 6, 6), torch.arange(6)
    plain = PairedAugment(AugmentConfig())(images, maps, rows, 1)
    coloured = PairedAugment(AugmentConfig(**COLOUR))(images, maps, rows, 1)
    assert torch.equal(plain[1], coloured[1])
    assert torch.equal(plain[2], coloured[2])
    assert (plain[0] - coloured[0]).abs().amax((1, 2, 3)).min() > 0.01
    assert coloured[0].min() >= 0
    assert coloured[0].max() <= 1


def test_colours_of_epochs_seeds_and_samples_differ() -> None:
    image, colour = pixels(1, 8), AugmentConfig(crop_scale=None, hflip=0.0, **COLOUR)
    looks = {
        tuple(PairedAugment(colour, seed=seed)(image, None, [row], epoch)[0].flatten().tolist())
        for seed in range(3)
        for epoch in range(3)
        for row in range(3)
    }
    assert len(looks) == 27


def test_colours_are_kornias_own() -> None:
    images, ids = pixels(12, 32), np.arange(12, dtype=np.uint64)
    augment = PairedAugment(AugmentConfig(crop_scale=None, hflip=0.0, **COLOUR))
    ours, _, _ = augment(images, None, ids, 0)
    params = _params(augment._colour, 0, 0, ids, 1, 2**20)
    jitter = K.ColorJitter(
        *(COLOUR[name] for name in ("brightness", "contrast", "saturation", "hue")), order=range(4)
    )
    gray = K.RandomGrayscale(p=COLOUR["grayscale"])
    theirs = gray(jitter(images.float() / 255, params=params[0].data), params=params[1].data)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    is_gray = (ours[:, 0] == ours[:, 1]).all(2).all(1)
    assert 0 < is_gray.sum() < 12


def test_outside_the_frame_images_are_filled_and_maps_are_zero() -> None:
    config = AugmentConfig(crop_scale=None, hflip=0.0, rotate=45.0, fill=(0.2, 0.4, 0.6))
    images = torch.full((6, 3, 48, 48), 255, dtype=torch.uint8)
    out, maps, theta = PairedAugment(config)(images, torch.ones(6, 1, 6, 6), torch.arange(6), 0)
    outside = ~inside(theta, (48, 48))
    assert 0 < outside.float().mean() < 0.3
    for channel, value in enumerate((0.2, 0.4, 0.6)):
        assert (out[:, channel][outside[:, 0]] == value).all()
    torch.testing.assert_close(out[~outside.expand_as(out)].min(), torch.tensor(1.0))
    assert maps is not None
    torch.testing.assert_close(maps, coverage(theta, (6, 6)))


def test_maps_of_several_explained_classes_are_warped_alike() -> None:
    images, maps, rows = pixels(4, 48), torch.rand(4, 3, 2, 8, 8), torch.arange(4)
    augment = PairedAugment(AugmentConfig(**MOVES), map_size=(6, 5))
    together = augment(images, maps, rows, 0)[1]
    assert together is not None
    assert together.shape == (4, 3, 2, 6, 5)
    assert torch.equal(together[:, 1], augment(images, maps[:, 1], rows, 0)[1])


def test_a_finer_map_is_averaged_not_sampled() -> None:
    """Stripes of one pixel vanish to their mean at any crop."""
    stripes = (torch.arange(224) % 2).float().expand(8, 1, 224, 224)
    augment = PairedAugment(AugmentConfig(crop_scale=(0.5, 1.0)), map_size=7)
    maps = augment(pixels(8, 224), stripes, torch.arange(8), 0)[1]
    assert maps is not None
    assert (maps - 0.5).abs().max() < 0.03


def test_identity_warp_is_exact_and_differentiable() -> None:
    maps = torch.rand(3, 2, 7, 7, requires_grad=True)
    warped = warp(maps, torch.eye(2, 3).expand(3, 2, 3))
    torch.testing.assert_close(warped, maps, atol=1e-5, rtol=0)
    warped.sum().backward()
    torch.testing.assert_close(maps.grad, torch.ones_like(maps), atol=1e-5, rtol=0)


def test_warp_computes_in_float32_under_autocast() -> None:
    maps, theta = torch.rand(2, 1, 7, 7), torch.eye(2, 3).expand(2, 2, 3) * 0.7
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(warp(maps, theta, 5), warp(maps.clone(), theta, 5))
    assert warp(maps.bfloat16(), theta, 5).dtype == torch.float32


def test_autocast_around_the_step_changes_nothing() -> None:
    images, maps, augment = pixels(5, 48), torch.rand(5, 1, 6, 6), PairedAugment(EVERYTHING)
    plain = augment(images, maps, torch.arange(5), 0)
    with torch.autocast("cpu", torch.bfloat16):
        inside_autocast = augment(images, maps, torch.arange(5), 0)
    for found, expected in zip(inside_autocast, plain, strict=True):
        assert torch.equal(found, expected)


def test_sampling_grid_is_affine_grid() -> None:
    theta = torch.rand(4, 2, 3)
    expected = F.affine_grid(theta, [4, 1, 9, 5], align_corners=False)
    torch.testing.assert_close(sampling_grid(theta, (9, 5)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("canvas", [320, 128])
def test_canvases_larger_than_the_images_are_shrunk_as_torchvision_does(canvas: int) -> None:
    images, ids = pixels(6, canvas), np.arange(6, dtype=np.uint64)
    augment = PairedAugment(AugmentConfig(vflip=0.0), size=96)
    ours, _, theta = augment(images, None, ids, 0)
    boxes, mirrored = drawn_boxes(augment, ids, canvas, 0)
    for image, found, box, flip in zip(images, ours, boxes.long().tolist(), mirrored, strict=True):
        x0, y0, x1, y1 = box
        expected = TV.resized_crop(image.float() / 255, y0, x0, y1 - y0, x1 - x0, [96, 96], antialias=True)
        torch.testing.assert_close(found, expected.flip(-1) if flip else expected, atol=1.5e-5, rtol=0)
    assert torch.equal(shrink(images, theta, (96, 96)) / 255, ours)
