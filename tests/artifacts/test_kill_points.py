"""The writers are killed before each change of the disk, run out of disk in each file, and sync in the right order."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import TeacherRows, open_images, open_store, verify_store
from artifacts.durable import appearing
from artifacts.errors import ImageSetError, IncompleteStore
from artifacts.manifest import StoreShape
from artifacts.writer import ShardStream, StoreWriter
from cli.main import run_guarded

WORKER = Path(__file__).with_name("kill_points_worker.py")


# ---- killed before each change of the disk


def _killed_everywhere(kind: str, folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(WORKER), kind, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    kinds = Counter(point["what"].split()[0] for point in found)
    print(f"{kind}: {len(found)} kill points {dict(kinds)}; by finished shards:", end=" ")
    print(dict(Counter(len(point["finished"]) for point in found)))
    for point in found:
        assert point["code"] == -9, point
        assert point["wrong_in_the_end"] == [], point
        assert not set(point["finished"]) & set(point["made_again"]), point
    return found


@pytest.mark.parametrize(("kind", "last"), [("store", "manifest.json"), ("images", "index.json")])
def test_killed_before_any_change_of_the_disk(tmp_path: Path, kind: str, last: str) -> None:
    found = _killed_everywhere(kind, tmp_path)
    assert {len(point["finished"]) for point in found} == {0, 1, 2, 3}
    for point in found:
        assert point["wrong_when_killed"] == [], point  # what has its name is there in full
        assert set(point["made_again"]) == {"0", "1", "2"} - set(point["finished"]), point
        if last in point["seen"]:
            assert point["what"] == "fsync .", point  # of the folder, after the last rename


def test_killed_before_any_change_of_the_disk_while_a_store_is_mended(tmp_path: Path) -> None:
    found = _killed_everywhere("mend", tmp_path)
    assert {tuple(point["finished"]) for point in found} == {("0", "2"), ("0", "1", "2")}
    assert any(point["what"].startswith("unlink ./commits/") for point in found)
    assert any(point["what"].startswith("unlink ./logits/c/2") for point in found)
    for point in found:
        assert point["wrong_when_killed"] in ([], ["maps/c/1/0/0/0/0/0"]), point
        if point["wrong_when_killed"]:
            assert "1" not in point["finished"], point


# ---- the order in which things become durable


class Disk:
    """What would still be there after a power cut: it watches fsync, rename, unlink and mkdir.

    A file is safe when it was synced as it is now, and it and every folder above it were made before a sync of the
    folder that holds them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self.synced, self.unsafe = root, {}, set[Path]()
        self.named: list[str] = []
        self.when_named: list[Callable[[str], None]] = []
        real = {name: getattr(os, name) for name in ("replace", "unlink", "mkdir")}

        def fsync(handle: int) -> None:  # the disk itself is not what is tested
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_dir():
                self.unsafe = {entry for entry in self.unsafe if entry.parent != path}
            else:
                self.synced[path] = self._state(path)

        def replace(source: Path, target: Path) -> None:
            assert self.synced.pop(source, None) == self._state(source), f"{source} was renamed unsynced"
            name = str(target.relative_to(root))
            for check in self.when_named:
                check(name)
            real["replace"](source, target)
            self.synced[target] = self._state(target)
            self.unsafe.add(target)
            self.named.append(name)

        def unlink(path: Path, **named: Any) -> None:
            real["unlink"](path, **named)
            self.unsafe.add(path)  # it may come back until its folder is synced

        def mkdir(path: Path, mode: int = 0o777) -> None:
            real["mkdir"](path, mode)
            self.unsafe.add(path)

        for name, function in (("fsync", fsync), ("replace", replace), ("unlink", unlink), ("mkdir", mkdir)):
            monkeypatch.setattr(os, name, function)

    def safe(self, name: str) -> bool:
        path = self.root / name
        above = {path, *path.parents} & self.unsafe
        return self.synced.get(path) == self._state(path) and not above

    def settled(self, name: str) -> bool:
        """Whether a removal of that file is safe."""
        return self.root / name not in self.unsafe

    @staticmethod
    def _state(path: Path) -> tuple[int, int, int] | None:
        if not path.exists():
            return None
        about = path.stat()
        return about.st_ino, about.st_size, about.st_mtime_ns


def _objects(shard: int) -> list[str]:
    tails = {"logits": 2, "explained_class": 2, "maps": 5, "map_scale": 2}
    return ["/".join([name, "c", str(shard), *["0"] * tail]) for name, tail in tails.items()]


