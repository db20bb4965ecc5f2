"""Copies of remote shards on this machine, named by their sha256 and bounded in size.

`E2KD_CACHE_DIR` says where (default: e2kd under the user's cache folder), `E2KD_CACHE_GIB` how much (default 20).
When it is full, copies that this process has not used go, the longest unused first. What this process uses stays, so
that an epoch in random order over more than fits does not fetch everything again and again.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

from artifacts.access import writing_to
from artifacts.durable import appearing, sha256_file, sweep
from artifacts.errors import PlaceError, WriteError

_used: set[str] = set()
_one_at_a_time = threading.Lock()


def _unlock_in_child() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("E2KD_CACHE_DIR") or Path(base, "e2kd"))


def bound() -> int:
    """Bytes. Raises PlaceError where E2KD_CACHE_GIB is not a number."""
    text = os.environ.get("E2KD_CACHE_GIB", "20")
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise PlaceError(
            f"E2KD_CACHE_GIB is {text!r}; set it to a number of GiB, or to 0 for no cache",
            key="E2KD_CACHE_GIB",
        )
    return int(gib * 2**30)


def kept(sha256: str, size: int, fetch: Callable[[Path], None]) -> Path | None:
    """The copy of the object with this checksum, fetched if need be; None where there is no room for it here.

    None also where what was fetched is not that object: the reader then meets the damage in the remote bytes.
    """
    file = folder() / sha256
    with _one_at_a_time:
        try:
            if not _there(file, size) and not _fetched(file, size, sha256, fetch):
                return None
            os.utime(file)
        # the object is not there
        except FileNotFoundError:
            raise
        # this machine has no place for it
        except (OSError, WriteError):
            return None
        _used.add(sha256)
    return file


def _fetched(file: Path, size: int, sha256: str, fetch: Callable[[Path], None]) -> bool:
    if not _make_room(size):
        return False
    try:
        with appearing(file) as partial:
            if _there(file, size):  # another process fetched it while we waited
                raise _Stop
            fetch(partial)
            if not _there(partial, size) or sha256_file(partial) != sha256:
                raise _Stop
    except _Stop:
        return _there(file, size)
    finally:
        sweep(file.with_name(f"{sha256}.partial"))
    return True


def forget(sha256: str) -> bool:
    """Remove a copy that turned out to be damaged. Whether there was one."""
    file = folder() / sha256
    with writing_to(file):
        there = file.exists()
        file.unlink(missing_ok=True)
    return there


class _Stop(Exception):
    """The copy is there already, or is not to be kept."""


def _there(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _make_room(size: int) -> bool:
    """Remove the longest unused copies until `size` more bytes fit. False where they do not."""
    folder().mkdir(parents=True, exist_ok=True)
    copies: list[tuple[float, int, Path]] = []
    for file in folder().iterdir():
        try:
            # of a process that was killed
            if file.suffix == ".partial":
                sweep(file)
            about = file.stat()
            copies.append((about.st_mtime, about.st_size, file))
        # another process makes room too
        except FileNotFoundError:
            continue
    room = bound() - sum(bytes_ for _, bytes_, _ in copies)
    for _, bytes_, file in sorted(copies):
        if room >= size:
            break
        if file.name not in _used and file.suffix != ".partial":
            room += bytes_
            file.unlink(missing_ok=True)
    return room >= size
