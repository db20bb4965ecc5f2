"""JSON files that carry the sha256 of what they say, so that a flipped bit is not believed."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

from pydantic import ValidationError

_DEEPEST = 40


def seal(content: dict[str, Any]) -> bytes:
    """The file: `content` and, as the last key, `seal`, the sha256 of its canonical form."""
    return json.dumps({**content, "seal": _digest(content)}, indent=1).encode()


def unseal(data: bytes, schema_version: int) -> dict[str, Any]:
    """The content of a sealed file. Raises ValueError if it was changed, NewerSchema before looking."""
    # each level of a sealed file is indented by one more blank
    if b"\n" + b" " * (_DEEPEST + 1) in data:
        raise ValueError(f"it has more than {_DEEPEST} levels")
    content = parsed(data)
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping")
    version = content.get("schema_version", schema_version)
    if type(version) is not int or not 0 < version < 2**31:
        raise ValueError("its schema_version is not a number")
    if version > schema_version:
        raise NewerSchema(version)
    content.pop("seal", None)
    if seal(content) != data:
        raise ValueError("its own checksum differs")
    return content


def parsed(data: bytes) -> Any:
    """What JSON says. Raises ValueError, also for what is nested too deeply and for NaN and Infinity."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def reason(error: Exception) -> str:
    """One line: what is wrong with a file, by the error of reading it; never what the file holds at length."""
    if isinstance(error, NewerSchema):
        return f"its schema is {error}, of a newer e2kd"
    if not isinstance(error, ValidationError):
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}"[:200] if where else first["msg"][:200]


def shown(value: object) -> str:
    """What a file holds, for a sentence: at most 200 letters of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class NewerSchema(ValueError):
    """The file was written by a newer e2kd; args[0] is its schema version."""


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
