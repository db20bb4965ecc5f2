"""CONTRIBUTING.md's sentence, done to a copy of the tree: an explainer is one new file, one config class, one row."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from artifacts import open_store

TREE = Path(__file__).parents[2]
PACKAGES = ("artifacts", "pipeline", "cli")
NEW, CONFIG, TABLE = (
    "pipeline/explain/saliency.py",
    "pipeline/config/explain.py",
    "pipeline/explain/__init__.py",
)

FILE = '''"""Input gradients (Simonyan et al. 2014): how much each pixel would change the logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.explain.explainer import Classes, Explained, Explainer, cotangent, explained_classes


class Saliency(Explainer):
    """Maps [B,1,H,W] >= 0 of the size of the images: |d logit / d x| summed over the colours, to a power."""

    channels = 1

    def __init__(self, model: nn.Module, *, logit: str = "raw", power: float = 1.0) -> None:
        super().__init__(model, logit=logit)
        self.power = power

    def map_size(self, image_size: int) -> tuple[int, int]:
        return image_size, image_size

    def explain(self, images: Tensor, classes: Classes, differentiable: bool) -> Explained:
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            logits = self.model(x)
            classes = explained_classes(classes, logits)
            asked = cotangent(self.logit, logits, classes)
            (gradient,) = torch.autograd.grad(logits, x, asked, create_graph=differentiable)
            maps = gradient.abs().sum(1, keepdim=True) ** self.power
        return Explained(logits if differentiable else logits.detach(), maps, classes)
'''

CLASS = '''

class Saliency(ExplainConfig):
    """The gradient of the logit to the image."""

    explainer: Literal["saliency"]
    power: float = 1.0
'''

ROW = '    "saliency": Saliency,\n'
IMPORT = "from pipeline.explain.saliency import Saliency\n"

NETWORK = {"model": "toy/resnet", "width": 4}
EXPERIMENT = {
    "data": {"source": "toybirds", "limit": 24},
    "view": {"size": 48},
    "explain": {"explainer": "saliency", "power": 0.5},
    "teacher": {**NETWORK, "train": {"epochs": 1}},
    "students": {"e2kd": {**NETWORK, "epochs": 1, "batch_size": 8, "explanation_weight": 1}},
    "evaluate": {"select": None, "splits": ["test-ood"]},
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(TREE / package, tmp_path / "copy" / package)
    return tmp_path / "copy"


def insert(file: Path, line: str, after: str) -> None:
    """Put `line` behind the last line that begins with `after`."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    last = max(number for number, text in enumerate(lines) if text.startswith(after))
    file.write_text("".join([*lines[: last + 1], line, *lines[last + 1 :]]), encoding="utf-8")


def add_explainer(copy: Path) -> None:
    """One new file, one config class, one row of the table (and the row's import)."""
    (copy / NEW).write_text(FILE, encoding="utf-8")
    with (copy / CONFIG).open("a", encoding="utf-8") as config:
        config.write(CLASS)
    insert(copy / TABLE, IMPORT, after="from pipeline.explain.")
    insert(copy / TABLE, ROW, after='    "bcos": BCos,')


def changes(copy: Path) -> Iterator[tuple[str, str]]:
    """(file, "+ line" or "- line") of every line in which the copy is not the tree."""
    for package in PACKAGES:
        names = {path.relative_to(root) for root in (TREE, copy) for path in (root / package).rglob("*.py")}
        for name in sorted(names):
            old, new = (lines_of(root / name) for root in (TREE, copy))
            if old != new:
                changed = (line for line in difflib.ndiff(old, new) if line[:2] in ("+ ", "- "))
                yield from ((name.as_posix(), line) for line in changed)


def lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def test_an_explainer_is_one_file_one_config_class_and_one_row(copy: Path, tmp_path: Path) -> None:
    add_explainer(copy)
    added = {NEW: FILE, CONFIG: CLASS, TABLE: IMPORT + ROW}
    expected = [(file, f"+ {line}") for file, text in added.items() for line in text.splitlines()]
    assert sorted(changes(copy)) == sorted(expected)

    (tmp_path / "saliency.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cli", "distill", "saliency.yaml", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    manifest = open_store(tmp_path / "out/stores/saliency-raw/train").manifest
    assert manifest.explainer.name == "saliency"
    assert manifest.explainer.settings == {"logit": "raw", "power": 0.5}
    assert (manifest.shape.channels, manifest.shape.height, manifest.maps.codec) == (1, 48, "e2kd.fp16")
    run = tmp_path / "out/runs/e2kd/seed-0"
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < history[-1]["explanation_loss"] < 1
    scores = json.loads((run / "result.json").read_text())["splits"]["test-ood"]
    assert 0 < scores["map_cosine"] < 1
    assert scores["dead"] == 0
