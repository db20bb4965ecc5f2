"""The cache of remote objects: asked for once, bounded, and never believed without a look."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import cache
from artifacts.durable import sha256_file
from artifacts.errors import DamagedStore, PlaceError
from artifacts.images import open_images
from artifacts.places import place
from artifacts.store import TeacherStore, open_store

READ = """
import sys, numpy as np
from artifacts.images import open_images
from artifacts.store import open_store
store, images = open_store(sys.argv[1]), open_images(sys.argv[2])
order = np.random.default_rng(int(sys.argv[4])).permutation(len(store))
rows = store.read(order)
again = np.argsort(order)
pixels = np.stack([images[row].image for row in order])[again]
np.savez(sys.argv[3], maps=rows.maps[again], logits=rows.logits[again], pixels=pixels)
"""


@pytest.fixture
def both(bucket: str, stored_once: Path, packed_once: Path, upload: Any) -> tuple[str, str]:
    """The URLs of a store and an image set; no requests counted."""
    return upload(stored_once, f"{bucket}/store"), upload(packed_once, f"{bucket}/images")


def asked(s3: Any) -> list[Any]:
    """GETs of shard objects, the only big ones."""
    return [found for found in s3.gets() if "/c/" in found.key or found.key.endswith(".tar")]


def everything(store: str | Path | TeacherStore, images: str | Path) -> dict[str, np.ndarray]:
    opened, beside = store if isinstance(store, TeacherStore) else open_store(store), open_images(images)
    rows = opened.read(range(len(opened)))
    pixels = np.stack([beside[row].image for row in range(len(beside))])
    return {"maps": rows.maps, "logits": rows.logits, "pixels": pixels}


def assert_same(found: Any, expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def bounded(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("E2KD_CACHE_GIB", repr(size / 2**30))
    assert cache.bound() == size


# ---- asked for once


def test_each_shard_object_is_asked_for_once(
    s3: Any,
    both: tuple[str, str],
    stored_once: Path,
    packed_once: Path,
    cache_folder: Path,
    remote_tools: Any,
) -> None:
    expected = everything(stored_once, packed_once)
    assert_same(everything(*both), expected)
    keys = [found.key for found in asked(s3)]
    assert len(keys) == len(set(keys)), "once each"
    assert not any(found.ranged for found in asked(s3))
    s3.reset()
    for _ in range(2):  # as a second epoch, and as a place that is opened again
        assert_same(everything(*both), expected)
    assert asked(s3) == []
    assert remote_tools.cached(cache_folder)


def test_other_processes_do_not_ask_again(
    s3: Any, both: tuple[str, str], tmp_path: Path, stored_once: Path, packed_once: Path
) -> None:
    expected = everything(stored_once, packed_once)
    asked_for = []
    for seed in range(2):
        out = tmp_path / f"{seed}.npz"
        subprocess.run([sys.executable, "-c", READ, *both, str(out), str(seed)], check=True, timeout=60)
        assert_same(np.load(out), expected)
        asked_for.append(len(asked(s3)))
        s3.reset()
    assert asked_for[0] > 0
    assert asked_for[1] == 0


def test_equal_objects_share_a_copy(remote: str, cache_folder: Path, remote_tools: Any) -> None:
    where, name = place(remote), sha256(b"same").hexdigest()
    for folder in ("a", "b"):
        where.write(f"{folder}/object", b"same")
        assert bytes(where.view(f"{folder}/object", 4, name)[0:4]) == b"same"
    assert remote_tools.cached(cache_folder) == {name: b"same"}


def test_threads_that_want_the_same_object_fetch_it_once(
    s3: Any, bucket: str, cache_folder: Path, remote_tools: Any
) -> None:
    data = os.urandom(100_000)
    place(bucket).write("object", data)
    s3.reset()
    start, found = threading.Barrier(8), []

    def read() -> None:
        where = place(bucket)
        start.wait(20)
        found.append(bytes(where.view("object", len(data), sha256(data).hexdigest())[0 : len(data)]))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [data] * 8
    assert len(s3.gets("object")) == 1
    assert remote_tools.cached(cache_folder) == {sha256(data).hexdigest(): data}


# ---- bounded


class Source:
    """Objects to fetch, and which were."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, ""

    def name(self, letter: str) -> str:
        return sha256(letter.encode() * 100).hexdigest()

    def keep(self, letter: str) -> Path | None:
        def fetch(file: Path) -> None:
            self.fetched += letter
            file.write_bytes(letter.encode() * 100)

        return cache.kept(self.name(letter), 100, fetch)

    def held(self) -> str:
        return "".join(letter for letter in "abcdefgh" if (self.folder / self.name(letter)).is_file())

    def earlier(self, letters: str) -> None:
        """Copies of earlier processes, oldest first."""
        for number, letter in enumerate(letters):
            self.keep(letter)
            os.utime(self.folder / self.name(letter), (1000 + number, 1000 + number))
        cache._used.clear()
        self.fetched = ""


