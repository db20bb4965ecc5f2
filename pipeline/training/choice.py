"""Which of a sweep's runs counts: the best on the selection split, with the first seed (paper Sec. 4, "best
hyperparameters as obtained on a separate validation set"). Only that one is trained with the other seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config import Experiment
from pipeline.training.run import Run
from pipeline.workspace import Layout

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
        name = method_of(student) if is_swept(experiment, student) else student
        found.setdefault(name, []).append(student)
    return [Method(name, tuple(candidates)) for name, candidates in found.items()]


def method_of(student: str) -> str:
    """`e2kd` of `e2kd,temperature=5`."""
    return student.partition(",")[0]


def is_swept(experiment: Experiment, student: str) -> bool:
    """Whether a student is one of a sweep's candidates."""
    return bool(experiment.sweep.get(method_of(student)))


def scores(experiment: Experiment, layout: Layout) -> dict[str, dict[str, float | None]]:
    """By method and candidate: with the first seed, on `evaluate.select`; None where there is none."""
    return {
        method.name: {name: _score(experiment, layout, name) for name in method.candidates}
        for method in methods(experiment)
    }


def chosen(experiment: Experiment, layout: Layout) -> dict[str, Choice]:
    """By method. A swept one is left out while a candidate's run with the first seed is neither finished nor diverged;
    of equal candidates the first counts."""
    found = {}
    for name, candidates in scores(experiment, layout).items():
        runs = [Run(layout.run(student, experiment.seeds[0])) for student in candidates]
        decided = all(run.done or run.diverged for run in runs)
        if decided or not experiment.sweep.get(name):
            best = _best(candidates)
            found[name] = Choice(best, candidates[best], candidates)
    return found


def _best(scores: dict[str, float | None]) -> str:
    """The first of the highest; one without a score only where none has one."""
    known = {name: score for name, score in scores.items() if score is not None}
    return max(known, key=known.__getitem__) if known else next(iter(scores))


def _score(experiment: Experiment, layout: Layout, student: str) -> float | None:
    run = Run(layout.run(student, experiment.seeds[0]))
    if not run.done or experiment.evaluate.select is None:
        return None
    scores: dict[str, Any] = run.result()["splits"].get(experiment.evaluate.select, {})
    names = (experiment.evaluate.select_by,) if experiment.evaluate.select_by else DEFAULT_SCORES
    return next((float(scores[name]) for name in names if scores.get(name) is not None), None)
