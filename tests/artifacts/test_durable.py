"""Files appear whole or not at all, with any number of processes, killed at any moment."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.access import reading_from, writing_to
from artifacts.durable import appearing, sha256_file, sweep, write_atomic
from artifacts.errors import DataError, PlaceError, WriteError

WRITE = """
import sys
from pathlib import Path
from artifacts.durable import write_atomic
print("ready", flush=True)
sys.stdin.readline()
for _ in range(15):
    write_atomic(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)
"""
HOLD = """
import sys
from pathlib import Path
from artifacts.durable import appearing
with appearing(Path(sys.argv[1])) as file:
    file.write_bytes(b"killed" * 100_000)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def start(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def stopped(process: subprocess.Popen[str]) -> int:
    process.kill()
    process.communicate(timeout=30)
    return process.returncode


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/file"
    with appearing(path) as partial:
        assert partial.parent == path.parent
        assert partial.read_bytes() == b""
        partial.write_bytes(b"data")
        assert not path.exists()
    assert path.read_bytes() == b"data"
    assert os.listdir(path.parent) == ["file"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def interrupted() -> None:
        with appearing(path) as partial:
            partial.write_bytes(b"longer than the new one")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_no_file_stays_open(tmp_path: Path) -> None:
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        write_atomic(tmp_path / "a/b", b"data")
        with pytest.raises(ValueError, match="x"), appearing(tmp_path / "c"):
            raise ValueError("x")
    assert len(os.listdir("/proc/self/fd")) == count


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(WriteError) as caught, appearing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.path, caught.value.errno) == (str(path), errno.ENOSPC)
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; mend that and run the same command again"
    )
    write_atomic(path, b"")
    with pytest.raises(WriteError) as caught:
        write_atomic(path / "below/file", b"")
    assert (caught.value.path, caught.value.errno) == (str(path), errno.EEXIST)


def test_a_folder_in_the_files_place_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(WriteError) as caught:
        write_atomic(tmp_path / "file", b"")
    assert (caught.value.path, caught.value.errno) == (str(tmp_path / "file"), errno.EISDIR)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "I/O error", "other"),
        FileNotFoundError(errno.ENOENT, "No such file", "other"),
        FileNotFoundError(errno.ENOENT, "the object is not there"),
        FileNotFoundError("the object is not there"),
        OSError(errno.EBADF, "Bad file descriptor"),
        ConnectionResetError("reset"),
    ],
    ids=repr,
)
def test_an_error_of_something_else_passes_while_a_file_is_written(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(type(error)) as caught, writing_to(tmp_path / "file"):
        raise error
    assert caught.value is error


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlaceError) as caught, reading_from(tmp_path):
        tmp_path.read_bytes()
    assert caught.value.path == str(tmp_path)
    assert str(caught.value) == f"cannot read {tmp_path}: Is a directory; make it readable"
    below = str(tmp_path / "a/b")
    with pytest.raises(DataError) as other, reading_from(tmp_path, DataError, "copy it again"):
        raise PermissionError(errno.EACCES, "Permission denied", below)
    assert (other.value.path, str(other.value)) == (
        below,
        f"cannot read {below}: Permission denied; copy it again",
    )


def test_a_missing_file_and_another_one_are_not_the_readers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), reading_from(tmp_path / "file"):
        (tmp_path / "file").read_bytes()
    (tmp_path / "other").mkdir()
    with pytest.raises(IsADirectoryError), reading_from(tmp_path / "file"):
        (tmp_path / "other").read_bytes()


# ---- several processes


def test_processes_that_write_the_same_file_leave_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "folder/file"
    processes = [start(WRITE, str(path), letter) for letter in "ab"]
    try:
        for process in processes:
            ready(process)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        while any(process.poll() is None for process in processes):
            if path.exists():
                data = path.read_bytes()
                assert data in (b"a" * 100_000, b"b" * 100_000)
            time.sleep(0.002)
        assert [process.returncode for process in processes] == [0, 0]
    finally:
        for process in processes:
            stopped(process)
    assert os.listdir(path.parent) == ["file"]
    assert path.stat().st_size == 100_000


