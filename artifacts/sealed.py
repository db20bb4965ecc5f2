"""JSON files that carry the sha256 of what they say, so that a flipped bit is not believed."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def seal(content: dict[str, Any]) -> bytes:
    """The file: `content` and, as the last key, `seal`, the sha256 of its canonical form."""
    return json.dumps({**content, "seal": _digest(content)}, indent=1).encode()


def unseal(data: bytes, schema_version: int) -> dict[str, Any]:
    """The content of a sealed file. Raises ValueError where it was changed, NewerSchema before looking."""
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping")
    version = content.get("schema_version", schema_version)
    if not isinstance(version, int):
        raise ValueError("its schema_version is not a number")
    if version > schema_version:
        raise NewerSchema(version)
    content.pop("seal", None)
    if seal(content) != data:
        raise ValueError("its own checksum differs")
    return content


class NewerSchema(Exception):
    """The file was written by a newer e2kd; args[0] is its schema version."""


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
