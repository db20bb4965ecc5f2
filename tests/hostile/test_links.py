"""What is written goes where it was sent: never through a link, into a pipe, or to a file that has another name too."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import PlaceError, WriteError
from artifacts.durable import appearing, sweep, write_atomic
from artifacts.places import place
from artifacts.store import load_store
from artifacts.writer import StoreWriter

CONFIG = """
data: {source: toybirds, limit: 8}
view: {size: 16}
teacher: {model: toy/resnet, train: {epochs: 1}}
train: {model: toy/resnet}
students: {kd: {}}
"""

Trap = Callable[[Path, Path], object]


def a_link(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim)


def a_relative_link(partial: Path, victim: Path) -> None:
    partial.symlink_to(os.path.relpath(victim, partial.parent))


def a_link_to_nothing(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim.with_name("not-yet"))


def a_link_to_a_link(partial: Path, victim: Path) -> None:
    partial.with_name(f"{partial.name}.link").symlink_to(victim)
    partial.symlink_to(f"{partial.name}.link")


def a_hard_link(partial: Path, victim: Path) -> None:
    os.link(victim, partial)


def a_loop(partial: Path, victim: Path) -> None:
    partial.symlink_to(partial.name)


def a_pipe(partial: Path, victim: Path) -> None:
    os.mkfifo(partial)


def a_socket(partial: Path, victim: Path) -> None:
    folder = os.open(partial.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as bound:
        # a path of a socket is at most a hundred letters
        bound.bind(f"/proc/self/fd/{folder}/{partial.name}")
    os.close(folder)


def a_device(partial: Path, victim: Path) -> None:
    partial.symlink_to("/dev/full")


TRAPS: list[Trap] = [
    a_link,
    a_relative_link,
    a_link_to_nothing,
    a_link_to_a_link,
    a_hard_link,
    a_loop,
    a_pipe,
    a_socket,
    a_device,
]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
@pytest.mark.parametrize("name", ["report.html", "report.html.partial"])
def test_a_trap_is_replaced_by_the_file(world: Any, trap: Trap, name: str) -> None:
    """a04: at the target and at its partial file, whose name anyone can guess."""
    trap(world.here / name, world.home / ".bashrc")
    with world.untouched("here"):
        write_atomic(world.here / "report.html", b"<html>")
    target = world.here / "report.html"
    assert (target.is_symlink(), target.is_file(), target.read_bytes()) == (False, True, b"<html>")
    assert target.stat().st_nlink == 1
    assert not os.path.lexists(world.here / "report.html.partial")


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_sweeping_removes_the_trap_only(world: Any, trap: Trap) -> None:
    trap(world.here / "x.partial", world.home / ".bashrc")
    with world.untouched("here"):
        sweep(world.here / "x.partial")
    assert not os.path.lexists(world.here / "x.partial")


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_an_import_over_traps(world: Any, trap: Trap) -> None:
    images, store = world.root / "cache/images", world.root / "cache/store"
    for file in (
        images / "shard-000000.tar.partial",
        images / "index.json.partial",
        store / "draft.json.partial",
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        trap(file, world.home / "thesis.txt")
    with world.untouched("cache"):
        assert world("import", world.export, images, store).code == 0
    assert world("verify", images).code == world("verify", store).code == 0


@pytest.mark.parametrize("folder", ["commits", "logits", "logits/c", "maps/c/0"])
def test_nothing_is_written_below_a_linked_folder(world: Any, folder: str) -> None:
    store = world.root / "cache/store"
    (store / folder).parent.mkdir(parents=True)
    (store / folder).symlink_to(world.home)
    said = world.refused("import", world.export, world.root / "cache/images", store)
    assert "a link on the way leads out of" in said
    assert str(store) in said


@pytest.mark.parametrize("target", ["{home}/new", "commits", "../../../home", "/dev/null", "/nowhere/x"])
def test_a_folder_that_leads_nowhere(world: Any, target: str) -> None:
    store = world.root / "cache/store"
    store.mkdir()
    (store / "commits").symlink_to(target.format(home=world.home))
    world.refused("import", world.export, world.root / "cache/images", store)


def test_nothing_is_removed_below_a_linked_folder(world: Any) -> None:
    (world.home / "000001.json").write_text("mine")
    shutil.rmtree(world.store / "commits")
    (world.store / "commits").symlink_to(world.home)
    with world.untouched(), pytest.raises(WriteError, match="a link on the way"):
        StoreWriter(world.store, load_store(world.store).manifest).uncommit(1)


def test_a_link_within_a_place_is_followed(world: Any) -> None:
    """It leads nowhere else."""
    (world.here / "real").mkdir()
    (world.here / "link").symlink_to("real")
    place(world.here).write("link/x", b"1")
    assert (world.here / "real/x").read_bytes() == b"1"


def test_a_place_may_be_a_link_itself(world: Any) -> None:
    """The user made it, to a bigger disk."""
    (world.here / "disk").mkdir()
    (world.here / "out").symlink_to(world.here / "disk")
    (place(world.here / "out") / "stores/s").write("x", b"1")
    assert (world.here / "disk/stores/s/x").read_bytes() == b"1"


def test_a_folder_between_a_place_and_what_lies_below_it(world: Any) -> None:
    (world.here / "stores").symlink_to(world.home)
    below = place(world.here) / "stores/s" / "train"
    with world.untouched(), pytest.raises(WriteError, match="a link on the way"):
        below.write("draft.json", b"{}")


@pytest.mark.parametrize("name", ["report", "stores/s", "stores/s/train/commits", "runs/kd", "images"])
@pytest.mark.parametrize("command", ["report", "precompute", "pack", "verify"])
def test_an_experiment_with_a_folder_that_leads_out(world: Any, name: str, command: str) -> None:
    """a04: a run's folder as it came from a stranger."""
    folder = world.root / "cache/run"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(world.home)
    (folder / "config.yaml").write_text(CONFIG)
    if command == "verify":
        store = folder / "stores/other/train"
        shutil.copytree(world.store, store)
        (store / "draft.json").unlink()
        arguments = ["verify", store, "--repair", "--images", world.images]
    elif command == "report":
        arguments = ["report", folder]
    else:
        arguments = [command, folder / "config.yaml", "--out", folder]
    with world.untouched("cache"):
        ended = world(*arguments)
    assert ended.code == 2, ended
    assert f"{folder / name} is a link that leads out of {folder}" in ended.err


