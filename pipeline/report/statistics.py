"""How sure a difference is: means over seeds, and a paired bootstrap of rows and seeds. numpy only.

Two students that answered the same rows are compared row by row: each resample draws rows with replacement, the same
for both and for all seeds, and seeds with replacement, the same for both (Efron and Tibshirani 1993, ch. 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
F1_COUNTS = ("f1_hits", "f1_predicted", "f1_true")
LOCALISED = "localised"
"""Over how many labels a row's epg and iou are means, where rows have several: the split's are over all labels."""

Samples = Mapping[str, np.ndarray]
"""Metric -> one value per row, float [N], NaN where a row has none; F1 by its three counts per row."""


class Interval(NamedTuple):
    """A difference of means over seeds and its 95 % bootstrap percentile interval, in the metric's own unit."""

    difference: float
    low: float
    high: float


class Summary(NamedTuple):
    """Mean and, of two seeds or more, standard deviation (n - 1). NaN where no seed has a value."""

    mean: float
    std: float | None


def summarise(values: Sequence[float]) -> Summary:
    """Over seeds; values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Summary(math.nan, None)
    return Summary(float(np.mean(finite)), float(np.std(finite, ddof=1)) if len(finite) > 1 else None)


def paired_intervals(
    own: Sequence[Samples], base: Sequence[Samples], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Own minus base for every metric that all runs have: one Samples per seed, in the same order of seeds.

    Empty where there is nothing to pair: no runs, or runs on other numbers of rows. A metric without any defined row
    in some run is left out. The draws depend on `seed` and the numbers of rows and runs only.
    """
    assert len(own) == len(base)
    ratios = [_ratios(samples) for samples in (*own, *base)]
    names = [name for name in ratios[0] if all(name in found for found in ratios)] if ratios else []
    names = [name for name in names if all(found[name][1].sum() > 0 for found in ratios)]
    rows = {len(found[name][0]) for found in ratios for name in names}
    if len(rows) != 1:
        return {}
    tops = np.stack([[found[name][0] for name in names] for found in ratios])  # [2 x seeds, metrics, rows]
    bottoms = np.stack([[found[name][1] for name in names] for found in ratios])
    observed = _difference(tops.sum(2), bottoms.sum(2), np.arange(len(own)))
    drawn = _resampled(tops, bottoms, len(own), resamples, np.random.default_rng(seed))
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    return {
        name: Interval(float(observed[i]), float(low[i]), float(high[i]))
        for i, name in enumerate(names)
        if math.isfinite(low[i])
    }


def _resampled(
    tops: np.ndarray, bottoms: np.ndarray, seeds: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Differences f64 [resamples, metrics]."""
    rows = tops.shape[2]
    drawn = np.empty((resamples, tops.shape[1]))
    for index in range(resamples):
        times = np.bincount(rng.integers(rows, size=rows), minlength=rows).astype(np.float64)
        drawn[index] = _difference(tops @ times, bottoms @ times, rng.integers(seeds, size=seeds))
    return drawn


def _difference(tops: np.ndarray, bottoms: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """[2 x seeds, metrics] sums -> mean over the drawn seeds of own minus base, f64 [metrics]; NaN for 0 / 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = tops / bottoms
    own, base = np.split(scores, 2)
    difference: np.ndarray = (own[seeds] - base[seeds]).mean(0)
    return difference


def _ratios(samples: Samples) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> (numerator, denominator) per row f64 [N]: score = sum / sum. F1 = 2 hits / (predicted + true)."""
    found = {
        name: _weighted(np.asarray(values, np.float64), _times(samples, name))
        for name, values in samples.items()
        if name not in (*F1_COUNTS, LOCALISED)
    }
    if all(name in samples for name in F1_COUNTS):
        hits, predicted, true = (np.asarray(samples[name], np.float64) for name in F1_COUNTS)
        found["f1"] = (2 * hits, predicted + true)
    return found


def _weighted(values: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A mean's (numerator, denominator) per row f64 [N]; both 0 where a row has no value."""
    return np.nan_to_num(values) * times, np.isfinite(values) * times


def _times(samples: Samples, name: str) -> np.ndarray:
    """How often each row's value counts: f64 [N]."""
    by_label = name in ("epg", "iou") and LOCALISED in samples
    return np.asarray(samples[LOCALISED] if by_label else np.ones(len(samples[name])), np.float64)
