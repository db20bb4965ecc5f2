"""What images are called: keys of packed samples, and the hash that puts images in order."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_OTHER = re.compile(r"[^A-Za-z0-9_-]+")
_LOST = re.compile(r"[^A-Za-z0-9_/-]")
"""Of a path without its suffix: what its key does not say."""


def name_bytes(name: str) -> bytes:
    """A name as bytes: the same for composed and decomposed accents, and for names that are not UTF-8."""
    return unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")


def rank(name: str, seed: int) -> int:
    """0 .. 2^64 - 1, uniform over names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:".encode() + name_bytes(name), digest_size=8).digest())


def printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")


def safe_keys(paths: Sequence[str]) -> list[str]:
    """Keys of [A-Za-z0-9_-] from paths: a/b.jpg -> a--b; a short hash follows if that would not be unique."""
    stems = [posixpath.splitext(path)[0] for path in paths]
    plain = [_OTHER.sub("_", stem.replace("/", "--")) for stem in stems]
    times = Counter(key.lower() for key in plain)
    return [
        key if times[key.lower()] == 1 and not _LOST.search(stem) else f"{key}-{_digest(path)}"
        for key, stem, path in zip(plain, stems, paths, strict=True)
    ]


def _digest(path: str) -> str:
    return hashlib.sha256(name_bytes(path)).hexdigest()[:10]
