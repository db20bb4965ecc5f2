"""Faults of every kind in every object: an error that says where, or exactly the right numbers.

Each case changes one finished store or image set in one way, reads every row, verifies, and undoes the change.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import artifacts.arrays
import artifacts.store
from artifacts import (
    DamagedStore,
    E2kdError,
    ImageSetError,
    IncompleteStore,
    Sample,
    StoreError,
    TeacherRows,
    open_images,
    open_store,
    verify_images,
    verify_store,
)
from artifacts.codecs import decode_logits, decode_maps, get_codec
from artifacts.manifest import CodecInfo, Manifest, StoreShape
from artifacts.places import LocalPlace
from artifacts.sealed import unseal
from artifacts.store import load_store
from artifacts.writer import StoreWriter

Fault = Callable[[bytes, np.random.Generator], bytes]

SMALL: dict[str, int] = {}
MANY = {"views": 2, "explained": 3, "channels": 2, "height": 5, "width": 4}
BIG = {"channels": 6, "height": 112, "width": 112}  # one row is one chunk, for every codec
STORES = {
    "fp16-fp16": ("fp16", "fp16", SMALL),
    "uint12-int8": ("uint12", "int8", SMALL),
    "fp32-lossless": ("fp32", "lossless", SMALL),
    "fp16-int6-many": ("fp16", "int6", MANY),
    "uint12-lossless-many": ("uint12", "lossless", MANY),
    "uint12-int5-big": ("uint12", "int5", BIG),
}


# ---- one object at a time


def one_bit(data: bytes, rng: np.random.Generator) -> bytes:
    return xored(data, int(rng.integers(len(data))), 1 << int(rng.integers(8)))


def one_byte(data: bytes, rng: np.random.Generator) -> bytes:
    return xored(data, int(rng.integers(len(data))), int(rng.integers(1, 256)))


def near_the_end(data: bytes, rng: np.random.Generator) -> bytes:
    """Where checksums and the index are."""
    return xored(data, len(data) - 1 - int(rng.integers(min(40, len(data)))), 1 << int(rng.integers(8)))


def near_the_start(data: bytes, rng: np.random.Generator) -> bytes:
    """Where the frame's header is."""
    return xored(data, int(rng.integers(min(12, len(data)))), 1 << int(rng.integers(8)))


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def one_byte_short(data: bytes, rng: np.random.Generator) -> bytes:
    return data[:-1]


def emptied(data: bytes, rng: np.random.Generator) -> bytes:
    return b""


def cut_and_padded(data: bytes, rng: np.random.Generator) -> bytes:
    """What a file system leaves that lost the last pages."""
    kept = int(rng.integers(len(data) - 8))
    return data[:kept] + bytes(len(data) - kept)


def zeroed_block(data: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(max(1, len(data) - 64)))
    stop = min(len(data), start + int(rng.choice([8, 64, 512, 4096])))
    return data[:start] + bytes(stop - start) + data[stop:]


def doubled(data: bytes, rng: np.random.Generator) -> bytes:
    return data + data


def one_byte_more(data: bytes, rng: np.random.Generator) -> bytes:
    return data + b"\0"


def rotated(data: bytes, rng: np.random.Generator) -> bytes:
    by = int(rng.integers(1, len(data)))
    return data[by:] + data[:by]


