"""Runs that the config does not describe, and run folders that lost a file: told, never mixed, nothing lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning_fabric import Fabric

from artifacts.errors import ConfigError, E2kdError
from pipeline.config import Experiment, dump
from pipeline.distill import distill
from pipeline.layout import Layout
from pipeline.progress import Quiet
from pipeline.report import report
from pipeline.run import CheckpointError, Run
from pipeline.stages import distill_all, evaluate_all

Tiny = Callable[..., Experiment]


def _trained(experiment: Experiment, layout: Layout, fabric: Fabric) -> Run:
    distill_all(experiment, layout, fabric, Quiet(), ["kd"], [0])
    return Run(layout.run("kd", 0))


def test_other_settings_are_refused_before_anything_is_written_and_told_by_the_report(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment = experiment_of(train__epochs=1, train__rows=32, students={"kd": {}})
    run = _trained(experiment, prepared, fabric)
    before = prepared.config.read_text()
    assert before == dump(experiment)
    other = experiment_of(train__epochs=1, train__rows=32, train__lr=0.25, students={"kd": {}})
    with pytest.raises(ConfigError, match=r"settings\.lr: run .*, config 0\.25"):
        distill_all(other, prepared, fabric, Quiet(), ["kd"], [0])
    with pytest.raises(ConfigError, match=r"settings\.lr: run .*, config 0\.25"):
        evaluate_all(other, prepared, fabric, Quiet())
    assert prepared.config.read_text() == before  # `e2kd report out/NAME` reads it
    assert "other settings" not in report(experiment, prepared)
    assert "made with other settings than this config's: kd seed 0 (settings.lr: run" in report(
        other, prepared
    )
    text = (prepared.report / "report.md").read_text()
    assert "made with other settings than this config's: kd seed 0 (settings.lr: run" in text
    evaluate_all(experiment, prepared, fabric, Quiet())
    assert run.done


def test_a_setting_newer_than_the_run_is_its_default(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment = experiment_of(train__epochs=1, train__rows=32, students={"kd": {}})
    run = _trained(experiment, prepared, fabric)
    kept = (run.path / "config.yaml").read_text()
    assert "  label_weight: 0.0\n" in kept
    (run.path / "config.yaml").write_text(kept.replace("  label_weight: 0.0\n", ""))
    _trained(experiment, prepared, fabric)
    other = experiment_of(train__epochs=1, train__rows=32, students={"kd": {"label_weight": 1}})
    with pytest.raises(ConfigError, match=r"settings\.label_weight: run 0\.0, config 1\.0"):
        distill(other, prepared, fabric, "kd", 0, Quiet())


def test_a_split_without_scores_is_told(prepared: Layout, experiment_of: Tiny, fabric: Fabric) -> None:
    experiment = experiment_of(train__epochs=1, train__rows=32, students={"kd": {}})
    run = _trained(experiment, prepared, fabric)
    result = run.result()
    lost = experiment.evaluate.splits[0]
    del result["splits"][lost]
    run.finish(result)
    assert f"not scored, run `e2kd evaluate`: kd seed 0 on {lost}" in report(experiment, prepared)


def test_a_lost_result_is_made_again_and_a_damaged_one_is_named(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment = experiment_of(train__epochs=1, train__rows=32, students={"kd": {}})
    run = _trained(experiment, prepared, fabric)
    weights, scores = (run.path / "last.safetensors").read_bytes(), run.result()["splits"]
    (run.path / "result.json").write_text('{"student": "k')
    with pytest.raises(CheckpointError, match=r"result\.json is damaged; delete it.*rm "):
        report(experiment, prepared)
    (run.path / "result.json").unlink()
    with pytest.raises(ConfigError, match="no finished run"):
        report(experiment, prepared)
    assert _trained(experiment, prepared, fabric).result()["splits"] == scores
    assert (run.path / "last.safetensors").read_bytes() == weights


def test_lost_weights_are_named_with_the_mend(prepared: Layout, experiment_of: Tiny, fabric: Fabric) -> None:
    experiment = experiment_of(train__epochs=1, train__rows=32, train__keep="last", students={"kd": {}})
    run = _trained(experiment, prepared, fabric)
    (run.path / "last.safetensors").unlink()
    with pytest.raises(E2kdError, match=r"last\.safetensors is gone; delete the run .*rm -r "):
        evaluate_all(experiment, prepared, fabric, Quiet())
