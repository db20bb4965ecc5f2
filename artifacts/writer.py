"""StoreWriter: fills a teacher store shard by shard, so that a kill at any moment loses at most the open shards."""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import NamedTuple

import numpy as np

from artifacts.arrays import (
    ABSENT,
    ArrayPlan,
    array_plans,
    check_record,
    checksum,
    compress,
    group_metadata,
    join,
)
from artifacts.codecs import encode_logits, encode_maps, get_codec
from artifacts.errors import DamagedStore, DataError, StoreError
from artifacts.manifest import Manifest, ManifestDraft, ObjectRecord, ShardRecord
from artifacts.places import Place, Url, place
from artifacts.records import (
    MEND,
    check_same,
    commit_name,
    incomplete,
    read_record,
    write_record,
    wrong_sizes,
)
from artifacts.rows import NO_CLASS, TeacherRows, dead_rows

LIBRARIES = ("e2kd", "zarr", "numcodecs", "numpy", "torch", "torchvision", "timm")
_BATCHES_AHEAD = 2
_COMMIT = re.compile(r"commits/([0-9]{6,9})\.json")


class StoreWriter:
    """Fills a store. Any number of processes may `create` the same one and write different shards of it."""

    def __init__(self, url: Url, draft: ManifestDraft) -> None:
        self.place, self.draft = place(url), draft
        self.plans = array_plans(draft)

    def create(self) -> None:
        """Make the empty store, or accept the one that is there if it is about the same.

        Raises MismatchedStore, with the differing fields, if it is not.
        """
        if self.place.exists("draft.json"):
            check_same(self.place, read_record(self.place, "draft.json", ManifestDraft), self.draft)
            self.write_metadata()
            return
        if any(name.startswith("commits/") for name in self.place.sizes()):
            raise StoreError(
                f"{self.place} has shards but no draft.json: delete the folder and precompute again",
                path=self.place,
            )
        self.write_metadata()
        write_record(self.place, "draft.json", self.draft)

    def write_metadata(self) -> None:
        """Write every zarr.json that is not there as it should be."""
        files = {f"{name}/zarr.json": plan.metadata() for name, plan in self.plans.items()}
        for name, data in {**files, "zarr.json": group_metadata()}.items():
            if not self.place.exists(name) or self.place.read(name) != data:
                self.place.write(name, data)

    def committed(self) -> set[int]:
        """Shards that are finished: committed, with every object there in its full size."""
        return set(self._records())

    def has_committed(self, shard: int) -> bool:
        """Whether one shard is finished."""
        try:
            record = self._commit(shard)
        except (FileNotFoundError, DamagedStore):
            return False
        return all(self.place.size(item.path) == item.bytes for item in record.arrays.values())

    def uncommit(self, shard: int) -> None:
        """Have a shard computed again."""
        self.place.remove(commit_name(shard))

    def write_shard(self, shard: int, rows: TeacherRows, keys_sha256: str, keys: Sequence[str]) -> None:
        """Write one shard of every array, make it durable, commit it; a committed one is left alone."""
        with ShardStream(self, threads=1) as stream:
            stream.begin(shard, keys_sha256, keys)
            stream.append(rows)
            stream.end()

    def finish(self) -> Manifest:
        """Write the manifest once every shard is committed. Raises IncompleteStore while one is missing."""
        shape, records = self.draft.shape, self._records()
        if len(records) < shape.shards:
            raise incomplete(self.place, len(records), shape.shards)
        shards = [records[shard] for shard in range(shape.shards)]
        self.place.sweep()
        manifest = Manifest(
            **dict(self.draft),
            dead_maps=sum(record.dead_maps for record in shards),
            shards=shards,
            versions=_versions(),
        )
        if self.place.exists("manifest.json"):
            old = read_record(self.place, "manifest.json", Manifest)
            if old.shards == shards:  # nothing new: the versions that made it stay on record
                return old
        write_record(self.place, "manifest.json", manifest)
        return manifest

    def _commit(self, shard: int) -> ShardRecord:
        """Raises FileNotFoundError, or DamagedStore if it is not a record of that shard."""
        record = read_record(self.place, commit_name(shard), ShardRecord)
        try:
            check_record(self.plans, shard, record)
        except ValueError as error:
            file = f"{self.place}/{commit_name(shard)}"
            raise DamagedStore(f"{file} is damaged ({error}); delete it and {MEND}", path=file) from None
        return record

    def _records(self) -> dict[int, ShardRecord]:
        sizes = self.place.sizes()
        numbers = (_COMMIT.fullmatch(name) for name in sorted(sizes))
        records = {}
        for shard in (int(found[1]) for found in numbers if found):
            with suppress(DamagedStore, FileNotFoundError):  # it is computed again
                record = self._commit(shard)
                if not wrong_sizes(record, sizes):
                    records[shard] = record
        return records


