"""Files that appear whole or not at all, and are still there after a power cut."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.access import writing_to
from artifacts.errors import WriteError

PATIENCE = 60.0
"""Seconds that a process may hold a file and write nothing to it before another one gives up waiting."""

_LOOK_AGAIN = 0.02
_AS_IT_IS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""What opening a link, a socket, or a device answers."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole: see `appearing`."""
    with appearing(path) as partial, partial.open("r+b") as file:
        file.write(data)


@contextmanager
def appearing(path: Path, patience: float = PATIENCE) -> Iterator[Path]:
    """A file to fill, which takes the name `path` when the block ends well: fsync, rename, fsync of the folder.

    Until then it is `path`.partial, locked against other processes; a killed process leaves only that, and the next
    attempt takes it over. Another one that holds it is waited for, `patience` seconds since it last wrote. A link, or
    anything but a file, that lies there is removed, never written through. Missing folders are made. Raises WriteError
    if the system refuses any of this.
    """
    partial = path.with_name(path.name + ".partial")
    with writing_to(path):
        _make_folder(path.parent)
        handle = _locked(partial, patience)
        try:
            yield partial
            os.fsync(handle)
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            os.close(handle)


def check_inside(root: Path, path: Path) -> None:
    """Raises WriteError if a link leads from `path`, or the folders above it, out of the folder `root`."""
    top, folder = _real(root), _real(path.parent)
    if folder != top and top not in folder.parents:
        raise WriteError(
            f"{path} is not written: a link on the way leads out of {root}, to {folder}; remove the link",
            path=path,
        )


def check_links(root: Path, names: Collection[str]) -> None:
    """Raises WriteError if a link leads out of a folder, of those at or below the `names` that are written there."""
    top = _real(root)
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name in names]
            files = [name for name in files if name.removesuffix(".partial") in names]
        for link in (Path(folder, name) for name in (*folders, *files)):
            target = _real(link) if link.is_symlink() else top
            if top not in (target, *target.parents):
                raise WriteError(
                    f"{link} is a link that leads out of {root}, to {target}, so nothing is written there; "
                    "remove the link (`artifacts: FOLDER` in the config puts stores and images on another disk)",
                    path=link,
                )


def _real(path: Path) -> Path:
    """Where links lead; one that leads to itself stays."""
    return Path(os.path.realpath(path))


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(partial: Path) -> None:
    """Remove what a killed process left; a file that a living one is writing stays. Raises WriteError."""
    with writing_to(partial):
        _sweep(partial)


def _sweep(partial: Path) -> None:
    try:
        handle = os.open(partial, os.O_RDWR | _AS_IT_IS)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        # a link, a socket or a device is no process's partial file
        partial.unlink()
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, partial):
            partial.unlink()
            sync_folder(partial.parent)
    except (BlockingIOError, FileNotFoundError):
        return
    finally:
        os.close(handle)


def _locked(partial: Path, patience: float) -> int:
    """An emptied file that this process alone writes; waits for another process that writes it."""
    while True:
        handle = _opened(partial)
        if handle is None:
            partial.unlink(missing_ok=True)
            continue
        try:
            _wait(handle, partial, patience)
        except BaseException:
            os.close(handle)
            raise
        # else it became the finished file while we waited
        if _is_at(handle, partial):
            if os.fstat(handle).st_size:
                os.ftruncate(handle, 0)
            return handle
        os.close(handle)


def _opened(partial: Path) -> int | None:
    """The partial file, made if need be; None if what lies there is no file of that one name."""
    try:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | _AS_IT_IS, 0o666)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    about = os.fstat(handle)
    if stat.S_ISREG(about.st_mode) and about.st_nlink <= 1:
        return handle
    os.close(handle)
    return None


def _wait(handle: int, partial: Path, patience: float) -> None:
    """Until no other process has the lock. Raises WriteError if one has it and does not write."""
    last, since = -1, time.monotonic()
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            size = os.fstat(handle).st_size
        if size != last:
            last, since = size, time.monotonic()
        if time.monotonic() - since > patience:
            raise WriteError(
                f"cannot write {partial}: another process has held it for {patience:.0f} s and writes nothing; "
                "stop that process, or remove the file, and run the same command again",
                path=partial,
                errno=errno.EWOULDBLOCK,
            )
        time.sleep(_LOOK_AGAIN)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        about, named = os.fstat(handle), path.lstat()
    except FileNotFoundError:
        return False
    return (about.st_dev, about.st_ino) == (named.st_dev, named.st_ino)


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, and durable."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
