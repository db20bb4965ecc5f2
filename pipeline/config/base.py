"""What every section of a config is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(
            f"{name[:100]!r} is no name: it stands in paths, so at most 100 of A-Z, a-z, 0-9, _, - and, not first, ."
        )
    return name


def _split(name: str) -> str:
    data_set, slash, split = name.rpartition("/")
    if slash:
        _plain(data_set)
    _plain(split)
    return name


PlainName = Annotated[str, AfterValidator(_plain)]
"""A name that becomes a file's or a folder's: never a path, never `.` or `..`."""
SplitName = Annotated[str, AfterValidator(_split)]
"""A split of `data`, or NAME/SPLIT, a split of also.NAME."""


class Settings(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Settings)


def classes_by_name(base: type[S], key: str) -> dict[str, type[S]]:
    """Every class below `base` by the names that it says in the literal type of its field `key`."""
    return dict(_named(base, key))


def _named(base: type[S], key: str) -> Iterator[tuple[str, type[S]]]:
    for cls in base.__subclasses__():
        for name in get_args(cls.model_fields[key].annotation):
            yield name, cls
        yield from _named(cls, key)