def test_data_and_folders_are_safe_before_the_commit_and_commits_before_the_manifest(
    tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path / "new" / "store")
    metadata = ["zarr.json", *(f"{name.split('/')[0]}/zarr.json" for name in _objects(0))]
    commits = [f"commits/{shard:06d}.json" for shard in range(3)]
    checked = []

    def check(name: str) -> None:
        if name in commits:
            needed = [*metadata, "draft.json", *_objects(int(Path(name).stem))]
        elif name == "manifest.json":
            needed = [*commits, *(item for shard in range(3) for item in _objects(shard))]
        elif name == "draft.json":
            needed = metadata
        else:
            return
        assert [item for item in needed if not disk.safe(item)] == [], name
        checked.append(name)

    disk.when_named.append(check)
    tools.fill(disk.root)
    assert checked == ["draft.json", *commits, "manifest.json"]
    written = [str(file.relative_to(disk.root)) for file in disk.root.rglob("*") if file.is_file()]
    assert [name for name in written if not disk.safe(name)] == []


def test_a_commit_is_safely_gone_before_its_objects_are_replaced(
    stored: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stored / "maps/c/1/0/0/0/0/0").write_bytes(b"half")
    disk = Disk(monkeypatch, stored)
    seen = []

    def check(name: str) -> None:
        if name in _objects(1):
            assert not (stored / "commits/000001.json").exists()
            assert disk.settled("commits/000001.json")
            seen.append(name)

    disk.when_named.append(check)
    tools.fill(stored)
    assert seen == _objects(1)
    assert disk.named == [*_objects(1), "commits/000001.json"]  # the manifest says the same as before
    assert verify_store(stored).ok


def test_tars_are_safe_before_their_row_lists_and_those_before_the_index(
    tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path / "new" / "images")
    lists = [f"shard-{shard:06d}.rows.json" for shard in range(3)]
    tars = [f"shard-{shard:06d}.tar" for shard in range(3)]

    def check(name: str) -> None:
        needed = {**dict(zip(lists, ([tar] for tar in tars), strict=True)), "index.json": [*lists, *tars]}
        assert [item for item in needed.get(name, []) if not disk.safe(item)] == [], name

    disk.when_named.append(check)
    tools.pack(disk.root)
    assert disk.named == [
        "packing.json",
        *(name for pair in zip(tars, lists, strict=True) for name in pair),
        "index.json",
    ]
    assert all(map(disk.safe, disk.named))


# ---- disks that are full or broken


def _fails_at(monkeypatch: pytest.MonkeyPatch, name: str, what: int, call: str) -> None:
    """fsync, rename or write of the file `name` fails."""
    real_fsync, real_replace, real_open = os.fsync, os.replace, Path.open

    def fail() -> None:
        raise OSError(what, os.strerror(what))  # as a write does: without a name

    def fsync(handle: int) -> None:
        if call == "fsync" and os.readlink(f"/proc/self/fd/{handle}").endswith(f"/{name}.partial"):
            fail()
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        if call == "replace" and str(target).endswith(f"/{name}"):
            fail()
        real_replace(source, target)

    def opened(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        file = real_open(path, mode, *args, **named)
        if call != "write" or "b" not in mode or mode == "rb" or not str(path).endswith(f"/{name}.partial"):
            return file
        file.close()
        return real_open(Path("/dev/full"), "wb", buffering=0)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "open", opened)


