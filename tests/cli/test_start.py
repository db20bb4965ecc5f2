"""The command line starts without torch, and turns mistakes into one message and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from artifacts.durable import write_atomic
from artifacts.errors import ConfigError, JobsFailed, MismatchedStore, WriteError
from cli.main import app, run_guarded


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.argv = ['e2kd', '--help']\nfrom cli.main import main\ntry: main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['e2kd', '--help']\nfrom cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
        "assert 'zarr' not in sys.modules, 'zarr was imported'",
        "import pathlib, pipeline.config as c; c.load(pathlib.Path('configs/toybirds.yaml'))",
        "import artifacts",
    ],
    ids=["help", "help-zarr", "config", "artifacts"],
)
def test_no_torch_is_imported(code: str) -> None:
    probe = f"{code}\nimport sys; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x.yaml: bad"), 2),
        (KeyboardInterrupt(), 130),
        (WriteError("cannot write out/x: No space left on device", path="out/x", errno=28), 2),
        (MismatchedStore("out/x was made for something else"), 2),
        (JobsFailed("failed: kd seed 0", codes={("kd", 0): 2}), 2),
        (JobsFailed("failed: kd seed 0", codes={("kd", 0): 1}), 1),
        (JobsFailed("failed: kd seed 0", codes={("kd", 0): 130}), 130),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(lambda: _raise(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("e2kd: ")
    assert "Traceback" not in printed


def test_a_full_disk_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **_: real(Path("/dev/full"), mode))
    assert run_guarded(lambda: write_atomic(tmp_path / "x.json", b"1" * 10_000)) == 2
    printed = capsys.readouterr().err
    assert "x.json: No space left on device" in printed
    assert not (tmp_path / "x.json").exists()


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_guarded(lambda: 1 // 0)
    with pytest.raises(FileExistsError):
        run_guarded(tmp_path.mkdir)
    with pytest.raises(IsADirectoryError):
        run_guarded(tmp_path.read_bytes)


def test_a_bug_exits_1_with_its_traceback() -> None:
    code = "import os, cli.main\ncli.main.app = lambda: os.mkdir('.')\ncli.main.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "e2kd: " not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "configs/toybird.yaml"], "did you mean"),
        (["distill", "configs/toybirds.yaml", "--set", "train.epoch=1"], "did you mean epochs?"),
        (["distill", "configs/toybirds.yaml", "--out", "README.md"], "cannot write README.md"),
        (["dance"], "No such command"),
    ],
)
def test_mistakes_exit_2(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-P", "-m", "cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--student", "e3kd"], "no student e3kd"), (["--out", "README.md/x"], "cannot write README.md/x")],
)
def test_mistakes_that_need_torch_are_a_sentence_too(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: another one would import torch first."""
    assert run_guarded(lambda: app(["distill", "configs/toybirds.yaml", *arguments])) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_names_that_the_terminal_cannot_show_are_escaped() -> None:
    command = [sys.executable, "-P", "-m", "cli", "pack", "configs/vögel.yaml"]
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **ascii_only})
    assert done.returncode == 2
    assert b"e2kd: no config file configs/v" in done.stderr


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "cli",
        "pack",
        "configs/toyshapes-fewshot.yaml",
        "--out",
        str(tmp_path),
    ]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    first = tmp_path / "images" / "teach" / "shard-000000.rows.json"
    while not first.exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 130, message
    assert message == "e2kd: interrupted; what is finished is kept: run the same command again to continue\n"
    assert first.exists()
    assert not (first.parent / "index.json").exists()


def test_dry_run_prints_the_resolved_config() -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "cli",
        "distill",
        "configs/toybirds.yaml",
        "--dry-run",
        "--set",
        "train.lr=0.5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "lr: 0.5" in done.stdout