class ShardStream:
    """Encodes, compresses and writes shards in the background while the teacher goes on answering.

    with ShardStream(writer) as stream:
        stream.begin(shard, keys_sha256, keys); stream.append(rows); ...; stream.end()

    Holds a few batches, one shard of compressed bytes, and the one before it while that is being written. Leaving the
    block waits for the last commit; leaving it by an exception (Ctrl-C) lets a running write finish and drops the rest.
    Errors of the background come out of the next call: DataError with the sample's key if the teacher's numbers are not
    finite or do not fit the codec, WriteError if a disk is full.
    """

    def __init__(self, writer: StoreWriter, threads: int | None = None) -> None:
        self._writer = writer
        self._encoders = ThreadPoolExecutor(threads or os.cpu_count() or 1, "encode")
        self._committer = ThreadPoolExecutor(1, "commit")
        self._batches: deque[list[Future[_Chunk]]] = deque()
        self._committing: Future[None] | None = None
        self._open: _OpenShard | None = None

    @property
    def explained(self) -> int:
        """K: explained classes of each row."""
        return self._writer.draft.shape.explained

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait_for_commit()
        finally:
            self._encoders.shutdown(cancel_futures=True)
            self._committer.shutdown(cancel_futures=kind is not None)

    def begin(self, shard: int, keys_sha256: str, keys: Sequence[str]) -> None:
        """Start a shard; `keys` name its samples in errors, `keys_sha256` goes into the commit record."""
        assert self._open is None
        self._open = _OpenShard(shard, keys_sha256, list(keys))

    def append(self, rows: TeacherRows) -> None:
        """The next rows of the open shard. Waits while more than a few batches are being encoded."""
        shard = self._open
        assert shard is not None
        classes = rows.explained_class.astype(np.int32)
        shard.classes.append(np.where(classes == NO_CLASS, ABSENT, classes))
        futures = []
        for name, values in (("logits", rows.logits), ("maps", rows.maps)):
            plan = self._writer.plans[name]
            assert values.shape[1:] == plan.tail
            shard.waiting[name].append(np.asarray(values, np.float32))
            futures += self._submit_full_chunks(shard, plan)
        self._batches.append(futures)
        while len(self._batches) > _BATCHES_AHEAD:
            for future in self._batches.popleft():
                future.result()

    def end(self) -> None:
        """Close the open shard and commit it in the background, after the commit of the shard before it."""
        shard = self._open
        assert shard is not None
        for name in shard.waiting:
            shard.submit_rest(self, self._writer.plans[name])
        self._open = None
        self._wait_for_commit()
        self._committing = self._committer.submit(self._commit, shard)

    def _submit_full_chunks(self, shard: _OpenShard, plan: ArrayPlan) -> list[Future[_Chunk]]:
        waiting = shard.waiting[plan.name]
        if sum(map(len, waiting)) < plan.chunk_rows:
            return []
        rows = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
        full = len(rows) - len(rows) % plan.chunk_rows
        shard.waiting[plan.name] = [rows[full:]] if full < len(rows) else []
        return [
            self.submit(shard, plan, rows[i : i + plan.chunk_rows]) for i in range(0, full, plan.chunk_rows)
        ]

    def submit(self, shard: _OpenShard, plan: ArrayPlan, rows: np.ndarray) -> Future[_Chunk]:
        chunks = shard.chunks[plan.name]
        keys = shard.keys[len(chunks) * plan.chunk_rows :]
        chunks.append(self._encoders.submit(_encode, self._writer.draft, plan, rows, keys))
        return chunks[-1]

    def _wait_for_commit(self) -> None:
        if self._committing is not None:
            self._committing.result()
            self._committing = None

    def _commit(self, shard: _OpenShard) -> None:
        """Encode what is left, write the objects, then the record."""
        place, plans = self._writer.place, self._writer.plans
        done = {name: [future.result() for future in futures] for name, futures in shard.chunks.items()}
        span = self._writer.draft.shape.shard_rows(shard.number)
        compressed = {name: [chunk.data for chunk in chunks] for name, chunks in done.items()}
        small = {"explained_class": np.concatenate(shard.classes)}
        small["map_scale"] = np.concatenate(
            [chunk.scale for chunk in done["maps"] if chunk.scale is not None]
        )
        if "logit_scale" in plans:
            small["logit_scale"] = np.concatenate([c.scale for c in done["logits"] if c.scale is not None])
        for name, values in small.items():
            assert len(values) == len(span), (name, len(values), span)
            step = plans[name].chunk_rows
            compressed[name] = [
                compress(plans[name], values[i : i + step]) for i in range(0, len(span), step)
            ]
        if self._writer.has_committed(shard.number):  # another process did, meanwhile
            return
        place.remove(commit_name(shard.number))  # from here on the old objects are not to be believed
        objects = {
            name: _write_object(place, plan, shard.number, compressed[name]) for name, plan in plans.items()
        }
        record = ShardRecord(
            shard=shard.number,
            start=span.start,
            stop=span.stop,
            keys_sha256=shard.keys_sha256,
            dead_maps=sum(chunk.dead for chunk in done["maps"]),
            arrays=objects,
        )
        write_record(place, commit_name(shard.number), record)


