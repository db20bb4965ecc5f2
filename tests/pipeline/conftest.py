"""A tiny experiment, taught and precomputed once for all tests; each test works on a copy."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from pipeline.config import Experiment, parse
from pipeline.distill import run as distill
from pipeline.order.prepare import prepare_stores
from pipeline.training.run import Run
from pipeline.workspace import Layout, Workspace

TINY: dict[str, Any] = {
    "data": {"source": "toybirds", "limit": 96},
    "view": {"size": 48},
    "explain": {"logit": "centred"},
    "store": {"rows_per_shard": 32, "batch_size": 16},
    "augment": {"crop_scale": [0.6, 1.0]},
    "teacher": {
        "model": "toy/resnet",
        "width": 4,
        "train": {"epochs": 2, "lr": 3e-3, "seed": 0, "guide": {"by": "mask"}},
    },
    "train": {"model": "toy/resnet", "width": 4, "rows": 64, "epochs": 3, "batch_size": 16, "lr": 3e-3},
    "students": {
        "ce": {"loss": "ce"},
        "kd": {"mode": "online"},
        "e2kd": {"mode": "online", "explanation_weight": 5},
        "kd-frozen": {},
        "e2kd-frozen": {"explanation_weight": 5},
    },
    "evaluate": {"select": "val", "splits": ["test-ood"]},
}


def tiny(**changes: Any) -> Experiment:
    """TINY with `train__epochs=5`-like changes."""
    raw = copy.deepcopy(TINY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = raw
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return parse(raw)


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory: pytest.TempPathFactory, fabric: Fabric) -> Path:
    root = tmp_path_factory.mktemp("prepared") / "tiny"
    prepare_stores(Workspace(tiny(), Layout(root), fabric))
    return root


@pytest.fixture
def prepared(prepared_root: Path, tmp_path: Path) -> Layout:
    """Packed, taught and precomputed."""
    shutil.copytree(prepared_root, tmp_path / "tiny")
    return Layout(tmp_path / "tiny")


@pytest.fixture(scope="session")
def experiment_of() -> Callable[..., Experiment]:
    return tiny


class _Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture
def compare_killed_run(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Experiment, Layout, str, Sequence[int]], None]:
    """(experiment, layout, student, steps): killed in one of the steps and resumed, the run ends bit for bit as in one
    go."""

    def compare(experiment: Experiment, layout: Layout, student: str, steps: Sequence[int]) -> None:
        def train() -> None:
            distill.distill(Workspace(experiment, layout, fabric), student, 1)

        def train_and_die(step: int) -> None:
            calls, real = iter(range(1000)), distill.StudentStep.__call__

            def dies(self: object, *args: object) -> object:
                if next(calls) == step:
                    raise _Killed
                return real(self, *args)  # type: ignore[arg-type]

            with monkeypatch.context() as patched:
                patched.setattr(distill.StudentStep, "__call__", dies)
                with pytest.raises(_Killed):
                    train()

        train()
        whole, resumed = layout.run(student, 1).rename(layout.root / "whole"), layout.run(student, 1)
        for step in steps:
            train_and_die(step)
            began = _hours_later(Run(resumed))
            torch.manual_seed(12345)  # whatever happened in between
            train()
            assert Run(resumed).result()["seconds"]["train"] >= began - 0.1
            for file in whole.glob("*.safetensors"):
                a, b = load_file(file), load_file(resumed / file.name)
                assert all(torch.equal(a[key], b[key]) for key in a), (step, file)
            assert _history(whole) == _history(resumed), step
            shutil.rmtree(resumed)

    return compare


def _hours_later(run: Run) -> float:
    """As if the logged epochs had taken an hour more; returns the last one's seconds."""
    lines = [line | {"seconds": line["seconds"] + 3600} for line in run.history()]
    run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return float(lines[-1]["seconds"]) if lines else 0.0


def _history(run: Path) -> list[dict[str, object]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in Run(run).history()]
