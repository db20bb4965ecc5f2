"""Remote calls that fail: survived where waiting helps, one sentence where it does not, never other numbers."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from artifacts import places
from artifacts.errors import E2kdError, ImageSetError, PlaceError
from artifacts.images import open_images
from artifacts.places import Place, place
from artifacts.store import open_store

DATA = bytes(range(256)) * 40


def view_of(where: Place) -> bytes:
    view = where.view("object", len(DATA), sha256(DATA).hexdigest())
    return bytes(view[100:200])


CALLS: dict[str, tuple[Callable[[Place], Any], Any]] = {
    "read": (lambda where: where.read("object"), DATA),
    "size": (lambda where: where.size("object"), len(DATA)),
    "sizes": (lambda where: where.sizes(), {"object": len(DATA)}),
    "view": (view_of, DATA[100:200]),
    "part": (lambda where: where.part("object", 5, 9), DATA[5:9]),  # type: ignore[attr-defined]
    "write": (lambda where: (where.write("object", b"new"), where.read("object")), (None, b"new")),
    "remove": (lambda where: (where.remove("object"), where.exists("object")), (None, False)),
}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that our layer makes, unslept."""
    found: list[float] = []
    monkeypatch.setattr(places, "time", SimpleNamespace(sleep=found.append))
    return found


# ---- over the wire


@pytest.mark.parametrize("kind", ["503", "drop"])
@pytest.mark.parametrize("name", CALLS)
def test_failures_that_pass_are_survived(
    s3: Any, bucket: str, waits: list[float], kind: str, name: str
) -> None:
    call, expected = CALLS[name]
    where = place(bucket) / "folder"
    where.write("object", DATA)
    times = 2 if kind == "503" else 4  # the client itself asks again once where it got no answer
    s3.fail(kind, times=times, when=lambda request: bool(request.key) or name == "sizes")
    assert call(where) == expected
    assert len(waits) == 2 or (kind == "drop" and len(waits) in (1, 4)), "ours, not the client's"


@pytest.mark.parametrize("name", ["read", "view", "part"])
def test_a_connection_that_breaks_in_the_body_is_survived(
    s3: Any, bucket: str, waits: list[float], name: str
) -> None:
    call, expected = CALLS[name]
    where = place(bucket) / "folder"
    where.write("object", DATA)
    s3.fail("cut", times=2)
    assert call(where) == expected
    assert len(waits) == 2


@pytest.mark.parametrize("name", CALLS)
def test_a_failure_that_stays_is_one_sentence_with_the_url(
    s3: Any, bucket: str, waits: list[float], name: str
) -> None:
    call, _ = CALLS[name]
    where = place(bucket) / "folder"
    where.write("object", DATA)
    s3.fail("503", times=10**6)
    with pytest.raises(PlaceError) as caught:
        call(where)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{bucket}/folder" in message
    assert name == "sizes" or f"{bucket}/folder/object" in message
    assert "failed 5 times" in message
    assert len(waits) == 4
    s3.heal()
    assert where.read("object") == DATA


def test_pauses_grow_and_vary(s3: Any, bucket: str, waits: list[float], monkeypatch: Any) -> None:
    monkeypatch.setattr(places, "FIRST_WAIT", 1.0)
    s3.fail("503", times=10**6)
    for _ in range(3):
        with pytest.raises(PlaceError):
            place(bucket).read("object")
    assert len(waits) == 12
    for pause, least in zip(waits, [1.0, 2.0, 4.0, 8.0] * 3, strict=True):
        assert least <= pause <= 2 * least
    assert len(set(waits)) == 12


@pytest.mark.parametrize("name", CALLS)
def test_no_access_is_not_repeated(s3: Any, bucket: str, waits: list[float], name: str) -> None:
    where = place(bucket)
    where.write("object", DATA)
    s3.fail("403", times=10**6)
    with pytest.raises(PlaceError, match="check the credentials") as caught:
        CALLS[name][0](where)
    assert str(caught.value.path).startswith(f"{bucket}/")
    assert bucket in str(caught.value)
    assert waits == []