STORE_FILES = [*_objects(1), "commits/000001.json"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("name", [*STORE_FILES, "draft.json", "maps/zarr.json", "manifest.json"])
def test_a_full_disk_is_one_sentence_and_loses_no_committed_shard(
    tmp_path: Path,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stored_once: Path,
    name: str,
    call: str,
) -> None:
    path = tmp_path / "store"
    with monkeypatch.context() as patched:
        _fails_at(patched, name, errno.ENOSPC, call)
        assert run_guarded(lambda: tools.fill(path)) == 2
    said = capsys.readouterr().err
    assert said == (
        f"e2kd: cannot write {path / name}: No space left on device; mend that and run the same command again\n"
    )
    done = {0} if name in STORE_FILES else {0, 1, 2} if name == "manifest.json" else set()
    assert StoreWriter(path, tools.draft()).committed() == done
    with pytest.raises(IncompleteStore):
        open_store(path)
    good = tools.snapshot(stored_once)
    assert [n for n, data in tools.snapshot(path).items() if good.get(n, data) != data] == []
    tools.fill(path)
    assert tools.snapshot(path) == good


@pytest.mark.parametrize("what", [errno.EIO, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_error_is_one_sentence(
    tmp_path: Path,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stored_once: Path,
    what: int,
    call: str,
) -> None:
    path, name = tmp_path / "store", _objects(1)[2]
    with monkeypatch.context() as patched:
        _fails_at(patched, name, what, call)
        assert run_guarded(lambda: tools.fill(path)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"e2kd: cannot write {path / name}: {os.strerror(what)}; ")
    assert said.count("\n") == 1
    assert StoreWriter(path, tools.draft()).committed() == {0}
    tools.fill(path)
    assert tools.snapshot(path) == tools.snapshot(stored_once)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("name", ["packing.json", "shard-000001.tar", "shard-000001.rows.json", "index.json"])
def test_a_full_disk_while_packing_is_one_sentence_and_loses_no_finished_shard(
    tmp_path: Path,
    tools: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    packed_once: Path,
    name: str,
    call: str,
) -> None:
    path = tmp_path / "images"
    with monkeypatch.context() as patched:
        _fails_at(patched, name, errno.ENOSPC, call)
        assert run_guarded(lambda: tools.pack(path)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"e2kd: cannot write {path / name}: No space left on device; ")
    assert said.count("\n") == 1
    with pytest.raises(ImageSetError):
        open_images(path)
    asked: list[int] = []
    tools.pack(path, lambda row: asked.append(row) or tools.sample(row))
    first = {"packing.json": 0, "index.json": tools.rows}.get(name, tools.per_shard)
    assert asked == list(range(first, tools.rows))
    assert tools.snapshot(path) == tools.snapshot(packed_once)


# ---- other processes at the same store


def test_files_of_another_process_may_vanish_while_the_folder_is_read(
    stored: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partial files take their names between our listing and our look at them."""
    partial = stored / "commits" / "000001.json.partial"
    partial.write_bytes(b"{")
    real = os.walk

    def walk(folder: Any, **named: Any) -> Any:
        listed = list(real(folder, **named))
        partial.unlink(missing_ok=True)
        return listed

    monkeypatch.setattr(os, "walk", walk)
    assert StoreWriter(stored, tools.draft()).committed() == {0, 1, 2}


def test_a_commit_that_another_process_takes_back_is_no_commit(
    stored: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(stored, tools.draft())
    sizes = writer.place.sizes()
    writer.uncommit(1)
    monkeypatch.setattr(type(writer.place), "sizes", lambda place: sizes)
    assert writer.committed() == {0, 2}


def test_the_sweep_leaves_files_alone_that_another_process_is_writing(stored: Path, tools: Any) -> None:
    """Two processes may finish at once, or one of them may still be writing a shard that the other has written."""
    whole = tools.snapshot(stored)
    (stored / "logits/c/2/0/0.partial").write_bytes(b"half")  # of a dead process
    (stored / "manifest.json").unlink()
    name = _objects(1)[0]
    with appearing(stored / name) as partial:
        partial.write_bytes(whole[name])
        StoreWriter(stored, tools.draft()).finish()
    assert tools.snapshot(stored) == whole


# ---- memory


def test_shards_that_are_written_are_not_kept(
    tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of 64 shards takes no more memory than one of 8."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    rows, size = 32, 64
    shard_bytes = rows * size * size * 2  # random numbers do not compress

    def peak(shards: int) -> int:
        shape = StoreShape(
            rows=rows * shards,
            rows_per_shard=rows,
            classes=tools.classes,
            channels=1,
            height=size,
            width=size,
        )
        writer = StoreWriter(tmp_path / str(shards), tools.draft(shape=shape))
        writer.create()
        rng = np.random.default_rng(0)
        tracemalloc.start()
        with ShardStream(writer) as stream:
            for shard in range(shards):
                stream.begin(shard, "0" * 64, [f"img-{row}" for row in shape.shard_rows(shard)])
                for _ in range(2):
                    half = rows // 2
                    maps = rng.random((half, 1, 1, 1, size, size), np.float32) + 0.5
                    logits = rng.random((half, 1, tools.classes), np.float32)
                    stream.append(TeacherRows(logits, np.zeros((half, 1, 1), np.int64), maps))
                stream.end()
        writer.finish()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(8), peak(64)
    print(f"peak of 8 shards {small / shard_bytes:.1f}, of 64 {large / shard_bytes:.1f} shards' bytes")
    assert large < small + 8 * shard_bytes  # 56 more were written
