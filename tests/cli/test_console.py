"""How progress looks on a terminal, and in logs."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from cli import console
from cli.console import SparseProgress, TerminalProgress, progress


class Clock:
    """Stands for time.monotonic: it goes on when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_in_a_log_a_bar_is_one_line_at_its_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with SparseProgress().bar("pack train", 100, "image") as advance:
        for _ in range(4):
            advance(25)
            clock.now += 2
        assert capsys.readouterr().out == ""
    assert capsys.readouterr().out == "pack train: 100/100 images in 8.0 s (12.5 image/s)\n"


def test_in_a_log_long_work_says_every_15_seconds_how_much_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with SparseProgress().bar("kd seed 0", 1000, "step") as advance:
        for _ in range(10):
            clock.now += 6
            advance(100)
    assert capsys.readouterr().out.splitlines() == [
        "kd seed 0: 300/1000 steps, 42 s left",
        "kd seed 0: 600/1000 steps, 24 s left",
        "kd seed 0: 900/1000 steps, 6 s left",
        "kd seed 0: 1000/1000 steps in 60.0 s (16.7 step/s)",
    ]


def test_in_a_log_nothing_to_do_and_no_time_are_no_error(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with SparseProgress().bar("kd seed 0", 0, "step") as advance:
        advance(0)
    assert capsys.readouterr().out == "kd seed 0: 0/0 steps in 0.0 s ()\n"


def test_work_that_fails_in_a_log_is_not_said_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), SparseProgress().bar("pack", 2, "image"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 100 columns is sent."""
    sent = io.StringIO()
    terminal = Console(file=sent, force_terminal=True, width=100, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", terminal)
    return sent


def plain(screen: io.StringIO) -> str:
    """Without colours and moves of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_on_a_terminal_a_finished_bar_stays_as_a_line(screen: io.StringIO) -> None:
    with TerminalProgress().bar("pack train", 4, "image") as advance:
        for _ in range(4):
            advance(1)
    last = plain(screen).strip().splitlines()[-1]
    assert last.startswith("pack train ")
    assert "4/4" in last
    assert re.search(r"[\d,.]+ image/s", last)
    assert "ETA" in last


def test_on_a_terminal_a_bar_moves(screen: io.StringIO) -> None:
    with TerminalProgress().bar("kd seed 0", 3, "step") as advance:
        advance(2)
    assert "2/3" in plain(screen)
    assert "3/3" not in plain(screen)


def test_on_a_terminal_a_line_is_said_as_it_is(screen: io.StringIO) -> None:
    line = f"[kd seed 0] {'long ' * 30}[red]end[/red]"
    TerminalProgress().say(line)
    assert plain(screen) == f"{line}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr("sys.stdout", Stream())
    assert type(progress()) is (TerminalProgress if terminal else SparseProgress)
