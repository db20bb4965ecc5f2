"""What a teacher store says of itself: where its numbers come from, how they are written, what each shard holds."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from artifacts.names import flat

SCHEMA_VERSION = 1


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherInfo(Record):
    """Who answered."""

    architecture: str
    weights_sha256: str
    preprocessing: dict[str, Any]
    classes: int
    class_names: list[str]


class ExplainerInfo(Record):
    """How it was explained."""

    name: str
    settings: dict[str, Any]


class CodecInfo(Record):
    """How one kind of number is encoded."""

    codec: str
    error_bound: str


class StoreShape(Record):
    """Rows of an image set, V views, K explained classes, C classes, maps of c x h x w."""

    rows: int
    rows_per_shard: int
    views: int = 1
    explained: int = 1
    classes: int
    channels: int
    height: int
    width: int

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))


class ManifestDraft(Record):
    """What is decided before the first row is computed. Two stores with the same draft hold the same numbers."""

    schema_version: int = SCHEMA_VERSION
    teacher: TeacherInfo
    explainer: ExplainerInfo
    view: dict[str, Any]
    images: str
    shape: StoreShape
    logits: CodecInfo
    maps: CodecInfo

    @property
    def identity(self) -> str:
        """A digest of the draft, by which other files say which store they were measured on."""
        draft = self.model_dump(mode="json", include=set(ManifestDraft.model_fields))
        return hashlib.sha256(json.dumps(draft, sort_keys=True).encode()).hexdigest()[:32]


class ObjectRecord(Record):
    """One shard object of one array. `checksums`: for each chunk the last four bytes of its Zstandard frame, in hex."""

    path: str
    bytes: int
    sha256: str
    checksums: str


class ShardRecord(Record):
    """A commit record: written after the shard's objects are durable. Rows are start <= row < stop."""

    shard: int
    start: int
    stop: int
    keys_sha256: str
    dead_maps: int
    arrays: dict[str, ObjectRecord]


class Manifest(ManifestDraft):
    """manifest.json, written last: a store without one is not finished."""

    dead_maps: int
    shards: list[ShardRecord]
    versions: dict[str, str]


def differences(old: ManifestDraft, new: ManifestDraft) -> dict[str, tuple[Any, Any]]:
    """By dotted name, the values of both for every field of the draft that differs; None if one lacks the field."""
    names = set(ManifestDraft.model_fields)
    return differing_values(*(draft.model_dump(include=names) for draft in (old, new)))


def differing_values(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of nested mappings, if they differ; None for a key that is not there."""
    a, b = flat(old), flat(new)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}
