"""Reading and writing a store's JSON records, and the sentences for what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from artifacts.arrays import check_shards
from artifacts.errors import DamagedStore, IncompleteStore, MismatchedStore, StoreError
from artifacts.manifest import SCHEMA_VERSION, Manifest, ManifestDraft, ShardRecord, differences
from artifacts.places import Place
from artifacts.sealed import NewerSchema, reason, seal, shown, unseal

MEND = "run: e2kd precompute CONFIG"
_Model = TypeVar("_Model", bound=BaseModel)


def commit_name(shard: int) -> str:
    return f"commits/{shard:06d}.json"


def read_record(place: Place, name: str, model: type[_Model]) -> _Model:
    """Raises StoreError for a newer format, DamagedStore if the file is not an unchanged `model`.

    A manifest's shards are those of its shape, and their objects where its arrays say: no other name is ever opened.
    """
    file = f"{place}/{name}"
    try:
        record = model.model_validate(unseal(place.read(name), SCHEMA_VERSION))
        if isinstance(record, Manifest):
            check_shards(record)
        return record
    except NewerSchema as error:
        raise StoreError(
            f"{file} has schema {error}, this e2kd reads {SCHEMA_VERSION}; update e2kd",
            path=file,
            fields={"schema_version": (error.args[0], SCHEMA_VERSION)},
        ) from None
    except ValueError as error:
        raise DamagedStore(f"{file} is damaged ({reason(error)}); delete it and {MEND}", path=file) from None


def write_record(place: Place, name: str, record: BaseModel) -> None:
    place.write(name, seal(record.model_dump(mode="json")))


def check_same(place: Place, old: ManifestDraft, new: ManifestDraft) -> None:
    """Raises MismatchedStore with the differing fields."""
    differing = differences(old, new)
    if differing:
        raise mismatch(place, differing)


def mismatch(place: Place, differing: Mapping[str, tuple[Any, Any]]) -> MismatchedStore:
    """The error for stores at `place` that belong to something else. `differing`: by name, (store's, config's)."""
    lines = "\n".join(
        f"  {key}: store {shown(old)}, config {shown(new)}" for key, (old, new) in differing.items()
    )
    return MismatchedStore(
        f"{place} was made for something else:\n{lines}\n"
        f"give this one another name (store.name), or delete the folder and {MEND}",
        path=place,
        fields=differing,
    )


def wrong_sizes(record: ShardRecord, sizes: Mapping[str, int]) -> dict[str, str]:
    """Array -> what is wrong with its object's size; `sizes` are those of the place."""
    wrong = {}
    for name, item in record.arrays.items():
        size = sizes.get(item.path)
        if size != item.bytes:
            wrong[name] = "is missing" if size is None else f"has {size} bytes, not {item.bytes}"
    return wrong


def damaged(place: Place, name: str, shard: int, rows: range, what: str) -> DamagedStore:
    """The error for an object of an array, or for some rows of it; `what` is wrong with it."""
    return DamagedStore(
        f"{place}: array {name}, shard {shard} (rows {rows.start} to {rows.stop - 1}) {what}; "
        f"run: e2kd verify --repair {place}",
        path=place,
        array=name,
        shard=shard,
        rows=rows,
    )


def incomplete(place: Place, done: int, shards: int) -> IncompleteStore:
    return IncompleteStore(
        f"{place} is not finished: {done} of {shards} shards are committed; {MEND}",
        path=place,
        done=done,
        shards=shards,
    )
