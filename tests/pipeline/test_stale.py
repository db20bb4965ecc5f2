"""Runs that the config does not describe, and run folders that lost a file: told, never mixed, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

from artifacts.errors import CheckpointError, ConfigError, DataError, Diverged, E2kdError
from pipeline.config import Experiment, dump
from pipeline.distill.run import distill
from pipeline.order.prepare import prepare_stores
from pipeline.order.runs import distill_all, evaluate_all
from pipeline.progress import Quiet
from pipeline.report import report
from pipeline.training.run import Run
from pipeline.workspace import CODEC_COST, FREEZING_GAP, SHIFT_CURVE, Layout, Workspace

Tiny = Callable[..., Experiment]


@pytest.fixture(scope="module")
def trained_root(
    prepared_root: Path, tmp_path_factory: pytest.TempPathFactory, experiment_of: Tiny, fabric: Fabric
) -> Path:
    root = shutil.copytree(prepared_root, tmp_path_factory.mktemp("trained") / "tiny")
    _trained(_once(experiment_of), Layout(root), fabric)
    return root


@pytest.fixture
def trained(trained_root: Path, tmp_path: Path) -> Layout:
    """`prepared`, and the student of `_once` is done: a copy to change."""
    return Layout(Path(shutil.copytree(trained_root, tmp_path / "tiny")))


def _once(experiment_of: Tiny, **changes: Any) -> Experiment:
    return experiment_of(**{"train__epochs": 1, "train__rows": 32, "students": {"kd": {}}} | changes)


def _trained(experiment: Experiment, layout: Layout, fabric: Fabric) -> Run:
    distill_all(Workspace(experiment, layout, fabric), ["kd"], [0])
    return Run(layout.run("kd", 0))


def test_other_settings_are_refused_before_anything_is_written_and_told_by_the_report(
    trained: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment, run = _once(experiment_of), Run(trained.run("kd", 0))
    before = trained.config.read_text()
    assert before == dump(experiment)
    other = _once(experiment_of, train__lr=0.25)
    with pytest.raises(ConfigError, match=r"settings\.lr: run .*, config 0\.25"):
        distill_all(Workspace(other, trained, fabric), ["kd"], [0])
    with pytest.raises(ConfigError, match=r"settings\.lr: run .*, config 0\.25"):
        evaluate_all(Workspace(other, trained, fabric))
    assert trained.config.read_text() == before  # `e2kd report out/NAME` reads it
    assert "other settings" not in report(Workspace(experiment, trained))
    assert "made with other settings than this config's: kd seed 0 (settings.lr: run" in report(
        Workspace(other, trained)
    )
    text = (trained.report / "report.md").read_text()
    assert "made with other settings than this config's: kd seed 0 (settings.lr: run" in text
    evaluate_all(Workspace(experiment, trained, fabric))
    assert run.done


def test_a_setting_newer_than_the_run_is_its_default(
    trained: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment, run = _once(experiment_of), Run(trained.run("kd", 0))
    kept = (run.path / "config.yaml").read_text()
    assert "  label_weight: 0.0\n" in kept
    (run.path / "config.yaml").write_text(kept.replace("  label_weight: 0.0\n", ""))
    _trained(experiment, trained, fabric)
    other = _once(experiment_of, students={"kd": {"label_weight": 1}})
    with pytest.raises(ConfigError, match=r"settings\.label_weight: run 0\.0, config 1\.0"):
        distill(Workspace(other, trained, fabric), "kd", 0)


def test_a_split_without_scores_is_told(trained: Layout, experiment_of: Tiny, fabric: Fabric) -> None:
    experiment, run = _once(experiment_of), Run(trained.run("kd", 0))
    result = run.result()
    lost = experiment.evaluate.splits[0]
    del result["splits"][lost]
    run.finish(result)
    assert f"not scored, run `e2kd evaluate`: kd seed 0 on {lost}" in report(Workspace(experiment, trained))


def test_a_lost_result_is_made_again_and_a_damaged_one_is_named(
    trained: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment, run = _once(experiment_of), Run(trained.run("kd", 0))
    weights, scores = (run.path / "last.safetensors").read_bytes(), run.result()["splits"]
    (run.path / "result.json").write_text('{"student": "k')
    with pytest.raises(CheckpointError, match=r"result\.json is damaged; delete it.*rm "):
        report(Workspace(experiment, trained))
    (run.path / "result.json").unlink()
    with pytest.raises(ConfigError, match="no finished run"):
        report(Workspace(experiment, trained))
    assert _trained(experiment, trained, fabric).result()["splits"] == scores
    assert (run.path / "last.safetensors").read_bytes() == weights


def test_lost_weights_are_named_with_the_mend(prepared: Layout, experiment_of: Tiny, fabric: Fabric) -> None:
    experiment = experiment_of(train__epochs=1, train__rows=32, train__keep="last", students={"kd": {}})
    run = _trained(experiment, prepared, fabric)
    (run.path / "last.safetensors").unlink()
    with pytest.raises(E2kdError, match=r"last\.safetensors is gone; delete the run .*rm -r "):
        evaluate_all(Workspace(experiment, prepared, fabric))


def test_runs_scored_beside_another_store_are_told_and_scored_again(
    trained: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment, run = _once(experiment_of), Run(trained.run("kd", 0))
    result = run.result()
    truth = result["splits"]["test-ood"]["accuracy"]
    result["splits"]["test-ood"]["accuracy"], result["stores"]["test-ood"] = 0.123, "of before"
    run.finish(result)
    told = report(Workspace(experiment, trained))
    assert (
        "scored on other images or maps than there are now, run `e2kd evaluate`: kd seed 0 on test-ood"
        in told
    )
    _trained(experiment, trained, fabric)
    assert run.result()["splits"]["test-ood"]["accuracy"] == truth
    assert "scored on other images" not in report(Workspace(experiment, trained))


def test_what_was_measured_of_another_store_is_measured_again(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment = experiment_of(evaluate__shifts=[1])
    prepare_stores(Workspace(experiment, prepared, fabric))
    beside = prepared.stores(experiment.store_name)
    names = ("teacher-val.json", "teacher-test-ood.json", FREEZING_GAP, CODEC_COST, SHIFT_CURVE)
    truth = {name: beside.read(name) for name in names}
    for name, text in truth.items():
        beside.write(name, json.dumps({**json.loads(text), "store": "of before"}).encode())
    prepare_stores(Workspace(experiment, prepared, fabric))
    assert {name: beside.read(name) for name in names} == truth


def test_a_config_that_stage_1_was_not_made_by_is_told(
    trained: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment = _once(experiment_of)
    assert "stage 1 was made by" not in report(Workspace(experiment, trained))
    other = _once(experiment_of, view__size=64, teacher__train__epochs=9)
    told = report(Workspace(other, trained))
    assert "this config is not the one that stage 1 was made by: view.size: made 48, config 64" in told
    assert "teacher.train.epochs: made 2, config 9" in told


def test_a_lost_best_epoch_is_not_replaced_by_the_last(
    trained: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment, run = _once(experiment_of), Run(trained.run("kd", 0))
    (run.path / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"best\.safetensors is gone"):
        evaluate_all(Workspace(experiment, trained, fabric))


def test_a_diverged_candidate_loses_its_sweep_and_stops_nothing(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw: dict[str, Any] = {"students": {"kd": {}, "e2kd": {"explanation_weight": 1}}}
    raw |= {"seeds": [0, 1], "sweep": {"kd": {"lr": [1e30, 1e-3]}}, "train__epochs": 1, "train__rows": 32}
    experiment = experiment_of(**raw)
    lost, kept = (name for name in experiment.candidates if name != "e2kd")
    said: list[str] = []
    lines = Quiet()
    monkeypatch.setattr(lines, "say", said.append)
    for _ in range(2):
        distill_all(Workspace(experiment, prepared, fabric, lines), list(experiment.candidates), [0, 1])
        assert said[-1].startswith("4 runs are done")
    assert not Run(prepared.run(lost, 0)).done
    assert all(Run(prepared.run(name, seed)).done for name in (kept, "e2kd") for seed in (0, 1))
    told = [line for line in said if line.startswith(f"{lost} seed 0: ")]
    assert len(told) == 2
    assert "earlier; to try it again: rm" in told[1]


def test_a_diverged_run_is_named_after_the_others_and_may_be_begun_with_other_settings(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    students = {"kd": {"lr": 1e30}, "e2kd": {"explanation_weight": 1}}
    experiment = experiment_of(train__epochs=1, train__rows=32, students=students)
    with pytest.raises(Diverged, match="diverged: kd seed 0; why is above"):
        distill_all(Workspace(experiment, prepared, fabric), ["kd", "e2kd"], [0])
    assert Run(prepared.run("e2kd", 0)).done
    assert _trained(
        experiment_of(train__epochs=1, train__rows=32, students={"kd": {}}), prepared, fabric
    ).done


@pytest.mark.parametrize(
    ("name", "text"), [("result.json", "{}"), ("config.yaml", "a: \0"), ("metrics.jsonl", "{]}\n")]
)
def test_a_damaged_file_of_a_run_is_named(
    trained: Layout, experiment_of: Tiny, fabric: Fabric, name: str, text: str
) -> None:
    experiment, run = _once(experiment_of), Run(trained.run("kd", 0))
    (run.path / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        report(Workspace(experiment, trained))


def test_a_damaged_measurement_is_named(trained: Layout, experiment_of: Tiny, fabric: Fabric) -> None:
    experiment = _once(experiment_of)
    trained.stores(experiment.store_name).write(CODEC_COST, b"")
    with pytest.raises(DataError, match=r"codec-cost\.json is damaged; delete it"):
        report(Workspace(experiment, trained))
