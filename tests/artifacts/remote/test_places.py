"""One contract for a local folder, memory:// and s3://: objects are there whole or not at all."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.registry import known_implementations

from artifacts import places
from artifacts.errors import (
    DamagedStore,
    E2kdError,
    ImageSetError,
    IncompleteStore,
    MismatchedStore,
    PlaceError,
)
from artifacts.images import open_images
from artifacts.places import LocalPlace, RemotePlace, place
from artifacts.store import TeacherStore, open_store
from artifacts.verify import verify_images, verify_store
from artifacts.writer import StoreWriter

DATA = bytes(range(256)) * 40


def finished(where: places.Place) -> dict[str, int]:
    """Objects, without what an interrupted write of a local file left."""
    return {name: size for name, size in where.sizes().items() if not name.endswith(".partial")}


# ---- one object


@pytest.mark.parametrize("name", ["object", "deep/er/object.tar", "with space+&=%.json"])
@pytest.mark.parametrize("data", [b"", b"x", DATA], ids=["empty", "one", "many"])
def test_what_is_written_is_there(base: str, name: str, data: bytes) -> None:
    where = place(base)
    where.write(name, data)
    assert where.read(name) == data
    assert where.size(name) == len(data)
    assert where.exists(name)
    assert where.sizes() == {name: len(data)}
    view = where.view(name, len(data), sha256(data).hexdigest())
    for start, stop in [(0, len(data)), (0, 1), (len(data) // 2, len(data)), (7, 7)]:
        assert bytes(view[start:stop]) == data[start:stop]


def test_what_is_not_there(base: str) -> None:
    where = place(base)
    assert where.size("none") is None
    assert not where.exists("none")
    assert where.sizes() == {}
    with pytest.raises(FileNotFoundError):
        where.read("none")
    with pytest.raises(FileNotFoundError):
        where.view("none", 3, "0" * 64)
    where.remove("none")
    where.write("folder/object", DATA)
    assert where.size("folder") is None, "a folder is no object"
    assert not where.exists("folder")
    assert where.size("object") is None
    assert where.size("folder/obj") is None


def test_a_place_holds_what_is_below_it_only(base: str) -> None:
    where = place(base)
    for name in ("a/one", "a/b/two", "ab/three", "a.tar"):
        where.write(name, name.encode())
    assert (where / "a").sizes() == {"one": 5, "b/two": 7}
    assert (where / "a" / "b").sizes() == {"two": 7}
    assert (where / "a/b").read("two") == b"a/b/two"
    assert str(where / "a" / "b") == f"{base}/a/b"
    assert place(f"{base}/a/").sizes() == (where / "a").sizes()
    assert place(f"{base}/a/").read("one") == b"a/one"
    assert place(where) is where


def test_writing_again_replaces_and_removing_removes(base: str) -> None:
    where = place(base)
    where.write("object", DATA)
    where.write("other", b"stays")
    where.write("object", b"new")
    assert where.read("object") == b"new"
    where.remove("object")
    assert where.size("object") is None
    assert where.sizes() == {"other": 5}
    where.remove("object")


def test_a_file_is_filled_in_place(base: str) -> None:
    where = place(base)
    with where.writing("object") as file, file.open("r+b") as opened:
        assert file.stat().st_size == 0
        opened.write(b"half ")
        assert not where.exists("object")
        opened.write(b"and half")
    assert where.read("object") == b"half and half"
    assert not file.exists()


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_while_writing_leaves_what_was_there(
    base: str, old: bytes | None, error: type[BaseException]
) -> None:
    where = place(base)
    if old is not None:
        where.write("object", old)

    def interrupted() -> None:
        with where.writing("object") as file:
            file.write_bytes(b"half")
            raise error("stop")

    with pytest.raises(error):
        interrupted()
    assert finished(where) == ({} if old is None else {"object": 3})
    if old is not None:
        assert where.read("object") == old
    where.write("object", DATA)
    assert where.sizes() == {"object": len(DATA)}
    assert where.read("object") == DATA


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_read_the_same(base: str, copied: Callable[[Any], Any]) -> None:
    where = place(base)
    where.write("object", DATA)
    where.view("object", len(DATA), sha256(DATA).hexdigest())
    other = copied(where)
    assert str(other) == str(where)
    assert type(other) is type(where)
    assert other.read("object") == DATA
    assert bytes(other.view("object", len(DATA), sha256(DATA).hexdigest())[3:9]) == DATA[3:9]
    other.write("more", b"1")
    assert where.sizes() == {"object": len(DATA), "more": 1}


def test_many_more_objects_than_may_be_open(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "OPEN_VIEWS", 2)
    where = place(base)
    for i in range(5):
        where.write(f"{i}", bytes([i]) * 100)
    for _ in range(2):
        for i in range(5):
            view = where.view(f"{i}", 100, sha256(bytes([i]) * 100).hexdigest())
            assert bytes(view[10:20]) == bytes([i]) * 10
    assert len(where._views) == 2


def test_a_view_is_of_the_object_that_was_asked_for(base: str) -> None:
    """Also by the same Place that has read what was there before."""
    where = place(base)
    for data in (DATA, DATA[::-1]):
        where.write("object", data)
        assert bytes(where.view("object", len(data), sha256(data).hexdigest())[0 : len(data)]) == data


def test_files_that_vanish_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes `b.partial` between the listing and the look at its size."""
    where = place(tmp_path / "base")
    where.write("a", b"1")
    walk = os.walk

    def late(top: Any, **named: Any) -> Any:
        for folder, folders, names in walk(top, **named):
            yield folder, folders, [*names, "b.partial"]

    monkeypatch.setattr(places.os, "walk", late)
    assert where.sizes() == {"a": 1}


