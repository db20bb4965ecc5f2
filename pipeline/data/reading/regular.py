"""Which files are read at all: regular ones. Opening a FIFO waits for ever, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def regular_size(file: os.PathLike[str] | str) -> int:
    """Bytes. Raises OSError, as for a file that is not there, if it is a folder, a FIFO, a device or a socket."""
    state = os.stat(file)
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(file))
    return state.st_size


def is_regular(file: Path) -> bool:
    """Whether there is such a file, and it is none of those."""
    try:
        regular_size(file)
    except (OSError, ValueError):
        return False
    return True