class _Chunk(NamedTuple):
    """A compressed chunk, the scales of its rows, and how many of its rows are dead (`rows.dead_rows`)."""

    data: bytes
    scale: np.ndarray | None
    dead: int


@dataclass
class _OpenShard:
    number: int
    keys_sha256: str
    keys: list[str]
    classes: list[np.ndarray] = field(default_factory=list)
    waiting: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"logits": [], "maps": []})
    chunks: dict[str, list[Future[_Chunk]]] = field(default_factory=lambda: {"logits": [], "maps": []})

    def submit_rest(self, stream: ShardStream, plan: ArrayPlan) -> None:
        rest = self.waiting[plan.name]
        if rest:
            stream.submit(self, plan, np.concatenate(rest))


def _encode(draft: ManifestDraft, plan: ArrayPlan, rows: np.ndarray, keys: Sequence[str]) -> _Chunk:
    codec = get_codec(getattr(draft, plan.name).codec)
    try:
        stored, scale = (encode_logits if plan.name == "logits" else encode_maps)(codec, rows)
    except ValueError as error:
        key = keys[int(error.args[0])]
        exact = "fp32" if plan.name == "logits" else "lossless"
        raise DataError(
            f"the teacher's {plan.name} for sample {key} are not finite or too large for "
            f"{codec.codec_id}; check the teacher's weights and precision, or set store.{plan.name}: {exact}",
            array=plan.name,
            key=key,
        ) from None
    dead = 0 if plan.name == "logits" else int(dead_rows(rows).sum())
    return _Chunk(compress(plan, stored), scale, dead)


def _write_object(place: Place, plan: ArrayPlan, shard: int, chunks: list[bytes]) -> ObjectRecord:
    parts, digest = join(plan, chunks), hashlib.sha256()
    name = plan.object_name(shard)
    with place.writing(name) as file, file.open("r+b") as opened:
        for part in parts:
            opened.write(part)
            digest.update(part)
    return ObjectRecord(
        path=name,
        bytes=sum(map(len, parts)),
        sha256=digest.hexdigest(),
        checksums="".join(checksum(chunk).hex() for chunk in chunks),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
