"""The cache on this machine: it touches only files that it named itself, and believes none that it has not hashed."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from artifacts import cache, open_store
from artifacts.durable import appearing, sha256_file


def objects(world: Any) -> dict[str, dict[str, Any]]:
    """The store's objects by their checksum."""
    shards = json.loads((world.store / "manifest.json").read_bytes())["shards"]
    return {item["sha256"]: item for shard in shards for item in shard["arrays"].values()}


@pytest.fixture
def url(world: Any) -> str:
    return f"local://{world.store}"


def test_other_files_in_its_folder_stay(world: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F6: a full cache removed the longest unused files, whatever they were."""
    names = [
        "holiday-1.jpg",
        "thesis.tex",
        "letter.partial",
        "a" * 64,
        "b" * 64 + ".partial",
        "objects/notes",
    ]
    names += [
        "objects/letter.partial",
        "objects/" + "c" * 63,
        "objects/" + "D" * 64,
        "objects/" + "d" * 64 + ".tex",
    ]
    for name in names:
        (world.cache / name).parent.mkdir(exist_ok=True)
        (world.cache / name).write_bytes(bytes(1_000_000))
        os.utime(world.cache / name, (1, 1))
    (world.cache / "objects" / ("e" * 64)).mkdir()
    monkeypatch.setenv("E2KD_CACHE_GIB", "0.00001")
    assert world("verify", url).code == 0
    assert {name for name in names if not (world.cache / name).is_file()} == set()
    assert (world.cache / "objects" / ("e" * 64)).is_dir()


def test_old_copies_go_and_links_lead_nowhere(world: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.cache / "objects"
    folder.mkdir()
    (folder / ("1" * 64)).write_bytes(bytes(20_000))
    (folder / ("2" * 64)).symlink_to(world.home / "thesis.txt")
    (folder / ("3" * 64 + ".partial")).symlink_to(world.home / "thesis.txt")
    (folder / ("4" * 64 + ".partial")).symlink_to("/dev/zero")
    os.mkfifo(folder / ("5" * 64 + ".partial"))
    monkeypatch.setenv("E2KD_CACHE_GIB", "0.00001")
    with world.untouched("cache"):
        assert world("verify", url).code == 0
    assert not (folder / ("1" * 64)).exists()


def test_it_is_private(world: Any, url: str) -> None:
    assert world("verify", url).code == 0
    assert stat.S_IMODE((world.cache / "objects").stat().st_mode) == 0o700


@pytest.mark.parametrize("command", ["verify", "read"])
def test_a_planted_copy_is_found(world: Any, url: str, command: str) -> None:
    """F8: of the right size and name, with chunks that fit the four bytes that the manifest has of them."""
    (world.cache / "objects").mkdir()
    for sha256, item in objects(world).items():
        data = bytearray((world.store / item["path"]).read_bytes())
        data[0:3] = b"bad"
        (world.cache / "objects" / sha256).write_bytes(data)
    if command == "verify":
        assert world("verify", url).code == 0
    else:
        assert open_store(url).read([3]).logits[0, 0, 0] == 3
    copies = [file for file in (world.cache / "objects").iterdir() if sha256_file(file) != file.name]
    assert copies == [] or command == "read"


def test_a_copy_that_is_a_link_is_no_copy(world: Any, url: str) -> None:
    (world.cache / "objects").mkdir()
    for sha256, item in objects(world).items():
        (world.home / sha256).write_bytes((world.store / item["path"]).read_bytes())
        (world.cache / "objects" / sha256).symlink_to(world.home / sha256)
    with world.untouched("cache"):
        assert world("verify", url).code == 0
    assert not any(file.is_symlink() for file in (world.cache / "objects").iterdir())


def test_each_copy_is_hashed_once_and_another_file_of_its_name_again(
    world: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(url).read([0])
    cache._used.clear()
    hashed: list[str] = []

    def counted(file: Path) -> str:
        hashed.append(file.name)
        return sha256_file(file)

    monkeypatch.setattr(cache, "sha256_file", counted)
    for _ in range(3):
        open_store(url).read([0])
    assert len(hashed) == len(set(hashed)) > 0
    swapped = world.cache / "objects" / hashed[0]
    planted = swapped.with_name("planted")
    planted.write_bytes(bytes(swapped.stat().st_size))
    planted.replace(swapped)
    assert open_store(url).read([3]).logits[0, 0, 0] == 3


def test_a_linked_folder_of_copies_is_not_used(world: Any, url: str) -> None:
    (world.cache / "objects").symlink_to(world.home)
    with world.untouched():
        assert world("verify", url).code == 0


def test_a_copy_that_another_user_holds(world: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F15: it was waited for without an end. The object is read by ranges, and the next is not waited for again."""
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    sha256 = next(iter(objects(world)))
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with appearing(world.cache / "objects" / sha256):
            held.set()
            done.wait(20)
            (world.cache / "objects" / f"{sha256}.partial").write_bytes(b"x")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    with world.untouched("cache"):
        assert world("verify", url).code == 0
        assert open_store(url).read([3]).logits[0, 0, 0] == 3
    done.set()
    thread.join(20)


def test_objects_that_are_not_what_they_are_called_are_not_kept(world: Any, url: str) -> None:
    file = world.store / "logits/c/1/0/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 255
    file.write_bytes(data)
    said = world.refused("verify", url, code=3)
    assert "sha256 differs" in said
    assert "cannot be decoded" in said
    assert all(sha256_file(copy) == copy.name for copy in (world.cache / "objects").iterdir())
