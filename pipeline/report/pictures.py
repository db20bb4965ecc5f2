"""Curves as PNG files, by matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.document import Picture
from pipeline.report.overlay import drawn, save
from pipeline.report.plotting import plt
from pipeline.report.results import Results
from pipeline.report.statistics import Summary, summarise

PANELS = {
    "loss": "training loss",
    "explanation_loss": "explanation loss, 1 - cosine",
    "val_accuracy": "validation accuracy",
    "val_agreement": "validation agreement",
    "val_f1": "validation F1",
    "val_epg": "validation EPG",
    "val_iou": "validation IoU",
}
"""Drawn if some run has them more than once."""

Points = Sequence[tuple[int, Summary]]

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Told apart by the colour-blind (Tol's bright scheme)."""

STYLES = [(colour, marker) for marker, colour in zip(itertools.cycle("osD^vPX*"), COLOURS * 8, strict=False)]
"""56 pairs of a colour and a marker."""


def draw_curves(results: Results, folder: Path) -> list[Picture]:
    """`curve-<metric>.png` for every panel that has data: mean over finished seeds, band of one standard deviation."""
    histories = {
        method.name: [method.runs[seed].history() for seed in results.results[method.name]]
        for method in results.methods
    }
    drawn = []
    for metric, title in PANELS.items():
        curves = {name: _over_seeds(lines, metric) for name, lines in histories.items()}
        curves = {name: points for name, points in curves.items() if points}
        if any(len(points) > 1 for points in curves.values()):
            file = f"curve-{metric.replace('_', '-')}.png"
            _draw(folder / file, curves, _styles(results), title, "epoch", log=metric == "loss")
            alt = f"{title} by epoch for {', '.join(curves)}"
            drawn.append(Picture(file, alt, f"{title[0].upper()}{title[1:]}, mean over seeds and one std."))
    return drawn


def draw_shift(results: Results, folder: Path) -> None:
    """`shift-curve.png`, where shift curves were measured."""
    measured = results.shift_curves()
    if measured:
        split, curves = measured
        file = folder / "shift-curve.png"
        _draw(file, curves, _styles(results), f"map cosine, {split}", "diagonal shift in px")


def grid(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, np.ndarray]:
    """A figure and its axes [rows, columns]."""
    figure, axes = plt.subplots(rows, columns, figsize=inches, layout="constrained", squeeze=False)
    return figure, axes


def _over_seeds(histories: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> list[tuple[int, Summary]]:
    """Epoch (from 1) -> the metric over the seeds that have it; undefined values are left out."""
    found: dict[int, list[float]] = {}
    for line in (line for history in histories for line in history):
        if line.get(metric) is not None:
            found.setdefault(line["epoch"] + 1, []).append(line[metric])
    points = [(epoch, summarise(values)) for epoch, values in sorted(found.items())]
    return [(epoch, summary) for epoch, summary in points if math.isfinite(summary.mean)]


def _styles(results: Results) -> dict[str, tuple[str, str]]:
    """Colour and marker of the teacher and of each method: the same in every panel."""
    names = [method.name for method in results.all_methods]
    return {"teacher": ("black", "."), **dict(zip(names, itertools.cycle(STYLES), strict=False))}


def _draw(
    path: Path,
    curves: Mapping[str, Points],
    styles: Mapping[str, tuple[str, str]],
    title: str,
    along: str,
    log: bool = False,
) -> None:
    figure, axes = grid(1, 1, (5.4, 3.3))
    axis = axes[0, 0]
    for name, points in curves.items():
        _line(axis, name, points, *styles[name])
    axis.set_title(drawn(title), fontsize=10, parse_math=False)
    axis.set_xlabel(along)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if log:
        axis.set_yscale("log")
    for label in figure.legend(loc="outside right upper", fontsize=8, edgecolor="none").get_texts():
        label.set_parse_math(False)
    save(figure, path)


def _line(axis: Any, name: str, points: Points, colour: str, marker: str) -> None:
    at, means = [place for place, _ in points], [summary.mean for _, summary in points]
    spread = [summary.std or 0.0 for _, summary in points]
    dense = max(len(at) // 8, 1)
    axis.plot(
        at,
        means,
        label=drawn(name),
        color=colour,
        linewidth=1.6,
        marker=marker,
        markersize=4,
        markevery=dense,
    )
    if any(spread):
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        positive = [max(value, min(means) / 10) for value in low] if min(means) > 0 else low
        axis.fill_between(at, positive, high, color=colour, alpha=0.12, linewidth=0)
