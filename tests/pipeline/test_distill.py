"""Stage 2: every student trains; a killed run resumed equals an uninterrupted one; settings are never mixed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from artifacts.errors import ConfigError, Diverged
from pipeline.augment.warp import resample
from pipeline.config import Experiment
from pipeline.distill import step
from pipeline.distill.run import distill
from pipeline.training.run import Run
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
CompareKilledRun = Callable[[Experiment, Layout, str, Sequence[int]], None]


def _train(
    experiment: Experiment, layout: Layout, fabric: Fabric, student: str, seed: int = 0
) -> dict[str, object]:
    return distill(Workspace(experiment, layout, fabric), student, seed)


@pytest.mark.parametrize("student", ["ce", "kd", "e2kd", "kd-frozen", "e2kd-frozen"])
def test_every_student_trains_and_leaves_a_whole_run(
    student: str, prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    result = _train(experiment_of(), prepared, fabric, student)
    run = prepared.run(student, 0)
    names = {file.name for file in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "last.safetensors", "state.pt", "result.json", "done"} <= names
    assert json.loads((run / "result.json").read_text()) == result
    scores = result["splits"]["test-ood"]  # type: ignore[index]
    assert set(scores) >= {
        "accuracy",
        "agreement",
        "epg",
        "iou",
        "dead",
        "map_cosine",
        "ece",
        "worst_group_accuracy",
    }
    assert all(0 <= value <= 1 for value in scores.values())
    history = Run(run).history()
    assert [line["epoch"] for line in history] == [0, 1, 2]
    assert all("val_accuracy" in line for line in history)


@pytest.mark.parametrize("student", ["e2kd-frozen", "kd"])
def test_killed_and_resumed_is_bit_identical(
    student: str, prepared: Layout, experiment_of: Tiny, compare_killed_run: CompareKilledRun
) -> None:
    compare_killed_run(experiment_of(), prepared, student, [1, 4, 7, 11])


def test_done_runs_are_left_alone(prepared: Layout, fabric: Fabric, experiment_of: Tiny) -> None:
    first = _train(experiment_of(), prepared, fabric, "kd-frozen")
    stamp = (prepared.run("kd-frozen", 0) / "state.pt").stat().st_mtime_ns
    assert _train(experiment_of(), prepared, fabric, "kd-frozen") == first
    assert (prepared.run("kd-frozen", 0) / "state.pt").stat().st_mtime_ns == stamp


def test_other_settings_never_continue_a_run(prepared: Layout, fabric: Fabric, experiment_of: Tiny) -> None:
    _train(experiment_of(), prepared, fabric, "kd-frozen")
    with pytest.raises(ConfigError, match=r"settings\.lr: run 0\.003, config 0\.1"):
        _train(experiment_of(train__lr=0.1), prepared, fabric, "kd-frozen")


def test_frozen_e2kd_with_lambda_0_is_kd(prepared: Layout, fabric: Fabric, experiment_of: Tiny) -> None:
    experiment = experiment_of(students={"a": {}, "b": {"explanation_weight": 1e-30}})
    _train(experiment, prepared, fabric, "a")
    _train(experiment, prepared, fabric, "b")
    a, b = (load_file(prepared.run(name, 0) / "last.safetensors") for name in "ab")
    assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)


@pytest.mark.parametrize("loss", ["kd", "l2d"])
def test_the_labels_loss_beside_the_teachers(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny, loss: str
) -> None:
    """L = kd_weight L_KD + label_weight L_labels + lambda L_exp, logged term by term."""
    weighed = {
        "loss": loss,
        "kd_weight": 0.5,
        "label_weight": 0.25,
        "explanation_weight": 2,
        "temperature": 1,
    }
    experiment = experiment_of(students={"both": weighed})
    result = _train(experiment, prepared, fabric, "both")
    assert result["splits"]
    for line in Run(prepared.run("both", 0)).history():
        terms = 0.5 * line["logit_loss"] + 0.25 * line["label_loss"] + 2 * line["explanation_loss"]
        assert line["loss"] == pytest.approx(terms, rel=1e-4)


@pytest.mark.parametrize("weight", ["kd_weight", "label_weight"])
def test_there_is_nothing_to_weigh_without_a_teachers_logits(experiment_of: Tiny, weight: str) -> None:
    with pytest.raises(ConfigError, match=r"loss: ce has labels only. Remove them, or set loss"):
        experiment_of(students={"ce": {"loss": "ce", weight: 0.5}})


def test_l2d_has_no_temperature(experiment_of: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"students\.a: .*remove temperature"):
        experiment_of(students={"a": {"loss": "l2d", "temperature": 3}})


def test_mixed_labels_beside_frozen_targets(prepared: Layout, fabric: Fabric, experiment_of: Tiny) -> None:
    experiment = experiment_of(students={"both": {"label_weight": 1, "mixup": 1, "explanation_weight": 2}})
    assert _train(experiment, prepared, fabric, "both")["splits"]


def test_a_diverging_run_names_the_step(prepared: Layout, fabric: Fabric, experiment_of: Tiny) -> None:
    with pytest.raises(Exception, match=r"not finite at step \d+ \(epoch \d\)"):
        _train(experiment_of(train__lr=1e30), prepared, fabric, "kd-frozen")


def test_a_run_that_diverges_in_its_last_step_is_not_scored(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    """No loss comes after it: the network's own answers tell."""
    steep = {"lr": 1e30, "optimizer": "adam", "warmup": 0, "epochs": 1, "batch_size": 96}
    experiment = experiment_of(students={"kd": {"mode": "online", **steep}})
    with pytest.raises(Diverged, match="answers with NaN or infinity"):
        _train(experiment, prepared, fabric, "kd")
    assert not Run(prepared.run("kd", 0)).done
    assert not list(prepared.run("kd", 0).glob("*.safetensors"))


def test_too_few_images_for_the_shots_is_an_error(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    with pytest.raises(ConfigError, match=r"student kd asks for shots: 50, but class \w+ has \d+ images in"):
        _train(experiment_of(students={"kd": {"shots": 50}}), prepared, fabric, "kd")


def test_damaged_checkpoint_is_an_error_with_a_mend(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    _train(experiment_of(), prepared, fabric, "kd-frozen")
    run: Path = prepared.run("kd-frozen", 0)
    (run / "done").unlink()
    (run / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(Exception, match=r"state\.pt.*delete"):
        _train(experiment_of(), prepared, fabric, "kd-frozen")


def test_bf16_students_train(prepared: Layout, experiment_of: Tiny) -> None:
    from pipeline.devices import start

    result = _train(experiment_of(train__precision="bf16"), prepared, start("bf16"), "e2kd-frozen")
    assert result["splits"]


@pytest.mark.parametrize("student", ["e2kd", "e2kd-frozen"])
def test_maps_compared_at_the_images_size(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny, monkeypatch: pytest.MonkeyPatch, student: str
) -> None:
    """The authors' comparison: both maps brought to the images' size, bilinearly, before the cosine."""
    seen = []
    real = step.explanation_loss

    def spy(maps: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((maps.shape, targets.shape))
        return real(maps, targets)

    monkeypatch.setattr(step, "explanation_loss", spy)
    _train(experiment_of(explain__compare_at="input", train__epochs=1), prepared, fabric, student)
    assert set(seen) == {((16, 1, 48, 48), (16, 1, 48, 48))}


def test_bringing_a_map_to_the_images_size_is_bilinear() -> None:
    maps = torch.rand(2, 1, 7, 7)
    expected = torch.nn.functional.interpolate(maps, size=(48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample(maps, (48, 48)), expected, rtol=1e-4, atol=1e-5)
