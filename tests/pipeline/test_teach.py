"""Guided teachers: every loss on masks, on boxes, with one or several labels; Pareto teachers are used afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from artifacts import Sample, open_images
from artifacts.errors import ConfigError, DataError
from artifacts.packing import Packing, write_images
from pipeline.config import Experiment
from pipeline.evaluate.scores import Scores
from pipeline.order.prepare import prepare_teacher
from pipeline.teach import run as module
from pipeline.teach import step
from pipeline.teach.run import teach
from pipeline.training.keep import kept_weights
from pipeline.training.pareto import ParetoFront
from pipeline.training.run import Run
from pipeline.training.trained import load_teacher
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
KINDS = ["energy", "l1", "ppce", "rrr"]
SIZE, ROWS = 32, 24
COLOURS = np.array([[255, 40, 40], [40, 255, 40], [40, 40, 255]], np.uint8)


def sample(row: int, several: bool) -> Sample:
    """One or two squares in the colours of their classes on noise, with their boxes."""
    rng = np.random.default_rng(row)
    image = rng.integers(0, 90, (3, SIZE, SIZE), dtype=np.uint8)
    classes = [row % 3, (row + 1) % 3][: 1 + (several and row % 2)]
    boxes = []
    for place, cls in enumerate(classes):
        x, y = rng.integers(0, 6), 16 * place + rng.integers(0, 6)
        image[:, y : y + 10, x : x + 10] = COLOURS[cls][:, None, None]
        boxes.append([cls, x, y, x + 10, y + 10])
    label = tuple(classes) if several else classes[0]
    return Sample(f"image-{row}", image, label=label, boxes=np.array(boxes, np.float32))


def boxed(root: Path, several: bool, **changes: Any) -> Layout:
    """An experiment's folder with generated images that have boxes."""
    layout = Layout(root)
    for split in ("train", "val"):
        write_images(
            layout.images(split),
            Packing(
                count=ROWS,
                get=lambda row: Sample(**{**vars(sample(row, several)), **changes}),
                view={"size": SIZE},
                classes=["red", "green", "blue"],
                source="squares",
                rows_per_shard=16,
            ),
        )
    return layout


def history(layout: Layout) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in Run(layout.teacher).history()]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, fabric: Fabric, experiment_of: Tiny) -> Path:
    """The toy birds, packed."""
    root = tmp_path_factory.mktemp("packed") / "tiny"
    prepare_teacher(
        Workspace(experiment_of(teacher__train=None, teacher__weights="none"), Layout(root), fabric)
    )
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_guides_by_masks(
    kind: str, packed: Path, tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    layout = Layout(tmp_path, shared=str(packed))
    teach(Workspace(experiment_of(teacher__train__guide__loss=kind), layout, fabric))
    lines = history(layout)
    assert len(lines) == 2
    for line in lines:
        assert line["loss"] == pytest.approx(line["classification"] + 2 * line["guidance"], rel=1e-4)
        assert line["guidance"] > 0
        assert 0 < line["valid_maps"] <= 1
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["val_epg"] <= 1
    assert kept_weights(Run(layout.teacher)).name == "best.safetensors"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["toy/resnet", "bcos/small"])
def test_every_loss_guides_by_the_boxes_of_several_labels(
    model: str, kind: str, tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    """GradCAM and B-cos maps; crops that lose the object included."""
    layout = boxed(tmp_path, several=True)
    experiment = experiment_of(
        teacher__model=model,
        train__model=model,
        teacher__train__loss="bce",
        teacher__train__guide={"by": "box", "loss": kind},
        augment__crop_scale=[0.1, 1.0],
        evaluate__select=None,
    )
    teach(Workspace(experiment, layout, fabric))
    lines = history(layout)
    assert len(lines) == 2
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["guidance"] > 0 and 0 < line["valid_maps"] <= 1 for line in lines)


