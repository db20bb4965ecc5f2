"""A tiny experiment, run by the command line once for all tests; each test works on a copy."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import app, run_guarded

TINY = """
data: {source: toybirds, limit: 32}
view: {size: 32}
explain: {logit: centred}
store: {rows_per_shard: 16, batch_size: 16}
teacher: {model: toy/resnet, width: 4, train: {epochs: 1, lr: 3.0e-3, seed: 0}}
train: {model: toy/resnet, width: 4, epochs: 1, batch_size: 16, lr: 3.0e-3}
students: {kd: {}, e2kd: {explanation_weight: 5}}
evaluate: {select: val, splits: [test-ood]}
"""


@dataclass(frozen=True)
class Ended:
    """What a command came to: its exit code, and what it printed."""

    code: int
    out: str
    err: str


class E2kd:
    """Runs commands in this process, as the console script does."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ended:
        self._capsys.readouterr()
        code = run_guarded(lambda: app([str(word) for word in arguments]))
        said = self._capsys.readouterr()
        return Ended(code, said.out, said.err)

    def refused(self, *arguments: object) -> str:
        """What a command says that ends with exit code 2: one sentence, without its `e2kd: `."""
        ended = self(*arguments)
        assert ended.code == 2, ended
        assert ended.err.startswith("e2kd: "), ended
        assert ended.err.count("\n") == 1, ended
        return ended.err.removeprefix("e2kd: ").rstrip("\n")


@pytest.fixture
def e2kd(capsys: pytest.CaptureFixture[str]) -> E2kd:
    return E2kd(capsys)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config. Its folder has `stored`, an experiment after stage 1, and `finished`, one after stage 2."""
    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    assert run_guarded(lambda: app(["precompute", str(config), "--out", str(folder / "stored")])) == 0
    shutil.copytree(folder / "stored", folder / "finished")
    assert run_guarded(lambda: app(["distill", str(config), "--out", str(folder / "finished")])) == 0
    return config


@pytest.fixture
def stored(tiny: Path, tmp_path: Path) -> Path:
    """The folder of an experiment that no student was trained of yet."""
    return Path(shutil.copytree(tiny.parent / "stored", tmp_path / "stored"))


@pytest.fixture
def finished(tiny: Path, tmp_path: Path) -> Path:
    """The folder of an experiment whose students are trained and reported."""
    return Path(shutil.copytree(tiny.parent / "finished", tmp_path / "finished"))


NOBODY = 65534


@pytest.fixture
def open_to_nobody() -> Iterator[Path]:
    """A folder in which the user nobody may do everything."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    return _as_nobody


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Permissions hold: root, who may read and write everything, is the user nobody meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
