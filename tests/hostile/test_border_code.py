"""Code that lies in the current folder never runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from pipeline.order.jobs import run_jobs, this_command
from pipeline.progress import Quiet
from tests.hostile.border import changed, listing

EVIL = "import pathlib; pathlib.Path('stolen').write_text('')\n"
NAMES = (
    "cli/__main__.py",
    "cli/__init__.py",
    "yaml.py",
    "threading.py",
    "zarr/__init__.py",
    "sitecustomize.py",
)


class Lines(Quiet):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules that a stranger wrote."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(EVIL)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_runs_no_module_of_the_current_folder(trap: Path) -> None:
    before, lines = listing(trap), Lines()
    failed = run_jobs([("kd", 0)], this_command(["distill", "none.yaml"]), 1, lines)
    assert failed == [(("kd", 0), 2)], lines.said
    assert "no config file none.yaml" in lines.said[-1]
    assert changed(before, listing(trap)) == []


def test_no_python_that_a_command_starts_runs_one(
    trap: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A script stands in for the console script: neither has the current folder on its path, its children would."""
    script = tmp_path_factory.mktemp("bin") / "e2kd"
    script.write_text(
        "import subprocess, sys\n"
        "from cli.main import main\n"
        "sys.argv = ['e2kd', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "subprocess.run([sys.executable, '-c', 'import yaml, threading'], check=True)\n"
    )
    before = listing(trap)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True)
    assert changed(before, listing(trap)) == []


def test_no_help_names_a_start_that_would() -> None:
    root = Path(cli.__file__).parents[1]
    for file in (root / "README.md", root / "cli/main.py", *sorted((root / "docs").glob("*.md"))):
        lines = [line for line in file.read_text().splitlines() if "-m cli" in line]
        assert not [line for line in lines if "-P -m cli" not in line], file