def test_boxes_of_one_label_and_a_guided_teacher_that_learns_to_look(
    tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    layout = boxed(tmp_path, several=False)
    experiment = experiment_of(
        teacher__train__guide={"by": "box", "weight": 5},
        teacher__train__lr=1e-2,
        teacher__train__epochs=12,
        teacher__train__batch_size=8,
        teacher__train__keep="last",
    )
    teach(Workspace(experiment, layout, fabric))
    lines = history(layout)
    assert lines[-1]["guidance"] < 0.3 * lines[0]["guidance"]
    assert lines[-1]["val_epg"] > 0.6  # unguided: 0.23


def test_several_labels_are_guided_one_a_step_about_their_own_boxes(
    tmp_path: Path, fabric: Fabric, experiment_of: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the step sees: masks are the boxes of the class that is explained, and classes change with the epoch."""
    layout = boxed(tmp_path, several=True)
    seen: dict[int, list[int]] = {}
    real = step.class_masks

    def spy(boxes: Any, classes: torch.Tensor, size: int) -> torch.Tensor:
        masks = real(boxes, classes, size)
        for found, cls, mask in zip(boxes, classes.tolist(), masks, strict=True):
            assert cls in found[:, 0]
            assert mask.sum() == 100
            if len(found) == 2:
                seen.setdefault(int(found[:, 2].sum() * 1000 + found[:, 1].sum()), []).append(cls)
        return masks

    monkeypatch.setattr(step, "class_masks", spy)
    experiment = experiment_of(
        teacher__train__loss="bce",
        teacher__train__guide={"by": "box"},
        teacher__train__epochs=6,
        teacher__train__batch_size=8,
        evaluate__select=None,
    )
    teach(Workspace(experiment, layout, fabric))
    assert sum(len(set(classes)) == 2 for classes in seen.values()) > len(seen) / 2


def test_a_front_chooses_the_best_within_a_distance_of_its_first_score(tmp_path: Path) -> None:
    scores = [(0.0, 0.9), (0.5, 0.8), (0.57, 0.7), (0.6, 0.4), (0.59, 0.3)]
    log = [{"epoch": epoch, "val_f1": f1, "val_epg": epg} for epoch, (f1, epg) in enumerate(scores)]
    chosen = [ParetoFront(tmp_path, ("f1", "epg")).best(log, "epg", within) for within in (0, 0.05, 0.2, 1)]
    assert chosen == [3, 2, 1, 0]


def test_a_teacher_that_looks_well_but_answers_badly_is_not_chosen(
    tmp_path: Path, fabric: Fabric, experiment_of: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(
        [{"f1": 0.9, "epg": 0.9}] * 1 + [{"f1": f1, "epg": epg} for f1, epg in ((0, 0.8), (0.6, 0.5))]
    )
    monkeypatch.setattr(module, "score", lambda *args: Scores(next(found), {}))
    layout = boxed(tmp_path, several=True)
    experiment = experiment_of(
        teacher__train__loss="bce",
        teacher__train__guide={"by": "box"},
        teacher__train__epochs=2,
        teacher__train__batch_size=8,
        teacher__train__pareto=["f1", "epg"],
        teacher__train__best_by="epg",
        teacher__train__within=0.05,
    )
    teach(Workspace(experiment, layout, fabric))
    best, second = (
        load_file(layout.teacher / name) for name in ("best.safetensors", "pareto/epoch-001.safetensors")
    )
    assert all(torch.equal(best[key], second[key]) for key in second)


def test_within_needs_a_front(experiment_of: Tiny) -> None:
    with pytest.raises(ConfigError, match="set best_by to a score of pareto"):
        experiment_of(
            teacher__train__pareto=["f1"], teacher__train__best_by="epg", teacher__train__within=0.05
        )


class _Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_killed_teacher_resumes_bit_for_bit_with_its_front(
    tmp_path: Path, fabric: Fabric, experiment_of: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = [boxed(tmp_path / name, several=False) for name in ("whole", "cut")]
    experiment = experiment_of(
        teacher__train__guide={"by": "box", "loss": "l1"},
        teacher__train__epochs=3,
        teacher__train__batch_size=8,
        teacher__train__pareto=["accuracy", "epg"],
        teacher__train__schedule="step",
    )
    teach(Workspace(experiment, layouts[0], fabric))
    calls, real = iter(range(100)), module.TeacherStep.__call__

    def dies(self: Any, *args: Any) -> Any:
        if next(calls) == 4:
            raise _Killed
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(module.TeacherStep, "__call__", dies)
        with pytest.raises(_Killed):
            teach(Workspace(experiment, layouts[1], fabric))
    teach(Workspace(experiment, layouts[1], fabric))
    assert history(layouts[0]) == history(layouts[1])
    whole, cut = (layout.teacher for layout in layouts)
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(cut) for file in cut.rglob("*.safetensors"))
    for file in files:
        a, b = load_file(whole / file), load_file(cut / file)
        assert all(torch.equal(a[key], b[key]) for key in a), file


def test_a_pareto_teacher_is_a_teacher(
    packed: Path, tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    layout = Layout(tmp_path, shared=str(packed))
    teach(Workspace(experiment_of(teacher__train__pareto=["accuracy", "epg"]), layout, fabric))
    listed = json.loads((layout.teacher / "pareto.json").read_text())
    files = {file.name: file for file in (layout.teacher / "pareto").iterdir()}
    assert files
    assert {f"epoch-{int(epoch):03d}.safetensors" for epoch in listed} == set(files)
    lines = {str(line["epoch"]): line for line in history(layout)}
    assert all(listed[e] == {n: lines[e][f"val_{n}"] for n in ("accuracy", "epg")} for e in listed)
    for file in files.values():
        later = experiment_of(teacher__train=None, teacher__weights=str(file))
        images = open_images(Layout(packed).images("train"))
        teacher = load_teacher(Workspace(later, Layout(tmp_path / "later")), images)
        stored = load_file(file)
        assert all(torch.equal(stored[name], tensor) for name, tensor in teacher.net.state_dict().items())


def test_a_score_that_validation_does_not_give_is_said_before_training(
    packed: Path, tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    layout = Layout(tmp_path, shared=str(packed))
    with pytest.raises(ConfigError, match=r"pareto asks for f1, but validation gives .*accuracy"):
        teach(Workspace(experiment_of(teacher__train__pareto=["f1", "epg"]), layout, fabric))
    assert history(layout) == []


def test_settings_that_do_not_fit_the_labels_are_errors_and_leave_no_run(
    tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    layout = boxed(tmp_path / "several", several=True)
    with pytest.raises(ConfigError, match=r"several labels an image: set teacher\.train\.loss to bce"):
        teach(Workspace(experiment_of(), layout, fabric))
    with pytest.raises(ConfigError, match=r"set teacher\.train\.guide\.by to box"):
        teach(Workspace(experiment_of(teacher__train__loss="bce"), layout, fabric))
    assert not layout.teacher.exists()
    unlabelled = boxed(tmp_path / "unlabelled", several=False, label=None)
    with pytest.raises(DataError, match="unlabelled"):
        teach(Workspace(experiment_of(), unlabelled, fabric))


def test_guidance_by_masks_that_are_not_there_names_the_image(
    tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    with pytest.raises(DataError, match=r"image-\d+.*has no mask"):
        teach(Workspace(experiment_of(), boxed(tmp_path, several=False), fabric))


def test_training_starts_from_other_weights(
    packed: Path, tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    """With a rate of almost nothing they stay what they were."""
    first, second = (Layout(tmp_path / name, shared=str(packed)) for name in ("first", "second"))
    teach(Workspace(experiment_of(teacher__train__epochs=1), first, fabric))
    origin = kept_weights(Run(first.teacher))
    changes = {"teacher__train__init": str(origin), "teacher__train__lr": 1e-12, "teacher__train__seed": 7}
    teach(Workspace(experiment_of(**changes), second, fabric))
    a, b = load_file(origin), load_file(kept_weights(Run(second.teacher)))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a if name.endswith("weight"))
