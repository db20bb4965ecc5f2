"""The arrays of a store and the bytes of a shard object: Zarr v3's `sharding_indexed` around Zstandard chunks.

We make and read these bytes ourselves, because each one must be durable, checked and fast: zarr-python neither syncs
nor notices a lost chunk, and takes 2 ms for a row. Zarr makes the metadata; any Zarr v3 reader opens the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.storage import MemoryStore

from artifacts.codecs import get_codec
from artifacts.manifest import Manifest, ManifestDraft, ShardRecord, StoreShape
from artifacts.places import View

LEVEL = 1
"""Of Zstandard: higher ones take longer, in both directions, for nothing (benchmarks/store.py)."""

_BIG_ROW = 64 * 1024
_CHUNK_ROWS = 64
_MISSING = 2**64 - 1
_ZSTD = Zstd(level=LEVEL, checksum=True)


ABSENT = -2
"""In the array `explained_class`: this sample has fewer explained classes. -1 is the fill value: missing data."""


@dataclass(frozen=True)
class ArrayPlan:
    """One array: `tail` is the shape of a row, `names` those of all dimensions."""

    name: str
    tail: tuple[int, ...]
    names: tuple[str, ...]
    dtype: np.dtype[Any]
    fill: float | int
    chunk_rows: int
    shape: StoreShape

    @property
    def row_bytes(self) -> int:
        return math.prod(self.tail) * self.dtype.itemsize

    @property
    def chunks_per_shard(self) -> int:
        return self.shape.rows_per_shard // self.chunk_rows

    def object_name(self, shard: int) -> str:
        """Where zarr looks for a shard, under the store's folder."""
        return "/".join([self.name, "c", str(shard), *["0"] * len(self.tail)])

    def metadata(self) -> bytes:
        """zarr.json."""
        return _metadata(self)[f"{self.name}/zarr.json"]


def array_plans(draft: ManifestDraft) -> dict[str, ArrayPlan]:
    """Every array of a store, in the order in which a shard's objects are written."""
    s = draft.shape
    logits, maps = get_codec(draft.logits.codec), get_codec(draft.maps.codec)
    answers = ("sample", "view", "explained")
    plans: list[tuple[str, tuple[int, ...], tuple[str, ...], Any, float | int]] = [
        ("logits", (s.views, s.classes), ("sample", "view", "class"), logits.stored_dtype, logits.fill_value),
        ("explained_class", (s.views, s.explained), answers, np.dtype("int32"), -1),
        (
            "maps",
            (s.views, s.explained, s.channels, s.height, s.width),
            (*answers, "channel", "y", "x"),
            maps.stored_dtype,
            maps.fill_value,
        ),
        ("map_scale", (s.views, s.explained), answers, np.dtype("float32"), float("nan")),
    ]
    if logits.codec_id == "e2kd.uint12":
        plans.append(
            ("logit_scale", (s.views, 2), ("sample", "view", "affine"), np.dtype("float32"), float("nan"))
        )
    return {
        name: ArrayPlan(name, tail, names, dtype, fill, _chunk_rows(tail, dtype, s.rows_per_shard), s)
        for name, tail, names, dtype, fill in plans
    }


def check_shards(manifest: Manifest) -> None:
    """Raises ValueError unless the commit records are those of shards 0, 1, 2, ... of the manifest's own shape."""
    if len(manifest.shards) != manifest.shape.shards:
        raise ValueError(f"it lists {len(manifest.shards)} shards, its rows make {manifest.shape.shards}")
    plans = array_plans(manifest)
    for shard, record in enumerate(manifest.shards):
        check_record(plans, shard, record)
    if manifest.dead_maps != sum(record.dead_maps for record in manifest.shards):
        raise ValueError("its dead maps are not the sum of the shards'")


