"""Small files that want to be large: refused at once, with a sentence, in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from artifacts import DamagedStore, open_store
from artifacts.arrays import array_plans, join
from artifacts.manifest import CodecInfo, ObjectRecord, ShardRecord, StoreShape
from artifacts.records import write_record
from artifacts.sealed import parsed, seal, unseal
from artifacts.store import load_store
from artifacts.writer import StoreWriter


def rle(content: int, said: int | None) -> bytes:
    """A Zstandard frame of `content` zeros, 4 bytes for 128 KiB, that says that it is `said` bytes long, or nothing."""
    head = b"\x28\xb5\x2f\xfd"
    head += b"\x00\x58" if said is None else b"\xe0" + struct.pack("<Q", said)
    blocks, left = [], content
    while left:
        size = min(left, 2**17)
        left -= size
        blocks.append(struct.pack("<I", size << 3 | 1 << 1 | (not left))[:3] + b"\0")
    return head + b"".join(blocks)


def put_chunk(world: Any, chunk: bytes, array: str = "maps") -> None:
    """Make it the first chunk of an array, with an index, a record and a manifest that fit."""
    plan = array_plans(load_store(world.store).manifest)[array]
    data = b"".join(join(plan, [chunk]))
    (world.store / plan.object_name(0)).write_bytes(data)
    said = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "checksums": chunk[-4:].hex(),
    }
    world.lie(lambda manifest: manifest["shards"][0]["arrays"][array].update(said))
    world.reseal(world.store / "commits/000000.json", lambda record: record["arrays"][array].update(said))


LENGTH = 4 * 4 * 2  # bytes of a chunk of maps: four rows of 2 x 2 in float16


@pytest.mark.parametrize("said", [None, LENGTH, LENGTH - 1, LENGTH + 1, 0, 3 * 2**30, 2**63, 2**64 - 1])
@pytest.mark.parametrize("content", [3 * 2**30, LENGTH + 1, LENGTH - 1])
def test_a_chunk_that_grows(world: Any, content: int, said: int | None) -> None:
    """a06: 183 kB became 6.6 GB."""
    put_chunk(world, rle(content, said))
    with world.untouched(), world.frugal(), pytest.raises(DamagedStore, match="cannot be read"):
        open_store(world.store).read([0])
    with world.frugal():
        assert "cannot be decoded" in world.refused("verify", world.store, code=3)


def test_a_chunk_of_the_right_length_is_read(world: Any) -> None:
    """The frames above are frames."""
    put_chunk(world, rle(LENGTH, LENGTH))
    assert open_store(world.store).read([0]).maps.max() == 0


@pytest.mark.parametrize(
    "places", [(0, 2**40), (2**40, 16), (2**63, 2**63), (2**64 - 1, 5), (0, 0), (0, 2**64 - 2)]
)
def test_an_index_of_an_object_that_leads_out_of_it(world: Any, places: tuple[int, int]) -> None:
    import google_crc32c

    record = load_store(world.store).manifest.shards[0].arrays["maps"]
    file = world.store / record.path
    index = struct.pack("<QQ", *places)
    data = file.read_bytes()[: -len(index) - 4] + index + google_crc32c.value(index).to_bytes(4, "big")
    data = data[:-4] + google_crc32c.value(index).to_bytes(4, "little")
    file.write_bytes(data)
    said = {"sha256": hashlib.sha256(data).hexdigest()}
    world.lie(lambda manifest: manifest["shards"][0]["arrays"]["maps"].update(said))
    with world.frugal(), pytest.raises(DamagedStore):
        open_store(world.store).read([0])
    world.refused("verify", world.store, code=3)


def test_a_shard_of_large_maps_is_checked_one_by_one(world: Any, tools: Any) -> None:
    """Each chunk is what the shape says, 1 MiB of zeros in 50 bytes; all at once, decoded, they are 256 MiB."""
    rows = 64
    shape = StoreShape(rows=rows, rows_per_shard=rows, classes=3, channels=1, height=1024, width=1024)
    plan = tools.draft("1" * 64).model_copy(
        update={"shape": shape, "maps": CodecInfo(codec="e2kd.int8", error_bound="x")}
    )
    writer = StoreWriter(world.strange / "large", plan)
    writer.create()
    arrays = {}
    for name, array in writer.plans.items():
        length = array.chunk_rows * array.row_bytes
        chunks = [rle(length, length)] * (rows // array.chunk_rows)
        data = b"".join(join(array, chunks))
        writer.place.write(array.object_name(0), data)
        digest = hashlib.sha256(data).hexdigest()
        sums = "".join(chunk[-4:].hex() for chunk in chunks)
        arrays[name] = ObjectRecord(path=array.object_name(0), bytes=len(data), sha256=digest, checksums=sums)
    record = ShardRecord(shard=0, start=0, stop=rows, keys_sha256="0" * 64, dead_maps=rows, arrays=arrays)
    write_record(writer.place, "commits/000000.json", record)
    writer.finish()
    with world.frugal():
        assert world("verify", writer.place).code == 0


DEEP = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"9" * 4000 + b"}",
    b'{"a": 1e400}',
    b'{"a": NaN, "seal": ""}',
    b'{"a": -Infinity}',
    b'{"schema_version": true}',
    b'{"schema_version": ' + b"9" * 4000 + b"}",
    b'{"schema_version": 1e400}',
    b'{"schema_version": "1"}',
    b"\xff\xfe[",
    b"\x00" * 100,
    b"",
    b"7",
    b"null",
    b'"' + b"a" * 100_000 + b'"',
    b'{"a": "\\ud800"}',
]


def nested(levels: int) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for _ in range(levels):
        content = {"a": content}
    return content


@pytest.mark.parametrize(
    "name",
    [
        "images/train/index.json",
        "images/train/shard-000000.rows.json",
        "images/train/packing.json",
        "stores/s/train/manifest.json",
        "stores/s/train/draft.json",
        "stores/s/train/commits/000001.json",
        "export/e2kd.json",
        "export/shard-000000.json",
    ],
)
def test_json_that_is_too_deep_or_too_large(world: Any, name: str) -> None:
    """F15"""
    to = (world.root / "cache/i", world.root / "cache/s")
    folder = world.images if name.startswith("images") else world.store
    for data in DEEP:
        (world.strange / name).write_bytes(data)
        with world.frugal():
            if name.startswith("export"):
                world.refused("import", world.export, *to)
            else:
                world.refused("verify", folder, code=3)


@pytest.mark.parametrize("levels", [41, 500, 900])
@pytest.mark.parametrize("name", ["images/train/index.json", "stores/s/train/manifest.json"])
def test_settings_that_are_too_deep_and_sealed(world: Any, name: str, levels: int) -> None:
    content = json.loads((world.strange / name).read_bytes())
    content.pop("seal")
    content["view"]["x"] = nested(levels)
    (world.strange / name).write_bytes(seal(content))
    world.refused("verify", world.strange / name.rpartition("/")[0], code=3)
    assert "levels" in world.refused("inspect", world.strange / name.rpartition("/")[0])


@pytest.mark.parametrize("value", [10**30, -(10**30), 10**4000])
def test_settings_with_a_huge_number(world: Any, value: int) -> None:
    world.lie(lambda manifest: manifest["explainer"]["settings"].update(x=value))
    assert "more than 64 bits" in world.refused("inspect", world.store)


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_a_record_that_is_a_sparse_file(world: Any, name: str) -> None:
    folder: Path = world.images if name == "index.json" else world.store
    os.truncate(folder / name, 40 * 2**30)
    for url in (folder, f"local://{folder}"):
        with world.frugal():
            assert "bytes, which no record has" in world.refused("inspect", url)
            world.refused("verify", url, code=3)


def test_a_tar_that_is_a_sparse_file(world: Any) -> None:
    """Its size is not that of the index."""
    os.truncate(world.images / "shard-000000.tar", 40 * 2**30)
    with world.frugal():
        world.refused("verify", world.images, code=3)
    os.truncate(world.export / "shard-000000.tar", 40 * 2**30)
    with world.frugal():
        world.refused("import", world.export, world.root / "cache/i", world.root / "cache/s")


def test_a_seal_is_of_bounded_depth() -> None:
    assert unseal(seal(nested(39)), 1) == nested(39)
    with pytest.raises(ValueError, match="levels"):
        unseal(seal(nested(42)), 1)
    with pytest.raises(ValueError, match="nested"):
        parsed(b"[" * 100_000)