def noise(data: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(len(data))


def xored(data: bytes, position: int, bits: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= bits
    return bytes(changed)


RANDOM: tuple[Fault, ...] = (one_bit, one_byte, near_the_end, near_the_start, truncated, zeroed_block)
ONCE: tuple[Fault, ...] = (one_byte_short, emptied, cut_and_padded, doubled, one_byte_more, rotated, noise)


def damages(data: bytes, rng: np.random.Generator, each: int) -> Iterator[tuple[str, bytes]]:
    """(fault, changed bytes), `each` of every random fault and one of the others."""
    for fault in (*RANDOM * each, *ONCE):
        changed = fault(data, rng)
        if changed != data:
            yield fault.__name__, changed


@contextmanager
def replaced(contents: dict[Path, bytes | None]) -> Iterator[None]:
    """Files with other contents (None: missing) for a while."""
    whole = {file: file.read_bytes() for file in contents}
    for file, data in contents.items():
        file.unlink() if data is None else file.write_bytes(data)
    try:
        yield
    finally:
        for file, data in whole.items():
            file.write_bytes(data)


# ---- stores


@dataclasses.dataclass
class Made:
    path: Path
    right: TeacherRows
    manifest: Manifest
    older: Path


def random_answers(plan: Any, shard: int, run: int) -> TeacherRows:
    s, span = plan.shape, plan.shape.shard_rows(shard)
    rng, n = np.random.default_rng(1000 * run + shard), len(span)
    return TeacherRows(
        rng.normal(size=(n, s.views, s.classes)).astype(np.float32) * 4,
        rng.integers(0, s.classes, (n, s.views, s.explained)),
        rng.normal(size=(n, s.views, s.explained, s.channels, s.height, s.width)).astype(np.float32),
    )


def filled(path: Path, tools: Any, plan: Any, run: int) -> Path:
    writer = StoreWriter(path, plan)
    writer.create()
    for shard in range(plan.shape.shards):
        tools.write_shard(writer, shard, random_answers(plan, shard, run))
    writer.finish()
    return path


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Callable[[str, str, dict[str, int]], Made]:
    @functools.cache
    def made(logits: str, maps: str, changes: tuple[tuple[str, int], ...]) -> Made:
        folder = tmp_path_factory.mktemp("faults")
        plan = tools.draft(
            shape=StoreShape(**(tools.draft().shape.model_dump() | {"classes": 7} | dict(changes))),
            logits=CodecInfo(codec=get_codec(logits).codec_id, error_bound="x"),
            maps=CodecInfo(codec=get_codec(maps).codec_id, error_bound="x"),
        )
        path = filled(folder / "store", tools, plan, 0)
        store = open_store(path)
        return Made(path, store.read(range(11)), store.manifest, filled(folder / "older", tools, plan, 1))

    return lambda logits, maps, changes: made(logits, maps, tuple(changes.items()))


@pytest.fixture(autouse=True)
def quick_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """zarr takes 2 ms to write the metadata of an array, each time; here it is compared a thousand times."""
    make, kept = artifacts.arrays._metadata, dict[str, dict[str, bytes]]()

    def metadata(plan: artifacts.arrays.ArrayPlan) -> dict[str, bytes]:
        if repr(plan) not in kept:
            kept[repr(plan)] = make(plan)
        return kept[repr(plan)]

    monkeypatch.setattr(artifacts.arrays, "_metadata", metadata)


def says(error: Exception, case: object, *parts: object) -> None:
    """The one sentence of an error has all of `parts`."""
    assert "\n" not in str(error), case
    for part in parts:
        assert str(part) in str(error), (case, str(error))


class Tally:
    """What became of the cases. A read of other numbers is an error at once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def read_store(self, made: Made, case: object, damaged: dict[int, str], by_row: bool) -> None:
        """Every row of the store: right, or an error that names its shard. `damaged`: shard -> array."""
        self.counts["cases"] += 1
        refused = False
        try:
            store = open_store(made.path)
        except E2kdError as error:
            self.named(made.path, case, error, damaged)
            refused = True
            store = load_store(made.path)  # as a process sees it that had opened the store before
        for rows in [[row] for row in range(11)] if by_row else [list(range(11))]:
            try:
                found = store.read(rows)
            except E2kdError as error:
                self.named(made.path, case, error, damaged)
                refused = True
                continue
            for field in dataclasses.fields(TeacherRows):
                got, right = (getattr(r, field.name) for r in (found, made.right))
                assert np.array_equal(got, right[rows]), f"SILENT WRONG READ: {case}, rows {rows}"
        self.counts["refused" if refused else "harmless"] += 1

    @staticmethod
    def named(path: Path, case: object, error: E2kdError, damaged: dict[int, str]) -> None:
        assert type(error) is DamagedStore, (case, error)
        says(error, case, f"run: e2kd verify --repair {path}")
        shard, rows = error.shard, error.rows
        assert shard is not None, case
        assert rows, case
        assert (error.path, error.array) == (str(path), damaged.get(shard)), (case, error)
        assert set(rows) <= set(range(4 * shard, min(4 * shard + 4, 11))), (case, error)
        assert f"array {error.array}, shard {shard} (rows {rows[0]} to {rows[-1]})" in str(error), case

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))


def verified(made: Made, case: object, damaged: dict[int, str]) -> None:
    problems = verify_store(made.path).problems
    assert {(p.shard, p.array) for p in problems} == set(damaged.items()), (case, problems)
    for problem in problems:
        assert problem.shard is not None
        assert problem.rows == (4 * problem.shard, min(4 * problem.shard + 3, 10))
        assert problem.mend == f"run: e2kd verify --repair {made.path}"


def objects(made: Made) -> list[tuple[str, int, Path]]:
    return [
        (name, record.shard, made.path / item.path)
        for record in made.manifest.shards
        for name, item in record.arrays.items()
    ]


@pytest.mark.parametrize(
    ("name", "by_row"),
    [
        ("fp16-fp16", False),
        ("uint12-int8", False),
        ("fp32-lossless", False),
        ("fp32-lossless", True),
        ("fp16-int6-many", True),
        ("uint12-lossless-many", True),
        ("uint12-int5-big", True),
    ],
)
def test_any_fault_in_an_object_is_refused_or_reads_right(
    make: Any, name: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tally = make(*STORES[name]), Tally()
    if by_row:
        monkeypatch.setattr(artifacts.store, "_IN_MEMORY", 0)
    rng = np.random.default_rng(len(name) + by_row)
    for array, shard, file in objects(made):
        if STORES[name][2] is BIG and shard != 1 + by_row:
            continue
        whole = file.read_bytes()
        stale = (made.older / file.relative_to(made.path)).read_bytes()
        cases = [("missing", None), ("stale", stale), *damages(whole, rng, 1)]
        for fault, data in cases:
            if data == whole:
                continue
            case = f"{name} {array} {shard} {fault}"
            with replaced({file: data}):
                tally.read_store(made, case, {shard: array}, by_row)
                verified(made, case, {shard: array})
    print(f"{name} by_row={by_row}: {tally}")
    assert tally.counts["cases"] >= (60 if STORES[name][2] is BIG else 150), str(tally)
    assert tally.counts["refused"] > 0.9 * tally.counts["cases"], str(tally)
    assert open_store(made.path).manifest == made.manifest
    assert verify_store(made.path).ok


@pytest.mark.parametrize(
    ("name", "by_row"),
    [("fp32-lossless", False), ("uint12-lossless-many", True), ("uint12-int5-big", True)],
)
def test_swapped_objects_are_refused(
    make: Any, name: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of the same array, also of the same size, and arrays of the same shard."""
    made, tally, equal = make(*STORES[name]), Tally(), 0
    if by_row:
        monkeypatch.setattr(artifacts.store, "_IN_MEMORY", 0)
    found = objects(made)
    for i, (array, shard, file) in enumerate(found):
        for other_array, other_shard, other in found[i + 1 :]:
            if array != other_array and shard != other_shard:
                continue
            one, two = file.read_bytes(), other.read_bytes()
            if one == two:
                continue
            equal += len(one) == len(two)
            case = f"{name} {array} {shard} <-> {other_array} {other_shard}"
            with replaced({file: two, other: one}):
                tally.counts["cases"] += 1
                damaged = {(shard, array), (other_shard, other_array)}
                with pytest.raises(DamagedStore) as caught:
                    open_store(made.path).read(range(11))
                assert (caught.value.shard, caught.value.array) in damaged, case
                assert caught.value.rows, case
                for row in [4 * shard, 4 * other_shard]:
                    with pytest.raises(DamagedStore, match="e2kd verify --repair"):
                        load_store(made.path).read([row])
                problems = verify_store(made.path).problems
                assert {(p.shard, p.array) for p in problems} == damaged, case
    print(f"{name} by_row={by_row}: {tally}, {equal} of equal size")
    assert equal >= 3
    assert verify_store(made.path).ok


@pytest.mark.parametrize("name", ["fp16-fp16", "uint12-int8"])
def test_any_fault_in_a_record_is_refused_or_harmless_and_found(make: Any, name: str) -> None:
    """manifest.json, draft.json, commit records, every zarr.json: reading is right or an error; verifying finds all."""
    made, tally = make(*STORES[name]), Tally()
    rng = np.random.default_rng(7)
    arrays = list(made.manifest.shards[0].arrays)
    files = ["manifest.json", "draft.json", "commits/000001.json", *(f"{a}/zarr.json" for a in arrays)]
    for record in files:
        file = made.path / record
        whole = file.read_bytes()
        for fault, data in [("missing", None), *damages(whole, rng, 3)]:
            case = f"{name} {record} {fault}"
            same = data is not None and record.count("zarr") == 0 and meaning(data) == meaning(whole)
            tally.counts["same JSON"] += same
            with replaced({file: data}):
                tally.counts["cases"] += 1
                try:
                    found = open_store(made.path).read(range(11))
                    for field in dataclasses.fields(TeacherRows):
                        got, right = (getattr(r, field.name) for r in (found, made.right))
                        assert np.array_equal(got, right), f"SILENT WRONG READ: {case}"
                    tally.counts["harmless"] += 1
                    assert record in ("draft.json", "commits/000001.json") or same, (
                        case
                    )  # readers do not need them
                except E2kdError as error:
                    tally.counts["refused"] += 1
                    says(error, case, made.path, "run: e2kd ")
                if not same:
                    problems = verify_store(made.path).problems
                    assert problems, f"NOT FOUND: {case}"
                    assert all("run: e2kd" in str(p) for p in problems), (case, problems)
    print(f"{name} records: {tally}")
    assert tally.counts["cases"] > 150, str(tally)
    assert verify_store(made.path).ok


def meaning(data: bytes) -> Any:
    try:
        return unseal(data, 1)
    except Exception:
        return None


@pytest.mark.parametrize("change", ["flip", "missing"])
def test_the_groups_metadata_is_verified(make: Any, change: str) -> None:
    made = make(*STORES["fp16-fp16"])
    file = made.path / "zarr.json"
    with replaced({file: xored(file.read_bytes(), 20, 1) if change == "flip" else None}):
        assert not verify_store(made.path).ok


def test_no_byte_of_a_sealed_file_may_differ(make: Any) -> None:
    made = make(*STORES["fp16-fp16"])
    file = made.path / "manifest.json"
    whole = file.read_bytes()
    with replaced({file: whole.replace(b"\n", b" ", 1)}):
        assert not verify_store(made.path).ok


@pytest.mark.parametrize("record", ["manifest.json", "commits/000001.json", "draft.json"])
def test_records_of_an_older_run_are_refused_or_found(make: Any, record: str) -> None:
    made = make(*STORES["fp32-lossless"])
    stale = (made.older / record).read_bytes()
    if stale == (made.path / record).read_bytes():
        assert record == "draft.json"  # both runs are of the same draft
        return
    with replaced({made.path / record: stale}):
        assert not verify_store(made.path).ok
        if record == "manifest.json":  # it names other objects
            with pytest.raises(DamagedStore) as caught:
                open_store(made.path).read(range(11))
            assert caught.value.shard in (0, 1, 2)
            assert caught.value.rows


def test_swapped_commit_records_are_found(make: Any) -> None:
    made = make(*STORES["fp32-lossless"])
    one, two = (made.path / f"commits/00000{i}.json" for i in (0, 1))
    with replaced({one: two.read_bytes(), two: one.read_bytes()}):
        assert {p.shard for p in verify_store(made.path).problems} == {0, 1}


def test_reading_at_any_moment_of_writing_says_that_it_is_not_finished(
    tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[int | None] = Counter()
    writing = LocalPlace.writing

    @contextmanager
    def watched(place: LocalPlace, name: str) -> Iterator[Path]:
        with writing(place, name) as file:
            yield file
            with pytest.raises(IncompleteStore) as caught:
                open_store(place.path)
            error = caught.value
            says(error, name, place.path, "run: e2kd precompute")
            assert error.path == str(place.path)
            assert error.shards == (None if error.done is None else 3)
            seen[error.done] += 1

    monkeypatch.setattr(LocalPlace, "writing", watched)
    tools.fill(tmp_path / "store")
    monkeypatch.undo()
    assert open_store(tmp_path / "store").read(range(11)).logits.shape == (11, 1, 5)
    # no store: zarr.json of 4 arrays and the group, draft.json; then 4 objects and a commit record of each shard;
    # then manifest.json
    assert dict(seen) == {None: 6, 0: 5, 1: 5, 2: 5, 3: 1}


@pytest.mark.parametrize("version", [2, 99])
def test_newer_schemas_say_so_everywhere(make: Any, packed: Any, version: int) -> None:
    made = make(*STORES["fp16-fp16"])
    for file, reader, verify in [
        (made.path / "manifest.json", open_store, verify_store),
        (packed.place.path / "index.json", open_images, verify_images),
    ]:
        newer = json.dumps(json.loads(file.read_bytes()) | {"schema_version": version}).encode()
        with replaced({file: newer}):
            message = f"has schema {version}, this e2kd reads 1; update e2kd"
            with pytest.raises((StoreError, ImageSetError), match=message) as caught:
                reader(file.parent)
            assert caught.value.path == str(file)
            assert caught.value.fields == {"schema_version": (version, 1)}
            (problem,) = verify(file.parent).problems
            assert message in str(problem)


# ---- plain zarr


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized:UserWarning")
@pytest.mark.parametrize("maps", ["fp16", "int8", "int6", "int5", "lossless"])
@pytest.mark.parametrize("logits", ["fp16", "uint12", "fp32"])
def test_plain_zarr_reads_the_stores_numbers(make: Any, logits: str, maps: str) -> None:
    made = make(logits, maps, SMALL)
    group = zarr.open_group(made.path, mode="r")
    scale = group["logit_scale"][:] if logits == "uint12" else None
    assert np.array_equal(
        decode_logits(get_codec(logits), group["logits"][:], scale), made.right.logits, equal_nan=False
    )
    assert np.array_equal(
        decode_maps(get_codec(maps), group["maps"][:], group["map_scale"][:]), made.right.maps
    )
    assert np.array_equal(group["explained_class"][:], made.right.explained_class)


def test_plain_zarr_refuses_flipped_bits_of_the_payload(make: Any) -> None:
    rng, tally = np.random.default_rng(0), Counter[str]()
    for name in ("fp16-fp16", "uint12-int8", "fp32-lossless", "uint12-lossless-many"):
        made = make(*STORES[name])
        for array, _, file in objects(made):
            whole, right = file.read_bytes(), zarr.open_array(made.path / array, mode="r")[:]
            end = len(whole) - 20  # one chunk, then its place and the index's checksum
            for position in rng.choice(end, 4, replace=False):
                with replaced({file: xored(whole, int(position), 1 << int(rng.integers(8)))}):
                    try:
                        found = zarr.open_array(made.path / array, mode="r")[:]
                    except Exception:  # whatever zarr and its codecs raise
                        tally["refused"] += 1
                    else:
                        tally["harmless"] += 1
                        assert np.array_equal(found, right), (name, array, int(position))
    print(f"plain zarr: {dict(tally)}")
    assert tally["refused"] > 0.9 * tally.total(), tally


# ---- image sets


@pytest.fixture(scope="module")
def set_of(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Callable[[str], Any]:
    @functools.cache
    def made(image_format: str) -> Any:
        return tools.pack(tmp_path_factory.mktemp("set") / "images", image_format=image_format)

    return made


def same(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Sample))


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_any_fault_in_a_tar_or_row_list_is_refused_or_reads_right(
    set_of: Any, image_format: str, tools: Any
) -> None:
    images, rng, tally = set_of(image_format), np.random.default_rng(3), Counter[str]()
    path: Path = images.place.path
    right = [images[row] for row in range(11)]
    for shard in range(3):
        for name in (f"shard-00000{shard}.tar", f"shard-00000{shard}.rows.json"):
            whole = (path / name).read_bytes()
            for fault, data in [("missing", None), *damages(whole, rng, 4)]:
                case = f"{image_format} {name} {fault}"
                tally["cases"] += 1
                with replaced({path / name: data}):
                    tally["refused" if refused_rows(path, case, shard, right) else "harmless"] += 1
                    problems = verify_images(path).problems
                    assert {p.shard for p in problems} == {shard}, (case, problems)
                    assert all(str(p).endswith(f"run: e2kd verify --repair {path}") for p in problems), (
                        problems
                    )
    print(f"{image_format}: {dict(tally)}")
    assert tally["cases"] > 150, tally
    assert tally["refused"] > 0.6 * tally["cases"], (
        tally
    )  # a tar is padding and headers, which rows do not need
    assert verify_images(path).ok


def refused_rows(path: Path, case: str, shard: int, right: list[Sample]) -> bool:
    """Whether any row was refused; each that was not must be right."""
    try:
        images = open_images(path)
    except ImageSetError as error:
        rows = f"(rows {4 * shard} to {min(4 * shard + 3, 10)})"
        says(error, case, f"shard-00000{shard}", rows, f"run: e2kd verify --repair {path}")
        return True
    refused = False
    for row in range(11):
        try:
            found = images[row]
        except ImageSetError as error:
            assert row // 4 == shard, case
            says(error, case, f"shard-00000{shard}", f"run: e2kd verify --repair {path}")
            refused = True
        else:
            assert same(found, right[row]), f"SILENT WRONG READ: {case}, row {row}"
    return refused


def test_any_fault_in_an_index_is_refused(set_of: Any) -> None:
    images, rng, tally = set_of("png"), np.random.default_rng(5), Counter[str]()
    file = images.place.path / "index.json"
    whole = file.read_bytes()
    for fault, data in [("missing", None), *damages(whole, rng, 25)]:
        tally["cases"] += 1
        if data is not None and meaning(data) == meaning(whole):
            tally["same JSON"] += 1
            continue
        with replaced({file: data}):
            with pytest.raises(ImageSetError, match=r"run: e2kd pack|update e2kd") as caught:
                open_images(images.place.path)
            assert caught.value.path == str(images.place.path if fault == "missing" else file), fault
            assert not verify_images(images.place.path).ok, fault
    print(f"index.json: {dict(tally)}")
    assert tally["cases"] > 100


@pytest.mark.parametrize("kinds", [("tar",), ("rows.json",), ("tar", "rows.json")])
def test_swapped_and_stale_shards_of_images_are_refused(
    set_of: Any, kinds: tuple[str, ...], tmp_path: Path, tools: Any
) -> None:
    """Also tars with their row lists, of equal size: the index names the bytes of both."""
    images = set_of("png")
    path: Path = images.place.path
    right = [images[row] for row in range(11)]

    def other(row: int) -> Sample:
        return dataclasses.replace(tools.sample(row), image=255 - tools.sample(row).image)

    older = tools.pack(tmp_path / "older", other).place.path
    for kind in kinds:
        assert (path / f"shard-000001.{kind}").stat().st_size > 0
    swapped = {path / f"shard-00000{a}.{k}": (path / f"shard-00000{1 - a}.{k}").read_bytes()
               for k in kinds for a in (0, 1)}  # fmt: skip
    stale = {path / f"shard-000001.{kind}": (older / f"shard-000001.{kind}").read_bytes() for kind in kinds}
    for change, shards in [(swapped, {0, 1}), (stale, {1})]:
        with replaced(change):
            assert {p.shard for p in verify_images(path).problems} == shards
            try:
                found = open_images(path)
            except ImageSetError as error:
                says(error, shards, "e2kd verify --repair")
                continue
            for row in range(11):
                try:
                    assert same(found[row], right[row]), row
                except ImageSetError as error:
                    assert row // 4 in shards
                    says(error, shards, "e2kd verify --repair")


def test_a_changed_packing_json_is_found(set_of: Any) -> None:
    images = set_of("png")
    file = images.place.path / "packing.json"
    with replaced({file: file.read_bytes().replace(b"random", b"rendom")}):
        assert not verify_images(images.place.path).ok


def test_a_resumed_pack_does_not_believe_a_changed_row_list(packed: Any, tools: Any) -> None:
    """Killed before the index was written, then a bit flips: the new index must not vouch for it."""
    path: Path = packed.place.path
    right = packed.labels
    (path / "index.json").unlink()
    rows = path / "shard-000001.rows.json"
    changed = rows.read_bytes().replace(b'"label": 1', b'"label": 3', 1)
    assert changed != rows.read_bytes()
    rows.write_bytes(changed)
    resumed = tools.pack(path)
    assert resumed.labels == right or not verify_images(path).ok


def test_a_copied_store_and_image_set_are_sound(make: Any, tmp_path: Path) -> None:
    """The tests above would be empty if a sound store were refused."""
    for name, settings in STORES.items():
        copy = shutil.copytree(make(*settings).path, tmp_path / name)
        assert verify_store(copy).ok, name