def check_record(plans: dict[str, ArrayPlan], shard: int, record: ShardRecord) -> None:
    """Raises ValueError unless this can be the commit record of that shard: its rows, arrays and objects' names."""
    rows = plans["logits"].shape.shard_rows(shard)
    if not rows or (record.shard, record.start, record.stop) != (shard, rows.start, rows.stop):
        said = f"shard {record.shard} with rows {record.start} to {record.stop - 1}"
        raise ValueError(f"its shard {shard} says that it is {said}")
    if record.arrays.keys() != plans.keys() or record.dead_maps > len(rows):
        raise ValueError(f"shard {shard} has other arrays than the store, or more dead maps than rows")
    for name, item in record.arrays.items():
        chunks = -(-len(rows) // plans[name].chunk_rows)
        if item.path != plans[name].object_name(shard) or len(item.checksums) != 8 * chunks:
            raise ValueError(f"array {name} of shard {shard} is not the object that its shape says")


def group_metadata() -> bytes:
    """zarr.json of the store's folder."""
    return _stored(lambda store: zarr.create_group(store, zarr_format=3))["zarr.json"]


def compress(plan: ArrayPlan, rows: np.ndarray) -> bytes:
    """One chunk: up to `chunk_rows` rows of the plan's dtype, padded with its fill value."""
    if len(rows) < plan.chunk_rows:
        padding = np.full((plan.chunk_rows - len(rows), *plan.tail), plan.fill, plan.dtype)
        rows = np.concatenate([rows, padding])
    packed: bytes = _ZSTD.encode(np.ascontiguousarray(rows, plan.dtype))
    return packed


def join(plan: ArrayPlan, chunks: Sequence[bytes]) -> list[bytes]:
    """The parts of a shard object: its chunks, then the index (offset and length of each) and the index's CRC-32C."""
    index = np.full((plan.chunks_per_shard, 2), _MISSING, "<u8")
    lengths = [len(chunk) for chunk in chunks]
    index[: len(chunks), 0] = np.cumsum([0, *lengths[:-1]])
    index[: len(chunks), 1] = lengths
    data = index.tobytes()
    return [*chunks, data, google_crc32c.value(data).to_bytes(4, "little")]


def checksum(chunk: bytes) -> bytes:
    """The four bytes that end a Zstandard frame: the hash of what it decompresses to."""
    return chunk[-4:]


def read_index(plan: ArrayPlan, view: View, size: int) -> np.ndarray:
    """Offsets and lengths u64 [chunks,2] of a shard object of `size` bytes. Raises ValueError if it is damaged."""
    length = 16 * plan.chunks_per_shard
    if size < length + 4:
        raise ValueError("it is too short for its index")
    tail = view[size - length - 4 : size]
    if len(tail) != length + 4 or google_crc32c.value(tail[:-4]).to_bytes(4, "little") != tail[-4:]:
        raise ValueError("the checksum of its index differs")
    return np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)


def decompress(plan: ArrayPlan, view: View, size: int, place: np.ndarray, expected: bytes) -> np.ndarray:
    """Rows [chunk_rows, *tail] of the chunk at `place` (offset, length) of an object of `size` bytes.

    Decompresses into memory of that shape and not a byte more. Raises ValueError if it is damaged.
    """
    offset, length = int(place[0]), int(place[1])
    if offset == _MISSING:
        raise ValueError("it lacks a chunk")
    if offset + length > size:
        raise ValueError("its index leads past its end")
    chunk = view[offset : offset + length]
    if len(chunk) != length or checksum(chunk) != expected:
        raise ValueError("its bytes are not those that were written")
    if _content_size(chunk) != plan.chunk_rows * plan.row_bytes:
        raise ValueError("a chunk has the wrong length")
    data = np.empty((plan.chunk_rows, *plan.tail), plan.dtype)
    try:
        _ZSTD.decode(chunk, out=data)
    except Exception as error:  # numcodecs raises whatever it raises
        raise ValueError(f"it cannot be decompressed: {error}") from None
    return data


def _content_size(frame: bytes) -> int:
    """Bytes that a Zstandard frame says it decompresses to (RFC 8878, 3.1.1.1); -1 if it does not say."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 6:
        return -1
    single, kind = frame[4] >> 5 & 1, frame[4] >> 6
    length = (1 if single else 0, 2, 4, 8)[kind]
    start = 5 + (not single) + (0, 1, 2, 4)[frame[4] & 3]
    if not length:
        return -1
    return int.from_bytes(frame[start : start + length], "little") + (256 if kind == 1 else 0)


def _chunk_rows(tail: tuple[int, ...], dtype: np.dtype[Any], rows_per_shard: int) -> int:
    """1 for full-resolution maps, which are read alone; else the largest divisor of a shard up to 64."""
    if math.prod(tail) * dtype.itemsize > _BIG_ROW:
        return 1
    return max(n for n in range(1, min(_CHUNK_ROWS, rows_per_shard) + 1) if rows_per_shard % n == 0)


def _metadata(plan: ArrayPlan) -> dict[str, bytes]:
    return _stored(
        lambda store: zarr.create_array(
            store,
            name=plan.name,
            zarr_format=3,
            shape=(plan.shape.rows, *plan.tail),
            dtype=plan.dtype,
            chunks=(plan.chunk_rows, *plan.tail),
            shards=(plan.shape.rows_per_shard, *plan.tail),
            dimension_names=plan.names,
            fill_value=plan.fill,
            serializer=BytesCodec(),
            compressors=[ZstdCodec(level=LEVEL, checksum=True)],
            filters=[],
        )
    )


def _stored(make: Any) -> dict[str, bytes]:
    """What zarr writes, as bytes."""
    objects: dict[str, Any] = {}
    make(MemoryStore(objects))
    return {name: buffer.to_bytes() for name, buffer in objects.items()}
