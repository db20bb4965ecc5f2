"""Golden curves: twenty steps of each kind of run, term by term, and the scores after them, as committed numbers.

A refactor reproduces them. A change of numbers renews them, in a commit whose message says why they changed:

    python tests/pipeline/test_golden_curves.py

Every epoch has one step, so a run's `metrics.jsonl` is its curve. Without oneDNN, and with two threads, the losses
change by up to 7e-4 and the gradient's norm by up to 5e-2 (a relu's kink): the tolerances are several times that, and
far below what a mistake in the method does.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from artifacts import ImageSet, Sample, open_images
from artifacts.packing import Packing, write_images
from pipeline.config import Experiment, ModelConfig, parse
from pipeline.data.pack import pack
from pipeline.distill.run import distill
from pipeline.models import build, save_weights
from pipeline.order.prepare import prepare_stores
from pipeline.precompute.run import precompute
from pipeline.teach.run import teach
from pipeline.training.run import Run
from pipeline.workspace import Layout, Workspace

FILE = Path(__file__).parents[1] / "golden" / "curves.json"
STEPS = 20
RELATIVE, OF_GRADIENT, ABSOLUTE = 5e-3, 0.2, 2e-4
SCORE = 0.05
"""Of accuracies and the like, which count whole images: three of 64 may fall to the other side."""
CURVES = {
    "gradcam": ("kd", "e2kd", "kd-frozen", "e2kd-frozen", "at"),
    "bcos": ("kd", "e2kd", "kd-frozen", "e2kd-frozen"),
    "multilabel": ("l2d-frozen",),
}

SCHEDULE: dict[str, Any] = {
    "epochs": STEPS,
    "batch_size": 16,
    "validate_every": STEPS,
    "keep": "last",
    "optimizer": "sgd",
    "clip_norm": 1.0,
}
STUDENTS: dict[str, Any] = {
    "kd": {"mode": "online"},
    "e2kd": {"mode": "online", "explanation_weight": 5},
    "kd-frozen": {},
    "e2kd-frozen": {"explanation_weight": 5},
}
GRADCAM: dict[str, Any] = {
    "data": {"source": "toybirds", "limit": 64},
    "view": {"size": 48},
    "explain": {"logit": "centred"},
    "store": {"rows_per_shard": 32},
    "augment": {"crop_scale": [0.4, 1.0]},
    "teacher": {"model": "toy/resnet", "width": 4, "weights": "teacher.safetensors"},
    "train": {
        "model": "toy/resnet",
        "width": 4,
        "rows": 40,
        "lr": 0.001,
        "clip_norm": 1.0,
        "temperature": 2,
        **SCHEDULE,
    },
    "students": STUDENTS | {"at": {"mode": "online", "prior": {"method": "at"}}},
    "evaluate": {"select": None, "splits": ["test-ood"]},
}
BCOS = GRADCAM | {
    "explain": {"logit": "raw"},
    "teacher": {"model": "bcos/small", "width": 4, "weights": "teacher.safetensors"},
    "train": GRADCAM["train"]
    | {"model": "bcos/small", "lr": 0.05, "clip_norm": None, "agc": 0.01, "temperature": 1},
    "students": STUDENTS,
}
MULTILABEL = GRADCAM | {
    "data": {"source": "voc", "root": "nowhere"},
    "view": {"size": 32},
    "explain": {"classes": "positive", "most": 3},
    "train": GRADCAM["train"] | {"loss": "l2d", "temperature": 1},
    "students": {"l2d-frozen": {"explanation_weight": 2, "label_weight": 0.5, "mixup": 0.4}},
    "evaluate": {"select": None, "splits": ["train"]},
}
CONFIGS = {"gradcam": GRADCAM, "bcos": BCOS, "multilabel": MULTILABEL}
TAUGHT = {"gradcam": {"guide": {"by": "mask"}}, "bcos": {"guide": {"by": "mask"}, "loss": "bce", "agc": 0.01}}
"""Teachers are taught, too: `teach` is a curve of its own."""


def prepared(kind: str, root: Path, fabric: Fabric) -> tuple[Experiment, Layout]:
    """An experiment with its stores, of a teacher of random weights that answers with some confidence."""
    raw, layout = copy.deepcopy(CONFIGS[kind]), Layout(root)
    raw["teacher"]["weights"] = str(root / "teacher.safetensors")
    experiment = parse(raw)
    pack_squares(layout) if kind == "multilabel" else pack(Workspace(experiment, layout))
    images = open_images(layout.images("train"))
    save_teacher(experiment.teacher, images, root / "teacher.safetensors")
    if kind == "multilabel":
        precompute(Workspace(experiment, layout, fabric), "train")
    else:
        prepare_stores(Workspace(experiment, layout, fabric))
    return experiment, layout


@torch.no_grad()
def save_teacher(config: ModelConfig, images: ImageSet, path: Path) -> None:
    """Random weights, with running statistics of the images; a head that has a bias divides the images evenly."""
    torch.manual_seed(7)
    model = build(config.model_copy(update={"weights": None}), len(images.classes)).train()
    pixels = torch.from_numpy(images.read_images(range(len(images)))).float() / 255
    for _ in range(30):
        model(pixels)
    if config.model == "toy/resnet":
        model.net.fc.weight.mul_(8)
        model.net.fc.bias.sub_(model.eval()(pixels).mean(0))
    save_weights(model.net, path)


def pack_squares(layout: Layout) -> None:
    """Pictures of a red, a green and a blue square, each there or not: several labels an image."""

    def sample(row: int) -> Sample:
        rng = np.random.default_rng(row)
        image, present = np.full((3, 32, 32), 128, np.uint8), []
        for colour in range(3):
            if rng.random() < 0.5 or (colour == 2 and not present):
                x, y = int(rng.integers(0, 24)), int(rng.integers(0, 24))
                image[:, y : y + 8, x : x + 8] = 0
                image[colour, y : y + 8, x : x + 8] = 255
                present.append(colour)
        return Sample(f"s{row}", image, label=tuple(present))

    write_images(
        layout.images("train"),
        Packing(
            count=40,
            get=sample,
            view={"size": 32},
            classes=["red", "green", "blue"],
            source="squares",
            rows_per_shard=20,
        ),
    )


def curve(run: Path) -> dict[str, list[float]]:
    """Each logged term over the steps."""
    history = Run(run).history()
    terms = [name for name in history[0] if name not in ("epoch", "seconds")]
    return {name: [float(f"{line[name]:.7g}") for line in history] for name in terms}


def measured(student: str, experiment: Experiment, layout: Layout, fabric: Fabric) -> dict[str, Any]:
    result = distill(Workspace(experiment, layout, fabric), student, 0)
    (scores,) = result["splits"].values()
    kept = {name: round(value, 4) for name, value in scores.items() if not name.startswith("group_")}
    return {"curve": curve(layout.run(student, 0)), "scores": kept}


def taught(kind: str, root: Path, fabric: Fabric) -> dict[str, Any]:
    model = {name: value for name, value in CONFIGS[kind]["teacher"].items() if name != "weights"}
    train = {"lr": 0.001, **SCHEDULE, **TAUGHT[kind]}
    experiment, layout = parse(CONFIGS[kind] | {"teacher": {**model, "train": train}}), Layout(root)
    pack(Workspace(experiment, layout))
    teach(Workspace(experiment, layout, fabric))
    return {"curve": curve(layout.teacher)}


def check(new: dict[str, Any], old: dict[str, Any], label: str) -> None:
    assert set(new["curve"]) == set(old["curve"]), label
    for name, expected in old["curve"].items():
        assert len(expected) == STEPS
        relative = OF_GRADIENT if name == "grad_norm" else RELATIVE
        wrong = [
            (step, a, b)
            for step, (a, b) in enumerate(zip(new["curve"][name], expected, strict=True))
            if not math.isclose(a, b, rel_tol=relative, abs_tol=ABSOLUTE)
        ]
        assert not wrong, (
            f"{label}: {name} differs from step {wrong[0][0]} on: (step, now, golden) {wrong[:3]}"
        )
    for name, score in old.get("scores", {}).items():
        assert new["scores"][name] == pytest.approx(score, abs=SCORE), f"{label}: score {name}"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, fabric: Fabric) -> dict[str, tuple[Experiment, Layout]]:
    return {kind: prepared(kind, tmp_path_factory.mktemp(kind), fabric) for kind in CURVES}


@pytest.mark.parametrize(("kind", "student"), [(kind, name) for kind in CURVES for name in CURVES[kind]])
def test_a_student_follows_its_golden_curve(
    kind: str, student: str, roots: dict[str, Any], fabric: Fabric, golden: dict[str, Any]
) -> None:
    experiment, layout = roots[kind]
    label = f"{kind}/{student}"
    check(measured(student, experiment, layout, fabric), golden[label], label)


@pytest.mark.parametrize("kind", TAUGHT)
def test_a_teacher_follows_its_golden_curve(
    kind: str, tmp_path: Path, fabric: Fabric, golden: dict[str, Any]
) -> None:
    check(taught(kind, tmp_path, fabric), golden[f"{kind}/teach"], f"{kind}/teach")


def all_of_them(folder: Path) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    found = {}
    for kind, students in CURVES.items():
        experiment, layout = prepared(kind, folder / kind, fabric)
        found |= {f"{kind}/{name}": measured(name, experiment, layout, fabric) for name in students}
    return found | {f"{kind}/teach": taught(kind, folder / f"teach-{kind}", fabric) for kind in TAUGHT}


def compact(curves: dict[str, Any]) -> str:
    """JSON with a line a term."""
    lines = [f' "{label}": {{' + _inner(content) + "}" for label, content in curves.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _inner(content: dict[str, Any]) -> str:
    terms = ",\n".join(
        f"   {json.dumps(name)}: {json.dumps(values)}" for name, values in content["curve"].items()
    )
    scores = f',\n  "scores": {json.dumps(content["scores"])}' if "scores" in content else ""
    return f'\n  "curve": {{\n{terms}\n  }}{scores}\n '


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(compact(all_of_them(Path(folder))))
    print(f"written: {FILE}")
