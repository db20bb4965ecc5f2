"""TeacherStore: the teacher's logits and explanation maps, one row per image, in Zarr v3.

    stores/<name>/<split>/  zarr.json, logits/, explained_class/, maps/, map_scale/   a plain Zarr v3 group
                            draft.json       what is being stored; a resumed precompute must be the same
                            commits/%06d.json  one per finished shard, after its objects are durable
                            manifest.json    written last: without it the store is incomplete

Every array has one shard object per image shard. Payloads are compressed with Zstandard with its checksum on (Zarr's
default is off: a flipped bit would read back as a number), and each object's size and sha256 are in its commit record.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from pydantic import BaseModel
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.storage import MemoryStore

from artifacts.codecs import get_codec
from artifacts.durable import naming, sha256_file, sync_file, sync_folder, write_atomic
from artifacts.errors import DamagedStore, DataError, IncompleteStore, MismatchedStore, StoreError
from artifacts.images import local_path
from artifacts.manifest import (
    SCHEMA_VERSION,
    Manifest,
    ManifestDraft,
    ObjectRecord,
    ShardRecord,
    differences,
)

ARRAYS = ("logits", "explained_class", "maps", "map_scale")
LIBRARIES = ("e2kd", "zarr", "numcodecs", "numpy", "torch", "torchvision", "timm")
_BIG_ROW = 64 * 1024
_IN_MEMORY = 256 * 2**20
_MEND = "run: e2kd precompute CONFIG"
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's answers for B rows.

    logits f32 [B,V,C]; explained_class i64 [B,V,K]; maps f32 [B,V,K,c,h,w]. V views (1: the canonical view),
    K explained classes (1: the teacher's top-1).
    """

    logits: np.ndarray
    explained_class: np.ndarray
    maps: np.ndarray


