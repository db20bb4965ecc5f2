"""Names that several files share: dotted keys of nested settings, and splits in file names."""

from __future__ import annotations

import re
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


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0, DEL and C1, which command terminals; marks that turn the direction of text; halves of surrogate pairs."""


def printable(text: str, keep: str = "") -> str:
    """A text whose control characters, but those in `keep`, stand there as `\\x1b` or `\\u202e`."""

    def shown(found: re.Match[str]) -> str:
        code = ord(found[0])
        return found[0] if found[0] in keep else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _CONTROLS.sub(shown, text)


_SECRET = re.compile(
    r"(?:(?<=://)|(?<=\w\w:/)(?=[^/\s]))(?:[^\s/@:]*:(?!\d+/)\S*|[^\s/@]*)@|(?<=[?&;#])([^\s=&;/]+)=[^\s&;#'\")]+"
)


def masked(text: str) -> str:
    """A text without the secrets of its URLs: user:password@ is gone, and values after ? stand as `...`."""
    if ":/" not in text:
        return text
    return _SECRET.sub(lambda found: f"{found[1]}=..." if found[1] else "", text)


def secrets_in(url: str) -> list[str]:
    """The pieces of a URL that `masked` leaves out, the longest first."""
    found = [match[0] for match in _SECRET.finditer(url)]
    pieces = {
        piece for one in found for piece in (one.rstrip("@"), *re.split("[/:@=]", one)) if len(piece) > 2
    }
    return sorted(pieces, key=len, reverse=True)


def shown(value: Any, most: int = 200) -> str:
    """What a message says of a value that came from a file: its repr, at most `most` letters and without secrets."""
    text = masked(repr(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def file_name(path: str | None) -> str | None:
    """The last part of a path: what is told to others of a file here, without folders and who they belong to."""
    return None if path is None else path.rstrip("/").rpartition("/")[2]


def in_file_name(split: str) -> str:
    """A split's name as a part of a file's name: NAME/train, a split of extra data, has a slash."""
    return split.replace("/", "--")
