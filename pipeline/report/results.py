"""What the report is about, read from an experiment's folder: methods, their finished runs, scores and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from artifacts.access import reading_from
from artifacts.errors import ConfigError
from artifacts.names import file_name, flat, shown
from pipeline.config import StudentConfig
from pipeline.config.text import text_of, yaml_of
from pipeline.evaluate.scores import read_samples, samples_file
from pipeline.evaluate.students import scored_elsewhere
from pipeline.report.statistics import Interval, Samples, Summary, paired_intervals, summarise
from pipeline.training.choice import choices
from pipeline.training.run import Run, run_settings
from pipeline.workspace import CODEC_COST, FREEZING_GAP, SHIFT_CURVE, Workspace, teacher_scores

STAGE_1 = ("data.", "view.", "teacher.", "explain.")
"""Settings that images, teacher and stores were made by; those of ELSEWHERE say only where they are read from."""
ELSEWHERE = ("data.root", "data.cub")
FREE = ("explanation_weight", "explain_every", "compile", "workers", "cache_mib", "validate_every")
"""Settings in which a baseline may differ: lambda, and what changes no result of a student without it."""


@dataclass(frozen=True)
class Candidate:
    """One student of a method and its score on the selection split; None if it was not finished."""

    student: str
    score: float | None


@dataclass(frozen=True)
class Method:
    """A row of the tables: `student` is the method's own or, after a sweep, the best of its candidates.

    While a sweep is not decided, `student` is empty and there are no runs: no candidate stands for the method.
    """

    name: str
    student: str
    candidates: tuple[Candidate, ...]
    swept: frozenset[str]
    runs: Mapping[int, Run]

    def results(self) -> dict[int, dict[str, Any]]:
        """Of the finished runs, by seed."""
        return {seed: run.result() for seed, run in self.runs.items() if run.done}


class Results:
    """The methods of an experiment with their finished runs, each file read once."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.experiment, self.layout = workspace.experiment, workspace.layout
        self.all_methods = methods(workspace)
        self.results = {method.name: method.results() for method in self.all_methods}
        self.methods = [method for method in self.all_methods if self.results[method.name]]
        self._intervals: dict[tuple[str, str], dict[str, Interval]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The held-out splits first, the one that selected last."""
        select = self.experiment.evaluate.select
        return tuple(dict.fromkeys((*self.experiment.evaluate.splits, *((select,) if select else ()))))

    def missing(self) -> list[str]:
        """`kd seed 1` for every run that is not finished; of a sweep that is not decided those that decide it."""
        first = self.experiment.seeds[0]
        wanted = [(m.student, seed) for m in self.all_methods for seed in m.runs]
        wanted += [(c.student, first) for m in self.all_methods if not m.student for c in m.candidates]
        return [f"{name} seed {seed}" for name, seed in wanted if not Run(self.layout.run(name, seed)).done]

    def stale(self) -> list[str]:
        """`kd seed 1 (settings.lr: run 0.1, config 0.2)` for every finished run that the config does not describe."""
        found = []
        for method in self.methods:
            for seed in self.results[method.name]:
                differing = method.runs[seed].differing(run_settings(self.experiment, method.student))
                said = "; ".join(
                    f"{key}: run {_told(key, old)}, config {_told(key, new)}"
                    for key, (old, new) in differing.items()
                )
                found += [f"{method.student} seed {seed} ({said})"] if said else []
        return found

    def rescored(self) -> list[str]:
        """`kd seed 1 on test` for every finished run that was scored beside another store than there is now."""
        return [
            f"{method.student} seed {seed} on {split}"
            for method in self.methods
            for seed in self.results[method.name]
            for split in scored_elsewhere(self.workspace, method.runs[seed])
        ]

    def foreign(self) -> list[str]:
        """`view.size: made 32, config 64` for what the config says of stage 1 other than the config that made it."""
        if not self.layout.config.exists():
            return []
        made = flat(self._made_by())
        own = flat(self.experiment.model_dump(mode="json"))
        return [
            f"{key}: made {_told(key, made[key])}, config {_told(key, own[key])}"
            for key in own
            if key.startswith(STAGE_1) and key not in ELSEWHERE and key in made and made[key] != own[key]
        ]

    def _made_by(self) -> Any:
        """The config that stage 1 left. Raises ConfigError if it is damaged."""
        try:
            with reading_from(self.layout.config, ConfigError):
                return yaml_of(text_of(self.layout.config))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{self.layout.config} is damaged ({said}); e2kd precompute CONFIG writes it again",
                path=self.layout.config,
            ) from None

    def unscored(self) -> list[str]:
        """`kd seed 1 on test` for every finished run without scores on a split of `evaluate`."""
        return [
            f"{method.student} seed {seed} on {split}"
            for method in self.methods
            for seed, result in self.results[method.name].items()
            for split in self.splits
            if not result["splits"].get(split)
        ]

    def scores(self, method: str, split: str) -> dict[str, list[float]]:
        """Metric -> one value per seed that has it; a null in the file is a NaN."""
        found: dict[str, list[float]] = {}
        for result in self.results[method].values():
            for metric, value in result["splits"].get(split, {}).items():
                found.setdefault(metric, []).append(np.nan if value is None else float(value))
        return found

    def teacher(self, split: str) -> dict[str, float]:
        """The teacher's scores on a split, written beside its store by precompute."""
        return {
            name: value for name, value in self._beside(teacher_scores(split)).items() if value is not None
        }

    def _beside(self, name: str) -> dict[str, Any]:
        """What stage 1 measured, without the store's identity."""
        return {key: value for key, value in self.workspace.measured(name).items() if key != "store"}

    def measured(self) -> dict[str, Any]:
        """Everything that stage 1 left beside the stores, for the report's stamp."""
        names = [teacher_scores(split) for split in self.splits]
        return {name: self._beside(name) for name in (*names, SHIFT_CURVE, FREEZING_GAP, CODEC_COST)}

    def runs_files(self, method: Method, seed: int) -> list[tuple[str, int, int]]:
        """(name, bytes, time in ns) of what the report reads of a run besides its result."""
        folder = method.runs[seed].path
        files = [folder / "metrics.jsonl", *sorted(folder.glob("scores-*.safetensors"))]
        return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]

    def baseline(self, method: Method) -> Method | None:
        """The finished method that differs by its explanation weight, which is 0 there, and by swept settings alone."""
        own = self.settings(method)
        if not own.explanation_weight:
            return None
        for other in self.methods:
            settings = self.settings(other)
            free = {*FREE, *method.swept, *other.swept}
            if not settings.explanation_weight and _without(settings, free) == _without(own, free):
                return other
        return None

    def settings(self, method: Method) -> StudentConfig:
        """Of the student that stands for the method."""
        return self.experiment.candidates[method.student].settings

    def difference(self, method: Method, base: Method, split: str, metric: str) -> float | None:
        """Own minus base over the seeds that both have."""
        pairs = [
            (_score(own, split, metric), _score(self.results[base.name][seed], split, metric))
            for seed, own in self.results[method.name].items()
            if seed in self.results[base.name]
        ]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        return summarise(differences).mean if differences else None

    def interval(self, method: Method, base: Method, split: str, metric: str) -> Interval | None:
        """Paired bootstrap over rows and seeds; None if the runs' per-row scores are not there."""
        key = (method.name, split)
        if key not in self._intervals:
            seeds = [seed for seed in self.results[method.name] if seed in self.results[base.name]]
            own, others = ([_samples(m.runs[seed].path, split) for seed in seeds] for m in (method, base))
            complete = bool(seeds) and all((*own, *others))
            self._intervals[key] = paired_intervals(own, others) if complete else {}
        return self._intervals[key].get(metric)

    def shift_curves(self) -> tuple[str, dict[str, list[tuple[int, Summary]]]] | None:
        """(split, {"teacher" or method: (shift in px, cosine over seeds)}), or None where none was measured."""
        teacher = self._beside(SHIFT_CURVE)
        found = {"teacher": [teacher]} if teacher else {}
        for name, results in self.results.items():
            measured = [result["shift"] for result in results.values() if result.get("shift")]
            found |= {name: measured} if measured else {}
        if not found:
            return None
        return next(iter(found.values()))[0]["split"], {
            name: _curve(measured) for name, measured in found.items()
        }


