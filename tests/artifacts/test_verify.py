"""Verifying: every change of a stored byte is found, and each problem says where it is and what mends it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import ImageSet, ImageSetError, Sample, open_images, verify_images, verify_store
from artifacts.manifest import ManifestDraft
from artifacts.writer import StoreWriter


@pytest.fixture(scope="module")
def beside_once(packed_once: Path, tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Path:
    packed = open_images(packed_once)
    plan: ManifestDraft = tools.draft(images=packed.fingerprint)
    writer = StoreWriter(tmp_path_factory.mktemp("beside") / "store", plan)
    writer.create()
    for shard in range(plan.shape.shards):
        rows = packed.shard_rows(shard)
        writer.write_shard(
            shard, tools.answers(plan, shard), packed.keys_sha256(shard), packed.keys[rows.start : rows.stop]
        )
    writer.finish()
    return writer.place.path


@pytest.fixture
def beside(beside_once: Path, tmp_path: Path) -> Path:
    """A store of `packed`."""
    return Path(shutil.copytree(beside_once, tmp_path / "beside"))


def flip(file: Path, position: int, bits: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= bits
    file.write_bytes(data)


# ---- stores


def test_a_sound_store_is_ok_and_progress_is_told(beside: Path, packed: ImageSet) -> None:
    seen: list[int] = []
    report = verify_store(beside, packed.place.path, progress=seen.append)
    assert report.ok
    assert report.problems == ()
    assert (report.shards, seen) == (3, [1, 1, 1])
    assert verify_store(beside, quick=True).ok


@pytest.mark.parametrize("quick", [True, False])
def test_every_missing_or_short_object_is_named(beside: Path, quick: bool) -> None:
    (beside / "maps/c/1/0/0/0/0/0").unlink()
    (beside / "logits/c/2/0/0").write_bytes(b"")
    problems = verify_store(beside, quick=quick).problems
    assert {(p.shard, p.array, p.rows) for p in problems} == {(1, "maps", (4, 7)), (2, "logits", (8, 10))}
    assert "shard 1, maps, rows 4-7: is missing; run: e2kd verify --repair " in str(problems[0])
    assert problems[0].mend == f"run: e2kd verify --repair {beside}"


def test_changed_bytes_are_named_and_quick_does_not_look(beside: Path) -> None:
    flip(beside / "explained_class/c/2/0/0", 10)
    assert verify_store(beside, quick=True).ok
    problems = verify_store(beside).problems
    assert {(p.shard, p.array, p.rows) for p in problems} == {(2, "explained_class", (8, 10))}
    assert "sha256 differs" in problems[0].what


def test_a_store_that_cannot_be_opened_is_one_problem(tmp_path: Path, beside: Path) -> None:
    (problem,) = verify_store(tmp_path / "nowhere").problems
    assert "there is no teacher store" in problem.what
    (beside / "manifest.json").unlink()
    (problem,) = verify_store(beside).problems
    assert "3 of 3 shards" in problem.what


def test_classes_out_of_range_are_a_problem(tmp_path: Path, tools: Any) -> None:
    writer = StoreWriter(tmp_path / "store", tools.draft())
    writer.create()
    for shard in range(3):
        rows = tools.answers(writer.draft, shard)
        tools.write_shard(
            writer, shard, dataclasses.replace(rows, explained_class=rows.explained_class + 5 * (shard == 1))
        )
    writer.finish()
    (problem,) = verify_store(writer.place.path).problems
    assert (problem.shard, problem.array) == (1, "explained_class")
    assert "out of range" in problem.what


def test_a_store_of_other_images_is_a_problem(
    beside: Path, packed: ImageSet, tmp_path: Path, tools: Any
) -> None:
    def other(row: int) -> Sample:
        return dataclasses.replace(
            tools.sample(row), key=f"other-{row}" if row == 5 else tools.sample(row).key
        )

    problems = verify_store(beside, tools.pack(tmp_path / "other", other).place.path).problems
    assert [p.shard for p in problems] == [None, 1]
    assert "made from other images" in problems[0].what
    assert "other samples" in problems[1].what


def test_damaged_images_beside_a_store_are_a_problem(beside: Path, packed: ImageSet) -> None:
    flip(packed.place.path / "shard-000001.rows.json", 20)
    problems = verify_store(beside, packed.place.path).problems
    assert [p.shard for p in problems] == [1]
    assert "shard-000001.rows.json is damaged" in problems[0].what
    (packed.place.path / "shard-000002.tar").unlink()
    (problem,) = verify_store(beside, packed.place.path).problems
    assert "shard-000002.tar (rows 8 to 10) is missing" in problem.what


# ---- image sets


def test_a_sound_image_set_is_ok_and_progress_is_told(packed: ImageSet) -> None:
    seen: list[int] = []
    report = verify_images(packed.place.path, progress=seen.append)
    assert (report.ok, report.shards, seen) == (True, 3, [1, 1, 1])


@pytest.mark.parametrize("quick", [True, False])
def test_every_missing_or_short_tar_is_named(packed: ImageSet, quick: bool) -> None:
    (packed.place.path / "shard-000000.tar").unlink()
    (packed.place.path / "shard-000001.tar").write_bytes(b"")
    (packed.place.path / "shard-000002.rows.json").unlink()
    problems = verify_images(packed.place.path, quick=quick).problems
    assert [(p.shard, p.rows) for p in problems] == [(0, (0, 3)), (1, (4, 7)), (2, (8, 10))]
    assert [p.what for p in problems] == ["is missing", "has 0 bytes, not 20480", "has no row list"]


def test_any_changed_byte_of_an_image_set_is_found_and_never_read_as_other_data(
    packed: ImageSet, tools: Any
) -> None:
    rng = np.random.default_rng(0)
    for shard, name in [(1, "shard-000001.tar"), (2, "shard-000002.rows.json")]:
        file = packed.place.path / name
        whole = file.read_bytes()
        for position in rng.choice(len(whole), 25, replace=False):
            flip(file, int(position), int(rng.integers(1, 256)))
            problems = verify_images(packed.place.path).problems
            assert problems
            assert {p.shard for p in problems} == {shard}
            images = open_images(packed.place.path)
            for row in images.shard_rows(shard):
                with contextlib.suppress(ImageSetError):
                    read, packed_one = images[row], tools.sample(row)
                    for field in dataclasses.fields(Sample):
                        assert np.array_equal(getattr(read, field.name), getattr(packed_one, field.name))
            file.write_bytes(whole)
    assert verify_images(packed.place.path).ok


def test_a_pack_that_swaps_two_tars_is_found(packed: ImageSet) -> None:
    first, second = packed.place.path / "shard-000000.tar", packed.place.path / "shard-000001.tar"
    one, two = first.read_bytes(), second.read_bytes()
    assert len(one) == len(two)
    first.write_bytes(two)
    second.write_bytes(one)
    problems = verify_images(packed.place.path).problems
    assert {p.shard for p in problems} == {0, 1}
    assert any("other keys" in p.what for p in problems)


def test_an_image_set_that_cannot_be_opened_is_one_problem(packed: ImageSet) -> None:
    file = packed.place.path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 2}))
    (problem,) = verify_images(packed.place.path).problems
    assert "schema 2" in problem.what


def test_images_of_another_size_are_found(tmp_path: Path, tools: Any) -> None:
    images = tools.pack(tmp_path / "set", view={"size": 32})
    problems = verify_images(images.place.path).problems
    assert {p.shard for p in problems} == {0, 1, 2}
    with tools.refused(ImageSetError, shard=0, rows=range(1), key="img-0000"):
        images.read_images([0])
