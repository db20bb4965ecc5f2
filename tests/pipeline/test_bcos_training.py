"""B-cos networks through the whole pipeline: teacher, int6 store, online and frozen students; how they train."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from artifacts import open_images, open_store, verify_store
from artifacts.errors import ConfigError, ModelError
from pipeline import explain as explainers
from pipeline.config import Experiment, ModelConfig, StudentConfig
from pipeline.models import build
from pipeline.order.prepare import prepare_stores
from pipeline.order.runs import distill_all
from pipeline.report import report
from pipeline.training.labels import label_loss
from pipeline.training.run import Run
from pipeline.training.schedule import clip_gradients
from pipeline.training.trained import build_explainer, load_teacher
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
BCOS: dict[str, Any] = {
    "teacher": {
        "model": "bcos/small",
        "width": 4,
        "train": {"epochs": 1, "loss": "bce", "agc": 0.01, "weight_decay": 0, "guide": {"by": "mask"}},
    },
    "train": {"model": "bcos/small", "width": 4, "rows": 32, "epochs": 1, "batch_size": 16, "agc": 0.01},
    "students": {
        "bce": {"loss": "bce"},
        "kd": {"mode": "online"},
        "e2kd": {"mode": "online", "explanation_weight": 5},
        "e2kd-frozen": {"explanation_weight": 5},
        "cnn": {"model": "toy/resnet", "mode": "frozen"},
    },
    "explain": {"logit": "raw"},
}


@pytest.fixture(scope="module")
def bcos_root(tmp_path_factory: pytest.TempPathFactory, experiment_of: Tiny, fabric: Fabric) -> Path:
    root = tmp_path_factory.mktemp("bcos") / "bcos"
    prepare_stores(Workspace(experiment_of(**BCOS), Layout(root), fabric))
    return root


@pytest.mark.parametrize("student", ["e2kd", "e2kd-frozen"])
def test_killed_and_resumed_is_bit_identical(
    student: str,
    bcos_root: Path,
    tmp_path: Path,
    experiment_of: Tiny,
    compare_killed_run: Callable[[Experiment, Layout, str, Sequence[int]], None],
) -> None:
    layout = Layout(Path(shutil.copytree(bcos_root, tmp_path / "bcos")))
    experiment = experiment_of(**{**BCOS, "train": {**BCOS["train"], "epochs": 3}})
    compare_killed_run(experiment, layout, student, [4])


def test_the_whole_pipeline(bcos_root: Path, experiment_of: Tiny, fabric: Fabric) -> None:
    experiment, layout = experiment_of(**BCOS), Layout(bcos_root)
    where = layout.store("bcos-raw", "train")
    assert verify_store(where, layout.images("train")).ok
    store, images = open_store(where), open_images(layout.images("train"))
    assert store.manifest.maps.codec == "e2kd.int6"
    rows = np.arange(0, 96, 7)
    explainer = build_explainer(experiment.explain, load_teacher(Workspace(experiment, layout), images))
    live = explainer(torch.from_numpy(images.read_images(rows)).float() / 255)
    stored = torch.from_numpy(store.read(rows).maps[:, 0, 0])
    assert stored.shape == live.maps.shape == (len(rows), 6, 48, 48)
    assert nn.functional.cosine_similarity(stored.flatten(1), live.maps.flatten(1)).min() > 0.98

    distill_all(Workspace(experiment, layout, fabric), list(experiment.candidates), [0])
    for name in experiment.candidates:
        result = json.loads((layout.run(name, 0) / "result.json").read_text())
        scores = result["splits"]["test-ood"]
        assert ("map_cosine" in scores) == (name != "cnn")  # GradCAM is not compared with W(x)
        assert 0 <= scores["epg"] <= 1
    line = Run(layout.run("e2kd", 0)).history()[0]
    assert line["grad_norm"] > 0
    assert line["map_norm"] > 0
    assert "e2kd-frozen" in report(Workspace(experiment, layout))


def test_explanations_of_two_kinds_cannot_be_matched(experiment_of: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"student e2kd: its explanations \(gradcam\).*teacher's \(bcos\)"):
        experiment_of(**{**BCOS, "train": {"model": "toy/resnet"}})


def test_gradcam_of_a_bcos_network_says_what_to_use() -> None:
    model = build(ModelConfig(model="bcos/small", width=4), 2)
    assert isinstance(explainers.build("auto", model), explainers.BCos)
    with pytest.raises(ModelError, match=r"set explain\.explainer to bcos"):
        explainers.build("gradcam", model)
    with pytest.raises(ModelError, match="no B-cos layers"):
        explainers.build("bcos", build(ModelConfig(model="toy/resnet", width=4), 2))
    with pytest.raises(ModelError, match="remove mean and std"):
        build(ModelConfig(model="bcos/small", mean=(0, 0, 0), std=(1, 1, 1)), 2)


def test_bce_with_off_targets_by_hand() -> None:
    """Two classes: targets (1, 1/2); -log s(0) = log 2; for logit 0 every term is log 2, whatever the target."""
    labels = torch.tensor([0])
    assert label_loss("bce", torch.zeros(1, 2), labels).item() == pytest.approx(math.log(2))
    logits = torch.tensor([[2.0, -1.0]])
    first = -math.log(1 / (1 + math.exp(-2)))
    p = 1 / (1 + math.exp(1))
    second = -(0.5 * math.log(p) + 0.5 * math.log(1 - p))
    assert label_loss("bce", logits, labels).item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert label_loss("ce", logits, labels).item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-5)


def test_adaptive_clipping_bounds_each_unit() -> None:
    """|gradient of a unit| <= agc * max(|weight of the unit|, 1e-3) (Brock et al. 2021), small ones untouched."""
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.weight[1] *= 10
    layer.weight.grad = torch.full((3, 4), 5.0)
    layer.weight.grad[2] = 1e-4
    before = layer.weight.grad.clone()
    norm = clip_gradients(layer, StudentConfig(model="toy/resnet", agc=0.01))
    assert norm.item() == pytest.approx(before.norm().item())
    norms = layer.weight.grad.norm(dim=1)
    torch.testing.assert_close(norms[:2], 0.01 * layer.weight.detach().norm(dim=1)[:2])
    torch.testing.assert_close(layer.weight.grad[2], before[2])
