"""TeacherStore: the teacher's logits and explanation maps, one row per image, in Zarr v3.

    stores/<name>/<split>/  zarr.json, logits/, explained_class/, maps/, map_scale/   a plain Zarr v3 group
                            draft.json       what is being stored; a resumed precompute must be the same
                            commits/%06d.json  one per finished shard, after its objects are durable
                            manifest.json    written last: without it the store is incomplete

Every array has one shard object per image shard. docs/store-format.md says what is in each byte; every byte is checked
when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from artifacts.arrays import array_plans, decompress, read_index
from artifacts.codecs import decode_logits, decode_maps, get_codec
from artifacts.errors import DamagedStore, IncompleteStore
from artifacts.manifest import Manifest, ManifestDraft
from artifacts.places import Place, Url, place
from artifacts.records import MEND, check_same, damaged, incomplete, read_record, wrong_sizes
from artifacts.rows import NO_CLASS, TeacherRows
from artifacts.writer import StoreWriter

_IN_MEMORY = 256 * 2**20


class TeacherStore:
    """A finished store, row-aligned with its image set. `read(rows)` gives TeacherRows."""

    def __init__(self, where: Place, manifest: Manifest) -> None:
        self.place, self.manifest = where, manifest
        self.plans = array_plans(manifest)
        self._logits, self._maps = get_codec(manifest.logits.codec), get_codec(manifest.maps.codec)
        self._indexes: dict[tuple[str, int], np.ndarray] = {}
        self._kept: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return self.manifest.shape.rows

    def read(self, rows: Sequence[int] | np.ndarray) -> TeacherRows:
        """Rows in any order. Raises DamagedStore, with array, shard and rows, if bytes were changed."""
        index = self._index(rows)
        logit_scale = self._take("logit_scale", index) if "logit_scale" in self.plans else None
        return TeacherRows(
            decode_logits(self._logits, self._take("logits", index), logit_scale),
            self._classes(index),
            self.read_maps(index),
        )

    def _classes(self, index: np.ndarray) -> np.ndarray:
        """The explained classes, i64. Raises DamagedStore if there is no such class."""
        stored = self._take("explained_class", index)
        if (stored >= self.manifest.shape.classes).any():
            row = int(index[(stored >= self.manifest.shape.classes).reshape(len(index), -1).any(1).argmax()])
            shard = row // self.manifest.shape.rows_per_shard
            raise damaged(
                self.place, "explained_class", shard, range(row, row + 1), "has a class out of range"
            )
        return stored.astype(np.int64).clip(min=NO_CLASS)

    def read_maps(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Only the maps: f32 [B,V,K,c,h,w]."""
        index = self._index(rows)
        plan, scale = self.plans["maps"], self._take("map_scale", index)
        if plan.chunk_rows > 1:
            return decode_maps(self._maps, self._take("maps", index), scale)
        # decoded in place: a copy costs more than decoding
        maps = np.empty((len(index), *plan.tail), np.float32)
        for position, _, chunk in self._chunks_of("maps", index):
            here = slice(position, position + 1)
            decode_maps(self._maps, chunk, scale[here], out=maps[here])
        return maps

    def check_same(self, draft: ManifestDraft) -> None:
        """Raises MismatchedStore, with the differing fields side by side, unless the store is what `draft` asks for."""
        check_same(self.place, self.manifest, draft)

    def read_shard(self, name: str, shard: int) -> np.ndarray:
        """One array's rows of one shard, as stored. Raises DamagedStore."""
        return np.concatenate([chunk for _, chunk in self.shard_chunks(name, shard)])

    def shard_chunks(self, name: str, shard: int) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows of the shard, these rows as stored), chunk by chunk. Raises DamagedStore."""
        span, step = self.manifest.shape.shard_rows(shard), self.plans[name].chunk_rows
        for start in range(0, len(span), step):
            rows = slice(start, min(start + step, len(span)))
            yield rows, self._chunk(name, span.start + start)[: rows.stop - rows.start]

    def check_metadata(self, name: str) -> None:
        """Raises DamagedStore if an array's zarr.json is not the one that was written."""
        if name in self._checked:
            return
        try:
            same = self.place.read(f"{name}/zarr.json") == self.plans[name].metadata()
        except FileNotFoundError:
            same = False
        if not same:
            raise DamagedStore(
                f"{self.place}: zarr.json of array {name} was changed; run: e2kd verify --repair {self.place}",
                path=self.place,
                array=name,
            )
        self._checked.add(name)

    def _take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows as stored."""
        self.check_metadata(name)
        plan = self.plans[name]
        if plan.row_bytes * len(self) <= _IN_MEMORY:
            return self._whole(name)[rows]
        taken = np.empty((len(rows), *plan.tail), plan.dtype)
        for position, row, chunk in self._chunks_of(name, rows):
            taken[position] = chunk[row % plan.chunk_rows]
        return taken

    def _index(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        index = np.asarray(rows, np.int64)
        if not ((index >= 0) & (index < len(self))).all():
            raise IndexError(f"rows {index.min()} to {index.max()} of {len(self)}")
        return index

    def _chunks_of(self, name: str, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(position in `rows`, row, its chunk), in the order of the rows on disk; a chunk is read once."""
        self.check_metadata(name)
        step, last, chunk = self.plans[name].chunk_rows, -1, np.empty(0)
        for position in np.argsort(rows, kind="stable").tolist():
            row = int(rows[position])
            if row // step != last:
                chunk, last = self._chunk(name, row), row // step
            yield position, row, chunk

    def _chunk(self, name: str, row: int) -> np.ndarray:
        """The checked, decompressed chunk that holds `row`."""
        plan, (shard, inside) = self.plans[name], divmod(row, self.manifest.shape.rows_per_shard)
        number = inside // plan.chunk_rows
        record = self.manifest.shards[shard].arrays[name]
        try:
            try:
                return self._read_chunk(name, shard, number)
            except ValueError:
                if not self.place.distrust(record.path, record.sha256):
                    raise
                self._indexes.pop((name, shard), None)
                return self._read_chunk(name, shard, number)
        except (FileNotFoundError, ValueError) as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            start = row - inside % plan.chunk_rows
            rows = range(start, min(start + plan.chunk_rows, self.manifest.shape.shard_rows(shard).stop))
            raise damaged(self.place, name, shard, rows, what) from None

    def _read_chunk(self, name: str, shard: int, number: int) -> np.ndarray:
        plan, record = self.plans[name], self.manifest.shards[shard].arrays[name]
        view = self.place.view(record.path, record.bytes, record.sha256)
        if (name, shard) not in self._indexes:
            self._indexes[name, shard] = read_index(plan, view, record.bytes)
        expected = bytes.fromhex(record.checksums[8 * number : 8 * number + 8])
        return decompress(plan, view, record.bytes, self._indexes[name, shard][number], expected)

    def _whole(self, name: str) -> np.ndarray:
        if name not in self._kept:
            shards = range(self.manifest.shape.shards)
            self._kept[name] = np.concatenate([self.read_shard(name, shard) for shard in shards])
        return self._kept[name]


def open_store(url: Url) -> TeacherStore:
    """Open a finished store, at a path or an fsspec URL. All sizes are checked here, bytes when rows are read.

    Raises IncompleteStore while precompute has not finished, DamagedStore for missing or short objects,
    StoreError for a newer format, PlaceError if the URL cannot be reached.
    """
    store = load_store(url)
    sizes = store.place.sizes()
    for record in store.manifest.shards:
        for name, what in wrong_sizes(record, sizes).items():
            raise damaged(store.place, name, record.shard, range(record.start, record.stop), what)
    return store


def load_store(url: Url) -> TeacherStore:
    """`open_store` without a look at the objects."""
    where = place(url)
    if not where.exists("manifest.json"):
        raise _unfinished(where)
    return TeacherStore(where, read_record(where, "manifest.json", Manifest))


def _unfinished(where: Place) -> IncompleteStore:
    if not where.exists("draft.json"):
        return IncompleteStore(f"there is no teacher store at {where}; {MEND}", path=where)
    draft = read_record(where, "draft.json", ManifestDraft)
    return incomplete(where, len(StoreWriter(where, draft).committed()), draft.shape.shards)
