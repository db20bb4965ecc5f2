"""Means, deviations and the paired bootstrap, by hand where a hand can."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.evaluate.metrics import calibration_error
from pipeline.report.statistics import Samples, paired_intervals, summarise

NAN = math.nan


def _rows(*values: float, name: str = "accuracy") -> Samples:
    return {name: np.array(values, np.float32)}


def test_mean_and_deviation_over_seeds() -> None:
    assert summarise([0.25, 0.75]) == (0.5, pytest.approx(math.sqrt(0.125)))
    assert summarise([0.25]) == (0.25, None)
    assert summarise([NAN, 0.25]) == (0.25, None)
    assert math.isnan(summarise([NAN]).mean)


def test_equal_runs_differ_by_exactly_nothing() -> None:
    runs = [_rows(0, 1, 1, 0), _rows(1, 1, 0, 0)]
    assert paired_intervals(runs, runs)["accuracy"] == (0, 0, 0)


def test_a_constant_gain_has_no_width_because_rows_and_seeds_are_paired() -> None:
    rng = np.random.default_rng(3)
    base = [_rows(*rng.random(50), name="epg") for _ in range(3)]
    own = [_rows(*(samples["epg"] + 0.125), name="epg") for samples in base]
    assert paired_intervals(own, base)["epg"] == pytest.approx((0.125, 0.125, 0.125), abs=1e-6)


def test_one_row_of_two_is_won_in_three_of_four_resamples() -> None:
    found = paired_intervals([_rows(1, 0)], [_rows(0, 0)])["accuracy"]
    assert found == (0.5, 0, 1)  # resampled means: 0, 1/2, 1/2, 1


def test_the_interval_is_the_normal_one_where_there_are_many_rows() -> None:
    rng = np.random.default_rng(0)
    own, base = rng.random(2000) < 0.6, rng.random(2000) < 0.5
    found = paired_intervals([_rows(*own)], [_rows(*base)])["accuracy"]
    difference = own.astype(float) - base
    half = 1.96 * difference.std() / math.sqrt(2000)
    assert found.difference == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.15 * half)


def test_seeds_widen_the_interval() -> None:
    zero, one = _rows(*[0.0] * 40), _rows(*[1.0] * 40)
    assert paired_intervals([one, zero], [zero, zero])["accuracy"] == (0.5, 0, 1)


def test_f1_is_of_the_counts_and_not_a_mean_over_rows() -> None:
    own = {
        name: np.array(v, np.float32)
        for name, v in zip(("f1_hits", "f1_predicted", "f1_true"), ([2, 0], [2, 1], [2, 1]), strict=True)
    }
    base = {
        name: np.array(v, np.float32)
        for name, v in zip(("f1_hits", "f1_predicted", "f1_true"), ([0, 0], [1, 1], [2, 1]), strict=True)
    }
    found = paired_intervals([own], [base])
    assert list(found) == ["f1"]
    assert found["f1"].difference == pytest.approx(2 * 2 / (3 + 3))
    assert (found["f1"].low, found["f1"].high) == (0, 1)


def test_rows_without_a_value_are_left_out_and_metrics_without_any_are_not_there() -> None:
    own = {"epg": np.array([1, NAN, 1], np.float32), "iou": np.array([NAN] * 3, np.float32)}
    base = {"epg": np.array([0.5, 0.5, NAN], np.float32), "iou": np.array([NAN] * 3, np.float32)}
    found = paired_intervals([own], [base])
    assert list(found) == ["epg"]
    assert found["epg"].difference == 0.5


def _grouped(accuracy: list[float], group: list[float]) -> Samples:
    return {"accuracy": np.array(accuracy, np.float32), "group": np.array(group, np.float32)}


def test_groups_and_the_worst_of_them() -> None:
    """Group 0 is won, group 1 lost, the row of no group counts nowhere but in the accuracy."""
    group = [0, 0, 1, 1, -1]
    found = paired_intervals([_grouped([1, 1, 1, 0, 0], group)], [_grouped([0, 0, 1, 1, 1], group)])
    assert list(found) == ["accuracy", "group_0_accuracy", "group_1_accuracy", "worst_group_accuracy"]
    assert found["group_0_accuracy"] == (1, 1, 1)  # a resample without the group has no score
    assert found["group_1_accuracy"] == (-0.5, -1, 0)
    assert found["worst_group_accuracy"].difference == 0.5 - 0
    assert found["accuracy"].difference == pytest.approx(0)


def test_the_worst_group_is_found_anew_in_every_resample() -> None:
    rng = np.random.default_rng(2)
    group = rng.integers(2, size=400).astype(float)
    runs = [_grouped([*(rng.random(400) < 0.5).astype(float)], [*group]) for _ in range(2)]
    found = paired_intervals(runs[:1], runs[1:])
    means = [min(r["accuracy"][group == g].mean(dtype=float) for g in (0, 1)) for r in runs]
    assert found["worst_group_accuracy"].difference == pytest.approx(means[0] - means[1])
    times = np.bincount(np.random.default_rng(0).integers(400, size=400), minlength=400)
    one = paired_intervals(runs[:1], runs[1:], resamples=1)["worst_group_accuracy"]
    drawn = [
        min((times * r["accuracy"])[group == g].sum() / times[group == g].sum() for g in (0, 1)) for r in runs
    ]
    assert one.low == one.high == pytest.approx(drawn[0] - drawn[1])


def test_the_calibration_error_is_that_of_the_metric() -> None:
    rng = np.random.default_rng(5)
    runs: list[Samples] = [
        {
            "accuracy": (rng.random(300) < 0.7).astype(np.float32),
            "confidence": np.concatenate([[0.2, 1.0, 1 / 15], rng.random(297)]).astype(np.float32),
        }
        for _ in range(2)
    ]
    found = paired_intervals(runs[:1], runs[1:])["ece"]
    own, base = (
        calibration_error(torch.from_numpy(r["confidence"]), torch.from_numpy(r["accuracy"])) for r in runs
    )
    assert found.difference == pytest.approx(own - base, abs=1e-12)
    assert found.low < found.difference < found.high


def test_runs_of_an_old_version_have_no_groups_and_the_rest_is_paired() -> None:
    new, old = _grouped([1, 0], [0, 1]), _rows(0, 0)
    assert list(paired_intervals([new], [old])) == ["accuracy"]


def test_how_many_resamples_are_weighed_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    own, base = ([_rows(*rng.random(20)), _rows(*rng.random(20))] for _ in "ab")
    expected = paired_intervals(own, base, resamples=120)["accuracy"]
    monkeypatch.setattr("pipeline.report.statistics.AT_ONCE", 7)
    assert paired_intervals(own, base, resamples=120)["accuracy"] == pytest.approx(expected)


def test_what_cannot_be_paired_has_no_interval_and_draws_repeat() -> None:
    assert paired_intervals([], []) == {}
    assert paired_intervals([_rows(1, 0)], [_rows(1, 0, 1)]) == {}
    assert paired_intervals([_rows(1, 0)], [_rows(1, 0, name="epg")]) == {}
    rng = np.random.default_rng(1)
    a, b = ([_rows(*rng.random(9))] for _ in "ab")
    assert paired_intervals(a, b) == paired_intervals(a, b)
