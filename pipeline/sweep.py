"""Which of a sweep's runs counts: the best on the selection split, with the first seed (paper Sec. 4, "best
hyperparameters as obtained on a separate validation set"). Only that one is trained with the other seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import Experiment
from pipeline.layout import Layout
from pipeline.run import Run

DEFAULT_SCORES = ("f1", "accuracy", "agreement")
"""What chooses where `evaluate.select_by` does not say it: the first that the runs have."""


@dataclass(frozen=True)
class Method:
    """A student of the config file; after a sweep several `candidates` by name, otherwise itself alone."""

    name: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """`student` counts for its method; the scores on `evaluate.select` by candidate, None where there is none."""

    student: str
    score: float | None
    candidates: dict[str, float | None]


def methods(experiment: Experiment) -> list[Method]:
    """In the config's order."""
    found: dict[str, list[str]] = {}
    for student in experiment.students:
        found.setdefault(method_of(student), []).append(student)
    return [Method(name, tuple(candidates)) for name, candidates in found.items()]


def method_of(student: str) -> str:
    """`e2kd` of `e2kd,temperature=5`."""
    return student.partition(",")[0]


def chosen(experiment: Experiment, layout: Layout) -> dict[str, Choice]:
    """By method. A swept one is left out while a candidate's run with the first seed is not finished; of equal
    candidates the first counts."""
    found = {}
    for method in methods(experiment):
        scores = {name: _score(experiment, layout, name) for name in method.candidates}
        if len(scores) == 1:
            found[method.name] = Choice(method.candidates[0], scores[method.candidates[0]], scores)
        elif all(Run(layout.run(name, experiment.seeds[0])).done for name in scores):
            best = max(scores, key=lambda name: -2.0 if scores[name] is None else float(scores[name] or 0.0))
            found[method.name] = Choice(best, scores[best], scores)
    return found


def _score(experiment: Experiment, layout: Layout, student: str) -> float | None:
    run = Run(layout.run(student, experiment.seeds[0]))
    if not run.done or experiment.evaluate.select is None:
        return None
    scores: dict[str, Any] = run.result()["splits"].get(experiment.evaluate.select, {})
    names = (experiment.evaluate.select_by,) if experiment.evaluate.select_by else DEFAULT_SCORES
    return next((float(scores[name]) for name in names if scores.get(name) is not None), None)
