"""The report's tables of scores: one per split, methods x metrics, with differences and the paper's numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config.grid import short
from pipeline.report.document import Cell, Table
from pipeline.report.paper import PaperTable
from pipeline.report.results import Method, Results
from pipeline.report.statistics import summarise

TITLES = {
    "accuracy": "accuracy %",
    "top5": "top-5 accuracy %",
    "agreement": "agreement %",
    "f1": "F1 %",
    "worst_group_accuracy": "worst-group accuracy %",
    "worst_group_agreement": "worst-group agreement %",
    "epg": "EPG %",
    "iou": "IoU %",
    "map_cosine": "map cosine x100",
    "dead": "dead maps %",
    "ece": "ECE %",
}
"""In the order of the columns. Other metrics follow under their own names."""

SHORT = ("accuracy", "agreement", "f1", "epg", "iou")
"""The columns shown on a terminal."""

GROUP = re.compile(r"group_(.+)_([a-z0-9]+)")
"""`group_2_accuracy`: a score of one group, in a table of its own."""


def score_table(results: Results, split: str, caption: str, paper: PaperTable | None = None) -> Table:
    """Methods x metrics; in a note the difference to the baseline with its interval."""
    metrics = [name for name in _metrics(results, split) if not GROUP.fullmatch(name)]
    return _table(results, split, caption, metrics, paper)


def short_table(results: Results, split: str) -> Table:
    """The few columns for a terminal, without intervals and in ASCII."""
    found = _metrics(results, split)
    full = _table(results, split, split, [name for name in SHORT if name in found], None)
    return replace(full, rows=[[_plain(cell) for cell in row] for row in full.rows])


def group_tables(results: Results, split: str) -> list[Table]:
    """One table per score that is known of groups; a column per group."""
    found: dict[str, list[str]] = {}
    for name in _metrics(results, split):
        if match := GROUP.fullmatch(name):
            found.setdefault(match[2], []).append(name)
    return [
        _table(results, split, f"{split}: {title(score)} by group", sorted(names, key=_by_group), None)
        for score, names in found.items()
    ]


def candidate_table(results: Results) -> Table | None:
    """Every candidate of every sweep with its score on the selection split; None without a sweep."""
    rows = [
        [
            Cell(method.name),
            Cell(settings_of(results.experiment.candidates[candidate.student].overrides)),
            Cell("not finished" if candidate.score is None else _percent(candidate.score)),
            Cell("chosen" if candidate.student == method.student else ""),
        ]
        for method in results.all_methods
        if len(method.candidates) > 1
        for candidate in method.candidates
    ]
    caption = f"Candidates of the sweeps, {results.experiment.evaluate.select}"
    return Table(caption, ["method", "settings", "score %", ""], rows) if rows else None


def settings_of(overrides: Mapping[str, Any]) -> str:
    """What a sweep's candidate was given: `temperature=5, explanation_weight=1`."""
    return ", ".join(f"{key}={short(value)}" for key, value in overrides.items()) or "as configured"


def title(metric: str) -> str:
    """The column's head: what it is and its unit."""
    if match := GROUP.fullmatch(metric):
        return f"group {match[1]}"
    return TITLES.get(metric, f"{metric.replace('_', ' ')} x100")


def _metrics(results: Results, split: str) -> list[str]:
    """Those that a method or the teacher has on the split, known ones first."""
    found = set(results.teacher(split)).union(*(results.scores(m.name, split) for m in results.methods))
    return [name for name in TITLES if name in found] + sorted(found - set(TITLES))


def _plain(cell: Cell) -> Cell:
    return Cell(cell.text.replace("±", "+-"), cell.note.split(" [")[0])


def _by_group(metric: str) -> tuple[int, str]:
    match = GROUP.fullmatch(metric)
    assert match
    return (int(match[1]) if match[1].isdigit() else 0), match[1]


def _table(
    results: Results, split: str, caption: str, metrics: Sequence[str], paper: PaperTable | None
) -> Table:
    columns = [(name, own) for name in metrics for own in (True, False) if own or _in_paper(paper, name)]
    head = ["method", *(title(name) if own else "paper" for name, own in columns)]
    teacher = results.teacher(split)
    first = [Cell("teacher")] + [
        _teacher_cell(teacher, name) if own else _paper_cell(paper, "teacher", name) for name, own in columns
    ]
    rows = [first] if any(cell.text for cell in first[1:]) else []
    rows += [
        [_name_cell(results, method)]
        + [
            _cell(results, method, split, name) if own else _paper_cell(paper, method.name, name)
            for name, own in columns
        ]
        for method in results.methods
    ]
    return Table(caption, head, rows, frozenset(i for i, (_, own) in enumerate(columns, 1) if not own))


def _name_cell(results: Results, method: Method) -> Cell:
    candidate = results.experiment.candidates.get(method.student)
    return Cell(method.name, settings_of(candidate.overrides) if candidate and candidate.swept else "")


def _in_paper(paper: PaperTable | None, metric: str) -> bool:
    return paper is not None and any(metric in row for row in paper.rows.values())


def _paper_cell(paper: PaperTable | None, name: str, metric: str) -> Cell:
    value = paper.rows.get(name, {}).get(metric) if paper else None
    return Cell("" if value is None else _percent(value))


def _teacher_cell(scores: dict[str, float], metric: str) -> Cell:
    return Cell(_percent(scores[metric]) if metric in scores else "")


def _cell(results: Results, method: Method, split: str, metric: str) -> Cell:
    values = results.scores(method.name, split).get(metric)
    if values is None:
        return Cell("")
    summary = summarise(values)
    spread = "" if summary.std is None else f" ± {100 * summary.std:.1f}"
    return Cell(_percent(summary.mean) + spread, _difference(results, method, split, metric))


def _difference(results: Results, method: Method, split: str, metric: str) -> str:
    """`+3.1 [1.0, 5.2]`, `+3.1` if there is no interval, or nothing."""
    base = results.baseline(method)
    if base is None:
        return ""
    if found := results.interval(method, base, split, metric):
        return f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    difference = results.difference(method, base, split, metric)
    return "" if difference is None or math.isnan(difference) else f"{100 * difference:+.1f}"


def _percent(share: float) -> str:
    """One decimal; a score that no row defines is said."""
    return f"{100 * share:.1f}" if math.isfinite(share) else "undefined"
