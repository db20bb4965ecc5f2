"""What a teacher store says of itself: where its numbers come from, how they are written, what each shard holds."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from artifacts.codecs import CODECS
from artifacts.fields import LARGEST_ROW, Count, Extent, Positive, RowsPerShard, Settings, Sha256
from artifacts.names import flat

SCHEMA_VERSION = 1


def _known(codec: str) -> str:
    if codec.removeprefix("e2kd.") not in CODECS:
        raise ValueError(f"no codec is called {codec!r}")
    return codec


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherInfo(Record):
    """Who answered."""

    architecture: str
    weights_sha256: Sha256
    preprocessing: Settings
    classes: Extent
    class_names: list[str]


class ExplainerInfo(Record):
    """How it was explained."""

    name: str
    settings: Settings


class CodecInfo(Record):
    """How one kind of number is encoded."""

    codec: Annotated[str, AfterValidator(_known)]
    error_bound: str


class StoreShape(Record):
    """Rows of an image set, V views, K explained classes, C classes, maps of c x h x w."""

    rows: Positive
    rows_per_shard: RowsPerShard
    views: Extent = 1
    explained: Extent = 1
    classes: Extent
    channels: Extent
    height: Extent
    width: Extent

    @model_validator(mode="after")
    def _bounded(self) -> StoreShape:
        maps = (self.views, self.explained, self.channels, self.height, self.width)
        if max(math.prod(maps), self.views * self.classes) > LARGEST_ROW:
            raise ValueError(f"a row has more than {LARGEST_ROW} numbers")
        if self.rows_per_shard * self.views * self.explained > LARGEST_ROW:
            raise ValueError(f"a shard has more than {LARGEST_ROW} maps")
        return self

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))


class ManifestDraft(Record):
    """What is decided before the first row is computed. Two stores with the same draft hold the same numbers."""

    schema_version: Annotated[int, Field(strict=True, ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    teacher: TeacherInfo
    explainer: ExplainerInfo
    view: Settings
    images: Sha256
    shape: StoreShape
    logits: CodecInfo
    maps: CodecInfo

    @property
    def identity(self) -> str:
        """A digest of the draft, by which other files say which store they were measured on."""
        draft = self.model_dump(mode="json", include=set(ManifestDraft.model_fields))
        return hashlib.sha256(json.dumps(draft, sort_keys=True).encode()).hexdigest()[:32]


class ObjectRecord(Record):
    """One shard object of one array. `checksums`: for each chunk the last four bytes of its Zstandard frame, in hex.

    `path` is what the array plan says (`records.read_record` looks), never any other.
    """

    path: str
    bytes: Count
    sha256: Sha256
    checksums: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{8})+$")]


class ShardRecord(Record):
    """A commit record: written after the shard's objects are durable. Rows are start <= row < stop."""

    shard: Count
    start: Count
    stop: Count
    keys_sha256: Sha256
    dead_maps: Count
    arrays: dict[str, ObjectRecord]


class Manifest(ManifestDraft):
    """manifest.json, written last: a store without one is not finished."""

    dead_maps: Count
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
