"""Names that several files share: dotted keys of nested settings, and splits in file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} -> {"a.b": 1, "c": [2]}. An empty mapping has no keys; a value has the key `prefix`."""
    if not isinstance(section, Mapping):
        return {prefix: section}
    values: dict[str, Any] = {}
    for key, inner in section.items():
        values |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return values


def in_file_name(split: str) -> str:
    """A split's name as a part of a file's name: NAME/train, a split of extra data, has a slash."""
    return split.replace("/", "--")
