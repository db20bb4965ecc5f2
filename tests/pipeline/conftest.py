"""A tiny experiment, taught and precomputed once for all tests; each test works on a copy."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

from pipeline.config import Experiment, parse
from pipeline.layout import Layout
from pipeline.progress import Quiet
from pipeline.stages import prepare_stores

TINY: dict[str, Any] = {
    "data": {"source": "toybirds", "limit": 96},
    "view": {"size": 48},
    "explain": {"logit": "centred"},
    "store": {"rows_per_shard": 32, "batch_size": 16},
    "augment": {"crop_scale": [0.6, 1.0]},
    "teacher": {
        "model": "toy/resnet",
        "width": 4,
        "train": {"epochs": 2, "lr": 3e-3, "guide": {"by": "mask"}},
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
    prepare_stores(tiny(), Layout(root), fabric, Quiet())
    return root


@pytest.fixture
def prepared(prepared_root: Path, tmp_path: Path) -> Layout:
    """Packed, taught and precomputed."""
    shutil.copytree(prepared_root, tmp_path / "tiny")
    return Layout(tmp_path / "tiny")


@pytest.fixture(scope="session")
def experiment_of() -> Callable[..., Experiment]:
    return tiny
