"""Files that appear whole or not at all, and are still there after a power cut."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.access import writing_to


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole: see `appearing`."""
    with appearing(path) as partial:
        partial.write_bytes(data)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file to fill, which takes the name `path` when the block ends well: fsync, rename, fsync of the folder.

    Until then it is `path`.partial, locked against other processes; a killed process leaves only that, and the next
    attempt takes it over. Missing folders are made. Raises WriteError if the system refuses any of this.
    """
    partial = path.with_name(path.name + ".partial")
    with writing_to(path):
        _make_folder(path.parent)
        handle = _locked(partial)
        try:
            yield partial
            os.fsync(handle)
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            os.close(handle)


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
        handle = os.open(partial, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == partial.stat().st_ino:
            partial.unlink()
            sync_folder(partial.parent)
    except (BlockingIOError, FileNotFoundError):
        return
    finally:
        os.close(handle)


def _locked(partial: Path) -> int:
    """An emptied file that this process alone writes; waits for another process that writes it."""
    while True:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            mine = os.fstat(handle).st_ino == partial.stat().st_ino
        except FileNotFoundError:
            mine = False
        if mine:
            if os.fstat(handle).st_size:
                os.ftruncate(handle, 0)
            return handle
        # while we waited it became the finished file
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, and durable."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
