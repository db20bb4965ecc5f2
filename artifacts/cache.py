"""Copies of remote shards on this machine, named by their sha256 and bounded in size.

`E2KD_CACHE_DIR` says where (default: e2kd under the user's cache folder), `E2KD_CACHE_GIB` how much (default 20). They
lie in a folder `objects` there, which is the user's alone; nothing but copies is ever touched. A copy that this process
did not fetch is hashed before it is believed, once per process and file. When the cache is full, copies that this
process has not used go, the longest unused first. What it uses stays, so that an epoch in random order over more than
fits does not fetch everything again and again.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from artifacts.access import writing_to
from artifacts.durable import appearing, sha256_file, sweep
from artifacts.errors import PlaceError, WriteError

PATIENCE = 10.0
"""Seconds that another process may hold a copy and fetch nothing, before the object is read by ranges instead."""
_COPY = re.compile(r"[0-9a-f]{64}(\.partial)?")

_used: dict[str, tuple[int, ...]] = {}
"""By checksum, which file this process fetched or hashed."""
_held: set[str] = set()
"""What another process held for too long."""
_one_at_a_time = threading.Lock()


def _unlock_in_child() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("E2KD_CACHE_DIR") or Path(base, "e2kd"), "objects")


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
    """The copy of the object with this checksum, fetched if need be; None if there is no room for it here.

    None also where what was fetched is not that object: the reader then meets the damage in the remote bytes.
    """
    file = _copy(sha256)
    with _one_at_a_time:
        try:
            if not _believed(file, size, sha256) and not _fetched(file, size, sha256, fetch):
                return None
            os.utime(file, follow_symlinks=False)
            _used[sha256] = _identity(file)
        # the object is not there
        except FileNotFoundError:
            raise
        # this machine has no place for it
        except (OSError, WriteError):
            return None
    return file


def _copy(sha256: str) -> Path:
    """The one file that a copy may be. Raises ValueError for what is no checksum."""
    if not _COPY.fullmatch(sha256) or sha256.endswith(".partial"):
        raise ValueError(f"{sha256!r} is no sha256")
    return folder() / sha256


def _fetched(file: Path, size: int, sha256: str, fetch: Callable[[Path], None]) -> bool:
    if sha256 in _held or not _make_room(size):
        return False
    try:
        with appearing(file, PATIENCE) as partial:
            # another process fetched it while we waited
            if _believed(file, size, sha256):
                raise _Stop
            fetch(partial)
            if not _there(partial, size) or sha256_file(partial) != sha256:
                raise _Stop
    except _Stop:
        return _believed(file, size, sha256)
    except WriteError as error:
        if error.errno == errno.EWOULDBLOCK:
            _held.add(sha256)
        raise
    finally:
        sweep(file.with_name(f"{sha256}.partial"))
    return True


def forget(sha256: str) -> bool:
    """Remove a copy that turned out to be damaged. Whether there was one."""
    file = _copy(sha256)
    _used.pop(sha256, None)
    with writing_to(file):
        there = file.is_file()
        if there:
            file.unlink(missing_ok=True)
    return there


class _Stop(Exception):
    """The copy is there already, or is not to be kept."""


def _there(file: Path, size: int) -> bool:
    """Whether it is a file, no link to one, of that size."""
    try:
        about = file.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(about.st_mode) and about.st_size == size


def _believed(file: Path, size: int, sha256: str) -> bool:
    """Whether the copy is there, and this process has seen that it is that object."""
    if not _there(file, size):
        return False
    return _used.get(sha256) == _identity(file) or sha256_file(file) == sha256


def _identity(file: Path) -> tuple[int, ...]:
    """Which file it is: another one under the same name is hashed again. Its times change by every use."""
    about = file.lstat()
    return about.st_dev, about.st_ino, about.st_size


def _make_room(size: int) -> bool:
    """Remove the longest unused copies until `size` more bytes fit. False if they do not."""
    _make_folder()
    copies: list[tuple[float, int, Path]] = []
    for file in folder().iterdir():
        if not _COPY.fullmatch(file.name):
            continue
        try:
            # of a process that was killed
            if file.suffix == ".partial":
                sweep(file)
            about = file.lstat()
        # another process makes room too
        except FileNotFoundError:
            continue
        if stat.S_ISREG(about.st_mode):
            copies.append((about.st_mtime, about.st_size, file))
    room = bound() - sum(bytes_ for _, bytes_, _ in copies)
    for _, bytes_, file in sorted(copies):
        if room >= size:
            break
        if file.name not in _used and file.suffix != ".partial":
            room += bytes_
            file.unlink(missing_ok=True)
    return room >= size


def _make_folder() -> None:
    """The folder of the copies, which only this user may enter unless someone opened it. Raises OSError for a link."""
    folder().parent.mkdir(parents=True, exist_ok=True)
    folder().mkdir(mode=0o700, exist_ok=True)
    if folder().is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "it is a link", str(folder()))
