"""Image sets: what is packed comes back, whoever reads it; what is not finished or not whole is not trusted."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from artifacts import ImageSet, ImageSetError, Sample, open_images
from artifacts.sealed import seal


def same(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Sample))


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_lossless_formats_give_back_every_field(tmp_path: Path, tools: Any, image_format: str) -> None:
    images = tools.pack(tmp_path / "set", image_format=image_format)
    assert len(images) == tools.rows
    for row in range(tools.rows):
        assert same(images[row], tools.sample(row)), row
    assert images[1].label == (0, 1)
    assert images[2].label is None
    assert images[1].boxes is not None
    assert images[1].boxes.dtype == np.float32
    assert images.keys == [tools.sample(row).key for row in range(tools.rows)]
    assert images.labels == [tools.sample(row).label for row in range(tools.rows)]
    assert images.groups == [tools.sample(row).group for row in range(tools.rows)]


def test_columns_are_built_once(tmp_path: Path, tools: Any) -> None:
    """Reports and training ask for them row by row: a set of a million rows cannot build a list at each question."""
    images = tools.pack(tmp_path / "set")
    for name in ("keys", "labels", "groups", "label_column", "group_column"):
        assert getattr(images, name) is getattr(images, name), name
    labels, groups = images.labels, images.groups
    assert images.multilabel
    assert images.label_column.tolist() == [label if isinstance(label, int) else -1 for label in labels]
    assert images.group_column.tolist() == [-1 if group is None else group for group in groups]
    for column in (images.label_column, images.group_column):
        assert column.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 7


def test_jpeg_is_close_on_smooth_images(tmp_path: Path, tools: Any) -> None:
    ramp = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    images = tools.pack(
        tmp_path / "set",
        lambda row: dataclasses.replace(tools.sample(row), image=np.stack([ramp] * 3)),
        image_format="jpg",
    )
    assert np.abs(images[5].image.astype(int) - ramp).max() <= 4
    assert same(dataclasses.replace(images[5], image=0), dataclasses.replace(tools.sample(5), image=0))


def test_rows_are_read_in_any_order_and_past_the_end_is_an_error(packed: ImageSet, tools: Any) -> None:
    order = np.array([10, 0, 7, 7])
    assert np.array_equal(packed.read_images(order), np.stack([tools.sample(int(r)).image for r in order]))
    for row in (-1, tools.rows):
        with pytest.raises(IndexError):
            packed[row]
    assert [len(packed.shard_rows(shard)) for shard in range(3)] == [4, 4, 3]


@pytest.mark.filterwarnings("ignore::Warning:webdataset")
def test_plain_webdataset_reads_the_shards(packed: ImageSet, tools: Any) -> None:
    import webdataset

    seen = [
        item
        for shard in packed.shards
        for item in webdataset.WebDataset(str(packed.place.path / shard.name), shardshuffle=False).decode(
            "rgb8"
        )
    ]
    assert [item["__key__"] for item in seen] == packed.keys
    for row, item in enumerate(seen):
        expected = tools.sample(row)
        assert np.array_equal(item["png"].transpose(2, 0, 1), expected.image)
        label = expected.label
        assert item["json"]["label"] == (list(label) if isinstance(label, tuple) else label)
        assert item["json"].get("group") == expected.group
        assert ("mask.png" in item) == (expected.mask is not None)


def test_a_copy_sent_to_a_worker_reads_the_same(packed: ImageSet) -> None:
    before = packed[5]  # opens a file
    assert same(copy.deepcopy(packed)[5], before)


def test_fingerprint_is_of_the_contents_and_the_view(tmp_path: Path, tools: Any) -> None:
    def other(row: int) -> Sample:
        return dataclasses.replace(tools.sample(row), image=tools.sample(row).image ^ (row == 9))

    first = tools.pack(tmp_path / "a").fingerprint
    assert tools.pack(tmp_path / "b").fingerprint == first
    assert tools.pack(tmp_path / "c", other).fingerprint != first
    assert tools.pack(tmp_path / "d", view={"size": 16, "resize": "crop"}).fingerprint != first


# ---- interrupted packs


def kill_in_shard(path: Path, shard: int) -> None:
    """The folder as a pack killed in a shard leaves it: earlier shards whole, this one not renamed yet."""
    tar = path / f"shard-{shard:06d}.tar"
    (path / "index.json").unlink()
    for later in sorted(path.glob("shard-*"))[2 * shard + 2 :]:
        later.unlink()
    tar.with_suffix(".rows.json").unlink()
    tar.rename(tar.with_name(tar.name + ".partial")).write_bytes(b"half a tar")


def before_sidecar(path: Path) -> None:
    """Killed when the tar was renamed and its row list was not written."""
    (path / "index.json").unlink()
    (path / "shard-000001.rows.json").unlink()


def before_index(path: Path) -> None:
    (path / "index.json").rename(path / "index.json.partial")


def without_tar(path: Path) -> None:
    (path / "index.json").unlink()
    (path / "shard-000001.tar").unlink()


def short_tar(path: Path) -> None:
    (path / "index.json").unlink()
    tar = path / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])


def empty_sidecar(path: Path) -> None:
    (path / "index.json").unlink()
    (path / "shard-000001.rows.json").write_bytes(b"")


@pytest.mark.parametrize(
    ("wound", "asked"),
    [
        (lambda path: kill_in_shard(path, 0), range(11)),
        (lambda path: kill_in_shard(path, 1), range(4, 11)),
        (lambda path: kill_in_shard(path, 2), range(8, 11)),
        (before_sidecar, range(4, 8)),
        (before_index, range(0)),
        (without_tar, range(4, 8)),
        (short_tar, range(4, 8)),
        (empty_sidecar, range(4, 8)),
    ],
)
def test_an_interrupted_pack_is_refused_then_resumes_to_the_same_bytes(
    packed: ImageSet, tools: Any, wound: Callable[[Path], None], asked: range
) -> None:
    whole = tools.snapshot(packed.place.path)
    wound(packed.place.path)
    with tools.refused(ImageSetError, "was not finished", path=packed.place):
        open_images(packed.place.path)
    calls: list[int] = []

    def get(row: int) -> Sample:
        calls.append(row)
        return tools.sample(row)

    tools.pack(packed.place.path, get)
    assert calls == list(asked)
    assert tools.snapshot(packed.place.path) == whole


def test_an_exception_while_packing_leaves_a_set_that_resumes(tmp_path: Path, tools: Any) -> None:
    def failing(row: int) -> Sample:
        if row == 6:
            raise KeyboardInterrupt
        return tools.sample(row)

    with pytest.raises(KeyboardInterrupt):
        tools.pack(tmp_path / "set", failing)
    with tools.refused(ImageSetError, "was not finished", path=tmp_path / "set"):
        open_images(tmp_path / "set")
    resumed = tools.pack(tmp_path / "set")
    assert tools.snapshot(resumed.place.path) == tools.snapshot(tools.pack(tmp_path / "whole").place.path)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.rows.json"])
def test_a_missing_file_is_refused_and_packing_again_mends_it(
    packed: ImageSet, tools: Any, name: str
) -> None:
    whole = tools.snapshot(packed.place.path)
    (packed.place.path / name).unlink()
    tar = packed.place.path / "shard-000001.tar"
    with tools.refused(ImageSetError, path=tar, shard=1, rows=range(4, 8)):
        open_images(packed.place.path)
    (packed.place.path / "index.json").unlink()
    tools.pack(packed.place.path)
    assert tools.snapshot(packed.place.path) == whole


def test_a_finished_set_is_left_alone(packed: ImageSet, tools: Any) -> None:
    seen: list[int] = []
    stamps = {file: file.stat().st_mtime_ns for file in packed.place.path.iterdir()}
    tools.pack(packed.place.path, lambda row: pytest.fail("asked again"), progress=seen.append)
    assert stamps == {file: file.stat().st_mtime_ns for file in packed.place.path.iterdir()}
    assert sum(seen) == tools.rows


def test_another_set_is_not_overwritten_finished_or_not(packed: ImageSet, tools: Any) -> None:
    before = tools.snapshot(packed.place.path)
    view = {"size": 16, "resize": "crop"}
    with tools.refused(ImageSetError, path=packed.place, fields={"view": (packed.view, view)}):
        tools.pack(packed.place.path, view=view)
    assert tools.snapshot(packed.place.path) == before
    (packed.place.path / "index.json").unlink()
    with tools.refused(ImageSetError, path=packed.place, fields={"rows_per_shard": (4, 8)}):
        tools.pack(packed.place.path, rows_per_shard=8)


# ---- unfit keys


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "ä", "a b", "a\n", "../a"])
def test_unfit_keys_are_refused(tmp_path: Path, tools: Any, key: str) -> None:
    with tools.refused(ImageSetError, "use only letters", rows=range(1), key=key):
        tools.pack(tmp_path / "set", lambda row: dataclasses.replace(tools.sample(row), key=key))


@pytest.mark.parametrize("row", [2, 9])
def test_repeated_keys_are_refused_and_the_corrected_source_packs(
    tmp_path: Path, tools: Any, row: int
) -> None:
    def twice(asked: int) -> Sample:
        return dataclasses.replace(tools.sample(asked), key=tools.sample(1 if asked == row else asked).key)

    place = tmp_path / "set"
    with tools.refused(
        ImageSetError, f"rows 1 and {row}", path=place, rows=range(row, row + 1), key="img-0001"
    ):
        tools.pack(tmp_path / "set", twice)
    assert len(tools.pack(tmp_path / "set")) == tools.rows


# ---- damage


@pytest.mark.parametrize("left", [None, 0, 700])
def test_missing_or_short_tars_are_refused_on_opening(packed: ImageSet, tools: Any, left: int | None) -> None:
    tar = packed.place.path / "shard-000001.tar"
    data = tar.read_bytes()
    tar.unlink() if left is None else tar.write_bytes(data[:left])
    with tools.refused(ImageSetError, path=tar, shard=1, rows=range(4, 8)):
        open_images(packed.place.path)


def test_a_changed_row_list_is_refused_when_read(packed: ImageSet, tools: Any) -> None:
    file = packed.place.path / "shard-000001.rows.json"
    file.write_text(file.read_text().replace("img-0005", "img-0006"))
    images = open_images(packed.place.path)
    with tools.refused(ImageSetError, path=file):
        images[5]


def test_bytes_that_do_not_decode_name_the_row(packed: ImageSet, tools: Any) -> None:
    tar = packed.place.path / "shard-000001.tar"
    for extension in ("png", "json"):
        whole = tar.read_bytes()
        entries = json.loads((packed.place.path / "shard-000001.rows.json").read_text())["rows"]
        place = next(row for row in entries if row["key"] == "img-0005")["members"][extension]
        data = bytearray(whole)
        data[place[0] : place[0] + place[1]] = b"\xff" * place[1]
        tar.write_bytes(data)
        with tools.refused(ImageSetError, path=tar, shard=1, rows=range(5, 6), key="img-0005"):
            open_images(packed.place.path)[5]
        tar.write_bytes(whole)


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_any_flipped_bit_of_a_member_is_an_error_that_names_the_row(
    tmp_path: Path, tools: Any, image_format: str
) -> None:
    """JPEG and JSON hold no checksum: without the row list's, most flips read back as other pixels or boxes."""
    images = tools.pack(tmp_path / "set", image_format=image_format)
    tar = images.place.path / "shard-000001.tar"
    whole = tar.read_bytes()
    members = json.loads((images.place.path / "shard-000001.rows.json").read_text())["rows"][1]["members"]
    for extension, (offset, length, _) in members.items():
        for position in np.linspace(offset, offset + length - 1, 25, dtype=int):
            data = bytearray(whole)
            data[position] ^= 1 << (position % 8)
            tar.write_bytes(data)
            told = f"checksum of its {extension} differs"
            with tools.refused(ImageSetError, told, path=tar, shard=1, rows=range(5, 6), key="img-0005"):
                open_images(images.place.path)[5]
    tar.write_bytes(whole)