class StoreWriter:
    """Fills a store shard by shard. Several processes may write different shards; one of them calls `create` first."""

    def __init__(self, path: Path, draft: ManifestDraft) -> None:
        self.path, self.draft = path, draft

    def create(self) -> None:
        """Make the empty store, or accept the one that is there if it is about the same.

        Raises MismatchedStore, with the differing fields, where it is not.
        """
        file = self.path / "draft.json"
        if file.exists():
            check_same(self.path, _parsed(file, ManifestDraft), self.draft)
            return
        if self.path.exists():
            shutil.rmtree(self.path)  # killed before the draft was written: there is nothing in it
        (self.path / "commits").mkdir(parents=True)
        group = zarr.create_group(self.path, zarr_format=3)
        for name, array in _arrays(self.draft).items():
            group.create_array(name, **array)
        write_atomic(file, self.draft.model_dump_json(indent=1).encode())

    def committed(self) -> set[int]:
        """Shards that are finished: committed, with every object there in its full size."""
        records = [_parsed(file, ShardRecord) for file in sorted((self.path / "commits").glob("*.json"))]
        return {record.shard for record in records if not wrong_sizes(self.path, record)}

    def write_shard(self, shard: int, rows: TeacherRows, keys_sha256: str, keys: Sequence[str]) -> None:
        """Write one shard of every array, make it durable, commit it.

        Raises DataError naming the sample where the teacher's numbers are not finite or do not fit the codec.
        """
        span = self.draft.shape.shard_rows(shard)
        stored = {
            "logits": self._encoded("logits", rows.logits, keys),
            "explained_class": rows.explained_class.astype(np.int32),
            "maps": self._encoded("maps", rows.maps, keys),
            "map_scale": np.ones(rows.maps.shape[:3], np.float32),
        }
        plan = _arrays(self.draft)  # zarr would broadcast another shape
        assert all(v.shape == (len(span), *plan[name]["shape"][1:]) for name, v in stored.items())
        self._clear(shard, stored)
        group: Any = zarr.open_group(self.path, mode="r+", zarr_format=3)
        with naming(self.path), zarr.config.set({"array.write_empty_chunks": True}):
            for name, values in stored.items():
                group[name][span.start : span.stop] = values
        objects = {name: self._durable(name, values.ndim, shard) for name, values in stored.items()}
        record = ShardRecord(
            shard=shard,
            start=span.start,
            stop=span.stop,
            keys_sha256=keys_sha256,
            dead_maps=int((~rows.maps.reshape(len(span), -1).any(1)).sum()),
            arrays=objects,
        )
        write_atomic(self.path / "commits" / f"{shard:06d}.json", record.model_dump_json(indent=1).encode())

    def finish(self) -> Manifest:
        """Write the manifest once every shard is committed. Raises IncompleteStore while one is missing."""
        shape = self.draft.shape
        missing = set(range(shape.shards)) - self.committed()
        if missing:
            raise IncompleteStore(_incomplete(self.path, shape.shards - len(missing), shape.shards))
        records = [
            _parsed(self.path / "commits" / f"{shard:06d}.json", ShardRecord) for shard in range(shape.shards)
        ]
        manifest = Manifest(
            **dict(self.draft),
            dead_maps=sum(record.dead_maps for record in records),
            shards=records,
            versions=_versions(),
        )
        file = self.path / "manifest.json"
        if file.exists():
            old = _parsed(file, Manifest)
            if old.shards == records:  # nothing new: the versions that made it stay on record
                return old
        write_atomic(file, manifest.model_dump_json(indent=1).encode())
        return manifest

    def _clear(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Remove what an interrupted or damaged write left: zarr would read it to merge it with what is written."""
        (self.path / "commits" / f"{shard:06d}.json").unlink(missing_ok=True)
        for name, values in arrays.items():
            folder = self.path.joinpath(*_object_path(name, values.ndim, shard).split("/")[:3])
            shutil.rmtree(folder, ignore_errors=True)  # with the .partial files of a killed zarr

    def _encoded(self, name: str, values: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        codec = get_codec(getattr(self.draft, name).codec)
        try:
            return codec.encode(values)
        except ValueError as error:
            row = int(error.args[0])
            raise DataError(
                f"the teacher's {name} for sample {keys[row]} are not finite or too large for {codec.codec_id}; "
                f"check the teacher's weights and precision, or set store.{name}: fp32"
            ) from None

    def _durable(self, name: str, dimensions: int, shard: int) -> ObjectRecord:
        relative = _object_path(name, dimensions, shard)
        path = self.path / relative
        sync_file(path)
        folder = path.parent
        while folder != self.path:
            sync_folder(folder)
            folder = folder.parent
        return ObjectRecord(path=relative, bytes=path.stat().st_size, sha256=sha256_file(path))


class TeacherStore:
    """A finished store, row-aligned with its image set. `read(rows)` gives TeacherRows."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._open: dict[str, Any] = {}
        self._kept: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.manifest.shape.rows

    def read(self, rows: Sequence[int] | np.ndarray) -> TeacherRows:
        """Rows in any order. Raises DamagedStore, naming array, shard and rows, where bytes were changed."""
        index = np.asarray(rows, np.int64)
        if not ((index >= 0) & (index < len(self))).all():
            raise IndexError(f"rows {index.min()} to {index.max()} of {len(self)}")
        logits = get_codec(self.manifest.logits.codec).decode(self._take("logits", index))
        classes = self._take("explained_class", index).astype(np.int64)
        maps = get_codec(self.manifest.maps.codec).decode(self._take("maps", index))
        return TeacherRows(logits, classes, maps)

    def check_same(self, draft: ManifestDraft) -> None:
        """Raises MismatchedStore, with the differing fields side by side, unless the store is what `draft` asks for."""
        check_same(self.path, self.manifest, draft)

    def read_shard(self, name: str, shard: int) -> np.ndarray:
        """One array's rows of one shard, as stored. Raises DamagedStore."""
        span = self.manifest.shape.shard_rows(shard)
        array = self.array(name)
        try:
            values = np.asarray(array[span.start : span.stop])
        except Exception as error:  # zarr raises whatever its codecs raise
            raise DamagedStore(damage(self.path, name, shard, span, f"cannot be read ({error})")) from error
        if _holds_fill(values):
            raise DamagedStore(damage(self.path, name, shard, span, "has rows that were never written"))
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _take(self, name: str, rows: np.ndarray) -> np.ndarray:
        if self._small(name):
            return self._whole(name)[rows]
        plan = _arrays(self.manifest)[name]
        taken = np.empty((len(rows), *plan["shape"][1:]), plan["dtype"])
        for position in np.argsort(rows, kind="stable"):
            taken[position] = self._one(name, int(rows[position]))
        return taken

    def _one(self, name: str, row: int) -> np.ndarray:
        array, shard, span = self.array(name), row // self.manifest.shape.rows_per_shard, range(row, row + 1)
        try:
            value = np.asarray(array[row])
        except Exception as error:
            raise DamagedStore(damage(self.path, name, shard, span, f"cannot be read ({error})")) from error
        if _holds_fill(value[None]):
            raise DamagedStore(damage(self.path, name, shard, span, "was never written"))
        return value

    def array(self, name: str) -> Any:
        """The open zarr array. Raises DamagedStore where its zarr.json is not the one that was written."""
        if name not in self._open:
            try:
                array: Any = zarr.open_group(self.path, mode="r", zarr_format=3)[name]
                plan = zarr.create_array(MemoryStore(), zarr_format=3, **_arrays(self.manifest)[name])
                changed = str(array.metadata.to_dict()) != str(plan.metadata.to_dict())
            except Exception:  # zarr raises whatever its parsers raise
                changed = True
            if changed:
                raise DamagedStore(
                    f"{self.path}: zarr.json of array {name} was changed; delete {self.path} and {_MEND}"
                )
            self._open[name] = array
        return self._open[name]

    def _small(self, name: str) -> bool:
        array = _arrays(self.manifest)[name]
        return math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize <= _IN_MEMORY

    def _whole(self, name: str) -> np.ndarray:
        if name not in self._kept:
            shards = range(self.manifest.shape.shards)
            self._kept[name] = np.concatenate([self.read_shard(name, shard) for shard in shards])
        return self._kept[name]


def open_store(url: str | Path) -> TeacherStore:
    """Open a finished store. Sizes of all objects are checked here, checksums when rows are read.

    Raises IncompleteStore while precompute has not finished, DamagedStore for missing or short objects,
    StoreError for a newer format.
    """
    store = load_store(url)
    for record in store.manifest.shards:
        for name, what in wrong_sizes(store.path, record).items():
            raise DamagedStore(damage(store.path, name, record.shard, range(record.start, record.stop), what))
    return store


def load_store(url: str | Path) -> TeacherStore:
    """`open_store` without a look at the objects."""
    path = local_path(url)
    file = path / "manifest.json"
    if not file.exists():
        raise IncompleteStore(_state(path))
    return TeacherStore(path, _parsed(file, Manifest))


def check_same(path: Path, old: ManifestDraft, new: ManifestDraft) -> None:
    """Raises MismatchedStore with the differing fields."""
    differing = differences(old, new)
    if differing:
        lines = "\n".join(f"  {line}" for line in differing)
        raise MismatchedStore(
            f"{path} was made for something else:\n{lines}\n"
            f"give this one another name (store.name), or delete the folder and {_MEND}"
        )


def damage(path: Path, name: str, shard: int, rows: range, what: str) -> str:
    """The sentence for a damaged object."""
    return (
        f"{path}: array {name}, shard {shard} (rows {rows.start} to {rows.stop - 1}) {what}; "
        f"delete {path / 'commits' / f'{shard:06d}.json'} and {_MEND}"
    )


def _arrays(draft: ManifestDraft) -> dict[str, dict[str, Any]]:
    """What `zarr.create_array` is told for each array."""
    s = draft.shape
    head = (s.rows, s.views)
    plans: dict[str, tuple[tuple[int, ...], tuple[str, ...], Any, Any]] = {
        "logits": (
            (*head, s.classes),
            ("sample", "view", "class"),
            get_codec(draft.logits.codec).stored_dtype,
            np.nan,
        ),
        "explained_class": ((*head, s.explained), ("sample", "view", "explained"), np.dtype("int32"), -1),
        "maps": (
            (*head, s.explained, s.channels, s.height, s.width),
            ("sample", "view", "explained", "channel", "y", "x"),
            get_codec(draft.maps.codec).stored_dtype,
            np.nan,
        ),
        "map_scale": ((*head, s.explained), ("sample", "view", "explained"), np.dtype("float32"), np.nan),
    }
    return {
        name: {
            "shape": shape,
            "dtype": dtype,
            "chunks": (_rows_per_chunk(shape, dtype, s.rows_per_shard), *shape[1:]),
            "shards": (s.rows_per_shard, *shape[1:]),
            "dimension_names": names,
            "fill_value": fill,
            "serializer": BytesCodec(),
            "compressors": [ZstdCodec(level=3, checksum=True)],
            "filters": [],
        }
        for name, (shape, names, dtype, fill) in plans.items()
    }


def _object_path(name: str, dimensions: int, shard: int) -> str:
    """Where zarr keeps a shard of an array, under the store's folder."""
    return "/".join([name, "c", str(shard), *["0"] * (dimensions - 1)])


def _rows_per_chunk(shape: tuple[int, ...], dtype: np.dtype[Any], rows_per_shard: int) -> int:
    """1 for full-resolution maps, which are read alone; else up to 64, which must divide the shard."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    return 1 if row_bytes > _BIG_ROW else math.gcd(64, rows_per_shard)


def _holds_fill(values: np.ndarray) -> bool:
    return bool((values < 0).any()) if values.dtype.kind == "i" else bool(np.isnan(values).any())


def wrong_sizes(path: Path, record: ShardRecord) -> dict[str, str]:
    """Array -> what is wrong with its object's size."""
    wrong = {}
    for name, item in record.arrays.items():
        file = path / item.path
        found = file.stat().st_size if file.exists() else None
        if found != item.bytes:
            wrong[name] = "is missing" if found is None else f"has {found} bytes, not {item.bytes}"
    return wrong


def _parsed(file: Path, model: type[_Model]) -> _Model:
    """Raises StoreError for a newer format, DamagedStore where the file is not a `model`."""
    try:
        raw = json.loads(file.read_bytes())
        if (schema := raw.get("schema_version", SCHEMA_VERSION)) > SCHEMA_VERSION:
            raise StoreError(f"{file} has schema {schema}, this e2kd reads {SCHEMA_VERSION}; update e2kd")
        return model.model_validate(raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedStore(f"{file} is damaged ({type(error).__name__}); delete it and {_MEND}") from None


def _state(path: Path) -> str:
    file = path / "draft.json"
    if not file.exists():
        return f"there is no teacher store at {path}; {_MEND}"
    draft = _parsed(file, ManifestDraft)
    return _incomplete(path, len(StoreWriter(path, draft).committed()), draft.shape.shards)


def _incomplete(path: Path, done: int, total: int) -> str:
    return f"{path} is not finished: {done} of {total} shards are committed; {_MEND}"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
