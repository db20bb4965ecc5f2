"""Several labels an image: the store holds every positive class's map, and students learn from one of them a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from artifacts import Sample, open_images, open_store, verify_store
from artifacts.errors import ConfigError
from artifacts.packing import Packing, write_images
from pipeline.config import Experiment, parse
from pipeline.data.batches import PairedRows
from pipeline.distill.run import distill
from pipeline.evaluate.scores import score, student_answers
from pipeline.precompute.run import precompute
from pipeline.teach.run import teach
from pipeline.training.run import Run
from pipeline.training.trained import build_explainer, load_teacher
from pipeline.workspace import Layout, Workspace, teacher_scores

STORE = "gradcam-raw"
COLOURS = torch.eye(3)


def squares(row: int) -> Sample:
    """A red, a green and a blue square of 8 px, each present or not: label k = colour k."""
    rng = np.random.default_rng(row)
    image, boxes, present = np.full((3, 32, 32), 128, np.uint8), [], []
    for colour in range(3):
        if rng.random() < 0.5 or (colour == 2 and not present):
            x, y = int(rng.integers(0, 10)) + 11 * (colour % 2), int(rng.integers(0, 24))
            image[:, y : y + 8, x : x + 8] = 0
            image[colour, y : y + 8, x : x + 8] = 255
            present.append(colour)
            boxes.append((colour, x, y, x + 8, y + 8))
    return Sample(f"s{row}", image, label=tuple(present), boxes=np.array(boxes, np.float32))


def config(**changes: Any) -> Experiment:
    raw: dict[str, Any] = {
        "data": {"source": "voc", "root": "nowhere"},
        "view": {"size": 32},
        "explain": {"classes": "positive", "most": 3},
        "store": {"rows_per_shard": 20, "batch_size": 16},
        "augment": {"crop_scale": [0.6, 1.0]},
        "teacher": {
            "model": "toy/resnet",
            "width": 8,
            "train": {"epochs": 12, "batch_size": 8, "lr": 2e-2, "loss": "bce"},
        },
        "train": {"model": "toy/resnet", "width": 4, "epochs": 2, "batch_size": 16, "loss": "l2d"},
        "students": {
            "frozen": {"explanation_weight": 1},
            "online": {"explanation_weight": 1, "mode": "online"},
            "labels": {"loss": "bce"},
            "mixed": {"explanation_weight": 1, "mixup": 0.4},
            "wrong": {"loss": "ce"},
        },
        "evaluate": {"select": "val", "splits": ["val"]},
    }
    return parse(raw | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, fabric: Fabric) -> Path:
    """Packed, taught and precomputed."""
    layout = Layout(tmp_path_factory.mktemp("multilabel"))
    for split, start, count in (("train", 0, 64), ("val", 64, 24)):
        write_images(
            layout.images(split),
            Packing(
                count=count,
                get=lambda row, start=start: squares(start + row),
                view={"size": 32},
                classes=["red", "green", "blue"],
                source="squares",
                rows_per_shard=20,
            ),
        )
    teach(Workspace(config(), layout, fabric))
    for split in ("train", "val"):
        precompute(Workspace(config(), layout, fabric), split)
    return layout.root


def test_the_store_holds_the_map_of_every_positive_class(root: Path, fabric: Fabric) -> None:
    layout = Layout(root)
    images, store = open_images(layout.images("train")), open_store(layout.store(STORE, "train"))
    assert verify_store(layout.store(STORE, "train"), layout.images("train")).ok
    assert store.manifest.shape.explained == 3
    rows = store.read(range(64))
    logits, classes = torch.from_numpy(rows.logits[:, 0]), torch.from_numpy(rows.explained_class[:, 0])
    positive = (logits > 0).sum(1).clamp(min=1)
    assert torch.equal((classes >= 0).sum(1), positive)
    assert positive.unique().numel() > 1  # some have one, some more
    assert torch.equal(classes[:, 0], logits.argmax(1))
    assert not rows.maps[rows.explained_class < 0].any()
    explainer = build_explainer(config().explain, load_teacher(Workspace(config(), layout), images))
    several = torch.nonzero(classes[:, 1] >= 0)[:, 0]
    pixels = torch.from_numpy(images.read_images(several.numpy())).float() / 255
    live = explainer(pixels, classes[several, 1]).maps
    assert torch.allclose(torch.from_numpy(rows.maps[several, 0, 1]), live, rtol=2e-3, atol=1e-4)


def test_the_teachers_epg_is_over_every_label_as_a_students_is(root: Path, fabric: Fabric) -> None:
    """Also where the store holds the map of one class an image."""
    layout = Layout(root)
    few = config(explain={"classes": "positive", "most": 1}, store={"rows_per_shard": 20, "name": "few"})
    images = open_images(layout.images("val"))
    store = precompute(Workspace(few, layout, fabric), "val")
    explainer = build_explainer(few.explain, load_teacher(Workspace(few, layout), images))
    live = score(fabric, student_answers(explainer), PairedRows(images, store, masks="any"), 24)
    assert live.samples["localised"].sum() > 24
    told = json.loads(layout.stores("few").read(teacher_scores("val")))
    assert told["epg"] == pytest.approx(live.means["epg"], abs=1e-3)
    assert told["iou"] == pytest.approx(live.means["iou"], abs=1e-2)
    assert told["f1"] == pytest.approx(live.means["f1"])


def test_batches_hold_label_tables_and_boxes(root: Path) -> None:
    layout = Layout(root)
    rows = PairedRows(open_images(layout.images("train")), masks="box")
    assert rows.multilabel
    assert rows.labelled
    batch = rows.read(np.array([3, 0]))
    assert batch.labels[0].nonzero()[:, 0].tolist() == list(squares(3).label or ())
    assert batch.boxes is not None
    assert batch.boxes[1][:, 0].tolist() == list(squares(0).label or ())


@pytest.mark.parametrize("student", ["frozen", "online", "labels", "mixed"])
def test_students_train_and_are_scored(root: Path, fabric: Fabric, student: str) -> None:
    result = distill(Workspace(config(), Layout(root), fabric), student, 0)
    scores = result["splits"]["val"]
    assert 0 <= scores["f1"] <= 1
    assert 0 <= scores["epg"] <= 1
    assert "accuracy" not in scores
    assert all(np.isfinite(line["loss"]) for line in Run(Layout(root).run(student, 0)).history())


def test_softmax_losses_need_one_label(root: Path, fabric: Fabric) -> None:
    with pytest.raises(ConfigError, match="needs one label an image"):
        distill(Workspace(config(), Layout(root), fabric), "wrong", 0)
