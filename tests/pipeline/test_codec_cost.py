"""What storing costs, as it is measured: against values worked out by hand, and with the warning where it is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from artifacts import ImageSet, Sample, TeacherRows, TeacherStore, open_images, open_store
from artifacts.codecs import get_codec
from artifacts.manifest import CodecInfo, ExplainerInfo, ManifestDraft, StoreShape, TeacherInfo
from artifacts.packing import Packing, write_images
from artifacts.writer import StoreWriter
from pipeline.config import AugmentConfig
from pipeline.explain.gradcam import Explained
from pipeline.precompute.codec_cost import codec_cost, tell

ROWS, SIDE = 64, 16
CPU = torch.device("cpu")
CROPS = AugmentConfig(crop_scale=(0.1, 0.3))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Row r is of colour r, so that a teacher knows its rows."""
    path = tmp_path_factory.mktemp("numbered") / "images"
    write_images(
        path,
        Packing(
            count=ROWS,
            get=lambda row: Sample(f"row-{row}", np.full((3, SIDE, SIDE), row, np.uint8), label=0),
            view={"size": SIDE, "resize": SIDE},
            classes=["a", "b"],
            source="numbers",
            rows_per_shard=32,
        ),
    )
    return open_images(path)


class Teacher(nn.Module):
    """Says what it was told to say for each row."""

    def __init__(self, logits: np.ndarray, maps: np.ndarray) -> None:
        super().__init__()
        self.logits, self.maps = torch.from_numpy(logits), torch.from_numpy(maps)

    def forward(self, images: torch.Tensor, classes: torch.Tensor | None = None) -> Explained:
        rows = (images[:, 0, 0, 0] * 255).round().long()
        logits = self.logits[rows]
        return Explained(logits, self.maps[rows], logits.argmax(1) if classes is None else classes)


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def cost(images: ImageSet, tmp_path: Path) -> Measure:
    """codec_cost of a store with `stored` numbers and a teacher that now says `live` ones (default: the same)."""

    def measure(
        maps: np.ndarray,
        logits: np.ndarray | None = None,
        *,
        codec: str = "fp16",
        logit_codec: str = "fp16",
        live_logits: np.ndarray | None = None,
        augment: AugmentConfig = CROPS,
    ) -> dict[str, Any]:
        logits = np.tile(np.float32([1, 0]), (ROWS, 1)) if logits is None else logits
        store = stored(tmp_path / "store", images, maps, logits, codec, logit_codec)
        teacher = Teacher(logits if live_logits is None else live_logits, maps)
        return codec_cost(teacher, images, store, augment, CPU)

    return measure


def stored(
    path: Path, images: ImageSet, maps: np.ndarray, logits: np.ndarray, codec: str, logit_codec: str
) -> TeacherStore:
    draft = ManifestDraft(
        teacher=TeacherInfo(
            architecture="x", weights_sha256="0" * 64, preprocessing={}, classes=2, class_names=["a", "b"]
        ),
        explainer=ExplainerInfo(name="gradcam", settings={}),
        view=images.view,
        images=images.fingerprint,
        shape=StoreShape(
            rows=ROWS,
            rows_per_shard=32,
            classes=logits.shape[1],
            channels=maps.shape[1],
            height=maps.shape[2],
            width=maps.shape[3],
        ),
        logits=CodecInfo(codec=get_codec(logit_codec).codec_id, error_bound="x"),
        maps=CodecInfo(codec=get_codec(codec).codec_id, error_bound="x"),
    )
    writer = StoreWriter(path, draft)
    writer.create()
    for shard in range(2):
        rows = slice(32 * shard, 32 * shard + 32)
        answers = TeacherRows(
            logits[rows, None], logits[rows].argmax(1)[:, None, None], maps[rows, None, None]
        )
        writer.uncommit(shard)
        writer.write_shard(shard, answers, images.keys_sha256(shard), images.shard_keys(shard))
    writer.finish()
    return open_store(path)


def noise(spike: float = 0.0) -> np.ndarray:
    """Positive noise, and one bright pixel in a corner that most crops do not show."""
    maps = np.random.default_rng(0).random((ROWS, 1, SIDE, SIDE)).astype(np.float32)
    maps[:, :, 0, 0] += spike
    return maps


@pytest.mark.parametrize(
    "augment", [CROPS, AugmentConfig(crop_scale=None, hflip=0), AugmentConfig(rotate=30)]
)
def test_half_precision_is_nearly_perfect(cost: Measure, augment: AugmentConfig) -> None:
    logits = np.random.default_rng(1).normal(size=(ROWS, 2)).astype(np.float32)
    found = cost(noise(300), logits, augment=augment)
    assert (found["maps"], found["logits"]) == ("e2kd.fp16", "e2kd.fp16")
    for kind in ("whole", "augmented"):
        assert found[kind]["mean"] >= found[kind]["p1"] > 0.9999
        assert found[kind]["images"] == ROWS
    assert 0 <= found["kl"] < 1e-6
    assert found["top1"] == 1
    assert "\n" not in tell(found)
    assert tell(found).startswith(
        "codec cost: maps e2kd.fp16, cosine 1.0000 whole, 1.0000 augmented (1% below 1.0000)"
    )


