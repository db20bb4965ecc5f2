"""What the system refuses, met by real commands: one sentence that names the file, exit code 2. All else is a bug."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from artifacts.errors import CheckpointError, ModelError, PlaceError, WriteError
from artifacts.places import place
from pipeline.models.weights import fetch
from pipeline.training.run import Run

AGAIN = "mend that and run the same command again"
STORE = "stores/gradcam-centred/train"


# ---- what cannot be written


@pytest.mark.parametrize(
    ("blocked", "command"),
    [
        ("images", "pack"),
        ("stage-1.lock/x", "teach"),
        ("teacher", "teach"),
        ("stores", "precompute"),
        ("config.yaml/x", "precompute"),
        ("runs", "distill"),
        ("runs/kd/seed-0/lock/x", "distill"),
    ],
)
def test_something_else_where_a_file_should_be(
    e2kd: Any, tiny: Path, stored: Path, blocked: str, command: str
) -> None:
    """`x` in the end: a folder in a file's place; else a file in a folder's place."""
    place, _, folder = blocked.partition("/x")
    path = stored / place
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if folder or blocked.endswith("/x"):
        (path / "x").mkdir(parents=True)
    else:
        path.write_text("a file")
    said = e2kd.refused(command, tiny, "--out", stored)
    assert said.startswith(f"cannot write {path}"), said
    assert said.endswith(f"; {AGAIN}")


def test_a_report_where_a_file_is(e2kd: Any, tiny: Path, finished: Path) -> None:
    shutil.rmtree(finished / "report")
    (finished / "report").write_text("a file")
    said = e2kd.refused("report", tiny, "--out", finished)
    assert said == f"cannot write {finished}/report: File exists; {AGAIN}"


def test_a_picture_below_a_file(e2kd: Any, tiny: Path, stored: Path) -> None:
    said = e2kd.refused("inspect", stored / STORE, "--row", 1, "--png", f"{tiny}/row.png")
    assert said == f"cannot write {tiny}: File exists; {AGAIN}"


def test_an_export_into_a_file(e2kd: Any, tiny: Path, stored: Path) -> None:
    said = e2kd.refused("export", stored / STORE, tiny)
    assert said.startswith(f"cannot write {tiny}: ")


def test_a_folder_that_may_not_be_written(
    e2kd: Any, photos: Path, as_nobody: Callable[[], AbstractContextManager[None]]
) -> None:
    closed = photos.parent / "closed"
    closed.mkdir(mode=0o555)
    with as_nobody():
        said = e2kd.refused("pack", photos, "--out", closed / "out")
    assert said == f"cannot write {closed}/out: Permission denied; {AGAIN}"


def test_a_log_of_a_run_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(WriteError) as caught:
        Run(tmp_path).log([{"epoch": 0}])
    assert (caught.value.path, caught.value.errno) == (str(tmp_path / "metrics.jsonl"), errno.ENOSPC)


def test_a_cache_of_weights_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "weights.pth").write_bytes(b"1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(WriteError) as caught:
        fetch(f"file://{tmp_path}/weights.pth")
    assert str(caught.value.path).startswith(str(tmp_path / "file"))


def test_weights_that_cannot_be_fetched_are_no_write_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="cannot get the weights") as caught:
        fetch(f"file://{tmp_path}/none.pth")
    assert caught.value.path == f"file://{tmp_path}/none.pth"


@pytest.mark.parametrize(
    "arguments",
    [["distill", "configs/toybirds.yaml", "--dry-run"], ["--help"]],
    ids=lambda words: words[-1],
)
def test_an_output_on_a_full_disk(arguments: list[str]) -> None:
    command = [sys.executable, "-P", "-m", "cli", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"e2kd: cannot write the standard output: No space left on device; {AGAIN}\n"


# ---- what cannot be read


def test_a_folder_instead_of_a_config(e2kd: Any, tmp_path: Path) -> None:
    assert e2kd.refused("pack", tmp_path).startswith(f"cannot read {tmp_path}: ")


def test_a_name_that_is_too_long(e2kd: Any) -> None:
    name = "x" * 300
    assert e2kd.refused("pack", name).startswith(f"cannot read {name}: ")
    assert e2kd.refused("report", name).startswith(f"cannot read {name}: ")
    assert e2kd.refused("inspect", name).startswith(f"cannot read {name}/")


def test_a_reader_that_closed_the_pipe_is_no_error() -> None:
    """As `e2kd doctor | head -1` does."""
    command = [sys.executable, "-P", "-m", "cli", "distill", "configs/toybirds.yaml", "--dry-run"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.close()
    _, said = running.communicate(timeout=60)
    assert "Traceback" not in said
    assert "cannot write" not in said


def test_a_file_instead_of_a_store(e2kd: Any, tiny: Path) -> None:
    assert e2kd.refused("verify", tiny).startswith(f"there is nothing at {tiny}; ")
    assert e2kd.refused("inspect", tiny).startswith(f"there is no teacher store at {tiny}; ")


def test_a_folder_in_an_objects_place(e2kd: Any, stored: Path) -> None:
    file = stored / STORE / "manifest.json"
    file.unlink()
    file.mkdir()
    said = e2kd.refused("inspect", stored / STORE)
    assert said.startswith(f"{stored}/{STORE} is not finished: 2 of 2 shards are committed")
    assert place(stored / STORE).size("manifest.json") is None
    with pytest.raises(PlaceError) as caught:
        place(stored / STORE).read("manifest.json")
    assert caught.value.path == str(file)


def test_a_run_whose_file_is_a_folder(e2kd: Any, tiny: Path, finished: Path) -> None:
    file = finished / "runs/kd/seed-0/result.json"
    file.unlink()
    file.mkdir()
    assert e2kd.refused("report", tiny, "--out", finished) == (
        f"cannot read {file}: it is not a regular file; make it readable"
    )
    with pytest.raises(CheckpointError) as caught:
        Run(file.parent).result()
    assert caught.value.path == str(file)


@pytest.fixture
def photos(open_to_nobody: Path) -> Path:
    """A config, and beside it its folder of eight photographs of two classes."""
    for number in range(8):
        folder = open_to_nobody / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * number, 0, 0)).save(folder / f"{number}.png")
    config = open_to_nobody / "photos.yaml"
    config.write_text(
        f"data: {{source: folder, root: {open_to_nobody}/photos, val_fraction: 0.5}}\n"
        "view: {size: 32}\n"
        f"teacher: {{model: toy/resnet, width: 4, weights: {open_to_nobody}/weights.pt}}\n"
        "train: {model: toy/resnet, width: 4, epochs: 1}\n"
        "students: {kd: {}}\n"
        "evaluate: {select: null, splits: [val]}\n"
    )
    torch.save({}, open_to_nobody / "weights.pt")
    return config


@pytest.mark.parametrize(
    ("closed", "command"),
    [
        ("photos.yaml", "pack"),
        ("photos", "pack"),
        ("photos/a", "pack"),
        ("photos/a/2.png", "pack"),
        ("weights.pt", "precompute"),
    ],
)
def test_what_may_not_be_read_is_named(
    e2kd: Any,
    photos: Path,
    as_nobody: Callable[[], AbstractContextManager[None]],
    closed: str,
    command: str,
) -> None:
    path = photos.parent / closed
    mode = path.stat().st_mode
    path.chmod(0)
    with as_nobody():
        said = e2kd.refused(command, photos, "--out", photos.parent / "out")
    path.chmod(mode)
    assert str(path) in said
    assert "Permission denied" in said
    assert said.startswith(("cannot read ", "cannot list "))


def test_a_store_that_may_not_be_read(
    e2kd: Any, tiny: Path, open_to_nobody: Path, as_nobody: Callable[[], AbstractContextManager[None]]
) -> None:
    out = Path(shutil.copytree(tiny.parent / "stored", open_to_nobody / "stored"))
    for closed, said_by in [
        (out / STORE / "maps/c/0/0/0/0/0/0", "verify"),
        (out / STORE / "manifest.json", "inspect"),
        (out / STORE / "commits", "inspect"),
        (out / "images/train/shard-000000.tar", "export"),
    ]:
        mode = closed.stat().st_mode
        closed.chmod(0)
        with as_nobody():
            said = e2kd.refused(said_by, out / STORE, *[open_to_nobody / "exported"] * (said_by == "export"))
        closed.chmod(mode)
        assert said == f"cannot read {closed}: Permission denied; make it readable"
