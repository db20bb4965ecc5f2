"""What an image set says of itself: index.json, packing.json, and the row list beside each tar, as checked records."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from artifacts.fields import LARGEST_IMAGE, Count, Key, Label, Positive, RowsPerShard, Settings, Sha256

SCHEMA_VERSION = 1
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""Of a packed image, by extension, as Pillow names them: nothing else is ever decoded."""

Extension = Literal["png", "jpg", "webp", "json", "mask.png"]
Offset = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Checksum = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def tar_name(shard: int) -> str:
    """The one name that the tar of a shard has."""
    return f"shard-{shard:06d}.tar"


def _view(view: dict[str, Any]) -> dict[str, Any]:
    size = view.get("size")
    if type(size) is not int or not 1 <= size <= LARGEST_IMAGE:
        raise ValueError(f"its size is no number of pixels from 1 to {LARGEST_IMAGE}")
    return view


View = Annotated[Settings, AfterValidator(_view)]
Version = Annotated[int, Field(strict=True, ge=1, le=SCHEMA_VERSION)]


class TarEntry(_Record):
    """A tar in the index."""

    name: str
    rows: RowsPerShard
    bytes: Positive
    sha256: Sha256
    rows_sha256: Sha256


class Index(_Record):
    """index.json, written last. Its tars are called by their position, and hold all rows without a gap."""

    schema_version: Version = SCHEMA_VERSION
    view: View
    classes: list[str]
    rows_per_shard: RowsPerShard
    rows: Positive
    shards: Annotated[list[TarEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _covered(self) -> Index:
        for shard, entry in enumerate(self.shards):
            if entry.name != tar_name(shard):
                raise ValueError(f"the tar of shard {shard} is not called {tar_name(shard)}")
            if entry.rows != min(self.rows_per_shard, self.rows - shard * self.rows_per_shard):
                raise ValueError(f"shard {shard} has {entry.rows} rows")
        if sum(entry.rows for entry in self.shards) != self.rows:
            raise ValueError(f"its shards do not hold its {self.rows} rows")
        return self


class Packed(_Record):
    """packing.json: what was asked for."""

    schema_version: Version = SCHEMA_VERSION
    view: View
    classes: list[str]
    source: str
    count: Positive
    rows_per_shard: RowsPerShard
    format: Literal["png", "jpg", "webp"]


class Row(_Record):
    """A row of a row list: `members` are (offset, length, CRC-32) by extension."""

    key: Key
    label: Label | list[Label] | None = None
    group: Label | None = None
    members: dict[Extension, tuple[Offset, Count, Checksum]]

    @model_validator(mode="after")
    def _whole(self) -> Row:
        if "json" not in self.members or len(self.members.keys() & FORMATS) != 1:
            raise ValueError(f"sample {self.key} has no json, or not one image")
        return self


class Tar(_Record):
    bytes: Positive
    sha256: Sha256


class Rows(_Record):
    """<tar>.rows.json."""

    tar: Tar
    rows: list[Row]

    @model_validator(mode="after")
    def _inside(self) -> Rows:
        if len({row.key for row in self.rows}) != len(self.rows):
            raise ValueError("two rows have the same key")
        for row in self.rows:
            if any(offset + length > self.tar.bytes for offset, length, _ in row.members.values()):
                raise ValueError(f"the members of {row.key} lie outside the tar")
        return self


class About(BaseModel):
    """The JSON file of a sample, as far as it is read: anyone may add keys."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    label: Label | list[Label] | None
    group: Label | None = None
    boxes: (
        list[Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=5, max_length=5)]]
        | None
    ) = None
    source: str | None = None