def test_lossless_is_exact(cost: Measure) -> None:
    logits = np.random.default_rng(1).normal(size=(ROWS, 2)).astype(np.float32)
    found = cost(noise(300), logits, codec="lossless", logit_codec="fp32")
    assert found["whole"]["p1"] == found["augmented"]["p1"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-15)
    assert "warning" not in tell(found)


@pytest.mark.parametrize(("codec", "better"), [("int5", "int6"), ("int6", "int8"), ("int8", "fp16")])
def test_a_codec_that_collapses_after_the_crop_is_named_with_the_better_one(
    cost: Measure, codec: str, better: str
) -> None:
    spike = {"int5": 1e2, "int6": 3e3, "int8": 3e4}[codec]  # the rest gets one level or none
    found = cost(noise(spike), codec=codec)
    assert found["whole"]["p1"] > 0.99  # the whole map looks fine
    assert found["augmented"]["p1"] < get_codec(codec).crop_p1
    line, warning = tell(found).split("\n")
    assert f"maps e2kd.{codec}" in line
    assert warning == (
        f"warning: 1% of the augmented maps are below the {get_codec(codec).crop_p1} that e2kd.{codec} promises; "
        f"a better codec: store.maps: {better} (with another store.name)"
    )


@pytest.mark.parametrize(("codec", "better"), [("int5", "int6"), ("int6", "int8"), ("int8", "fp16")])
def test_a_codec_that_leaves_nothing_of_the_crop_is_named(cost: Measure, codec: str, better: str) -> None:
    """The worst of all collapses: the spike takes every level, and a crop without it is all zero."""
    found = cost(noise(1e6), codec=codec)
    assert found["augmented"]["images"] == ROWS
    assert f"a better codec: store.maps: {better} " in tell(found)


@pytest.mark.parametrize("codec", ["int5", "int6", "int8"])
def test_no_warning_where_the_codec_keeps_its_word(cost: Measure, codec: str) -> None:
    found = cost(noise(), codec=codec)
    assert found["augmented"]["p1"] >= get_codec(codec).crop_p1
    assert "\n" not in tell(found)


@pytest.mark.parametrize("codec", ["fp16", "int6", "int5", "lossless"])
def test_maps_that_are_all_dead(cost: Measure, codec: str) -> None:
    found = cost(np.zeros((ROWS, 1, SIDE, SIDE), np.float32), codec=codec)
    assert found["whole"] == found["augmented"] == {"mean": 0.0, "p1": 0.0, "images": 0}
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert "warning" not in tell(found)


def test_dead_maps_are_left_out(cost: Measure) -> None:
    maps = noise()
    maps[::4] = 0
    found = cost(maps)
    assert found["whole"]["images"] == found["augmented"]["images"] == ROWS * 3 // 4
    assert found["whole"]["mean"] == pytest.approx(1, abs=1e-4)


def test_kl_and_top1_by_hand(cost: Measure) -> None:
    """Live softmax (3/4, 1/4). Stored: the same for half of the rows, (1/2, 1/2) for a quarter, (1/4, 3/4) for one."""
    live = np.tile(np.float32([math.log(3), 0]), (ROWS, 1))
    kept = live.copy()
    kept[32:48] = 0
    kept[48:] = [0, math.log(3)]
    found = cost(noise(), kept, logit_codec="fp32", live_logits=live)
    half = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    turned = 0.5 * math.log(3)
    assert found["kl"] == pytest.approx((half + turned) / 4, abs=1e-7)
    assert found["top1"] == 0.75  # of two equal logits the first is the top one
    assert "top-1 kept 75.0%" in tell(found)


def test_kl_of_a_coarse_codec_is_that_of_its_rounding(cost: Measure) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(ROWS, 50)).astype(np.float32) * 5
    found = cost(noise(), logits, logit_codec="uint12")
    step = np.ptp(logits, axis=1).mean() / 4095
    assert 0 < found["kl"] < step**2
    assert found["top1"] == 1


def test_a_map_that_is_wrong_is_seen(cost: Measure, images: ImageSet, tmp_path: Path) -> None:
    maps = noise()
    logits = np.tile(np.float32([1, 0]), (ROWS, 1))
    store = stored(tmp_path / "other", images, maps[::-1].copy(), logits, "fp16", "fp16")
    found = codec_cost(Teacher(logits, maps), images, store, CROPS, CPU)
    assert found["whole"]["mean"] < 0.9
    assert "warning" in tell(found)
    assert "store.maps: lossless" in tell(found)