@pytest.fixture
def source(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """With room for three objects."""
    bounded(monkeypatch, 350)
    return Source(cache_folder)


def test_the_longest_unused_go_first(source: Source) -> None:
    source.earlier("cab")
    source.keep("d")
    assert source.held() == "abd"
    source.keep("e")
    assert source.held() == "bde"


def test_using_a_copy_makes_it_young(source: Source) -> None:
    source.earlier("abc")
    source.keep("a")
    assert source.fetched == ""
    cache._used.clear()  # as for the next process
    source.keep("d")
    source.keep("e")
    assert source.held() == "ade"


def test_what_this_process_used_stays(source: Source) -> None:
    source.earlier("abc")
    source.keep("a")
    source.keep("d")
    assert source.held() == "acd"
    source.keep("e")
    assert source.held() == "ade"
    assert source.keep("f") is None, "all three are in use"
    assert source.held() == "ade"
    assert source.fetched == "de", "what does not fit is not fetched"
    assert source.keep("a") is not None


def test_what_is_bigger_than_the_cache_is_not_kept(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source.earlier("a")
    bounded(monkeypatch, 99)
    assert source.keep("b") is None
    assert source.fetched == ""


def test_a_failed_fetch_leaves_nothing(source: Source) -> None:
    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.kept(source.name("a"), 100, fail)
    assert list(source.folder.iterdir()) == []
    assert source.keep("a") == source.folder / source.name("a")


@pytest.mark.parametrize("data", [b"", b"a" * 99, b"a" * 101, b"a" * 99 + b"b"])
def test_what_is_not_the_object_is_not_kept(source: Source, data: bytes) -> None:
    assert cache.kept(source.name("a"), 100, lambda file: file.write_bytes(data) and None) is None
    assert list(source.folder.iterdir()) == []
    assert source.keep("a") is not None


def test_a_short_copy_is_fetched_again(source: Source) -> None:
    source.keep("a")
    (source.folder / source.name("a")).write_bytes(b"a" * 50)
    assert source.keep("a") is not None
    assert source.fetched == "aa"
    assert (source.folder / source.name("a")).read_bytes() == b"a" * 100


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_small_cache_reads_right_and_keeps_its_bound(
    s3: Any,
    both: tuple[str, str],
    stored_once: Path,
    packed_once: Path,
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    remote_tools: Any,
    share: float,
) -> None:
    expected = everything(stored_once, packed_once)
    files = [*stored_once.rglob("c/*/**/*"), *packed_once.glob("*.tar")]
    total = sum({sha256_file(f): f.stat().st_size for f in files if f.is_file()}.values())
    bounded(monkeypatch, int(share * total))
    for _ in range(2):
        assert_same(everything(*both), expected)
        assert sum(map(len, remote_tools.cached(cache_folder).values())) <= share * total
    assert any(found.ranged for found in asked(s3))
    assert bool(remote_tools.cached(cache_folder)) == (share > 0)
    kept = set(remote_tools.cached(cache_folder))
    s3.reset()
    assert_same(everything(*both), expected)
    assert set(remote_tools.cached(cache_folder)) == kept, "no churn"
    assert all(found.ranged for found in asked(s3)), "what is not kept is not fetched whole again"


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2KD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg/e2kd/objects"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache/e2kd/objects"
    monkeypatch.setenv("E2KD_CACHE_DIR", str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own/objects"
    assert cache.bound() == 20 * 2**30
    monkeypatch.setenv("E2KD_CACHE_GIB", "0.5")
    assert cache.bound() == 2**29


# ---- what goes wrong beside it


def spoiled(folder: Path) -> int:
    """Change a byte in the middle of every copy; their sizes and names stay."""
    files = list(folder.iterdir())
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    return len(files)


def test_a_spoiled_copy_never_reads_as_numbers(
    both: tuple[str, str], stored_once: Path, packed_once: Path, cache_folder: Path
) -> None:
    expected = everything(stored_once, packed_once)
    everything(*both)
    assert spoiled(cache_folder) > 5
    for row in range(11):
        try:
            found = open_store(both[0]).read([row]).maps[0]
        except DamagedStore:
            continue
        np.testing.assert_array_equal(found, expected["maps"][row])


def test_a_spoiled_copy_is_fetched_again(
    both: tuple[str, str], stored_once: Path, packed_once: Path, cache_folder: Path
) -> None:
    """The objects are sound: nothing is to repair, and `verify --repair` writes what is named as the copy is."""
    everything(*both)
    spoiled(cache_folder)
    assert_same(everything(*both), everything(stored_once, packed_once))


def test_what_killed_processes_were_fetching_goes(source: Source) -> None:
    code = (
        "import os, sys; from artifacts import cache\n"
        "def fetch(file):\n    file.write_bytes(bytes(100)); os.kill(os.getpid(), 9)\n"
        "cache.kept('0' * 64, 100, fetch)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert len([file for file in source.folder.rglob("*") if file.is_file()]) == 1
    for letter in "abc":
        source.keep(letter)
    assert sum(file.stat().st_size for file in source.folder.rglob("*") if file.is_file()) <= 350


def test_another_process_makes_room_at_the_same_time(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source.earlier("abc")
    bound = cache.bound

    def meanwhile() -> int:
        (source.folder / source.name("a")).unlink(missing_ok=True)
        return bound()

    monkeypatch.setattr(cache, "bound", meanwhile)
    assert source.keep("d") is not None
    assert source.held() == "bcd"


def test_a_cache_folder_that_cannot_be_made(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read by ranges, as what does not fit."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("E2KD_CACHE_DIR", str(tmp_path / "file/cache"))
    where = place(remote)
    where.write("object", b"data")
    assert bytes(where.view("object", 4, sha256(b"data").hexdigest())[0:4]) == b"data"


def test_a_process_that_is_forked_while_a_thread_fetches(source: Source) -> None:
    """As the workers of a data loader may be."""
    fetching, done = threading.Event(), threading.Event()

    def slow(file: Path) -> None:
        fetching.set()
        done.wait(20)
        file.write_bytes(b"a" * 100)

    thread = threading.Thread(target=cache.kept, args=(source.name("a"), 100, slow))
    thread.start()
    fetching.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(1)
        os._exit(0 if source.keep("b") else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.set()
    thread.join(20)
    assert code == 0


@pytest.mark.parametrize("gib", ["lots", "", "nan"])
def test_a_bound_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch, gib: str) -> None:
    monkeypatch.setenv("E2KD_CACHE_GIB", gib)
    with pytest.raises(PlaceError, match="E2KD_CACHE_GIB") as caught:
        cache.bound()
    assert caught.value.key == "E2KD_CACHE_GIB"
