"""The scorecard: a Markdown table over students x splits, and one figure of maps and training curves."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.durable import write_atomic
from artifacts.errors import ConfigError
from pipeline.config import Experiment, StudentConfig
from pipeline.layout import CODEC_COST, FREEZING_GAP, Layout, teacher_scores
from pipeline.run import Run

Scores = Mapping[str, Sequence[float]]
"""Metric -> one value per seed."""

METRICS = {
    "accuracy": "accuracy %",
    "agreement": "agreement %",
    "epg": "EPG %",
    "dead": "dead maps %",
    "map_cosine": "map cosine x100",
}


def report(experiment: Experiment, layout: Layout) -> str:
    """Write `report/report.md` and `report/figure.png`; returns the table and where the report is.

    Finished runs only: what is missing is said in the report. Raises ConfigError where no run is finished.
    Nothing is drawn again when the runs are the same as in the last report.
    """
    results = _results(experiment, layout)
    if not results:
        raise ConfigError(f"no finished run in {layout.runs}; run: e2kd distill CONFIG")
    text = render(experiment, layout, results)
    stamp = hashlib.sha256(text.encode()).hexdigest()
    file, figure = layout.report / "report.md", layout.report / "figure.png"
    if not (file.exists() and figure.exists() and stamp in file.read_text()):
        from pipeline.figure import draw

        layout.report.mkdir(parents=True, exist_ok=True)
        draw(experiment, layout, figure)
        write_atomic(file, f"{text}\n<!-- {stamp} -->\n".encode())
    return f"{_tables(experiment, layout, results)}\n\nreport: {file}\nfigure: {figure}"


def render(experiment: Experiment, layout: Layout, results: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The whole page as Markdown."""
    return "\n".join(
        [
            f"# {layout.root.name}",
            "",
            *_about(experiment, layout),
            "",
            _tables(experiment, layout, results),
            "",
            "Mean +- standard deviation over seeds; in brackets the difference to the student with the same settings "
            "but lambda = 0. EPG counts a dead (all-zero) map as 0; a high share of dead maps makes EPG and map cosine "
            "meaningless. Map cosine is to the teacher's map of the same class, at the student's resolution.",
            "",
            "![maps and training curves](figure.png)",
            "",
            *_costs(results),
        ]
    )


def _results(experiment: Experiment, layout: Layout) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name in experiment.students:
        runs = [Run(layout.run(name, seed)) for seed in experiment.seeds]
        done = [run.result() for run in runs if run.done]
        if done:
            found[name] = done
    return found


def _about(experiment: Experiment, layout: Layout) -> list[str]:
    teacher = experiment.teacher
    guide = teacher.train.guide if teacher.train else None
    origin = f"weights {teacher.weights}" if teacher.weights else "trained here"
    guided = f", guided by {guide.by} (weight {guide.weight:g})" if guide else ""
    explain = experiment.explain
    lines = [
        f"- teacher: {teacher.model}, {origin}{guided}",
        f"- explanation: {explain.explainer} of the {explain.logit} logit",
        f"- seeds: {', '.join(map(str, experiment.seeds))}",
    ]
    beside = layout.stores(experiment.store_name)
    if beside.exists(FREEZING_GAP):
        from pipeline.gap import tell

        lines.append(f"- {tell(json.loads(beside.read(FREEZING_GAP)))}")
    if beside.exists(CODEC_COST):
        from pipeline.codec_cost import tell as tell_cost

        lines.append(f"- {tell_cost(json.loads(beside.read(CODEC_COST)))}")
    missing = [
        f"{name} seed {seed}"
        for name in experiment.students
        for seed in experiment.seeds
        if not Run(layout.run(name, seed)).done
    ]
    return [*lines, f"- not finished: {', '.join(missing)}"] if missing else lines


def _tables(experiment: Experiment, layout: Layout, results: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """One table per split: the held-out splits first, the one that selected epochs last."""
    select = experiment.evaluate.select
    splits = list(dict.fromkeys((*experiment.evaluate.splits, *((select,) if select else ()))))
    parts = []
    for split in splits:
        title = f"**{split}**" + (f" ({_role_of_selection(experiment)})" if split == select else "")
        parts.append(f"{title}\n\n{_table(experiment, layout, results, split)}")
    return "\n\n".join(parts)


def _role_of_selection(experiment: Experiment) -> str:
    selects = any(student.keep == "best" for student in experiment.students.values())
    return "selects the epoch" if selects else "settings are chosen here"


def _table(
    experiment: Experiment, layout: Layout, results: Mapping[str, Sequence[dict[str, Any]]], split: str
) -> str:
    scores = {name: _by_metric(runs, split) for name, runs in results.items()}
    teacher = read_teacher_scores(layout, experiment, split)
    found = set(teacher).union(*scores.values())
    names = [metric for metric in METRICS if metric in found]
    rows = [["student", *(METRICS[name] for name in names)]]
    rows.append(["teacher", *(_cell([teacher[n]], None) if n in teacher else "" for n in names)])
    for student, values in scores.items():
        base = scores.get(_baseline(experiment.students, student) or "", {})
        rows.append([student, *(_cell(values[n], base.get(n)) if n in values else "" for n in names)])
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it also reads well in a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def read_teacher_scores(layout: Layout, experiment: Experiment, split: str) -> dict[str, float]:
    """The teacher's scores on a split, written beside its store by precompute."""
    beside, name = layout.stores(experiment.store_name), teacher_scores(split)
    scores: dict[str, float] = json.loads(beside.read(name)) if beside.exists(name) else {}
    return scores


def _by_metric(runs: Sequence[dict[str, Any]], split: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for run in runs:
        for metric, value in run["splits"].get(split, {}).items():
            found.setdefault(metric, []).append(value)
    return found


def _baseline(students: Mapping[str, StudentConfig], name: str) -> str | None:
    """The student that differs only by its explanation weight, which is 0 there."""
    own = students[name]
    if not own.explanation_weight:
        return None
    plain = own.model_copy(update={"explanation_weight": 0.0})
    return next((other for other, settings in students.items() if settings == plain), None)


def _cell(values: Sequence[float], base: Sequence[float] | None) -> str:
    mean = 100 * statistics.fmean(values)
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    delta = f" ({mean - 100 * statistics.fmean(base):+.1f})" if base else ""
    return f"{mean:.1f}{spread}{delta}"


def _costs(results: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    rows = [["student", "training seconds per run"]]
    for name, runs in results.items():
        rows.append([name, f"{statistics.fmean(run['seconds']['train'] for run in runs):.1f}"])
    return [markdown_table(rows)]
