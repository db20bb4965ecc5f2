"""Names that a file holds are never paths: what is opened, written and removed is named by position and by hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import ImageSetError, StoreError, cache
from artifacts.errors import DamagedStore
from artifacts.images import load_images
from artifacts.places import place
from artifacts.store import load_store

Change = Callable[[dict[str, Any]], object]

PATHS = [
    "{home}/thesis.txt",
    "../../home/thesis.txt",
    "../" * 12 + "{home}/.bashrc",
    "{home}/thesis.txt/../thesis.txt",
    "..",
    "",
    "A" * 64,
    "0" * 63,
    "0" * 64 + "\n",
    "0" * 64 + "/../../home/thesis.txt",
    "ａ" * 64,
]


def in_arrays(field: str, value: object) -> Change:
    return lambda manifest: [
        item.update({field: value}) for shard in manifest["shards"] for item in shard["arrays"].values()
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["sha256", "path"])
def test_a_manifest_names_no_file(world: Any, path: str, field: str) -> None:
    """a01, a03: the object's checksum was the name of its copy, and the copy that `forget` removed."""
    world.lie(in_arrays(field, path.format(home=world.home)))
    world.refused("verify", f"local://{world.store}", code=3)
    world.refused("inspect", f"local://{world.store}", "--row", 1, "--png", world.root / "cache/x.png")
    world.refused("verify", world.store, code=3)
    world.refused("export", f"local://{world.store}", world.root / "cache/dest")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["sha256", "rows_sha256", "name"])
def test_an_index_names_no_file(world: Any, path: str, field: str) -> None:
    """a01, a02: the tar's name was where an export of it was written."""

    def change(index: dict[str, Any]) -> None:
        index["shards"][1][field] = path.format(home=world.home)

    world.reseal(world.images / "index.json", change)
    for url in (world.images, f"local://{world.images}"):
        world.refused("verify", url, code=3)
        world.refused("inspect", url)
        world.refused("export", f"local://{world.store}", world.root / "cache/dest", "--images", url)


def test_tars_are_called_by_their_position(world: Any) -> None:
    def exchange(index: dict[str, Any]) -> None:
        index["shards"][0]["name"], index["shards"][1]["name"] = "shard-000001.tar", "shard-000000.tar"

    world.reseal(world.images / "index.json", exchange)
    assert "the tar of shard 0 is not called shard-000000.tar" in world.refused("inspect", world.images)


@pytest.mark.parametrize("path", PATHS)
def test_the_tar_of_a_row_list_is_no_path(world: Any, path: str) -> None:
    world.mislabel(lambda rows: rows["tar"].update(sha256=path.format(home=world.home)))
    world.refused("verify", f"local://{world.images}", code=3)
    world.refused("inspect", f"local://{world.images}")


@pytest.mark.parametrize("key", ["../../home/pictures/slip", "{home}/slip", "a b", "", "a\n", "ä", "a.b"])
def test_a_key_is_no_path(world: Any, key: str) -> None:
    """F13: the default name of a picture, and what an export's tar holds."""
    key = key.format(home=world.home)
    world.mislabel(lambda rows: rows["rows"][0].update(key=key))
    world.refused("inspect", world.store, "--key", key)
    world.refused("export", world.store, world.root / "cache/dest")
    world.refused("verify", world.images, code=3)
    with pytest.raises(ImageSetError, match=r"rows\.0\.key"):
        _ = load_images(world.images).keys


@pytest.mark.parametrize("member", ["../x", "exe", "png/../../x", "gif", "eps", ""])
def test_members_are_those_of_a_sample(world: Any, member: str) -> None:
    def change(rows: dict[str, Any]) -> None:
        rows["rows"][0]["members"][member] = [0, 10, 0]

    world.mislabel(change)
    world.refused("export", world.store, world.root / "cache/dest")
    world.refused("verify", world.images, code=3)


def test_array_names_are_those_of_the_plan(world: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        arrays = manifest["shards"][0]["arrays"]
        arrays["../../../home"] = arrays.pop("maps")

    world.lie(change)
    assert "other arrays than the store" in world.refused("inspect", world.store)


@pytest.mark.parametrize("name", ["manifest.json", "draft.json"])
@pytest.mark.parametrize("codec", ["../x", "fp64", "e2kd.", "lossless"])
def test_codecs_are_those_that_there_are(world: Any, name: str, codec: str) -> None:
    world.reseal(world.store / name, lambda record: record["maps"].update(codec=codec))
    if name == "draft.json":
        (world.store / "manifest.json").unlink()
    with pytest.raises(StoreError, match="no codec is called"):
        load_store(world.store)


def test_a_commit_record_that_names_other_files_is_none(world: Any) -> None:
    """`precompute` computes its shard again instead of looking at what it names."""
    from artifacts.writer import StoreWriter

    plan = load_store(world.store).manifest
    for shard, path in enumerate([str(world.home / "thesis.txt"), "../../../../home/thesis.txt"]):
        world.reseal(
            world.store / f"commits/{shard:06d}.json",
            lambda record, path=path: [
                item.update(path=path, bytes=(world.home / "thesis.txt").stat().st_size)
                for item in record["arrays"].values()
            ],
        )
    assert StoreWriter(world.store, plan).committed() == {2}


@pytest.mark.parametrize("name", ["../home/thesis.txt", "0" * 63, "", ".", "objects"])
def test_the_cache_itself_takes_no_other_name(world: Any, name: str) -> None:
    with world.untouched():
        with pytest.raises(ValueError, match="is no sha256"):
            cache.forget(name)
        with pytest.raises(ValueError, match="is no sha256"):
            cache.kept(name, 4, lambda file: file.write_bytes(b"evil") and None)


def test_an_export_that_names_files_elsewhere(world: Any, tmp_path: Path) -> None:
    """Its tars are called by position too: what e2kd.json says besides is refused."""
    world.reseal(world.export / "e2kd.json", lambda about: about["packed"].update(format="../../x"))
    to = (world.root / "cache/i", world.root / "cache/s")
    assert "packed.format" in world.refused("import", world.export, *to)
    world.reseal(world.export / "e2kd.json", lambda about: about.update(tars=["../../home/thesis.txt"]))
    world.refused("import", world.export, *to)


def test_a_sound_store_still_reads(world: Any) -> None:
    """The attacks above start from this."""
    with world.untouched("cache"):
        for url in (world.store, f"local://{world.store}", world.images, f"local://{world.images}"):
            assert world("verify", url).code == 0
            assert world("inspect", url).code == 0
    assert json.loads((world.store / "manifest.json").read_bytes())["shards"]
    world.lie(lambda manifest: manifest.update(shards=[]))
    with pytest.raises(DamagedStore):
        load_store(place(f"local://{world.store}"))
