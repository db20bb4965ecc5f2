"""Distilling on unrelated images: `also` names another data set, whose images are packed without labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lightning_fabric import Fabric
from PIL import Image

from artifacts import open_images
from artifacts.errors import ConfigError, ModelError
from pipeline.config import Experiment
from pipeline.data.pack import pack_split
from pipeline.order.runs import distill_all
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
SHAPES = {"source": "toyshapes", "limit": 32}
SMALL = {
    "data__limit": 32,
    "also": {"shapes": SHAPES},
    "teacher__train__epochs": 1,
    "train__rows": 16,
    "train__epochs": 1,
}


def test_its_images_are_packed_without_annotations(experiment_of: Tiny, tmp_path: Path) -> None:
    experiment = experiment_of(also={"birds": {"source": "toybirds", "limit": 8}}, data__limit=8)
    layout = Layout(tmp_path)
    own = pack_split(Workspace(experiment, layout), "train")
    other = pack_split(Workspace(experiment, layout), "birds/train")
    assert str(other.place) == str(tmp_path / "images/birds/train")
    assert len(other.classes) == 0
    assert len(own.classes) > 0
    for row in range(8):
        labelled, plain = own[row], other[row]
        assert plain.key == labelled.key
        assert np.array_equal(plain.image, labelled.image)
        assert labelled.label is not None
        assert (plain.label, plain.group, plain.boxes, plain.mask) == (None, None, None, None)


def test_a_folder_of_photographs(experiment_of: Tiny, tmp_path: Path) -> None:
    """Its class folders are no labels here; what is unreadable is written down beside its splits."""
    for number in range(6):
        (tmp_path / f"photos/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 50)).save(tmp_path / f"photos/{number % 2}/{number}.png")
    (tmp_path / "photos/0/2.png").write_bytes(b"")
    also = {
        "mine": {"source": "folder", "root": tmp_path / "photos", "val_fraction": 0, "on_bad_image": "skip"}
    }
    images = pack_split(Workspace(experiment_of(also=also), Layout(tmp_path / "out")), "mine/train")
    assert len(images) == 5
    assert {images[row].label for row in range(5)} == {None}
    kept = json.loads((tmp_path / "out/images/mine/unreadable-train.json").read_text())
    assert list(kept["unreadable"]) == ["0/2.png"]


def test_a_student_learns_from_them(experiment_of: Tiny, fabric: Fabric, tmp_path: Path) -> None:
    """The teacher's two classes are scored on the data's own test images."""
    students = {"kd": {"split": "shapes/train"}, "e2kd": {"split": "shapes/train", "explanation_weight": 5}}
    experiment = experiment_of(**SMALL, students=students, teacher__classes=2)
    layout = Layout(tmp_path / "tiny")
    distill_all(Workspace(experiment, layout, fabric), ["kd", "e2kd"], [0])
    assert set(open_images(layout.images("shapes/train")).labels) == {None}
    for name in students:
        result = json.loads((layout.run(name, 0) / "result.json").read_text())
        assert 0 <= result["splits"]["test-ood"]["accuracy"] <= 1


def test_without_the_number_of_the_teachers_classes(
    experiment_of: Tiny, fabric: Fabric, tmp_path: Path
) -> None:
    experiment = experiment_of(**SMALL, students={"kd": {"split": "shapes/train"}})
    with pytest.raises(
        ModelError, match=r"has no classes: say how many the teacher has with teacher\.classes"
    ):
        distill_all(Workspace(experiment, Layout(tmp_path / "tiny"), fabric), ["kd"], [0])


def test_a_loss_on_labels_is_refused(experiment_of: Tiny, fabric: Fabric, tmp_path: Path) -> None:
    experiment = experiment_of(
        **SMALL, students={"ce": {"loss": "ce", "split": "shapes/train"}}, teacher__classes=2
    )
    with pytest.raises(ConfigError, match="student ce needs labels"):
        distill_all(Workspace(experiment, Layout(tmp_path / "tiny"), fabric), ["ce"], [0])


@pytest.mark.parametrize(
    ("also", "split", "said"),
    [
        ({"shapes": SHAPES}, "shape/train", "has no 'shape'; did you mean shapes"),
        ({"shapes": SHAPES}, "zzz/train", "has no 'zzz'; it has shapes"),
        ({}, "shapes/train", "has no 'shapes'; it is empty"),
        ({"shapes": SHAPES}, "shapes/trian", "toyshapes has no split 'trian'; did you mean train"),
        ({"train": SHAPES}, "train/train", r"also\.train has the name of a split of data"),
    ],
)
def test_a_split_that_is_not_there(
    experiment_of: Tiny, tmp_path: Path, also: dict[str, object], split: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        pack_split(Workspace(experiment_of(also=also), Layout(tmp_path)), split)
