"""The standard output as a file that can be full: what cannot be written there is a WriteError like all others."""

from __future__ import annotations

import errno
import io
import os
import sys

NAME = "the standard output"


class Output(io.TextIOWrapper):
    """Raises WriteError if the system refuses a line; a reader that closed the pipe is no error of ours."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _named(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _named(error) from error


def name_output() -> None:
    """Put an Output in the place of sys.stdout."""
    old = sys.stdout
    if isinstance(old, io.TextIOWrapper):
        encoding, errors, lines = old.encoding, old.errors, old.line_buffering
        sys.stdout = Output(old.detach(), encoding=encoding, errors=errors, line_buffering=lines)


def flush_output() -> None:
    """Write the last lines, as Python does at its end; those that are refused are dropped for good.

    Raises WriteError, but not if the reader has closed the pipe.
    """
    try:
        sys.stdout.flush()
    except Exception as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def _named(error: OSError) -> Exception:
    # imported here and not at the start: `artifacts` imports zarr
    from artifacts.access import write_error

    return error if error.errno == errno.EPIPE else write_error(error, NAME)