def test_a_killed_writers_partial_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = start(HOLD, str(path))
    ready(process)
    assert stopped(process) == -9
    assert os.listdir(tmp_path) == ["file.partial"]
    write_atomic(path, b"short")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"short", "nothing of the longer partial"


def test_a_living_writer_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = start(HOLD, str(path))
    ready(process)
    waiting = threading.Thread(target=write_atomic, args=(path, b"second"))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert not path.exists()
    process.communicate("\n", timeout=30)
    waiting.join(30)
    assert process.returncode == 0
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file"]


def test_a_writer_that_waits_for_one_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = start(HOLD, str(path))
    ready(process)
    waiting = threading.Thread(target=write_atomic, args=(path, b"second"))
    waiting.start()
    waiting.join(0.1)
    stopped(process)
    waiting.join(30)
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file"]


def test_sweeping_removes_what_killed_processes_left_only(tmp_path: Path) -> None:
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    sweep(partial)
    process = start(HOLD, str(path))
    ready(process)
    sweep(partial)
    assert partial.exists()
    stopped(process)
    sweep(partial)
    assert os.listdir(tmp_path) == []
    write_atomic(path, b"data")
    assert os.listdir(tmp_path) == ["file"]


def test_a_writer_that_waits_for_a_partial_that_is_swept(tmp_path: Path) -> None:
    """Its name is gone when the lock is free: the waiting one starts anew."""
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    handle = os.open(partial, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    waiting = threading.Thread(target=write_atomic, args=(path, b"data"))
    waiting.start()
    waiting.join(0.1)
    partial.unlink()
    os.close(handle)
    waiting.join(20)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"data"


def test_many_threads_write_many_files(tmp_path: Path) -> None:
    start_together = threading.Barrier(4)
    errors = []

    def write(letter: bytes) -> None:
        try:
            start_together.wait(10)
            for i in range(10):
                write_atomic(tmp_path / f"deep/{i % 3}/file", letter * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    files = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert files == ["deep/0/file", "deep/1/file", "deep/2/file"]
    assert all(len(set((tmp_path / file).read_bytes())) == 1 for file in files)


# ---- power cuts


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is done to the disk: ("fsync" | "mkdir" | "rename", path)."""
    done: list[tuple[str, str]] = []

    def recorded(name: str, real: Callable[..., None], path: Callable[..., str]) -> None:
        def call(*args: object, **kwargs: object) -> None:
            where = path(*args)
            real(*args, **kwargs)
            done.append((name, where))

        monkeypatch.setattr(os, {"rename": "replace"}.get(name, name), call)

    recorded("fsync", os.fsync, lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    recorded("mkdir", os.mkdir, lambda path, *_: str(path))
    recorded("rename", os.replace, lambda _, target: str(target))
    return done


def test_contents_then_name_then_folder_reach_the_disk(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    with appearing(tmp_path / "file") as partial:
        partial.write_bytes(b"data")
        assert order == []
    assert order == [
        ("fsync", str(tmp_path / "file.partial")),
        ("rename", str(tmp_path / "file")),
        ("fsync", str(tmp_path)),
    ]


def test_new_folders_reach_the_disk_first(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    write_atomic(tmp_path / "a/b/file", b"data")
    assert order == [
        ("mkdir", str(tmp_path / "a")),
        ("fsync", str(tmp_path)),
        ("mkdir", str(tmp_path / "a/b")),
        ("fsync", str(tmp_path / "a")),
        ("fsync", str(tmp_path / "a/b/file.partial")),
        ("rename", str(tmp_path / "a/b/file")),
        ("fsync", str(tmp_path / "a/b")),
    ]


def test_a_disk_that_fails_to_sync_gives_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "file", b"old")

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError) as caught:
        write_atomic(tmp_path / "file", b"new")
    assert (caught.value.path, caught.value.errno) == (str(tmp_path / "file"), errno.EIO)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_file(tmp_path / "file") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
