"""docs/store-format.md is enough: a reader written from it, without our code, reads the same rows."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs.zstd import Zstd

from artifacts import ImageSet, open_store
from artifacts.codecs import get_codec
from artifacts.manifest import CodecInfo, ManifestDraft, StoreShape

LEVELS = {"e2kd.int8": 127, "e2kd.int6": 31, "e2kd.int5": 15}


def sealed(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_bytes())
    seal = content.pop("seal")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == seal
    assert content["schema_version"] == 1 if "schema_version" in content else "shard" in content
    return content


def read_array(store: Path, name: str, manifest: dict[str, Any]) -> np.ndarray:
    about = json.loads((store / name / "zarr.json").read_text())
    shape, dtype = about["shape"], np.dtype(about["data_type"])
    per_shard = about["chunk_grid"]["configuration"]["chunk_shape"][0]
    per_chunk = about["codecs"][0]["configuration"]["chunk_shape"][0]
    chunks = per_shard // per_chunk
    rows: list[np.ndarray] = []
    for record in manifest["shards"]:
        item = record["arrays"][name]
        data = (store / item["path"]).read_bytes()
        assert len(data) == item["bytes"]
        index, crc = data[-16 * chunks - 4 : -4], data[-4:]
        assert struct.pack("<I", google_crc32c.value(index)) == crc
        places = np.frombuffer(index, "<u8").reshape(chunks, 2)
        found = []
        for k, (offset, length) in enumerate(places.tolist()):
            if offset == 2**64 - 1:
                continue
            chunk = data[offset : offset + length]
            assert chunk[-4:].hex() == item["checksums"][8 * k : 8 * k + 8]
            found.append(np.frombuffer(Zstd().decode(chunk), dtype).reshape(per_chunk, *shape[1:]))
        rows.append(np.concatenate(found)[: record["stop"] - record["start"]])
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("maps", "logits"),
    [("fp16", "fp16"), ("int8", "uint12"), ("int6", "fp16"), ("int5", "fp32"), ("lossless", "uint12")],
)
@pytest.mark.parametrize(
    "shape", [{}, {"views": 2, "explained": 3, "channels": 6, "height": 80, "width": 80}]
)
def test_a_reader_written_from_the_document(
    tmp_path: Path, tools: Any, maps: str, logits: str, shape: dict[str, int]
) -> None:
    plan: ManifestDraft = tools.draft(
        maps=CodecInfo(codec=get_codec(maps).codec_id, error_bound="x"),
        logits=CodecInfo(codec=get_codec(logits).codec_id, error_bound="x"),
        shape=StoreShape(**(tools.draft().shape.model_dump() | shape)),
    )
    path = tools.fill(tmp_path / "store", plan).place.path
    manifest = sealed(path / "manifest.json")
    for record in manifest["shards"]:
        assert sealed(path / "commits" / f"{record['shard']:06d}.json") == record
    stored = {name: read_array(path, name, manifest) for name in manifest["shards"][0]["arrays"]}
    q = stored["maps"].astype(np.float32)
    if manifest["maps"]["codec"] in LEVELS:
        q = q * np.abs(q)
    q = q * stored["map_scale"][..., None, None, None]
    z = stored["logits"].astype(np.float32)
    if manifest["logits"]["codec"] == "e2kd.uint12":
        scale = stored["logit_scale"]
        z = z * scale[..., 1:] + scale[..., :1]
    ours = open_store(path).read(range(tools.rows))
    assert np.array_equal(ours.maps, q)
    assert np.array_equal(ours.logits, z)
    assert np.array_equal(ours.explained_class, stored["explained_class"])


def test_an_image_reader_written_from_the_document(packed: ImageSet) -> None:
    index = sealed(packed.place.path / "index.json")
    parts = [index["view"], index["classes"], [[s["rows"], s["sha256"]] for s in index["shards"]]]
    assert hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() == packed.fingerprint
    row = 0
    for shard in index["shards"]:
        tar = (packed.place.path / shard["name"]).read_bytes()
        listed = (packed.place.path / shard["name"]).with_suffix(".rows.json").read_bytes()
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert hashlib.sha256(listed).hexdigest() == shard["rows_sha256"]
        for entry in json.loads(listed)["rows"]:
            members = packed.members(row)
            assert entry["members"].keys() == members.keys()
            for name, (offset, length, crc32) in entry["members"].items():
                assert tar[offset : offset + length] == members[name]
                assert zlib.crc32(members[name]) == crc32
            assert json.loads(members["json"])["label"] == entry["label"]
            row += 1
    assert row == len(packed)
