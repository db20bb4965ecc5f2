"""A world: someone's home, an empty folder to stand in, and things that a stranger made. Attacks run the real commands.

Whatever a command is given, nothing but the folders that it was told to write may change: `World.untouched` lists
everything before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from artifacts import Sample, TeacherRows, cache, open_images, open_store, places
from artifacts.exchange import export_store
from artifacts.manifest import CodecInfo, ExplainerInfo, ManifestDraft, StoreShape, TeacherInfo
from artifacts.packing import Packing, write_images
from artifacts.sealed import seal
from artifacts.writer import StoreWriter
from cli.main import app, run_guarded

COMMAND = typer.main.get_command(app)
SIZE, ROWS, PER_SHARD, CLASSES = 16, 10, 4, 3
SECRETS = ("thesis.txt", ".bashrc", "pictures/holiday.jpg")


@dataclass(frozen=True)
class Ended:
    """What a command came to. An exception that is no error of the tree comes out of the call: a traceback."""

    code: int
    out: str
    err: str


class World:
    """home/ is a victim's, here/ where the commands run, strange/ what came from a stranger, cache/ the cache."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.home, self.here, self.strange, self.cache = (
            root / name for name in ("home", "here", "strange", "cache")
        )
        self.images, self.store = self.strange / "images/train", self.strange / "stores/s/train"
        self.export = self.strange / "export"

    def __call__(self, *arguments: object) -> Ended:
        """Run a command."""
        self._capsys.readouterr()
        code = run_guarded(lambda: COMMAND([str(word) for word in arguments]))
        said = self._capsys.readouterr()
        return Ended(code, said.out, said.err)

    def refused(self, *arguments: object, code: int = 2) -> str:
        """What a command says that must not succeed, and must leave the world alone: one sentence, or problems (3)."""
        with self.untouched("cache"):
            ended = self(*arguments)
        assert ended.code == code, ended
        said = ended.err if code == 2 else ended.out
        assert "Traceback" not in said
        assert code == 3 or (said.startswith("e2kd: ") and said.count("\n") == 1), ended
        return said

    def listing(self, *without: str) -> dict[str, tuple[object, ...]]:
        """Everything there is, apart from some folders, and what it is."""
        found: dict[str, tuple[object, ...]] = {}
        left = [str(self.root)]
        while left:
            for entry in os.scandir(left.pop()):
                name = entry.path.removeprefix(f"{self.root}/")
                if name not in without:
                    found[name] = _what(entry)
                    left += [entry.path] if entry.is_dir(follow_symlinks=False) else []
        return found

    @contextmanager
    def untouched(self, *without: str) -> Iterator[None]:
        """The block creates, changes and removes nothing but below the folders `without`."""
        before = self.listing(*without)
        yield
        after = self.listing(*without)
        assert {name for name in before | after if before.get(name) != after.get(name)} == set()

    @staticmethod
    def reseal(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a sealed file and seal it anew, as anyone can."""
        content = json.loads(file.read_bytes())
        content.pop("seal")
        change(content)
        file.write_bytes(seal(content))

    def lie(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the store's manifest."""
        self.reseal(self.store / "manifest.json", change)

    def mislabel(self, change: Callable[[dict[str, Any]], object], shard: int = 0) -> None:
        """Change a row list, and the index so that it fits."""
        file = self.images / f"shard-{shard:06d}.rows.json"
        self.reseal(file, change)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.reseal(
            self.images / "index.json", lambda index: index["shards"][shard].update(rows_sha256=digest)
        )

    @contextmanager
    def frugal(self, mib: int = 100) -> Iterator[None]:
        """The block needs no more memory than that: a bomb did not go off."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mib * 1024


def _what(entry: os.DirEntry[str]) -> tuple[object, ...]:
    about = entry.stat(follow_symlinks=False)
    if entry.is_symlink():
        return "link", os.readlink(entry.path)
    if not entry.is_file(follow_symlinks=False):
        return (about.st_mode,)
    # a sparse file may say that it has a terabyte
    if about.st_size > 10**7:
        return about.st_mode, about.st_size
    with open(entry.path, "rb") as file:
        return about.st_mode, file.read()


def sample(row: int) -> Sample:
    rng = np.random.default_rng(row)
    return Sample(
        key=f"img-{row:04d}",
        image=rng.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8),
        label=row % CLASSES,
        mask=rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8) if row % 2 else None,
    )


def packing(**changes: Any) -> Packing:
    settings: dict[str, Any] = {
        "count": ROWS,
        "get": sample,
        "view": {"size": SIZE},
        "classes": ["a", "b", "c"],
        "source": "random",
        "rows_per_shard": PER_SHARD,
    }
    return Packing(**settings | changes)


def draft(images: str) -> ManifestDraft:
    return ManifestDraft(
        teacher=TeacherInfo(
            architecture="toy",
            weights_sha256="0" * 64,
            preprocessing={"mean": [0.5]},
            classes=CLASSES,
            class_names=["a", "b", "c"],
        ),
        explainer=ExplainerInfo(name="gradcam", settings={}),
        view={"size": SIZE},
        images=images,
        shape=StoreShape(rows=ROWS, rows_per_shard=PER_SHARD, classes=CLASSES, channels=1, height=2, width=2),
        logits=CodecInfo(codec="e2kd.fp16", error_bound="x"),
        maps=CodecInfo(codec="e2kd.fp16", error_bound="x"),
    )


def answers(rows: range) -> TeacherRows:
    """Whole numbers, other ones for each row."""
    n = len(rows)
    numbers = np.arange(rows.start, rows.stop, dtype=np.float32)
    logits = np.stack([numbers, -numbers - 1, -numbers - 2], 1)[:, None]
    maps = np.broadcast_to(numbers[:, None, None, None, None, None] + 1, (n, 1, 1, 1, 2, 2))
    return TeacherRows(logits, np.zeros((n, 1, 1), np.int64), np.ascontiguousarray(maps))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound image set, a store of it and an export of both, to copy and to spoil."""
    folder = tmp_path_factory.mktemp("strange")
    write_images(folder / "images/train", packing())
    images = open_images(folder / "images/train")
    writer = StoreWriter(folder / "stores/s/train", draft(images.fingerprint))
    writer.create()
    for shard in range(len(images.shards)):
        rows = images.shard_rows(shard)
        writer.write_shard(shard, answers(rows), images.keys_sha256(shard), images.shard_keys(shard))
    writer.finish()
    export_store(open_store(writer.place), images, folder / "export")
    return folder


@pytest.fixture
def world(
    made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> World:
    made = World(tmp_path / "world", capsys)
    shutil.copytree(made_once, made.strange)
    for name in SECRETS:
        (made.home / name).parent.mkdir(parents=True, exist_ok=True)
        (made.home / name).write_text(f"{name}: mine\n" * 9)
    made.here.mkdir()
    made.cache.mkdir()
    monkeypatch.chdir(made.here)
    monkeypatch.setenv("E2KD_CACHE_DIR", str(made.cache))
    monkeypatch.setattr(cache, "_used", {})
    monkeypatch.setattr(cache, "_held", set())
    monkeypatch.setattr(places, "FIRST_WAIT", 0.001)
    # no power is cut here, and a disk takes its time
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return made


class Tools:
    """The functions of this file, for tests (a conftest is not importable)."""

    sample = staticmethod(sample)
    packing = staticmethod(packing)
    draft = staticmethod(draft)
    answers = staticmethod(answers)


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