# ---- urls


@pytest.mark.parametrize(
    "url",
    [
        "nonsense://bucket/x",
        "://x",
    ],
)
def test_an_unknown_protocol_is_one_sentence(url: str) -> None:
    with pytest.raises(PlaceError) as caught:
        place(url)
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)


def test_a_protocol_whose_package_is_missing_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    monkeypatch.setitem(
        known_implementations,
        "absent",
        {"class": "absent.System", "err": "Please install absent"},
    )
    with tools.refused(PlaceError, "Please install absent", path="absent://x"):
        place("absent://x")


def test_paths_and_file_urls_are_local(tmp_path: Path) -> None:
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        where = place(url)
        assert isinstance(where, LocalPlace)
        assert os.fspath(where) == str(where) == str(tmp_path)
    assert isinstance(place("memory://x"), RemotePlace)


def test_a_forked_process_reads_and_writes(base: str) -> None:
    """Workers of a data loader are forks of a process that has used the place."""
    where = place(base)
    where.write("object", DATA)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a dead lock is a failure
        try:
            right = where.read("object") == DATA
            view = where.view("object", len(DATA), sha256(DATA).hexdigest())
            right &= bytes(view[5:500]) == DATA[5:500]
            right &= copy.deepcopy(where).size("object") == len(DATA)
            where.write("child", b"was here")
        except BaseException:
            right = False
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert where.read("object") == DATA
    if not base.startswith("memory"):
        assert where.read("child") == b"was here"


# ---- image sets and stores


def assert_reads_right(store: TeacherStore, tools: Any) -> None:
    order = np.random.default_rng(0).permutation(len(store))
    found = store.read(order)
    parts = [tools.answers(tools.draft(), shard) for shard in range(3)]
    for name in ("logits", "explained_class", "maps"):
        np.testing.assert_array_equal(
            getattr(found, name), np.concatenate([getattr(part, name) for part in parts])[order]
        )


@pytest.fixture
def store_at(base: str, stored_once: Path, upload: Any) -> str:
    """A finished store at each backend."""
    return str(upload(stored_once, f"{base}/store"))


@pytest.fixture
def images_at(base: str, packed_once: Path, upload: Any) -> str:
    return str(upload(packed_once, f"{base}/images"))


def test_a_store_is_the_same_bytes_everywhere(
    base: str, stored_once: Path, tools: Any, remote_tools: Any
) -> None:
    url = f"{base}/store"
    tools.fill(url)
    assert remote_tools.objects(url) == tools.snapshot(stored_once)
    tools.fill(url)
    assert_reads_right(open_store(url), tools)
    assert_reads_right(copy.deepcopy(open_store(url)), tools)
    assert verify_store(url).ok
    with pytest.raises(MismatchedStore):
        StoreWriter(url, tools.draft(images="2" * 64)).create()