@pytest.mark.parametrize(
    "name", ["config.yaml.partial", "report/report.html.partial", "runs/kd/seed-0/metrics.jsonl"]
)
def test_an_experiment_with_a_file_that_leads_out(world: Any, name: str) -> None:
    folder = world.root / "cache/run"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(world.home / "not-yet")
    (folder / "config.yaml").write_text(CONFIG)
    for arguments in (["report", folder], ["precompute", folder / "config.yaml", "--out", folder]):
        with world.untouched("cache"):
            ended = world(*arguments)
        assert (ended.code, "remove the link" in ended.err) == (2, True), ended


@pytest.mark.parametrize("name", ["index.json", "shard-000001.rows.json", "shard-000001.tar", "packing.json"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "device", "folder"])
def test_pipes_and_devices_are_not_waited_for(world: Any, name: str, kind: str) -> None:
    file = world.images / name
    file.unlink()
    {
        "pipe": lambda: os.mkfifo(file),
        "loop": lambda: file.symlink_to(name),
        "device": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
    }[kind]()
    with world.untouched():
        assert world("verify", world.images).code in (2, 3)
        assert world("inspect", world.images).code in (0, 2)


@pytest.mark.parametrize("name", ["e2kd.json", "shard-000000.tar", "shard-000000.json"])
@pytest.mark.parametrize("target", [None, "/dev/zero", "{name}"])
def test_an_export_of_pipes(world: Any, name: str, target: str | None) -> None:
    (world.export / name).unlink()
    if target is None:
        os.mkfifo(world.export / name)
    else:
        (world.export / name).symlink_to(target.format(name=name))
    world.refused("import", world.export, world.root / "cache/i", world.root / "cache/s")


@pytest.mark.parametrize(
    "name", ["manifest.json", "maps/c/1/0/0/0/0/0", "commits/000001.json", "maps/zarr.json"]
)
def test_a_store_of_pipes(world: Any, name: str) -> None:
    (world.store / name).unlink()
    os.mkfifo(world.store / name)
    with world.untouched():
        assert world("verify", world.store).code in (2, 3)
        assert world("inspect", world.store).code in (0, 2)


def test_a_process_that_holds_a_file_and_writes_nothing(world: Any) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with appearing(world.here / "x"):
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    with (
        pytest.raises(WriteError, match="another process has held it for 0 s") as caught,
        appearing(world.here / "x", patience=0.1),
    ):
        raise AssertionError
    done.set()
    thread.join(20)
    assert caught.value.path == str(world.here / "x.partial")


def test_reading_a_pipe_is_one_sentence(world: Any) -> None:
    os.mkfifo(world.here / "x")
    with pytest.raises(PlaceError, match="it is not a regular file"):
        place(world.here).read("x")
