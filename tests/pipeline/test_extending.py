"""CONTRIBUTING.md's sentence, done to a copy of the tree: a data source is one new file, one config class, one row."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from artifacts import open_images

TREE = Path(__file__).parents[2]
PACKAGES = ("artifacts", "pipeline", "cli")
CONFIG, TABLE = "pipeline/config/data.py", "pipeline/data/sources/__init__.py"

FILE = '''"""Photographs as NumPy arrays: <split>.npz with images u8 [N,S,S,3] and labels i64 [N]."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.config.data import Arrays
from pipeline.data.reading.listing import Entry, Listing


def split_names(data: Arrays) -> list[str]:
    return sorted(file.stem for file in data.root.glob("*.npz"))


def open_listing(data: Arrays, split: str) -> Listing:
    arrays = np.load(data.root / f"{split}.npz")
    images, labels = arrays["images"], arrays["labels"]
    entries = [Entry(f"{split}/{row}", images[row].nbytes, int(label)) for row, label in enumerate(labels)]

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        return Image.fromarray(images[int(entry.id.partition("/")[2])])

    return Listing(data.classes, entries, read)
'''

CLASS = '''

class Arrays(Files):
    """NumPy files below `root`: `<split>.npz` with images and labels."""

    source: Literal["arrays"]
    classes: tuple[str, ...]
'''

ROW = "    OnDisk(config.Arrays, arrays),\n"
IMPORT = "    arrays,\n"

EXPERIMENT = {
    "data": {"source": "arrays", "root": "data", "classes": ["dark", "light"], "val_per_class": 4},
    "view": {"size": 32},
    "teacher": {"model": "toy/resnet", "width": 4, "train": {"epochs": 1}},
    "students": {"e2kd": {"model": "toy/resnet", "width": 4, "epochs": 1, "explanation_weight": 1}},
    "evaluate": {"splits": ["test"]},
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(TREE / package, tmp_path / "copy" / package)
    return tmp_path / "copy"


def insert(file: Path, line: str, after: str) -> None:
    """Put `line` behind the last line that begins with `after`."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    last = max(number for number, text in enumerate(lines) if text.startswith(after))
    file.write_text("".join([*lines[: last + 1], line, *lines[last + 1 :]]), encoding="utf-8")


def add_source(copy: Path) -> None:
    """One new file, one config class, one row of the table (and the row's import)."""
    (copy / "pipeline/data/sources/arrays.py").write_text(FILE, encoding="utf-8")
    with (copy / CONFIG).open("a", encoding="utf-8") as config:
        config.write(CLASS)
    insert(copy / TABLE, IMPORT, after="from pipeline.data.sources import (")
    insert(copy / TABLE, ROW, after="    OnDisk(")


def changes(copy: Path) -> Iterator[tuple[str, str]]:
    """(file, "+ line" or "- line") of every line in which the copy is not the tree."""
    for package in PACKAGES:
        names = {path.relative_to(root) for root in (TREE, copy) for path in (root / package).rglob("*.py")}
        for name in sorted(names):
            old, new = (lines_of(root / name) for root in (TREE, copy))
            if old != new:
                changed = (line for line in difflib.ndiff(old, new) if line[:2] in ("+ ", "- "))
                yield from ((name.as_posix(), line) for line in changed)


def lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def test_a_data_source_is_one_file_one_config_class_and_one_row(copy: Path, tmp_path: Path) -> None:
    add_source(copy)
    added = {"pipeline/data/sources/arrays.py": FILE, CONFIG: CLASS, TABLE: IMPORT + ROW}
    expected = [(file, f"+ {line}") for file, text in added.items() for line in text.splitlines()]
    assert sorted(changes(copy)) == sorted(expected)

    (tmp_path / "data").mkdir()
    noise = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        labels = np.arange(count) % 2
        images = noise.integers(0, 128, (count, 32, 32, 3)) + 127 * labels[:, None, None, None]
        np.savez(tmp_path / f"data/{split}.npz", images=images.astype(np.uint8), labels=labels)
    (tmp_path / "arrays.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cli", "distill", "arrays.yaml", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    packed = open_images(tmp_path / "out/images/train")
    assert (packed.classes, len(packed)) == (["dark", "light"], 16)
    assert all(packed[row].image.mean() > 120 for row in np.flatnonzero(packed.label_column))
    assert len(open_images(tmp_path / "out/images/val")) == 8
    result = json.loads((tmp_path / "out/runs/e2kd/seed-0/result.json").read_text())
    assert 0 <= result["splits"]["test"]["agreement"] <= 1
