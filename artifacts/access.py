"""The operating system's refusals as errors of the tree, so that every other OSError is a bug with its traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.errors import E2kdError, PlaceError, WriteError

_BUGS = (errno.EBADF, errno.EINVAL, errno.EFAULT)
"""What a call on an open file answers if the program is wrong, whatever the file is."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A disk of this machine takes no more: waiting and asking again do not help."""


@contextmanager
def writing_to(path: Path | str) -> Iterator[None]:
    """Raises WriteError with `path` if the system refuses to write that file, or to make a folder above it.

    An OSError about another file passes through: the block may read while it writes.
    """
    try:
        yield
    except OSError as error:
        if not _is_about(error, Path(path)):
            raise
        raise write_error(error, path) from error


def write_error(error: OSError, path: Path | str) -> WriteError:
    """The one sentence for a file that cannot be written; it names the folder above the file if that is the reason."""
    named = _named(error)
    file = named if named in Path(path).parents else path
    return WriteError(
        f"cannot write {file}: {error.strerror}; mend that and run the same command again",
        path=file,
        errno=error.errno,
    )


@contextmanager
def reading_from(
    path: Path | str, kind: type[E2kdError] = PlaceError, mend: str = "make it readable"
) -> Iterator[None]:
    """Raises `kind`, with the file's path, if the system refuses to read `path` or what lies below it.

    FileNotFoundError passes through: the caller knows what is missing. An OSError about another file does, too.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if not _is_about(error, Path(path), below=True):
            raise
        file = _named(error) or path
        raise kind(f"cannot read {file}: {error.strerror}; {mend}", path=file) from error


def _is_about(error: OSError, path: Path, below: bool = False) -> bool:
    """Whether an error is about this file, its partial one, a folder above it, or, with `below`, a file below it.

    An error of an open file names none; a missing file is always named by the system.
    """
    if error.errno is None:
        return False
    named = _named(error)
    if named is None:
        return error.errno not in (*_BUGS, errno.ENOENT)
    partial = named.parent == path.parent and named.name.startswith(f"{path.name}.")
    return named in (path, *path.parents) or partial or (below and path in named.parents)


def _named(error: OSError) -> Path | None:
    """The file that the system names."""
    return None if error.filename is None else Path(os.fsdecode(error.filename))
