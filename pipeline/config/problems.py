"""What is wrong with a config, in words: pydantic's errors as one sentence each, with "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from artifacts.names import shown

Tags = Mapping[str, type[BaseModel]]
Unions = Mapping[str, Tags]


def near(given: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """At most `count` of the `known` names, those that are spelled most as `given`, the nearest first.

    `cutoff`: the least similarity, 0..1 (`difflib.get_close_matches`).
    """
    return difflib.get_close_matches(given, list(known), n=count, cutoff=cutoff)


def did_you_mean(given: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """The end of a message about the unknown name `given`: the known name that is near, else the words `otherwise`."""
    nearest = near(given, known, cutoff=cutoff)
    return f"did you mean {nearest[0]}?" if nearest else otherwise


def unknown_key(location: str, known: Sequence[str]) -> str:
    """`location` is not one of the `known` keys of its section."""
    location = location[:200]
    hint = did_you_mean(location.rsplit(".", 1)[-1], known, f"known keys: {', '.join(known)}")
    return f"{location}: unknown key" + (f"; {hint}" if known else "")


def describe(problem: Any, root: type[BaseModel], unions: Unions, more_keys: Sequence[str] = ()) -> str:
    """One of pydantic's errors as a sentence.

    `unions` has the tags of each section that is a union, with their classes: tags are no keys. `more_keys` are keys of
    the top level that `root` does not have.
    """
    tags = unions.get(str(problem["loc"][0]), {}) if problem["loc"] else {}
    key = ".".join(str(part) for part in problem["loc"] if part not in tags) or "config"
    match problem["type"]:
        case "extra_forbidden":
            model = _model_at(problem["loc"][:-1], root, tags)
            return unknown_key(
                key, [*(model.model_fields if model else ()), *(more_keys if model is root else ())]
            )
        case "missing":
            return f"{key}: is missing"
        case "literal_error":
            return _bad_choice(key, problem)
        case "union_tag_not_found":
            return f"{key}: {_discriminator(problem)} is missing; one of {', '.join(sorted(tags))}"
        case "union_tag_invalid":
            given = str(problem["ctx"]["tag"])
            return f"{key}.{_discriminator(problem)}: {shown(given)} is unknown; {_near(given[:200], sorted(tags))}"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: {_lower(problem['msg'])}, got {shown(problem['input'])}"


def _discriminator(problem: Any) -> str:
    return str(problem["ctx"]["discriminator"]).strip("'")


def _bad_choice(key: str, problem: Any) -> str:
    choices = [choice.strip("'") for choice in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    return f"{key}: {shown(problem['input'])} is unknown; {_near(str(problem['input'])[:200], choices)}"


def _near(given: str, choices: Sequence[str]) -> str:
    return did_you_mean(given, choices, f"one of {', '.join(choices)}")


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _model_at(location: Sequence[Any], root: type[BaseModel], tags: Tags) -> type[BaseModel] | None:
    """The settings class at a location of the config, for the names of its keys."""
    model: Any = root
    for part in location:
        if part in tags:
            model = tags[part]
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = next(_classes_in(model.model_fields[part].annotation), None)
    return model


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)
