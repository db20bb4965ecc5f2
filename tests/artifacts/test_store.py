"""Teacher stores: rows come back, for any reader; interrupted writes resume to the same bytes; damage is refused."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import artifacts.store
import artifacts.writer
from artifacts import (
    DamagedStore,
    DataError,
    IncompleteStore,
    MismatchedStore,
    StoreError,
    TeacherRows,
    TeacherStore,
    open_store,
    verify_store,
)
from artifacts.durable import sha256_file
from artifacts.manifest import CodecInfo, ExplainerInfo, StoreShape
from artifacts.writer import StoreWriter

ARRAYS = {
    "logits": ("sample", "view", "class"),
    "explained_class": ("sample", "view", "explained"),
    "maps": ("sample", "view", "explained", "channel", "y", "x"),
    "map_scale": ("sample", "view", "explained"),
}


def joined(tools: Any, plan: Any) -> TeacherRows:
    parts = [tools.answers(plan, shard) for shard in range(plan.shape.shards)]
    return TeacherRows(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("logits", "explained_class", "maps")
        )
    )


def assert_rows(found: TeacherRows, expected: TeacherRows, rows: list[int]) -> None:
    assert (found.logits.dtype, found.explained_class.dtype, found.maps.dtype) == (
        np.float32,
        np.int64,
        np.float32,
    )
    assert np.array_equal(found.logits, expected.logits[rows])
    assert np.array_equal(found.explained_class, expected.explained_class[rows])
    assert np.array_equal(found.maps, expected.maps[rows])


@pytest.fixture(params=["in memory", "row by row"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading: whole arrays kept, or one row at a time."""
    if request.param == "row by row":
        monkeypatch.setattr(artifacts.store, "_IN_MEMORY", 0)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("shape", [{}, {"views": 2, "explained": 3, "channels": 6}])
def test_rows_come_back_in_the_order_asked(tmp_path: Path, tools: Any, shape: dict[str, int]) -> None:
    plan = tools.draft()
    plan = tools.draft(shape=StoreShape(**(plan.shape.model_dump() | shape)))
    store = open_store(tools.fill(tmp_path / "store", plan).place.path)
    assert len(store) == tools.rows
    for rows in ([7], [10, 0, 3, 3], list(range(tools.rows))):
        assert_rows(store.read(rows), joined(tools, plan), rows)
    assert_rows(store.read(np.array([2, 9])), joined(tools, plan), [2, 9])


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("row", [-1, 11])
def test_rows_that_are_not_there_are_an_index_error(stored: Path, row: int) -> None:
    with pytest.raises(IndexError):
        open_store(stored).read([0, row])


def test_big_rows_are_chunked_alone_and_small_ones_together(tmp_path: Path, tools: Any) -> None:
    shape = tools.draft().shape.model_dump() | {"channels": 6, "height": 80, "width": 80}
    tools.fill(tmp_path / "store", tools.draft(shape=StoreShape(**shape)))
    group = zarr.open_group(tmp_path / "store", mode="r")
    assert group["maps"].chunks[0] == 1
    assert group["logits"].chunks[0] == tools.per_shard


def test_a_copy_sent_to_a_worker_reads_the_same(stored: Path, tools: Any) -> None:
    store = open_store(stored)
    store.read([0])
    assert_rows(copy.deepcopy(store).read([5]), joined(tools, tools.draft()), [5])


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized:UserWarning")  # commits/, manifest.json
def test_plain_zarr_reads_the_arrays_with_core_codecs_only(stored: Path, tools: Any) -> None:
    group = zarr.open_group(stored, mode="r")
    expected = joined(tools, tools.draft())
    assert set(group.array_keys()) == set(ARRAYS)
    for name, dimensions in ARRAYS.items():
        assert group[name].metadata.dimension_names == dimensions
        about = json.loads((stored / name / "zarr.json").read_text())
        sharding = about["codecs"][0]
        inner = sharding["configuration"]
        assert about["zarr_format"] == 3
        assert [sharding["name"], *[c["name"] for c in inner["codecs"]]] == [
            "sharding_indexed",
            "bytes",
            "zstd",
        ]
        assert inner["codecs"][-1]["configuration"]["checksum"] is True
        assert "crc32c" in [c["name"] for c in inner["index_codecs"]]
    scale = group["map_scale"][:]
    assert np.array_equal(group["maps"][:] * scale[..., None, None, None], expected.maps)
    assert np.array_equal(group["logits"][:].astype(np.float32), expected.logits)
    assert scale.dtype == np.float32


def test_no_stored_value_is_the_fill_value(stored: Path) -> None:
    group = zarr.open_group(stored, mode="r")
    assert group["explained_class"].fill_value == -1
    assert all(np.isnan(group[name].fill_value) for name in ("logits", "maps", "map_scale"))


