"""Copies of remote shards on this machine, named by their sha256 and bounded in size.

`E2KD_CACHE_DIR` says where (default: e2kd under the user's cache folder), `E2KD_CACHE_GIB` how much (default 20).
When it is full, copies that this process has not used go, the longest unused first. What this process uses stays, so
that an epoch in random order over more than fits does not fetch everything again and again.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from artifacts.durable import sha256_file

_used: set[str] = set()
_one_at_a_time = threading.Lock()


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("E2KD_CACHE_DIR") or Path(base, "e2kd"))


def bound() -> int:
    """Bytes."""
    return int(float(os.environ.get("E2KD_CACHE_GIB", "20")) * 2**30)


def kept(sha256: str, size: int, fetch: Callable[[Path], None]) -> Path | None:
    """The copy of the object with this checksum, fetched if need be; None where it does not fit or is not that.

    What is fetched is kept only if size and sha256 are right: the reader then meets the damage in the remote bytes.
    """
    file = folder() / sha256
    with _one_at_a_time:
        if not (file.is_file() and file.stat().st_size == size):
            if not _make_room(size):
                return None
            with tempfile.TemporaryDirectory(dir=folder(), prefix="fetch-") as scratch:
                copy = Path(scratch, sha256)
                fetch(copy)
                if copy.stat().st_size != size or sha256_file(copy) != sha256:
                    return None
                copy.replace(file)
        _used.add(sha256)
        os.utime(file)
    return file


def _make_room(size: int) -> bool:
    """Remove the longest unused copies until `size` more bytes fit. False where they do not."""
    folder().mkdir(parents=True, exist_ok=True)
    copies = sorted((f for f in folder().iterdir() if f.is_file()), key=lambda file: file.stat().st_mtime)
    room = bound() - sum(file.stat().st_size for file in copies)
    for file in copies:
        if room >= size:
            break
        if file.name not in _used:
            room += file.stat().st_size
            file.unlink(missing_ok=True)
    return room >= size