def methods(workspace: Workspace) -> list[Method]:
    """In the config's order: each with its own student or, after a sweep, the chosen candidate."""
    experiment, rows = workspace.experiment, []
    for name, choice in choices(workspace).items():
        student = choice.chosen or ""
        runs = (
            {seed: Run(workspace.layout.run(student, seed)) for seed in experiment.seeds} if student else {}
        )
        candidates = tuple(Candidate(*pair) for pair in choice.scores.items())
        rows.append(Method(name, student, candidates, frozenset(experiment.sweep.get(name, ())), runs))
    return rows


def _told(key: str, value: Any) -> str:
    """A setting's value in the report, which others read: of a file of weights its name alone."""
    last = key.rpartition(".")[2]
    return shown(file_name(value) if last in ("weights", "init") and isinstance(value, str) else value)


def _score(result: Mapping[str, Any], split: str, metric: str) -> float | None:
    score: float | None = result["splits"].get(split, {}).get(metric)
    return score


def _samples(run: Path, split: str) -> Samples:
    """A run's scores per row; nothing if the file is not there (a run of an old version)."""
    file = samples_file(run, split)
    return {name: values.numpy() for name, values in read_samples(file).items()} if file.exists() else {}


def _without(settings: StudentConfig, keys: set[str]) -> dict[str, Any]:
    """Every setting by its dotted name, less some."""
    every = flat(settings.model_dump(mode="json"))
    return {key: value for key, value in every.items() if key not in keys}


def _curve(measured: Sequence[Mapping[str, Any]]) -> list[tuple[int, Summary]]:
    """The shifts of the first; each with the cosines of all that have it."""
    by_run = [dict(zip(curve["shifts"], curve["cosine"], strict=True)) for curve in measured]
    return [
        (shift, summarise([run[shift] for run in by_run if run.get(shift) is not None]))
        for shift in measured[0]["shifts"]
    ]