def test_dead_maps_are_stored_and_counted(stored: Path) -> None:
    store = open_store(stored)
    assert store.manifest.dead_maps == 1
    assert [record.dead_maps for record in store.manifest.shards] == [0, 1, 0]
    assert not store.read([6]).maps.any()


def test_a_store_of_dead_maps_reads(tmp_path: Path, tools: Any) -> None:
    writer = StoreWriter(tmp_path / "store", tools.draft())
    writer.create()
    for shard in range(3):
        rows = tools.answers(writer.draft, shard)
        tools.write_shard(
            writer, shard, TeacherRows(rows.logits * 0, rows.explained_class * 0, rows.maps * 0)
        )
    assert writer.finish().dead_maps == tools.rows
    assert not open_store(writer.place.path).read([8]).maps.any()
    assert verify_store(writer.place.path).ok


def test_the_store_is_what_its_manifest_says(stored: Path) -> None:
    manifest = open_store(stored).manifest
    named = {}
    for record in manifest.shards:
        assert set(record.arrays) == set(ARRAYS)
        commit = json.loads((stored / "commits" / f"{record.shard:06d}.json").read_text())
        assert commit.pop("seal")
        assert commit == record.model_dump()
        named |= {item.path: (item.bytes, item.sha256) for item in record.arrays.values()}
    found = [f for f in stored.rglob("*") if f.is_file() and "c" in f.relative_to(stored).parts]
    assert named == {str(f.relative_to(stored)): (f.stat().st_size, sha256_file(f)) for f in found}
    assert {"zarr", "numpy", "numcodecs"} <= set(manifest.versions)
    assert [(record.start, record.stop) for record in manifest.shards] == [(0, 4), (4, 8), (8, 11)]


# ---- interrupted writes


def uncommitted(path: Path) -> None:
    (path / "commits" / "000001.json").unlink()


def half_committed(path: Path) -> None:
    file = path / "commits" / "000001.json"
    file.rename(file.with_name(file.name + ".partial")).write_bytes(b"{")


def garbage_objects(path: Path) -> None:
    """Objects of an uncommitted shard, and what zarr leaves when it is killed while writing one."""
    uncommitted(path)
    (path / "maps/c/1/0/0/0/0/0").write_bytes(b"half")
    (path / "logits/c/1/0/0").write_bytes(b"")
    (path / "maps/c/1/0/0/0/0/0.4fbd.partial").write_bytes(b"half")


def garbage_in_the_last_shard(path: Path) -> None:
    (path / "commits" / "000002.json").unlink()
    (path / "maps/c/2/0/0/0/0/0").write_bytes(b"half")


def short_object(path: Path) -> None:
    """Committed, yet not there in full."""
    (path / "maps/c/1/0/0/0/0/0").write_bytes(b"half")


def no_object(path: Path) -> None:
    (path / "explained_class/c/1/0/0").unlink()


def only_the_manifest(path: Path) -> None:
    (path / "manifest.json.partial").write_bytes(b"{")


@pytest.mark.parametrize(
    ("wound", "done", "asked"),
    [
        (uncommitted, 2, [1]),
        (half_committed, 2, [1]),
        (garbage_objects, 2, [1]),
        (garbage_in_the_last_shard, 2, [2]),
        (short_object, 2, [1]),
        (no_object, 2, [1]),
        (only_the_manifest, 3, []),
    ],
)
def test_an_interrupted_store_is_refused_then_resumes_to_the_same_bytes(
    stored: Path, tools: Any, wound: Callable[[Path], None], done: int, asked: list[int]
) -> None:
    whole = tools.snapshot(stored)
    (stored / "manifest.json").unlink()
    wound(stored)
    with tools.refused(IncompleteStore, path=stored, done=done, shards=3):
        open_store(stored)
    writer = StoreWriter(stored, tools.draft())
    writer.create()
    assert sorted({0, 1, 2} - writer.committed()) == asked
    tools.fill(stored)
    assert tools.snapshot(stored) == whole