def test_a_missing_object_is_not_asked_for_again(s3: Any, bucket: str, waits: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        place(bucket).read("none")
    with pytest.raises(FileNotFoundError):
        place(f"{bucket}-none").read("none")
    assert place(f"{bucket}-none").sizes() == {}
    assert waits == []


def test_a_server_that_is_not_there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(PlaceError, match="failed 5 times"):
            open_store(f"{bucket}/store")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_writing_asks_for_nothing_but_objects(s3: Any, bucket: str) -> None:
    """Credentials that may touch only objects below a prefix suffice."""
    s3.fail("403", times=10**6, when=lambda request: not request.key)
    place(bucket).write("folder/object", DATA)
    assert place(bucket).read("folder/object") == DATA


def puts_of_shard_1(request: Any) -> bool:
    return bool(request.method == "PUT" and "maps/c/1" in request.key)


def test_a_failed_upload_leaves_no_object_and_the_next_run_writes_it(
    s3: Any, bucket: str, tools: Any, stored_once: Path, remote_tools: Any
) -> None:
    url = f"{bucket}/store"
    s3.fail("503", times=10**6, when=puts_of_shard_1)
    with pytest.raises(PlaceError, match="maps/c/1") as caught:
        tools.fill(url)
    assert str(caught.value.path).startswith(f"{url}/maps/c/1/")
    assert "\n" not in str(caught.value)
    assert len([request for request in s3.requests if puts_of_shard_1(request)]) == 5
    names = place(url).sizes()
    assert not any(name.startswith("maps/c/1") for name in names)
    assert [name for name in names if name.startswith("commits")] == ["commits/000000.json"]
    s3.reset()
    tools.fill(url)
    assert [r for r in s3.requests if r.method == "PUT" and "/c/0" in r.key] == [], "shard 0 was done"
    assert remote_tools.objects(url) == tools.snapshot(stored_once)


def test_a_store_is_written_and_read_through_random_failures(
    s3: Any, bucket: str, tools: Any, stored_once: Path, remote_tools: Any
) -> None:
    rng = np.random.default_rng(0)
    for kind in ("503", "drop"):
        s3.fail(kind, times=10**6, when=lambda _: bool(rng.random() < 0.04))
    tools.fill(f"{bucket}/store")
    found = open_store(f"{bucket}/store").read(range(tools.rows))
    s3.heal()
    np.testing.assert_array_equal(found.maps, open_store(stored_once).read(range(tools.rows)).maps)
    assert remote_tools.objects(f"{bucket}/store") == tools.snapshot(stored_once)


# ---- downloads that are not what was uploaded


@pytest.fixture(params=[False, True], ids=["cached", "ranges"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache, and with none, where objects are read by ranges."""
    if request.param:
        monkeypatch.setenv("E2KD_CACHE_GIB", "0")


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("kind", "times"), [("short", 1), ("flip", 1), ("cut", 1), ("flip", 10**6)])
def test_spoiled_downloads_of_a_store_never_read_as_numbers(
    s3: Any,
    bucket: str,
    stored_once: Path,
    cache_folder: Path,
    remote_tools: Any,
    upload: Any,
    kind: str,
    times: int,
) -> None:
    url = upload(stored_once, f"{bucket}/store")
    expected = open_store(stored_once).read([5])
    s3.fail(kind, times=times, when=lambda request: "maps/c/1" in request.key)
    try:
        found: Any = open_store(url).read([5])
    except E2kdError as error:
        found = error
    if isinstance(found, E2kdError):
        assert "\n" not in str(found)
        assert url in str(found)
    else:
        assert times == 1
        np.testing.assert_array_equal(found.maps, expected.maps)
        np.testing.assert_array_equal(found.logits, expected.logits)
    remote_tools.cached(cache_folder)
    s3.heal()
    np.testing.assert_array_equal(open_store(url).read([5]).maps, expected.maps)
    remote_tools.cached(cache_folder)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("kind", "times"), [("flip", 1), ("short", 10**6)])
@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.rows.json", "index.json"])
def test_spoiled_downloads_of_images_never_read_as_pixels(
    s3: Any,
    bucket: str,
    packed_once: Path,
    cache_folder: Path,
    tools: Any,
    remote_tools: Any,
    upload: Any,
    name: str,
    kind: str,
    times: int,
) -> None:
    url = upload(packed_once, f"{bucket}/images")
    s3.fail(kind, times=times, when=lambda request: request.key.endswith(name))
    try:
        found: Any = [open_images(url)[row] for row in range(4, 8)]
    except ImageSetError as error:
        found = error
    if isinstance(found, ImageSetError):
        assert name in str(found)
    else:
        for sample, row in zip(found, range(4, 8), strict=True):
            np.testing.assert_array_equal(sample.image, tools.sample(row).image)
            assert sample.label == tools.sample(row).label
    remote_tools.cached(cache_folder)
    s3.heal()
    np.testing.assert_array_equal(open_images(url)[6].image, tools.sample(6).image)


# ---- a file system of our own, for what no server does on demand


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """Raises what `errors` holds for a method, one per call; uploads only half while `halves` lasts."""

    protocol = "flaky"
    errors: ClassVar[dict[str, list[BaseException]]] = {}
    halves: ClassVar[list[int]] = [0]
    calls: ClassVar[list[str]] = []

    def _next(self, method: str) -> None:
        self.calls.append(method)
        if self.errors.get(method):
            raise self.errors[method].pop(0)

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        self._next("cat_file")
        return super().cat_file(*args, **kwargs)

    def info(self, *args: Any, **kwargs: Any) -> Any:
        self._next("info")
        return super().info(*args, **kwargs)

    def find(self, *args: Any, **kwargs: Any) -> Any:
        self._next("find")
        return super().find(*args, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self._next("get_file")
        Path(lpath).write_bytes(super().cat_file(rpath))

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self._next("put_file")
        data = Path(lpath).read_bytes()
        if self.halves[0] > 0:
            self.halves[0] -= 1
            data = data[: len(data) // 2]
        self.pipe_file(rpath, data)

    def rm_file(self, path: str) -> None:
        self._next("rm_file")
        super().rm_file(path)


@pytest.fixture
def flaky() -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.errors, Flaky.halves, Flaky.calls = {}, [0], []
    return f"flaky://{uuid.uuid4().hex}"


METHODS = {
    "read": "cat_file",
    "size": "info",
    "sizes": "find",
    "view": "get_file",
    "part": "cat_file",
    "write": "put_file",
    "remove": "rm_file",
}


@pytest.mark.parametrize(
    "error", [OSError("reset"), TimeoutError("late"), RuntimeError("odd"), KeyError("x")]
)
@pytest.mark.parametrize("name", CALLS)
def test_any_error_of_a_protocol_is_repeated(
    flaky: str, waits: list[float], cache_folder: Path, name: str, error: Exception
) -> None:
    call, expected = CALLS[name]
    where = place(flaky)
    where.write("object", DATA)
    Flaky.errors = {METHODS[name]: [error] * 4}
    assert call(where) == expected
    assert len(waits) == 4
    where.write("object", DATA)
    where._views.clear()
    shutil.rmtree(cache_folder, ignore_errors=True)
    Flaky.errors = {METHODS[name]: [error] * 5}
    with pytest.raises(PlaceError, match="failed 5 times") as caught:
        call(where)
    assert type(error).__name__ in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_is_not_repeated(flaky: str, waits: list[float], name: str) -> None:
    where = place(flaky)
    where.write("object", DATA)
    Flaky.errors = {METHODS[name]: [KeyboardInterrupt()]}
    with pytest.raises(KeyboardInterrupt):
        CALLS[name][0](where)
    assert waits == []
    assert where.read("object") == DATA


def test_an_upload_that_arrives_by_half_is_repeated(flaky: str, waits: list[float]) -> None:
    where = place(flaky)
    Flaky.halves = [2]
    where.write("object", DATA)
    assert where.read("object") == DATA
    assert len(waits) == 2


def test_an_upload_that_never_arrives_whole_is_an_error(flaky: str, waits: list[float]) -> None:
    where = place(flaky)
    Flaky.halves = [10**6]
    with pytest.raises(PlaceError, match=f"{len(DATA) // 2} of {len(DATA)} bytes arrived"):
        where.write("object", DATA)
    Flaky.halves = [0]
    where.write("object", DATA)
    assert where.read("object") == DATA


def test_an_upload_that_never_arrives_whole_leaves_nothing(flaky: str, waits: list[float]) -> None:
    Flaky.halves = [10**6]
    with pytest.raises(PlaceError):
        place(flaky).write("object", DATA)
    assert not place(flaky).exists("object")


def test_a_full_cache_disk_is_not_the_networks_fault(flaky: str, waits: list[float]) -> None:
    """Read by ranges, as what does not fit; at least, nobody should look for the network's fault."""
    where = place(flaky)
    where.write("object", DATA)
    Flaky.errors = {"get_file": [OSError(28, "No space left on device")] * 100}
    assert view_of(where) == DATA[100:200]
    assert waits == []
