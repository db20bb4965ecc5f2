"""Which of a sweep's runs counts: the best on the selection split, with the first seed (paper Sec. 4, "best
hyperparameters as obtained on a separate validation set"). Only that one is trained with the other seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from artifacts.errors import ConfigError
from pipeline.config import DEFAULT_SCORES, Candidate, Experiment
from pipeline.training.run import Run
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Choice:
    """One student of the config file and its candidates.

    scores  by candidate, on `evaluate.select` with the first seed; None if there is none
    chosen  the candidate that counts; None while a run with the first seed is neither finished nor diverged
    """

    method: str
    scores: dict[str, float | None]
    chosen: str | None

    def decided(self, experiment: Experiment) -> str | None:
        """`chosen`. Raises ConfigError if no candidate has the score that chooses."""
        if self.chosen is not None and self.scores[self.chosen] is None and len(self.scores) > 1:
            wanted, split = experiment.evaluate.select_by, experiment.evaluate.select
            raise ConfigError(
                f"sweep.{self.method}: no run has {wanted or ' or '.join(DEFAULT_SCORES)} on {split}; set "
                "evaluate.select_by to a score that they have, then `e2kd evaluate` scores them again"
            )
        return self.chosen


def by_method(experiment: Experiment) -> dict[str, list[Candidate]]:
    """The candidates of each student, in the config's order."""
    methods: dict[str, list[Candidate]] = {name: [] for name in experiment.students}
    for candidate in experiment.candidates.values():
        methods[candidate.method].append(candidate)
    return methods


def choices(workspace: Workspace) -> dict[str, Choice]:
    """By method, in the config's order; of equal candidates the first counts."""
    return {
        method: _choice(workspace, method, candidates)
        for method, candidates in by_method(workspace.experiment).items()
    }


def _choice(workspace: Workspace, method: str, candidates: list[Candidate]) -> Choice:
    seed = workspace.experiment.seeds[0]
    runs = {one.name: Run(workspace.layout.run(one.name, seed)) for one in candidates}
    scores = {name: _score(workspace.experiment, run) for name, run in runs.items()}
    decided = not candidates[0].swept or all(run.done or run.diverged for run in runs.values())
    return Choice(method, scores, _best(scores) if decided else None)


def _best(scores: dict[str, float | None]) -> str:
    """The first of the highest; one without a score only if none has one."""
    known = {name: score for name, score in scores.items() if score is not None}
    return max(known, key=known.__getitem__) if known else next(iter(scores))


def _score(experiment: Experiment, run: Run) -> float | None:
    if not run.done or experiment.evaluate.select is None:
        return None
    scores: dict[str, Any] = run.result()["splits"].get(experiment.evaluate.select, {})
    names = (experiment.evaluate.select_by,) if experiment.evaluate.select_by else DEFAULT_SCORES
    return next((float(scores[name]) for name in names if scores.get(name) is not None), None)
