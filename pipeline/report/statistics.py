"""How sure a difference is: means over seeds, and a paired bootstrap of rows and seeds. numpy only.

Two students that answered the same rows are compared row by row: each resample draws rows with replacement, the same
for both and for all seeds, and seeds with replacement, the same for both (Efron and Tibshirani 1993, ch. 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
AT_ONCE = 50
"""Resamples weighed in one matrix product; what is drawn does not depend on it."""

F1_COUNTS = ("f1_hits", "f1_predicted", "f1_true")
LOCALISED = "localised"
"""Over how many labels a row's epg and iou are means, where rows have several: the split's are over all labels."""
GROUP, GROUPED = "group", ("accuracy", "agreement")
CONFIDENCE, BINS = "confidence", 15

Samples = Mapping[str, np.ndarray]
"""What `evaluate` keeps: metric -> one value per row, float [N], NaN where a row has none; F1 by its three counts per
row; and each row's group and top-1 probability."""


class Interval(NamedTuple):
    """A difference of means over seeds and its 95 % bootstrap percentile interval, in the metric's own unit."""

    difference: float
    low: float
    high: float


class Summary(NamedTuple):
    """Mean and, of two seeds or more, standard deviation (n - 1). NaN if no seed has a value."""

    mean: float
    std: float | None


class _Statistic(NamedTuple):
    """A score by sums over rows: each row's values f64 [k, N], and sums [runs, k, draws] -> scores [runs, draws]."""

    values: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


def summarise(values: Sequence[float]) -> Summary:
    """Over seeds; values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Summary(math.nan, None)
    return Summary(float(np.mean(finite)), float(np.std(finite, ddof=1)) if len(finite) > 1 else None)


def paired_intervals(
    own: Sequence[Samples], base: Sequence[Samples], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Own minus base for every score that all runs have: one Samples per seed, in the same order of seeds.

    Empty if there is nothing to pair: no runs, or runs on other numbers of rows. A score without any defined row in
    some run is left out. Resampled worst groups are worse and calibration errors larger than the observed ones; their
    difference has this bias on both sides. The draws depend on `seed` and the numbers of rows and runs only.
    """
    assert len(own) == len(base)
    runs = [_statistics(samples) for samples in (*own, *base)]
    names = [name for name in runs[0] if _pairs([run.get(name) for run in runs])] if runs else []
    if len({run[name].values.shape[1] for run in runs for name in names}) != 1:
        return {}
    chosen = {name: runs[0][name] for name in names}
    columns = np.stack([np.concatenate([run[name].values for name in names]) for run in runs])
    rows, seeds = columns.shape[2], len(own)
    observed = _differences(columns, chosen, np.ones((rows, 1)), np.arange(seeds)[:, None])[:, 0]
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [
            _differences(columns, chosen, *_draw(rng, rows, seeds, min(AT_ONCE, resamples - start)))
            for start in range(0, resamples, AT_ONCE)
        ],
        axis=1,
    )
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=1)
    return {
        name: Interval(float(observed[i]), float(low[i]), float(high[i]))
        for i, name in enumerate(names)
        if math.isfinite(low[i])
    }


def _pairs(statistics: Sequence[_Statistic | None]) -> bool:
    """Do all runs have the statistic, of the same rows' values, with a score?"""
    found = [statistic for statistic in statistics if statistic is not None]
    return (
        len(found) == len(statistics)
        and len({statistic.values.shape for statistic in found}) == 1
        and all(math.isfinite(s.score(s.values.sum(1)[None, :, None])[0, 0]) for s in found)
    )


