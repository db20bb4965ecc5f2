"""Reading a config file: YAML, overrides, `train` laid under the students, and every problem at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from artifacts.errors import ConfigError
from artifacts.names import masked, shown
from pipeline.config.base import Settings
from pipeline.config.experiment import EXPLAIN_SETTINGS, Experiment
from pipeline.config.grid import combinations, overridden, wrong
from pipeline.config.problems import Unions, describe, near, unknown_key
from pipeline.config.sources import SOURCES
from pipeline.config.text import text_of, yaml_of
from pipeline.config.training import StudentConfig

UNIONS: Unions = {"data": SOURCES, "also": SOURCES, "explain": EXPLAIN_SETTINGS}
"""Sections of several kinds: the class of each kind by the name that the section says."""


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a config file, apply `key.sub=value` overrides and validate.

    Raises ConfigError that lists every problem at once.
    """
    raw = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    return parse(raw, where=str(path))


def parse(raw: Mapping[str, Any], where: str = "config") -> Experiment:
    """Validate an already read config. Raises ConfigError that lists every problem at once."""
    resolved, problems = _resolve_students(copy.deepcopy(dict(raw)))
    if not problems:
        problems = _candidates_problems(resolved)
    try:
        experiment = Experiment.model_validate(resolved)
    except ValidationError as error:
        problems += [_sentence(problem) for problem in error.errors()]
    if problems:
        distinct = list(dict.fromkeys(problems))
        lines = "\n".join(f"  {problem}" for problem in distinct)
        raise ConfigError(f"{where} has {len(distinct)} problem{'s' if len(distinct) > 1 else ''}:\n{lines}")
    return experiment


def _candidates_problems(resolved: Mapping[str, Any]) -> list[str]:
    """Problems of a sweep's candidates, each told at the key of `sweep` or of the student that has it."""
    students, problems = resolved.get("students"), []
    sweep = resolved.get("sweep")
    for name, grid in sweep.items() if isinstance(sweep, dict) else ():
        own = students.get(name) if isinstance(students, dict) else None
        if not isinstance(own, dict):
            continue
        for overrides in combinations(grid):
            try:
                StudentConfig.model_validate(overridden(own, overrides))
            except ValidationError as error:
                for problem in error.errors():
                    swept = ".".join(map(str, problem["loc"])) in grid
                    location = ("sweep" if swept else "students", name, *problem["loc"])
                    problems.append(_sentence({**problem, "loc": location}))
    return problems


def _sentence(problem: Any) -> str:
    return describe(problem, Experiment, UNIONS, more_keys=["train"])


def dump(settings: Settings) -> str:
    """The resolved settings as YAML, in the order of the class; a URL of artifacts without its password."""
    values = settings.model_dump(mode="json")
    if values.get("artifacts"):
        values["artifacts"] = masked(values["artifacts"])
    return yaml.safe_dump(values, sort_keys=False, width=100)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml_of(text_of(path))
    except FileNotFoundError:
        nearest = near(path.stem, (other.stem for other in path.parent.glob("*.yaml")))
        hint = (
            f"; did you mean {path.parent / nearest[0]}.yaml?" if nearest else "; the configs are in configs/"
        )
        raise ConfigError(f"no config file {path}{hint}", path=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", path=path) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not valid YAML: {' '.join(str(error).split())[:600]}", path=path
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must be a mapping with the keys {', '.join(Experiment.model_fields)}", path=path
        )
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key.sub=value, e.g. --set train.epochs=5", key=key)
    try:
        value = yaml_of(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {override[:200]}: {shown(text)} is not a YAML value: {' '.join(str(error).split())[:400]}",
            key=key,
        ) from None
    *parents, last = key.split(".")
    section: Any = raw
    for name in parents:
        section = section.setdefault(name, {}) if section.get(name) is not None else _replace(section, name)
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section", key=key)
    section[last] = value


def _replace(section: dict[str, Any], name: str) -> dict[str, Any]:
    section[name] = {}
    return section[name]


def _resolve_students(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Lay `augment` under `teacher.train` and `train`, and `train` under each student. Returns (config, problems)."""
    defaults = raw.pop("train", None) or {}
    augment = raw.get("augment") or {}
    problems = [
        f"{name}: must be a section (a mapping)"
        for name, section in (("train", defaults), ("augment", augment))
        if not isinstance(section, dict)
    ]
    if problems:
        return {**raw, "augment": {}}, problems
    problems += _unknown_keys("train", defaults, StudentConfig)
    defaults = {key: value for key, value in defaults.items() if key in StudentConfig.model_fields}
    students = raw.get("students")
    sweep = raw.get("sweep") or {}
    if isinstance(students, dict):
        students = {str(name): own for name, own in students.items()}
        raw["students"] = {
            name: _merge({"augment": augment}, defaults, own or {}) if isinstance(own, dict | None) else own
            for name, own in students.items()
        }
        if isinstance(sweep, dict):
            problems += wrong(students, sweep)
    if not problems and isinstance(students, dict) and isinstance(sweep, dict):
        _lay_first_values(raw["students"], sweep)
    teacher = raw.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("train"), dict):
        teacher["train"] = _merge({"augment": augment}, teacher["train"])
    return raw, problems


def _lay_first_values(students: dict[str, Any], sweep: Mapping[str, Any]) -> None:
    """A swept student is valid by itself, too: what only its sweep says is the first value there."""
    for name, grid in sweep.items():
        own = students[str(name)]
        if isinstance(own, dict):
            missing = {key: values[0] for key, values in grid.items() if not _has(own, key)}
            students[str(name)] = overridden(own, missing)


def _has(section: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(section, dict) or part not in section:
            return False
        section = section[part]
    return True


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; sections are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return copy.deepcopy(merged)


def _unknown_keys(where: str, section: Mapping[str, Any], model: type[BaseModel]) -> list[str]:
    known = list(model.model_fields)
    return [unknown_key(f"{where}.{key}", known) for key in section if key not in known]
