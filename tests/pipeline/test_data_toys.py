"""The two generated data sets: what they promise about order, groups, masks, boxes and seeds."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import ConfigError
from pipeline.config.data import ToyBirds, ToyShapes
from pipeline.data import RawSample, Source, open_source, split_names
from pipeline.data.source import Reduced
from pipeline.data.toys.blocks import BLOCK, Block, shuffled_rounds
from pipeline.data.toys.toybirds import draw_block as bird_block
from pipeline.data.toys.toyshapes import SILHOUETTES
from pipeline.data.toys.toyshapes import draw_block as shape_block

BIRDS = ToyBirds(source="toybirds")
SHAPES = ToyShapes(source="toyshapes")


def pixels(sample: RawSample) -> np.ndarray:
    return np.asarray(sample.image)


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (BIRDS, {"train": 2000, "val": 1000, "test-id": 1000, "test-ood": 1000}),
        (SHAPES, {"teach": 4000, "train": 200, "val": 500, "test": 1000}),
        (
            ToyShapes(source="toyshapes", train_per_class=5),
            {"teach": 4000, "train": 50, "val": 500, "test": 1000},
        ),
    ],
)
def test_splits_and_their_sizes(data: ToyBirds | ToyShapes, sizes: dict[str, int]) -> None:
    assert {split: len(open_source(data, split)) for split in split_names(data)} == sizes


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("train", [0.5, 0, 0, 0.5]),
        ("val", [0.25, 0.25, 0.25, 0.25]),
        ("test-id", [0.5, 0, 0, 0.5]),
        ("test-ood", [0, 0.5, 0.5, 0]),
    ],
)
def test_bird_groups(split: str, shares: list[float]) -> None:
    block = bird_block(0, split, 1)
    assert block.groups is not None
    assert np.array_equal(np.bincount(block.groups, minlength=4) / BLOCK, shares)
    assert np.array_equal(block.labels, block.groups // 2)


@given(st.integers(0, 2**32), st.sampled_from([2, 4, 10]), st.integers(1, BLOCK))
def test_any_prefix_is_balanced(seed: int, members: int, rows: int) -> None:
    order = shuffled_rounds(np.random.default_rng(seed), members)
    counts = np.bincount(order[:rows], minlength=members)
    assert len(order) == BLOCK
    assert counts.max() - counts.min() <= 1


def test_classes_do_not_come_in_a_fixed_order() -> None:
    labels = bird_block(0, "train", 0).labels.reshape(-1, 2)
    assert 0 < labels[:, 0].mean() < 1


@pytest.mark.parametrize("data", [BIRDS, SHAPES])
def test_rows_do_not_depend_on_what_was_read_before(data: ToyBirds | ToyShapes) -> None:
    forward = [pixels(open_source(data, "val").raw(row)) for row in (3, 99, 100, 260)]
    bird_block.cache_clear()
    shape_block.cache_clear()
    backward = [pixels(open_source(data, "val").raw(row)) for row in (260, 100, 99, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_splits_blocks_and_seeds_are_different_images() -> None:
    streams = [(0, "train", 0), (0, "test-id", 0), (0, "train", 1), (1, "train", 0)]
    first = {bird_block(*stream).images[0].tobytes() for stream in streams}
    assert len(first) == len(streams)
    assert not np.array_equal(shape_block(0, "teach", 0).images, shape_block(0, "train", 0).images)


@pytest.mark.parametrize("source", [open_source(BIRDS, "val"), open_source(SHAPES, "train")])
def test_samples_are_complete(source: Source) -> None:
    for row in range(40):
        sample = source.raw(row)
        assert sample.image.size == (48, 48)
        assert sample.image.mode == "RGB"
        assert sample.mask is not None
        assert sample.mask.mode == "L"
        assert sample.boxes is not None
        assert sample.boxes.dtype == np.float32
        assert sample.boxes.shape == (1, 5)
        assert sample.boxes[0, 0] == sample.label
        assert sample.label in range(len(source.classes))


@pytest.mark.parametrize("block", [bird_block(0, "train", 0), shape_block(0, "teach", 0)])
def test_masks_are_soft_and_show_where_the_object_is(block: Block) -> None:
    inside = block.masks > 127
    assert ((block.masks > 10) & (block.masks < 245)).any()
    assert (inside.mean((1, 2)) > 0.01).all()
    assert (inside.mean((1, 2)) < 0.5).all()
    grey = block.images.astype(float).mean(-1)
    contrast = [abs(g[m].mean() - g[~m].mean()) for g, m in zip(grey, inside, strict=True)]
    assert np.mean(contrast) > 25


@given(st.integers(0, 199))
@settings(max_examples=30, deadline=None)
def test_boxes_are_tight_around_the_mask(row: int) -> None:
    sample = open_source(BIRDS, "val").raw(row)
    assert sample.mask is not None
    assert sample.boxes is not None
    mask = np.asarray(sample.mask) > 127
    x0, y0, x1, y1 = sample.boxes[0, 1:].astype(int)
    assert mask[y0:y1, x0:x1].sum() == mask.sum()
    for edge in (mask[y0, :], mask[y1 - 1, :], mask[:, x0], mask[:, x1 - 1]):
        assert edge.any()


def test_background_texture_tells_land_from_water_whatever_the_bird() -> None:
    """Upright strokes vary along x, level waves along y: the shortcut is there, in and out of distribution."""
    for split in ("test-id", "test-ood"):
        block = bird_block(0, split, 0)
        assert block.groups is not None
        grey = block.images.astype(float).mean(-1)
        along_x = np.abs(np.diff(grey.mean(1), axis=1)).mean(1)
        along_y = np.abs(np.diff(grey.mean(2), axis=1)).mean(1)
        is_water = along_x < along_y
        assert (is_water == (block.groups % 2 == 1)).mean() > 0.9


def test_shape_backgrounds_say_nothing_about_the_class() -> None:
    blocks = [shape_block(0, "teach", number) for number in range(4)]
    corner = np.concatenate([block.images[:, :4, :4].reshape(BLOCK, -1).mean(1) for block in blocks])
    labels = np.concatenate([block.labels for block in blocks])
    means = np.array([corner[labels == label].mean() for label in range(len(SILHOUETTES))])
    assert means.std() < 0.35 * corner.std()


def test_keys_are_safe_unique_and_differ_between_splits() -> None:
    keys = [
        open_source(data, split).key(row)
        for data in (BIRDS,)
        for split in split_names(data)
        for row in range(50)
    ]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)


def test_limit_takes_the_first_rows() -> None:
    limited = open_source(ToyBirds(source="toybirds", limit=7), "train")
    assert len(limited) == 7
    assert limited.key(6) == open_source(BIRDS, "train").key(6)
    assert limited.describe() == f"first 7 of {open_source(BIRDS, 'train').describe()}"
    assert len(open_source(ToyBirds(source="toybirds", limit=10**6), "train")) == 2000


def test_an_unknown_split_is_named_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"no split 'test_ood'; did you mean test-ood\?"):
        open_source(BIRDS, "test_ood")
    with pytest.raises(ConfigError, match="it has teach, train, val, test"):
        open_source(SHAPES, "zzz")


def test_without_annotations_only_the_image_is_left() -> None:
    """Its description, which packed sets keep, is that of the first edition."""
    whole = open_source(ToyBirds(source="toybirds", limit=7), "train")
    plain = Reduced(whole, annotated=False)
    assert (plain.name, plain.classes, len(plain)) == (whole.name, [], 7)
    assert plain.describe() == f"without labels: first 7 of {open_source(BIRDS, 'train').describe()}"
    raw, bare = whole.raw(3), plain.raw(3)
    assert (bare.key, bare.source) == (plain.key(3), raw.source)
    assert bare.image.tobytes() == raw.image.tobytes()
    assert (bare.label, bare.group, bare.boxes, bare.mask) == (None, None, None, None)
