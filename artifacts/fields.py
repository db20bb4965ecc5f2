"""Kinds of values that a file may hold, each with its bounds: a record that holds anything else is not read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints

DEEPEST = 32
"""Levels of nested lists and mappings in settings."""
LARGEST_IMAGE = 4096
"""Pixels of a side of a packed image."""
MOST_ROWS_PER_SHARD = 65_536
LARGEST_ROW = 2**24
"""Numbers that one array of a store holds for one row."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Positive = Annotated[int, Field(strict=True, ge=1, le=2**40)]
Extent = Annotated[int, Field(strict=True, ge=1, le=2**20)]
RowsPerShard = Annotated[int, Field(strict=True, ge=1, le=MOST_ROWS_PER_SHARD)]
Label = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]


def plain(value: Any) -> Any:
    """`value`, if it is made of texts, finite numbers of 64 bits, lists and mappings, not nested too deeply.

    Raises ValueError.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels")
        level = [inner for outer in level for inner in _inside(outer)]
    return value


def _inside(value: Any) -> Iterable[Any]:
    """What lies one level below. Raises ValueError for a number out of bounds."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("it has a number of more than 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it has a number that is not finite")
    return ()


Settings = Annotated[dict[str, Any], AfterValidator(plain)]