def test_row_lists_without_checksums_are_refused_and_packing_again_mends_them(
    packed: ImageSet, tools: Any
) -> None:
    before = tools.snapshot(packed.place.path)
    index = json.loads((packed.place.path / "index.json").read_text())
    for shard in index["shards"]:
        file = (packed.place.path / shard["name"]).with_suffix(".rows.json")
        rows = json.loads(file.read_text())
        rows.pop("seal")
        for row in rows["rows"]:
            row["members"] = {name: place[:2] for name, place in row["members"].items()}
        file.write_bytes(seal(rows))
        shard["rows_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    index.pop("seal")
    (packed.place.path / "index.json").write_bytes(seal(index))
    with tools.refused(
        ImageSetError, ".2: Field required", path=packed.place.path / "shard-000000.rows.json"
    ):
        open_images(packed.place.path).read_images([0])
    tools.pack(packed.place.path)
    assert tools.snapshot(packed.place.path) == before


def test_index_that_is_newer_or_not_json_is_refused(packed: ImageSet, tools: Any) -> None:
    file = packed.place.path / "index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"schema_version": 2}))
    with tools.refused(ImageSetError, path=file, fields={"schema_version": (2, 1)}):
        open_images(packed.place.path)
    for text in ("", "{", "{}"):
        file.write_text(text)
        with tools.refused(ImageSetError, path=file, fields=None):
            open_images(packed.place.path)


def test_a_folder_without_a_set(tmp_path: Path, tools: Any) -> None:
    with tools.refused(ImageSetError, "is not there", path=tmp_path):
        open_images(tmp_path)


def test_file_urls_open(packed: ImageSet) -> None:
    assert len(open_images(f"file://{packed.place.path}")) == len(packed)


def test_moved_sets_open(packed: ImageSet, tmp_path: Path) -> None:
    shutil.move(packed.place.path, tmp_path / "elsewhere")
    assert open_images(tmp_path / "elsewhere").fingerprint == packed.fingerprint


def test_masks_are_viewable_by_any_reader(packed: ImageSet, tools: Any) -> None:
    import tarfile

    with tarfile.open(packed.place.path / "shard-000000.tar") as archive:
        file = archive.extractfile("img-0001.mask.png")
        assert file is not None
        assert np.array_equal(np.asarray(Image.open(file)), tools.sample(1).mask)
