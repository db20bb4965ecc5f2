"""`sweep`: every combination of a student's values becomes a student of its own, `name,key=value,...`.

Only students' keys are swept, so that all runs share one packed set and one store. What changes the store
(`explain.logit`, the teacher ...) is another experiment: `--set explain.logit=centred --out DIR`.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Mapping
from typing import Any


def expand(students: dict[str, Any], sweep: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Students with the swept ones replaced by their combinations, in the same order. Returns (students, problems).

    A config that was expanded before (`out/NAME/config.yaml`) stays as it is.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    for name, own in students.items():
        grid = sweep.get(name)
        found |= {name: own} if not grid else combinations(name, own, grid, problems)
    for name in sweep:
        if name not in students and not any(other.startswith(f"{name},") for other in students):
            near = difflib.get_close_matches(str(name), list(students), n=1)
            hint = f"did you mean {near[0]}?" if near else f"the students are {', '.join(students)}"
            problems.append(f"sweep.{name}: no such student; {hint}")
    return found, problems


def combinations(name: str, own: Any, grid: Any, problems: list[str]) -> dict[str, Any]:
    """The students of one grid {key: values}; what is wrong with it goes to `problems`."""
    if not isinstance(grid, dict) or not all(isinstance(values, list | tuple) for values in grid.values()):
        problems.append(f"sweep.{name}: write it as key: [value, value], e.g. temperature: [1, 5]")
        return {name: own}
    bad = [value for values in grid.values() for value in values if set(str(value)) & set("/,=")]
    if bad or not all(grid.values()):
        problems.append(f"sweep.{name}: " + (f"{bad[0]!r} has / , or =" if bad else "a list is empty"))
        return {name: own}
    found = {}
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        label = ",".join([name, *(f"{key}={_short(value)}" for key, value in values.items())])
        found[label] = _with(own, values)
    return found


def _with(own: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a student's section with dotted keys set."""
    student = copy.deepcopy(own) if isinstance(own, dict) else {}
    for key, value in values.items():
        *parents, last = str(key).split(".")
        section = student
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                return student | {key: value}  # an unknown key, which validation names
        section[last] = value
    return student


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
