"""How progress looks: bars with rate and ETA on a terminal, sparse lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
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

from pipeline.progress import Advance

out = Console(highlight=False, soft_wrap=True)

_SPARSE_SECONDS = 15.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "")


class TerminalProgress:
    """Live bars; a finished one stays as a line."""

    def say(self, line: str) -> None:
        out.print(line, markup=False)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=out) as live:
            task = live.add_task(label, total=total, unit=unit)
            yield lambda done: live.advance(task, done)


class SparseProgress:
    """One line at the end of each piece of work, and one every 15 s in between (logs, CI, pipes)."""

    def say(self, line: str) -> None:
        print(line, flush=True)

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
                self.say(f"{label}: {count}/{total} {unit}s, {left:.0f} s left")

        yield advance
        seconds = time.monotonic() - started
        rate = f"{count / seconds:,.1f} {unit}/s" if seconds > 0 else ""
        self.say(f"{label}: {count}/{total} {unit}s in {seconds:.1f} s ({rate})")


def progress() -> TerminalProgress | SparseProgress:
    return TerminalProgress() if sys.stdout.isatty() else SparseProgress()