def test_an_exception_in_the_middle_of_a_shard(
    tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = StoreWriter(tmp_path / "store", tools.draft())
    writer.create()
    tools.write_shard(writer, 0)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(artifacts.writer, "write_record", stop)  # objects are there, the record is not
        with pytest.raises(KeyboardInterrupt):
            tools.write_shard(writer, 1)
    assert (writer.place.path / "maps/c/1/0/0/0/0/0").exists()
    assert writer.committed() == {0}
    with tools.refused(IncompleteStore, path=writer.place, done=1, shards=3):
        writer.finish()
    tools.fill(writer.place.path)
    assert tools.snapshot(writer.place.path) == tools.snapshot(tools.fill(tmp_path / "whole").place.path)


def test_a_store_killed_before_its_draft_is_made_again(tmp_path: Path, tools: Any) -> None:
    path = tools.fill(tmp_path / "store").place.path
    for name in ("draft.json", "manifest.json"):
        (path / name).unlink()
    with tools.refused(IncompleteStore, path=path, done=None, shards=None):
        open_store(path)
    # nothing is thrown away
    with tools.refused(StoreError, "has shards but no draft.json", path=path):
        tools.fill(path)
    shutil.rmtree(path / "commits")
    (path / "maps" / "zarr.json").write_text("{")
    tools.fill(path)
    assert tools.snapshot(path) == tools.snapshot(tools.fill(tmp_path / "whole").place.path)


def test_a_committed_shard_is_mended_in_a_finished_store(stored: Path, tools: Any) -> None:
    whole = tools.snapshot(stored)
    (stored / "maps/c/1/0/0/0/0/0").unlink()
    (stored / "commits" / "000001.json").unlink()
    tools.fill(stored)
    assert tools.snapshot(stored) == whole


def test_the_manifest_follows_shards_that_were_written_again(stored: Path, tools: Any) -> None:
    (stored / "commits" / "000001.json").unlink()
    writer = StoreWriter(stored, tools.draft())
    rows = tools.answers(writer.draft, 1)  # another machine's numbers differ in the last bits
    tools.write_shard(writer, 1, TeacherRows(rows.logits + 1, rows.explained_class, rows.maps))
    writer.finish()
    assert verify_store(stored).ok
    assert np.array_equal(open_store(stored).read([4]).logits, rows.logits[:1] + 1)


def test_finishing_twice_changes_nothing(stored: Path, tools: Any) -> None:
    stamps = {f: f.stat().st_mtime_ns for f in stored.rglob("*") if f.is_file()}
    tools.fill(stored)
    assert stamps == {f: f.stat().st_mtime_ns for f in stored.rglob("*") if f.is_file()}


WRITE = """
import runpy, sys
from pathlib import Path
of = runpy.run_path(sys.argv[1])
writer = of["StoreWriter"](Path(sys.argv[2]), of["draft"]())
for shard in sys.argv[3:]:
    of["write_shard"](writer, int(shard))
"""


def test_two_processes_write_the_bytes_of_one(tmp_path: Path, tools: Any, stored: Path) -> None:
    writer = StoreWriter(tmp_path / "two", tools.draft())
    writer.create()
    conftest = str(Path(__file__).with_name("conftest.py"))
    command = [sys.executable, "-c", WRITE, conftest, str(writer.place.path)]
    both = [subprocess.Popen([*command, *shards]) for shards in (["2", "0"], ["1"])]
    assert [process.wait(60) for process in both] == [0, 0]
    writer.finish()
    assert tools.snapshot(writer.place.path) == tools.snapshot(stored)


# ---- what is refused


@pytest.mark.parametrize("left", [None, 0, 10])
@pytest.mark.parametrize("array", list(ARRAYS))
def test_missing_and_short_objects_are_refused_on_opening(
    stored: Path, tools: Any, array: str, left: int | None
) -> None:
    file = stored / open_store(stored).manifest.shards[1].arrays[array].path
    data = file.read_bytes()
    file.unlink() if left is None else file.write_bytes(data[:left])
    with tools.refused(DamagedStore, path=stored, array=array, shard=1, rows=range(4, 8)):
        open_store(stored)
    assert not verify_store(stored).ok


def test_another_teacher_explainer_or_image_set_is_refused(stored: Path, tools: Any) -> None:
    teacher = tools.draft().teacher.model_copy(update={"weights_sha256": "f" * 64})
    store = open_store(stored)
    store.check_same(tools.draft())
    for changes, fields in [
        ({"teacher": teacher}, {"teacher.weights_sha256": ("0" * 64, "f" * 64)}),
        ({"images": "2" * 64}, {"images": ("1" * 64, "2" * 64)}),
        (
            {"explainer": ExplainerInfo(name="gradcam", settings={"logit": "raw"})},
            {"explainer.settings.logit": ("centred", "raw")},
        ),
        ({"view": {"size": 16, "resize": "crop"}}, {"view.resize": ("fit", "crop")}),
        ({"view": {"size": 16}}, {"view.resize": ("fit", None)}),
        (
            {"maps": CodecInfo(codec="e2kd.fp32", error_bound="exact")},
            {"maps.codec": ("e2kd.fp16", "e2kd.fp32"), "maps.error_bound": ("x", "exact")},
        ),
    ]:
        other = tools.draft(**changes)
        with tools.refused(MismatchedStore, path=stored, fields=fields):
            store.check_same(other)
        with tools.refused(MismatchedStore, path=stored, fields=fields):
            StoreWriter(stored, other).create()


def test_newer_schemas_are_refused(stored: Path, tools: Any) -> None:
    for name in ("manifest.json", "draft.json"):
        file = stored / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 2, "new": 1}))
        with tools.refused(StoreError, path=file, fields={"schema_version": (2, 1)}):
            open_store(stored)
        (stored / "manifest.json").unlink(missing_ok=True)
    with tools.refused(StoreError, path=file, fields={"schema_version": (2, 1)}):
        StoreWriter(stored, tools.draft()).create()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"schema_version": 1}', "[]", '{"schema_version": "1"}'])