def test_images_are_the_same_bytes_everywhere(
    base: str, packed_once: Path, tools: Any, remote_tools: Any
) -> None:
    url = f"{base}/images"
    images = tools.pack(url)
    assert remote_tools.objects(url) == tools.snapshot(packed_once)
    for row in (10, 0, 5):
        np.testing.assert_array_equal(images[row].image, tools.sample(row).image)
    np.testing.assert_array_equal(
        open_images(url).read_images([7, 1]), [tools.sample(7).image, tools.sample(1).image]
    )
    assert images.fingerprint == open_images(packed_once).fingerprint
    assert verify_images(url).ok


@pytest.mark.parametrize("where", ["map_scale"])
def test_an_interrupted_store_resumes_to_the_same_bytes(
    base: str,
    where: str,
    stored_once: Path,
    tools: Any,
    remote_tools: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C while an object of the second shard is written."""
    url = f"{base}/store"
    writer = StoreWriter(url, tools.draft())
    writer.create()
    tools.write_shard(writer, 0)
    write = type(writer.place).writing

    def stopping(self: Any, name: str) -> Any:
        if name.startswith(where):
            raise KeyboardInterrupt
        return write(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(type(writer.place), "writing", stopping)
        with pytest.raises(KeyboardInterrupt):
            tools.write_shard(writer, 1)
    assert writer.committed() == {0}
    with tools.refused(IncompleteStore, path=url, done=1, shards=3):
        open_store(url)
    assert [str(problem) for problem in verify_store(url).problems] == [
        f"{url} is not finished: 1 of 3 shards are committed; run: e2kd precompute CONFIG"
    ]
    tools.fill(url)
    assert remote_tools.objects(url) == tools.snapshot(stored_once)


def test_an_interrupted_pack_resumes_to_the_same_bytes(
    base: str, packed_once: Path, tools: Any, remote_tools: Any
) -> None:
    url, asked = f"{base}/images", []

    def stopping(row: int) -> Any:
        if row == 6:
            raise KeyboardInterrupt
        return tools.sample(row)

    def get(row: int) -> Any:
        asked.append(row)
        return tools.sample(row)

    with pytest.raises(KeyboardInterrupt):
        tools.pack(url, stopping)
    with tools.refused(ImageSetError, "was not finished", path=url):
        open_images(url)
    assert "shard-000001.tar" not in finished(place(url))
    tools.pack(url, get)
    assert asked == list(range(4, 11))
    assert remote_tools.objects(url) == tools.snapshot(packed_once)


def test_a_place_without_a_store_or_images(base: str, tools: Any) -> None:
    for opening, sort, told in [
        (open_store, IncompleteStore, "there is no teacher store at"),
        (open_images, ImageSetError, "is not there"),
    ]:
        with tools.refused(sort, told, path=f"{base}/nothing"):
            opening(f"{base}/nothing")
    assert not verify_store(f"{base}/nothing").ok
    assert not verify_images(f"{base}/nothing").ok


@pytest.mark.parametrize("array", ["maps"])
def test_changed_bytes_of_a_store_are_found(store_at: str, array: str, remote_tools: Any, tools: Any) -> None:
    where = place(store_at)
    name = next(name for name in where.sizes() if name.startswith(f"{array}/c/1"))
    data = where.read(name)
    for position in (5, len(data) - 10):
        where.write(name, remote_tools.changed(data, position))
        store = open_store(store_at)
        with tools.refused(DamagedStore, path=store_at, array=array, shard=1, rows=range(4, 8)):
            store.read([5])
        (problem, *_) = verify_store(store_at).problems
        assert (problem.array, problem.shard) == (array, 1)
    where.write(name, data)
    assert verify_store(store_at).ok
    assert_reads_right(open_store(store_at), tools)


@pytest.mark.parametrize("array", ["logits"])
def test_missing_short_and_swapped_objects_of_a_store_are_found(
    store_at: str, array: str, tools: Any
) -> None:
    where = place(store_at)
    name, other = (
        next(name for name in where.sizes() if name.startswith(f"{array}/c/{shard}")) for shard in (1, 0)
    )
    data = where.read(name)
    for change, told in (
        (data[:-1], f"has {len(data) - 1} bytes, not {len(data)}"),
        (b"", f"has 0 bytes, not {len(data)}"),
        (None, "is missing"),
    ):
        if change is None:
            where.remove(name)
        else:
            where.write(name, change)
        with tools.refused(DamagedStore, told, path=store_at, array=array, shard=1, rows=range(4, 8)):
            open_store(store_at)
        assert [problem.what for problem in verify_store(store_at, quick=True).problems] == [told]
    where.write(name, where.read(other))
    with tools.refused(DamagedStore, path=store_at, array=array, shard=1):
        open_store(store_at).read([5])
    assert {(problem.array, problem.shard) for problem in verify_store(store_at).problems} == {(array, 1)}


def test_an_object_that_goes_after_opening_is_missing(store_at: str, tools: Any) -> None:
    where, store = place(store_at), open_store(store_at)
    where.remove(next(name for name in where.sizes() if name.startswith("maps/c/1")))
    with tools.refused(DamagedStore, "is missing", path=store_at, array="maps", shard=1, rows=range(4, 8)):
        store.read([5])


@pytest.mark.parametrize("name", ["manifest.json", "maps/zarr.json", "commits/000001.json"])
def test_changed_records_of_a_store_are_found(store_at: str, name: str, remote_tools: Any) -> None:
    where = place(store_at)
    data = where.read(name)
    where.write(name, remote_tools.changed(data, len(data) // 2))
    assert not verify_store(store_at).ok
    if name in ("manifest.json", "maps/zarr.json"):
        with pytest.raises(DamagedStore):
            open_store(store_at).read([0])


def test_changed_bytes_of_images_are_found(
    images_at: str, packed_once: Path, tools: Any, remote_tools: Any
) -> None:
    where = place(images_at)
    tar = where.read("shard-000001.tar")
    start = tar.index(open_images(packed_once).members(5)["png"])
    where.write("shard-000001.tar", remote_tools.changed(tar, start + 100))
    path = f"{images_at}/shard-000001.tar"
    with tools.refused(ImageSetError, path=path, shard=1, rows=range(5, 6), key="img-0005"):
        open_images(images_at)[5]
    assert open_images(images_at)[4].key == "img-0004"
    assert {problem.shard for problem in verify_images(images_at).problems} == {1}
    where.write("shard-000001.tar", where.read("shard-000000.tar"))
    with pytest.raises(E2kdError):
        open_images(images_at)[5]
    assert not verify_images(images_at).ok


@pytest.mark.parametrize("name", ["index.json", "shard-000001.rows.json"])
def test_changed_lists_of_images_are_found(images_at: str, name: str, tools: Any, remote_tools: Any) -> None:
    where = place(images_at)
    data = where.read(name)
    where.write(name, remote_tools.changed(data, len(data) // 2))
    with tools.refused(ImageSetError, path=f"{images_at}/{name}"):
        open_images(images_at)[5]
    assert not verify_images(images_at).ok


def test_missing_and_short_tars_are_found(images_at: str, tools: Any) -> None:
    where = place(images_at)
    tar = where.read("shard-000001.tar")
    half = len(tar) // 2
    for left, told in ((tar[:half], f"has {half} bytes, not {len(tar)}"), (None, "is missing")):
        images = open_images(images_at)
        if left is None:
            where.remove("shard-000001.tar")
        else:
            where.write("shard-000001.tar", left)
        path = f"{images_at}/shard-000001.tar"
        with tools.refused(ImageSetError, told, path=path, shard=1, rows=range(4, 8)):
            open_images(images_at)
        assert [problem.what for problem in verify_images(images_at, quick=True).problems] == [told]
        with tools.refused(ImageSetError, path=path, shard=1, rows=range(7, 8), key="img-0007"):
            images[7]
        where.write("shard-000001.tar", tar)
    where.remove("shard-000001.rows.json")
    with tools.refused(ImageSetError, "has no row list", path=path, shard=1, rows=range(4, 8)):
        open_images(images_at)
    assert not verify_images(images_at).ok


def test_two_processes_that_finish_at_once(stored: Path, tools: Any) -> None:
    """One writes the manifest while the other looks for what killed processes left."""
    manifest = (stored / "manifest.json").read_bytes()
    (stored / "manifest.json").unlink()
    other = threading.Thread(target=StoreWriter(stored, tools.draft()).finish)
    try:
        with place(stored).writing("manifest.json") as file:
            file.write_bytes(manifest)
            other.start()
            other.join(0.3)
    finally:
        other.join(20)
    assert (stored / "manifest.json").read_bytes() == manifest
    assert not list(stored.glob("*.partial"))
