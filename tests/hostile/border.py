"""What the tests of the border share: the real command in this process, and what a folder's files were before."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import app, run_guarded


@dataclass(frozen=True)
class Ended:
    """What a command came to: its exit code, and what it printed."""

    code: int
    out: str
    err: str


class Command:
    """Runs `e2kd ...` in this process, as the console script does."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ended:
        self._capsys.readouterr()
        code = run_guarded(lambda: app([str(word) for word in arguments]))
        said = self._capsys.readouterr()
        return Ended(code, said.out, said.err)

    def refused(self, *arguments: object) -> str:
        """The message of a command that ends with exit code 2."""
        ended = self(*arguments)
        assert ended.code == 2, ended
        assert ended.err.startswith("e2kd: "), ended
        return ended.err.removeprefix("e2kd: ").rstrip("\n")


def listing(folder: Path) -> dict[str, str]:
    """Everything below a folder -> what it is: its kind, its mode, and its bytes or target."""
    return {
        str(path.relative_to(folder)): f"{path.lstat().st_mode:o} {_content(path)}"
        for path in sorted(folder.rglob("*"))
    }


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was created, changed or removed."""
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def _content(path: Path) -> str:
    if path.is_symlink():
        return os.readlink(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


TINY = """
data: {source: toybirds, limit: 16}
view: {size: 16}
store: {rows_per_shard: 8, batch_size: 8}
teacher: {model: toy/resnet, width: 4, train: {epochs: 1, seed: 0}}
train: {model: toy/resnet, width: 4, epochs: 1, batch_size: 8}
students: {kd: {}, e2kd: {explanation_weight: 5}}
evaluate: {select: null, splits: [test-ood]}
"""


def finish(folder: Path, student: str = "kd", **result: object) -> Path:
    """A run that says of itself that it is finished. Returns its folder."""
    run = folder / f"runs/{student}/seed-0"
    run.mkdir(parents=True, exist_ok=True)
    said = {"student": student, "seed": 0, "splits": {"test-ood": {"accuracy": 0.5}}, "stores": {}, **result}
    (run / "result.json").write_text(json.dumps(said))
    (run / "done").write_text("")
    return run