@pytest.mark.parametrize("name", ["manifest.json", "draft.json"])
def test_files_that_are_not_manifests_are_refused(stored: Path, tools: Any, name: str, text: str) -> None:
    if name == "draft.json":
        (stored / "manifest.json").unlink()
    (stored / name).write_text(text)
    with tools.refused(DamagedStore, path=stored / name):
        open_store(stored)


@pytest.mark.parametrize(
    ("name", "bad"), [*itertools.product(["logits", "maps"], [np.nan, np.inf, -np.inf]), ("logits", 7e4)]
)
def test_numbers_that_do_not_fit_name_the_sample_and_write_nothing(
    tmp_path: Path, tools: Any, name: str, bad: float
) -> None:
    writer = StoreWriter(tmp_path / "store", tools.draft())
    writer.create()
    before = tools.snapshot(writer.place.path)
    rows = tools.answers(writer.draft, 1)
    getattr(rows, name)[2].flat[0] = bad
    with tools.refused(DataError, array=name, key="img-0006"):
        tools.write_shard(writer, 1, rows)
    assert tools.snapshot(writer.place.path) == before


# ---- bytes that were changed


def objects(path: Path) -> list[tuple[str, int, Path]]:
    return [
        (name, record.shard, path / item.path)
        for record in open_store(path).manifest.shards
        for name, item in record.arrays.items()
    ]


def read_or_error(store: TeacherStore, name: str, shard: int) -> np.ndarray | str:
    try:
        return store.read_shard(name, shard)
    except DamagedStore as error:
        return str(error)


def test_changed_bytes_never_read_back_as_other_numbers(stored: Path) -> None:
    """Any byte of any object: reading is an error or gives the right numbers, and verifying always tells."""
    rng = np.random.default_rng(0)
    refused = tried = 0
    for name, shard, file in objects(stored):
        whole, right = file.read_bytes(), open_store(stored).read_shard(name, shard)
        for position in rng.choice(len(whole), min(8, len(whole)), replace=False):
            data = bytearray(whole)
            data[position] ^= int(rng.integers(1, 256))
            file.write_bytes(data)
            found = read_or_error(open_store(stored), name, shard)
            tried += 1
            if isinstance(found, str):
                refused += 1
                assert f"array {name}, shard {shard} (rows " in found
            else:
                assert np.array_equal(found, right), (name, shard, position)
        problems = verify_store(stored).problems
        assert {(problem.shard, problem.array) for problem in problems} == {(shard, name)}
        file.write_bytes(whole)
    assert refused > 0.9 * tried
    assert verify_store(stored).ok


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("name", ["logits", "maps", "explained_class"])
def test_reading_rows_of_a_changed_object_is_an_error(stored: Path, name: str) -> None:
    file = next(file for array, shard, file in objects(stored) if (array, shard) == (name, 1))
    data = bytearray(file.read_bytes())
    data[12] ^= 4
    file.write_bytes(data)
    store = open_store(stored)
    with pytest.raises(DamagedStore) as caught:
        store.read([5])
    error = caught.value
    assert (error.path, error.array, error.shard) == (str(stored), name, 1)
    assert error.rows is not None
    assert set(error.rows) <= set(range(4, 8))


@pytest.mark.parametrize("name", ["logits", "maps", "explained_class"])
@pytest.mark.parametrize(
    ("old", "new"),
    [('"shape": [\n    11', '"shape": [\n    10'), ("little", "big"), ('"sample"', '"image"'), ("{", "")],
)
def test_changed_array_metadata_is_an_error(stored: Path, tools: Any, name: str, old: str, new: str) -> None:
    file = stored / name / "zarr.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with tools.refused(DamagedStore, path=stored, array=name):
        open_store(stored).read(range(11))
    (problem,) = verify_store(stored).problems
    assert (
        str(problem) == f"{name}: zarr.json of array {name} was changed; run: e2kd verify --repair {stored}"
    )