def _draw(rng: np.random.Generator, rows: int, seeds: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each row was drawn f64 [rows, count], and the drawn seeds int [seeds, count]."""
    times, drawn = np.empty((rows, count)), np.empty((seeds, count), np.int64)
    for index in range(count):
        times[:, index] = np.bincount(rng.integers(rows, size=rows), minlength=rows)
        drawn[:, index] = rng.integers(seeds, size=seeds)
    return times, drawn


def _differences(
    columns: np.ndarray, statistics: Mapping[str, _Statistic], times: np.ndarray, seeds: np.ndarray
) -> np.ndarray:
    """Own minus base, mean over the drawn seeds: f64 [scores, draws], NaN where one is undefined.

    Columns f64 [2 x seeds, all statistics' k, rows], times f64 [rows, draws], seeds int [seeds, draws].
    """
    sums = columns @ times
    ends = np.cumsum([len(statistic.values) for statistic in statistics.values()])[:-1]
    parts = zip(statistics.values(), np.split(sums, ends, axis=1), strict=True)
    scores = np.stack([statistic.score(part) for statistic, part in parts])
    own, base = np.split(scores, 2, axis=1)
    differences: np.ndarray = np.take_along_axis(own - base, seeds[None], axis=1).mean(1)
    return differences


def _statistics(samples: Samples) -> dict[str, _Statistic]:
    """Of one run, by the names of `evaluate.score`."""
    own = {name: np.asarray(values, np.float64) for name, values in samples.items()}
    found = {
        name: _Statistic(_mean(values, own[LOCALISED] if _by_label(own, name) else 1), _ratio)
        for name, values in own.items()
        if name not in (*F1_COUNTS, LOCALISED, GROUP, CONFIDENCE)
    }
    if all(name in own for name in F1_COUNTS):
        hits, predicted, true = (own[name] for name in F1_COUNTS)
        found["f1"] = _Statistic(np.stack([2 * hits, predicted + true]), _ratio)
    if CONFIDENCE in own:
        found["ece"] = _Statistic(_binned(own["accuracy"], own[CONFIDENCE]), _binned_error)
    for metric in GROUPED:
        if GROUP in own and metric in own:
            found |= _grouped(metric, own[metric], own[GROUP])
    return found


def _by_label(samples: Samples, name: str) -> bool:
    return name in ("epg", "iou") and LOCALISED in samples


def _mean(values: np.ndarray, times: np.ndarray | float) -> np.ndarray:
    """Numerator and denominator of a mean over the rows that have a value, each counted `times`: f64 [2, N]."""
    return np.stack([np.nan_to_num(values) * times, np.isfinite(values) * times])


def _ratio(sums: np.ndarray) -> np.ndarray:
    """NaN for 0 / 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: np.ndarray = sums[:, 0] / sums[:, 1]
    return ratio


def _grouped(metric: str, values: np.ndarray, group: np.ndarray) -> dict[str, _Statistic]:
    """The mean of each group's rows, and the worst of them; a row's group is -1 if it has none."""
    groups = [int(g) for g in np.unique(group) if g >= 0]
    means = {g: _mean(np.where(group == g, values, np.nan), 1) for g in groups}
    found = {f"group_{g}_{metric}": _Statistic(mean, _ratio) for g, mean in means.items()}
    if means:
        found[f"worst_group_{metric}"] = _Statistic(np.concatenate(list(means.values())), _worst)
    return found


def _worst(sums: np.ndarray) -> np.ndarray:
    """The least of several ratios; a group that was not drawn has none."""
    ratios = np.stack([_ratio(pair) for pair in np.split(sums, sums.shape[1] // 2, axis=1)])
    worst: np.ndarray = np.fmin.reduce(ratios)
    return worst


def _binned(correct: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """What `metrics.calibration_error` sums up, a row per bin, and the number of rows: f64 [BINS + 1, N]."""
    place = np.clip(np.ceil(confidence * BINS), 1, BINS)
    error = np.where(place == np.arange(1, BINS + 1)[:, None], correct - confidence, 0)
    return np.concatenate([error, np.ones((1, len(correct)))])


def _binned_error(sums: np.ndarray) -> np.ndarray:
    error: np.ndarray = np.abs(sums[:, :BINS]).sum(1) / sums[:, BINS]
    return error
