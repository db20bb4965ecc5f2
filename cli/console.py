"""What is printed: nothing else writes to the terminal. Control characters and markup that came from a file do nothing
there. Progress is bars with rate and ETA on a terminal, sparse lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from artifacts.names import masked, printable
from pipeline.progress import Advance

out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

_SPARSE_SECONDS = 15.0


def say(text: str) -> None:
    """Print lines to the standard output: what is no letter, but for the end of a line, is escaped; passwords of URLs
    are left out."""
    print(_plain(text), flush=True)


def complain(text: str) -> None:
    """The same to the standard error."""
    print(_plain(text), file=sys.stderr, flush=True)


def table(lines: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns, a line each whatever is in them."""
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        say(f"{one_line(name):<{width}}  {one_line(value)}")


def one_line(text: str) -> str:
    """A text from a file as a part of a line: it cannot begin another."""
    return printable(text)


def _plain(text: str) -> str:
    return printable(masked(text), keep="\n")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "")


class TerminalProgress:
    """Live bars; a finished one stays as a line."""

    def say(self, line: str) -> None:
        out.print(Text(_plain(line)))

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TextColumn("ETA", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=out) as live:
            task = live.add_task(one_line(label), total=total, unit=unit)
            yield lambda done: live.advance(task, done)


class SparseProgress:
    """One line at the end of each piece of work, and one every 15 s in between (logs, CI, pipes)."""

    def say(self, line: str) -> None:
        say(line)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        started = spoken = time.monotonic()
        count = 0

        def advance(done: int) -> None:
            nonlocal count, spoken
            count += done
            now = time.monotonic()
            if now - spoken >= _SPARSE_SECONDS and 0 < count < total:
                spoken = now
                left = (now - started) / count * (total - count)
                self.say(f"{one_line(label)}: {count}/{total} {unit}s, {left:.0f} s left")

        yield advance
        seconds = time.monotonic() - started
        rate = f"{count / seconds:,.1f} {unit}/s" if seconds > 0 else ""
        self.say(f"{one_line(label)}: {count}/{total} {unit}s in {seconds:.1f} s ({rate})")


def progress() -> TerminalProgress | SparseProgress:
    return TerminalProgress() if sys.stdout.isatty() else SparseProgress()
