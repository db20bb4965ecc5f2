"""`sweep`: every combination of a student's values becomes a student of its own, `name,key=value,...`.

Only students' keys are swept, so that all runs share one packed set and one store. What changes the store
(`explain.logit`, the teacher ...) is another experiment: `--set explain.logit=centred --out DIR`.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from pipeline.config.problems import unknown_key
from pipeline.config.training import StudentConfig


def expand(students: dict[str, Any], sweep: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Students with the swept ones replaced by their combinations, in the same order. Returns (students, problems).

    A config that was expanded before (`out/NAME/config.yaml`) stays as it is.
    """
    found: dict[str, Any] = {}
    problems = [problem for name, grid in sweep.items() for problem in _wrong(str(name), grid, students)]
    for name, own in students.items():
        swept = sweep.get(name) and not problems and isinstance(own, dict | None)
        more = combinations(name, own or {}, sweep[name]) if swept else {name: own}
        twice = [label for label in more if label in found or (label != name and label in students)]
        problems += [f"students.{label}: the sweep of {name} makes it too; keep one" for label in twice]
        found |= more
    return found, problems


def combinations(name: str, own: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The students of one grid {key: values}, the last key's values changing fastest."""
    found = {}
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        label = ",".join([name, *(f"{key}={short(value)}" for key, value in values.items())])
        found[label] = _with(own, values)
    return found


def short(value: Any) -> str:
    """A value as it stands in a run's name: `5` for 5.0, `0.2`, `True`; different values have different names."""
    brief = f"{value:g}" if isinstance(value, float) else str(value)
    return brief if not isinstance(value, float) or float(brief) == value else repr(value)


def _wrong(name: str, grid: Any, students: Mapping[str, Any]) -> list[str]:
    """The problems of one student's grid, a sentence each."""
    expanded = [other for other in students if other.startswith(f"{name},")]
    if name not in students and not expanded:
        near = difflib.get_close_matches(name, list(students), n=1)
        hint = f"did you mean {near[0]}?" if near else f"the students are {', '.join(students)}"
        return [f"sweep.{name}: no such student; {hint}"]
    if not isinstance(grid, dict) or not all(isinstance(values, list | tuple) for values in grid.values()):
        return [f"sweep.{name}: write it as key: [value, value], e.g. temperature: [1, 5]"]
    problems = [problem for key, values in grid.items() for problem in _wrong_values(name, str(key), values)]
    if not problems and name not in students and set(expanded) != set(combinations(name, {}, grid)):
        problems = [f"sweep.{name}: its students here are another sweep's; change it in the original config"]
    return problems


def _wrong_values(name: str, key: str, values: Sequence[Any]) -> list[str]:
    where, labels = f"sweep.{name}.{key}", [short(value) for value in values]
    unknown = _unknown(where, key)
    if unknown:
        return [unknown]
    if not labels:
        return [f"{where}: has no values"]
    bad = [label for label in labels if not label or set(label) & set("/,=\n")]
    if bad:
        return [f"{where}: {bad[0]!r} cannot be swept, values stand in folder names: no / , = and not empty"]
    twice = [label for label in labels if labels.count(label) > 1]
    return [f"{where}: {twice[0]} stands there twice"] if twice else []


def _unknown(where: str, key: str) -> str | None:
    """What is wrong with a dotted key of a student, if anything is."""
    model: type[BaseModel] | None = StudentConfig
    for part in key.split("."):
        known = list(model.model_fields) if model else []
        if part not in known:
            return unknown_key(where, known)
        model = _section(model, part) if model else None
    return (
        f"{where}: is a section; sweep one of its keys, {key}.{next(iter(model.model_fields))}"
        if model
        else None
    )


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The settings class of a key that is a section."""
    annotation = model.model_fields[key].annotation
    options = (annotation, *get_args(annotation))
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _with(own: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a student's section with dotted keys set."""
    student = copy.deepcopy(dict(own))
    for key, value in values.items():
        *parents, last = str(key).split(".")
        section = student
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[last] = value
    return student
