"""`sweep`: every combination of a student's values is a candidate, and the best of them counts for the student.

Only students' keys are swept, so that all runs share one packed set and one store. What changes the store
(`explain.logit`, the teacher ...) is another experiment: `--set explain.logit=centred --out DIR`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from pipeline.config.problems import did_you_mean, unknown_key
from pipeline.config.training import StudentConfig

MOST = 1000
"""Candidates of all sweeps of a config together."""
LONGEST = 200
"""Letters of a candidate's name, which is a folder's."""


@dataclass(frozen=True)
class Candidate:
    """One student to train: a student of the config file, or that with one combination of its sweep's values.

    method     the student's name in the config file, a row of the report
    overrides  dotted key -> value, of its sweep; empty if the student is not swept
    settings   all of its settings
    """

    method: str
    overrides: Mapping[str, Any]
    settings: StudentConfig

    @property
    def name(self) -> str:
        """Of its runs' folder: `e2kd,temperature=5,explanation_weight=1`. Nobody reads it back."""
        return label(self.method, self.overrides)

    @property
    def swept(self) -> bool:
        return bool(self.overrides)


def candidates(
    students: Mapping[str, StudentConfig], sweep: Mapping[str, Mapping[str, Sequence[Any]]]
) -> list[Candidate]:
    """Of every student in the config's order, the last key's values changing fastest."""
    return [
        Candidate(name, overrides, _overridden(own, overrides))
        for name, own in students.items()
        for overrides in combinations(sweep.get(name, {}))
    ]


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Of one grid {key: values}; one empty combination if it has no keys."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def label(method: str, overrides: Mapping[str, Any]) -> str:
    return ",".join([method, *(f"{key}={short(value)}" for key, value in overrides.items())])


def short(value: Any) -> str:
    """A value as it stands in a run's name: `5` for 5.0, `0.2`, `True`; different values have different names."""
    brief = f"{value:g}" if isinstance(value, float) else str(value)
    return brief if not isinstance(value, float) or float(brief) == value else repr(value)


def overridden(own: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a student's section with dotted keys set."""
    student = copy.deepcopy(dict(own))
    for key, value in overrides.items():
        *parents, last = str(key).split(".")
        section = student
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[last] = value
    return student


def wrong(students: Mapping[str, Any], sweep: Mapping[str, Any]) -> list[str]:
    """The problems of a config's sweep, a sentence each."""
    count = sum(_size(grid) for grid in sweep.values())
    if count > MOST:
        return [f"sweep: asks for {count:.4g} students, {MOST} at most are trained; sweep fewer values"]
    return [problem for name, grid in sweep.items() for problem in _wrong_grid(str(name), grid, students)]


def _size(grid: Any) -> float:
    """How many combinations a grid has; 0 for what is none, infinity for more than a float can say."""
    if not isinstance(grid, dict) or not all(isinstance(values, list | tuple) for values in grid.values()):
        return 0
    return math.prod(float(len(values)) for values in grid.values())


def _overridden(own: StudentConfig, overrides: Mapping[str, Any]) -> StudentConfig:
    if not overrides:
        return own
    return StudentConfig.model_validate(overridden(own.model_dump(exclude_unset=True), overrides))


def _wrong_grid(name: str, grid: Any, students: Mapping[str, Any]) -> list[str]:
    if name not in students:
        hint = did_you_mean(name, students, f"the students are {', '.join(students)}")
        return [f"sweep.{name}: no such student; {hint}"]
    if not isinstance(grid, dict) or not all(isinstance(values, list | tuple) for values in grid.values()):
        return [f"sweep.{name}: write it as key: [value, value], e.g. temperature: [1, 5]"]
    problems = [problem for key, values in grid.items() for problem in _wrong_values(name, str(key), values)]
    if not problems:
        longest = max((label(name, overrides) for overrides in combinations(grid)), key=len)
        if len(longest) > LONGEST:
            problems = [
                f"sweep.{name}: the folder {longest[:60]}... would have a name of over {LONGEST} letters"
            ]
    return problems


def _wrong_values(name: str, key: str, values: Sequence[Any]) -> list[str]:
    location, labels = f"sweep.{name}.{key}", [short(value) for value in values]
    unknown = _unknown(location, key)
    if unknown:
        return [unknown]
    if not labels:
        return [f"{location}: has no values"]
    bad = [text for text in labels if not text.isprintable() or not text or set(text) & set("/,=")]
    if bad:
        return [
            f"{location}: {bad[0][:100]!r} cannot be swept, values stand in folder names: no / , = and not empty"
        ]
    twice = [text for text, times in Counter(labels).items() if times > 1]
    return [f"{location}: {twice[0][:100]} stands there twice"] if twice else []


def _unknown(location: str, key: str) -> str | None:
    """What is wrong with a dotted key of a student, if anything is."""
    model: type[BaseModel] | None = StudentConfig
    for part in key.split("."):
        known = list(model.model_fields) if model else []
        if part not in known:
            return unknown_key(location, known)
        model = _section(model, part) if model else None
    return (
        f"{location}: is a section; sweep one of its keys, {key}.{next(iter(model.model_fields))}"
        if model
        else None
    )


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The settings class of a key that is a section."""
    annotation = model.model_fields[key].annotation
    options = (annotation, *get_args(annotation))
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)
