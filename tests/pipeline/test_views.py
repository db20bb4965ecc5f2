"""The canonical view: where pixels, masks and boxes go."""

from __future__ import annotations

import json
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import ViewConfig
from pipeline.config.data import ToyBirds
from pipeline.data import RawSample, open_source
from pipeline.data.view import CanonicalView


def coordinate_image(width: int, height: int) -> Image.Image:
    """Red is x and green is y, as 0..250 over the image."""
    x, y = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


def test_an_image_of_the_size_stays_as_it_is() -> None:
    raw = open_source(ToyBirds(source="toybirds"), "train").raw(5)
    sample = CanonicalView.of(ViewConfig(size=48)).apply(raw)
    assert raw.mask is not None
    assert raw.boxes is not None
    assert sample.boxes is not None
    assert sample.mask is not None
    assert np.array_equal(sample.image.transpose(1, 2, 0), np.asarray(raw.image))
    assert np.array_equal(sample.mask, np.asarray(raw.mask))
    assert np.array_equal(sample.boxes, raw.boxes)
    assert (sample.key, sample.label, sample.group) == (raw.key, raw.label, raw.group)


@given(st.integers(8, 150), st.integers(8, 150), st.integers(8, 60), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_any_image_becomes_size_by_size(width: int, height: int, size: int, margin: int) -> None:
    view = CanonicalView.of(ViewConfig(size=size, resize=size + margin))
    raw = RawSample("a", Image.new("RGB", (width, height)), mask=Image.new("L", (width, height), 255))
    sample = view.apply(raw)
    assert sample.image.shape == (3, size, size)
    assert sample.image.dtype == np.uint8
    assert sample.image.flags.c_contiguous
    assert sample.mask is not None
    assert sample.mask.shape == (size, size)
    assert sample.mask.min() == 255


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_centre_of_the_resized_image_is_kept(interpolation: str) -> None:
    view = CanonicalView.of(
        ViewConfig.model_validate({"size": 32, "resize": 40, "interpolation": interpolation})
    )
    image = view.apply(RawSample("a", coordinate_image(240, 120))).image.astype(float)
    middle = (np.arange(32) + 4 + 0.5) / 40  # of the shorter side, 120 px
    assert np.abs(image[1] - (250 * (middle * 120 - 0.5) / 119)[:, None]).max() < 2.5
    across = (np.arange(32) + 24 + 0.5) / 80
    assert np.abs(image[0] - (250 * (across * 240 - 0.5) / 239)[None, :]).max() < 2.5


def test_downsampling_is_antialiased() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    image = CanonicalView.of(ViewConfig(size=16)).apply(RawSample("a", Image.fromarray(stripes))).image
    assert np.abs(image.astype(int) - 127).max() < 12


@given(
    st.tuples(st.integers(40, 200), st.integers(40, 200)),
    st.tuples(st.integers(16, 40), st.integers(0, 20)),
    st.tuples(st.floats(0, 0.6), st.floats(0, 0.6)),
    st.tuples(st.floats(0.25, 0.4), st.floats(0.25, 0.4)),
    st.sampled_from(["centre", "squash"]),
)
@settings(max_examples=50, deadline=None)
def test_boxes_and_mask_follow_the_image(
    sides: tuple[int, int],
    view: tuple[int, int],
    at: tuple[float, float],
    extent: tuple[float, float],
    crop: Literal["centre", "squash"],
) -> None:
    """A filled box in the image, as its mask and as its box are in the same place afterwards."""
    size = np.array(sides)
    corners = np.concatenate([size * at, size * (np.array(at) + extent)]).round().astype(int)
    image = Image.new("RGB", sides)
    image.paste((255, 255, 255), tuple(corners.tolist()))
    boxes = np.array([[3, *corners]], np.float32)
    side, margin = view
    config = ViewConfig(size=side, resize=side + margin, interpolation="bilinear", crop=crop)
    canonical = CanonicalView.of(config)
    sample = canonical.apply(RawSample("a", image, boxes=boxes, mask=image.convert("L")))
    assert sample.mask is not None
    assert sample.boxes is not None
    assert np.abs(sample.image[0].astype(int) - sample.mask).max() <= 1
    assert set(sample.boxes[:, 0].tolist()) <= {3.0}
    edges = np.arange(view[0] + 1)
    covered = np.zeros((view[0], view[0]))
    for _, x0, y0, x1, y1 in sample.boxes:
        in_x, in_y = (np.diff(np.clip(edges, low, high)) for low, high in ((x0, x1), (y0, y1)))
        covered = in_y[:, None] * in_x[None]
    assert np.abs(covered.mean() - sample.mask.mean() / 255) < 2.5 / view[0]
    assert np.abs(covered - sample.mask / 255).max() < 0.75


def test_boxes_are_clipped_and_empty_ones_dropped() -> None:
    boxes = np.array([[0, 0, 10, 200, 50], [1, 0, 0, 30, 100], [2, 45, 0, 60, 100]], np.float32)
    raw = RawSample("a", Image.new("RGB", (200, 100)), boxes=boxes)
    sample = CanonicalView.of(ViewConfig(size=50)).apply(raw)  # keeps x 50..150 of the source, at half scale
    assert sample.boxes is not None
    assert sample.boxes.dtype == np.float32
    assert sample.boxes.tolist() == [[0, 0, 5, 50, 25], [2, 0, 0, 5, 50]]


def test_squashed_nothing_is_lost_but_the_margin() -> None:
    boxes = np.array([[0, 0, 0, 200, 100], [1, 20, 10, 120, 60]], np.float32)
    raw = RawSample("a", coordinate_image(200, 100), boxes=boxes)
    sample = CanonicalView.of(ViewConfig(size=50, crop="squash")).apply(raw)
    assert sample.boxes is not None
    assert sample.boxes.tolist() == [[0, 0, 0, 50, 50], [1, 5, 5, 30, 30]]
    expected = raw.image.resize((50, 50), Image.Resampling.BICUBIC)  # as torchvision's Resize((50, 50))
    assert np.array_equal(sample.image.transpose(1, 2, 0), np.asarray(expected))
    inner = CanonicalView.of(ViewConfig(size=40, resize=50, crop="squash")).apply(raw)
    assert np.array_equal(inner.image, sample.image[:, 5:45, 5:45])


def test_no_boxes_are_not_the_same_as_no_box_left() -> None:
    view = CanonicalView.of(ViewConfig(size=50))
    image = Image.new("RGB", (200, 100))
    gone = view.apply(RawSample("a", image, boxes=np.array([[1, 0, 0, 30, 100]], np.float32))).boxes
    assert gone is not None
    assert gone.shape == (0, 5)
    assert view.apply(RawSample("a", image)).boxes is None


def test_describe_is_json_and_tells_views_apart() -> None:
    configs = [
        ViewConfig(size=48),
        ViewConfig(size=48, resize=56),
        ViewConfig(size=48, interpolation="bilinear"),
        ViewConfig(size=48, crop="squash"),
    ]
    told = {json.dumps(CanonicalView.of(config).describe()) for config in configs}
    assert len(told) == 4
    assert CanonicalView.of(ViewConfig(size=48)) == CanonicalView.of(ViewConfig(size=48, resize=48))
