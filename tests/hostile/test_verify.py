"""`verify` means it: records that are sealed and lie are found, with exit code 3 (a07, a21)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from artifacts import open_images, open_store
from artifacts.packing import write_images

Change = Callable[[dict[str, Any]], object]


def no_shards(manifest: dict[str, Any]) -> None:
    manifest["shards"] = []


def one_shard_thrice(manifest: dict[str, Any]) -> None:
    manifest["shards"] = [manifest["shards"][0]] * 3


def shards_exchanged(manifest: dict[str, Any]) -> None:
    manifest["shards"][0], manifest["shards"][1] = manifest["shards"][1], manifest["shards"][0]


def shards_exchanged_by_name(manifest: dict[str, Any]) -> None:
    a, b = manifest["shards"][:2]
    a["arrays"], b["arrays"] = b["arrays"], a["arrays"]


def checksums_exchanged(manifest: dict[str, Any]) -> None:
    a, b = (shard["arrays"]["logits"] for shard in manifest["shards"][:2])
    for field in ("sha256", "checksums", "bytes"):
        a[field], b[field] = b[field], a[field]


def a_gap(manifest: dict[str, Any]) -> None:
    manifest["shards"][1]["start"] += 1


def an_overlap(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["stop"] += 1


def one_too_many(manifest: dict[str, Any]) -> None:
    manifest["shards"].append({**manifest["shards"][2], "shard": 3, "start": 12, "stop": 12})


def the_last_is_missing(manifest: dict[str, Any]) -> None:
    manifest["shards"].pop()


def fewer_rows(manifest: dict[str, Any]) -> None:
    manifest["shape"]["rows"] = 8


def more_rows(manifest: dict[str, Any]) -> None:
    manifest["shape"]["rows"] = 12


def another_split_into_shards(manifest: dict[str, Any]) -> None:
    manifest["shape"]["rows_per_shard"] = 5


def other_classes(manifest: dict[str, Any]) -> None:
    manifest["shape"]["classes"] = 5


def an_array_is_missing(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["arrays"].pop("map_scale")


def other_keys(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["keys_sha256"] = "0" * 64


def dead_maps(manifest: dict[str, Any]) -> None:
    manifest["dead_maps"] = 7


def checksums_of_fewer_chunks(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["arrays"]["logits"]["checksums"] = ""


MANIFESTS: list[Change] = [
    no_shards,
    one_shard_thrice,
    shards_exchanged,
    shards_exchanged_by_name,
    checksums_exchanged,
    a_gap,
    an_overlap,
    one_too_many,
    the_last_is_missing,
    fewer_rows,
    more_rows,
    another_split_into_shards,
    other_classes,
    an_array_is_missing,
    other_keys,
    dead_maps,
    checksums_of_fewer_chunks,
]


@pytest.mark.parametrize("change", MANIFESTS, ids=lambda change: change.__name__)
def test_a_manifest_that_lies(world: Any, change: Change) -> None:
    """The commit records lie alike."""
    world.lie(change)
    shards = json.loads((world.store / "manifest.json").read_bytes())["shards"]
    for number, shard in enumerate(shards[:3]):
        world.reseal(
            world.store / f"commits/{number:06d}.json", lambda record, shard=shard: record.update(shard)
        )
    world.refused("verify", world.store, code=3)


def the_last_tar_is_missing(index: dict[str, Any]) -> None:
    index["shards"].pop()


def an_empty_tar(index: dict[str, Any]) -> None:
    index["shards"][2]["rows"] = 0


def a_tar_thrice(index: dict[str, Any]) -> None:
    index["shards"] = [index["shards"][0]] * 3


def classes_by_number(index: dict[str, Any]) -> None:
    index["classes"] = 5


def classes_by_letter(index: dict[str, Any]) -> None:
    index["classes"] = "abc"


def tars_by_name(index: dict[str, Any]) -> None:
    index["shards"] = {shard["name"]: shard for shard in index["shards"]}


def no_rows(index: dict[str, Any]) -> None:
    index["rows"], index["shards"] = 0, []


INDEXES: list[Change] = [
    no_shards,
    no_rows,
    the_last_tar_is_missing,
    an_empty_tar,
    a_tar_thrice,
    shards_exchanged,
    lambda index: index.update(rows=9),
    lambda index: index.update(rows=11),
    lambda index: index.update(rows_per_shard=5),
    classes_by_number,
    classes_by_letter,
    tars_by_name,
    lambda index: index.update(view=None),
    lambda index: index["view"].update(size=32),
]


@pytest.mark.parametrize("change", INDEXES)
def test_an_index_that_lies(world: Any, change: Change) -> None:
    world.reseal(world.images / "index.json", change)
    world.refused("verify", world.images, code=3)
    world.refused("verify", world.store, "--images", world.images, code=3)


def another_label(rows: dict[str, Any]) -> None:
    rows["rows"][0]["label"] = 2


def no_label(rows: dict[str, Any]) -> None:
    rows["rows"][0]["label"] = None


def a_list_of_labels(rows: dict[str, Any]) -> None:
    rows["rows"][0]["label"] = [0]


def a_group(rows: dict[str, Any]) -> None:
    rows["rows"][0]["group"] = 1


def another_image(rows: dict[str, Any]) -> None:
    rows["rows"][0]["members"]["png"] = rows["rows"][1]["members"]["png"]


def another_mask(rows: dict[str, Any]) -> None:
    rows["rows"][0]["members"]["mask.png"] = rows["rows"][1]["members"]["mask.png"]


def a_mask_less(rows: dict[str, Any]) -> None:
    rows["rows"][1]["members"].pop("mask.png")


def the_mask_as_image(rows: dict[str, Any]) -> None:
    rows["rows"][1]["members"]["png"] = rows["rows"][1]["members"]["mask.png"]


def rows_exchanged(rows: dict[str, Any]) -> None:
    rows["rows"][0], rows["rows"][1] = rows["rows"][1], rows["rows"][0]


def keys_exchanged(rows: dict[str, Any]) -> None:
    a, b = rows["rows"][:2]
    a["key"], b["key"] = b["key"], a["key"]


def a_row_less(rows: dict[str, Any]) -> None:
    rows["rows"].pop()


def a_row_twice(rows: dict[str, Any]) -> None:
    rows["rows"].append(rows["rows"][0])


def another_tar(rows: dict[str, Any]) -> None:
    rows["tar"]["sha256"] = "0" * 64


def past_the_end(rows: dict[str, Any]) -> None:
    rows["rows"][0]["members"]["png"][0] = rows["tar"]["bytes"]


ROWS: list[Change] = [
    another_label,
    no_label,
    a_list_of_labels,
    a_group,
    another_image,
    another_mask,
    a_mask_less,
    the_mask_as_image,
    rows_exchanged,
    keys_exchanged,
    a_row_less,
    a_row_twice,
    another_tar,
    past_the_end,
]


@pytest.mark.parametrize("change", ROWS, ids=lambda change: change.__name__)
def test_a_row_list_that_lies(world: Any, change: Change) -> None:
    """a21: labels are in no fingerprint, but the tar that holds them too is."""
    world.mislabel(change)
    world.refused("verify", world.images, code=3)


def test_two_shards_with_the_same_key(world: Any, tools: Any) -> None:
    """Packing refuses it; a stranger's packer need not."""
    import shutil

    for start in (0, 4):
        folder = world.strange / f"images/from-{start}"
        write_images(folder, tools.packing(count=4, get=lambda row: tools.sample(row)))
    index = json.loads((world.strange / "images/from-0/index.json").read_bytes())
    tar = index["shards"][0]
    both = world.strange / "images/both"
    shutil.copytree(world.strange / "images/from-0", both)
    for suffix in ("tar", "rows.json"):
        shutil.copy(both / f"shard-000000.{suffix}", both / f"shard-000001.{suffix}")
    world.reseal(
        both / "index.json",
        lambda content: content.update(rows=8, shards=[tar, {**tar, "name": "shard-000001.tar"}]),
    )
    world.reseal(both / "packing.json", lambda content: content.update(count=8))
    assert "2 rows have the key img-0000" in world.refused("verify", both, code=3)


@pytest.mark.parametrize("field", ["view", "classes", "count", "rows_per_shard", "source", "format"])
def test_a_packing_of_something_else(world: Any, field: str) -> None:
    other = {
        "view": {"size": 8},
        "classes": ["x"],
        "count": 9,
        "rows_per_shard": 5,
        "source": 7,
        "format": "gif",
    }
    world.reseal(world.images / "packing.json", lambda packing: packing.update({field: other[field]}))
    assert "packing.json is missing or changed" in world.refused("verify", world.images, code=3)


def test_the_bytes_that_are_decoded_are_those_that_are_hashed(world: Any) -> None:
    """A tar that is another one of the same size, with a row list and an index that fit only its own checksum."""
    import hashlib

    tar = world.images / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[100] ^= 1
    tar.write_bytes(data)
    world.mislabel(lambda rows: rows["tar"].update(sha256=hashlib.sha256(data).hexdigest()))
    world.refused("verify", world.images, code=3)


def test_sound_ones_are_ok(world: Any) -> None:
    assert world("verify", world.images).code == world("verify", world.store).code == 0
    assert len(open_store(world.store)) == len(open_images(world.images)) == 10
