"""How the stages tell what they do; the command line decides how it looks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Lines and bars. `bar` yields a function that is called with the number of units done since the last call."""

    def say(self, line: str) -> None: ...

    def bar(self, label: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...


class Quiet:
    """A Progress that shows nothing (ranks other than 0, tests, notebooks)."""

    def say(self, line: str) -> None:
        pass

    def bar(self, label: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        return nullcontext(_ignore)


def _ignore(done: int) -> None:
    pass
