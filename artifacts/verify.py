"""Full checks of a store and of an image set: nothing is believed because a file exists."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from artifacts.arrays import ABSENT, group_metadata
from artifacts.codecs import decode_logits, decode_maps, get_codec
from artifacts.errors import DamagedStore, E2kdError, ImageSetError
from artifacts.images import ImageSet, load_images, open_images, wrong_tars
from artifacts.index import SCHEMA_VERSION, Packed
from artifacts.manifest import ManifestDraft, ShardRecord
from artifacts.places import Place, Url, place
from artifacts.records import commit_name, read_record, wrong_sizes
from artifacts.rowlist import locate_rows, row_list
from artifacts.sealed import NewerSchema, reason, unseal
from artifacts.store import TeacherStore, load_store

_SCALES = ("map_scale", "logit_scale")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; rows are (first, last). `mend` is empty where `what` says it."""

    what: str
    mend: str
    shard: int | None = None
    array: str | None = None
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = [
            f"shard {self.shard}" if self.shard is not None else "",
            self.array or "",
            f"rows {self.rows[0]}-{self.rows[1]}" if self.rows else "",
        ]
        place = ", ".join(part for part in where if part)
        return "; ".join(filter(None, [f"{place}: {self.what}" if place else self.what, self.mend]))


@dataclass(frozen=True)
class VerifyReport:
    """`ok` when there are no problems. `place` is what was looked at."""

    place: Place
    shards: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


Advance = Callable[[int], None]


def verify_store(
    url: Url, images: Url | None = None, *, quick: bool = False, progress: Advance | None = None
) -> VerifyReport:
    """Check a store: sizes; unless `quick`, sha256, decoding, finiteness, and rows and keys against `images`.

    `progress` is called with 1 per shard. A store that cannot be opened is one problem.
    """
    where = place(url)
    try:
        store = load_store(where)
        beside = open_images(images) if images is not None else None
    except E2kdError as error:
        return VerifyReport(where, 0, (Problem(str(error), ""),))
    sizes = where.sizes()
    problems = [*_changed_records(store)]
    if beside:
        problems += _alignment(store, beside)
    for record in store.manifest.shards:
        problems += _shard_problems(store, record, beside, sizes, quick)
        if progress:
            progress(1)
    return VerifyReport(where, len(store.manifest.shards), tuple(problems))


def verify_images(url: Url, *, quick: bool = False, progress: Advance | None = None) -> VerifyReport:
    """Check an image set: sizes; unless `quick`, sha256, tar contents, and that every image decodes."""
    where = place(url)
    try:
        images = load_images(where)
    except E2kdError as error:
        return VerifyReport(where, 0, (Problem(str(error), ""),))
    problems: list[Problem] = []
    if not _packed_as_said(images):
        problems.append(Problem("packing.json is missing or changed", _mend(where)))
    problems += _twice(images)
    wrong = wrong_tars(images)
    for shard in range(len(images.shards)):
        if shard in wrong or not quick:
            problems += _tar_problems(images, shard, wrong.get(shard))
        if progress:
            progress(1)
    return VerifyReport(where, len(images.shards), tuple(problems))


def _packed_as_said(images: ImageSet) -> bool:
    """Whether packing.json is there and about this set."""
    try:
        packed = Packed.model_validate(unseal(images.place.read("packing.json"), SCHEMA_VERSION))
    except (FileNotFoundError, ValueError, NewerSchema):
        return False
    said = (packed.view, packed.classes, packed.count, packed.rows_per_shard)
    return said == (images.view, images.classes, len(images), images.rows_per_shard)


def _twice(images: ImageSet) -> Iterator[Problem]:
    """Keys that several shards have."""
    try:
        times = Counter(images.keys)
    except (FileNotFoundError, ImageSetError):
        # the shard whose row list cannot be read is named on its own
        return
    yield from (Problem(f"{times[key]} rows have the key {key}", "") for key in times if times[key] > 1)


def _mend(where: Place) -> str:
    return f"run: e2kd verify --repair {where}"


def _changed_records(store: TeacherStore) -> Iterator[Problem]:
    """zarr.json of the group and every array, draft.json, and the commit records beside the manifest."""
    for name in store.plans:
        try:
            store.check_metadata(name)
        except DamagedStore:
            yield Problem(f"zarr.json of array {name} was changed", _mend(store.place), array=name)
    if not store.place.exists("zarr.json") or store.place.read("zarr.json") != group_metadata():
        yield Problem("zarr.json of the group is missing or changed", _mend(store.place))
    for record in store.manifest.shards:
        try:
            same = read_record(store.place, commit_name(record.shard), ShardRecord) == record
        except (E2kdError, FileNotFoundError):
            same = False
        if not same:
            yield Problem("its commit record is missing or changed", _mend(store.place), record.shard)
    try:
        draft = read_record(store.place, "draft.json", ManifestDraft)
        if draft != ManifestDraft(
            **{name: getattr(store.manifest, name) for name in ManifestDraft.model_fields}
        ):
            yield Problem("draft.json is that of another store", "delete the store and precompute again")
    except (E2kdError, FileNotFoundError):
        yield Problem("draft.json is missing or changed", _mend(store.place))


def _alignment(store: TeacherStore, images: ImageSet) -> Iterator[Problem]:
    if store.manifest.images != images.fingerprint:
        yield Problem(
            f"the store was made from other images than {images.place} (fingerprint {store.manifest.images[:12]}, "
            f"not {images.fingerprint[:12]})",
            "delete the store and run: e2kd precompute CONFIG",
        )
    elif len(store) != len(images):
        yield Problem(
            f"the store has {len(store)} rows, {images.place} has {len(images)}", "precompute again"
        )
    elif store.manifest.shape.rows_per_shard != images.rows_per_shard:
        yield Problem(f"its shards have other rows than those of {images.place}", "precompute again")


def _shard_problems(
    store: TeacherStore, record: ShardRecord, images: ImageSet | None, sizes: Mapping[str, int], quick: bool
) -> list[Problem]:
    rows = (record.start, record.stop - 1)
    mend = _mend(store.place)
    wrong = wrong_sizes(record, sizes)
    found = [Problem(what, mend, record.shard, name, rows) for name, what in wrong.items()]
    if quick:
        return found
    scales: dict[str, np.ndarray] = {}
    for name in sorted(record.arrays.keys() - wrong.keys(), key=lambda name: (name not in _SCALES, name)):
        item = record.arrays[name]
        if not _is_whole(store.place, item.path, item.bytes, item.sha256):
            found.append(Problem("sha256 differs: bytes were changed", mend, record.shard, name, rows))
        try:
            what = _bad_values(store, record.shard, name, scales)
        except DamagedStore:
            what = "cannot be decoded"
        found += [Problem(what, mend, record.shard, name, rows)] if what else []
    try:
        known = images is not None and record.shard < len(images.shards)
        if images is not None and known and images.keys_sha256(record.shard) != record.keys_sha256:
            found.append(
                Problem("its rows are other samples than the image set's", mend, record.shard, None, rows)
            )
    except ImageSetError as error:
        found.append(Problem(str(error), "", record.shard, None, rows))
    return found


def _bad_values(store: TeacherStore, shard: int, name: str, scales: dict[str, np.ndarray]) -> str | None:
    """What is wrong with an array's values, decoded chunk by chunk: a shard of big maps takes gigabytes.

    A scale is kept in `scales`, for the array that is divided by it. Raises DamagedStore.
    """
    if name in _SCALES:
        scales[name] = store.read_shard(name, shard)
        return None
    # all chunks are decoded, whatever the first ones hold
    fit = [_is_fit(store, name, chunk, rows, scales) for rows, chunk in store.shard_chunks(name, shard)]
    if all(fit):
        return None
    return "has classes out of range" if name == "explained_class" else "has values that are not finite"


def _is_fit(
    store: TeacherStore, name: str, chunk: np.ndarray, rows: slice, scales: Mapping[str, np.ndarray]
) -> bool:
    """Whether stored rows are classes that there are, or finite numbers, if their scale is there to tell."""
    manifest, kind = store.manifest, {"logits": "logit_scale", "maps": "map_scale"}.get(name)
    if kind is None:
        return not _unfit(chunk, manifest.shape.classes).any()
    if kind in store.plans and kind not in scales:
        return True
    scale = scales[kind][rows] if kind in scales else None
    if name == "logits":
        return bool(np.isfinite(decode_logits(get_codec(manifest.logits.codec), chunk, scale)).all())
    return scale is None or bool(np.isfinite(decode_maps(get_codec(manifest.maps.codec), chunk, scale)).all())


def _tar_problems(images: ImageSet, shard: int, wrong: str | None) -> list[Problem]:
    info, rows = images.shards[shard], images.shard_rows(shard)
    span = (rows.start, rows.stop - 1)
    mend = _mend(images.place)
    if wrong:
        return [Problem(wrong, mend, shard, info.name, span)]
    problems = []
    if not _is_whole(images.place, info.name, info.bytes, info.sha256):
        problems.append("sha256 differs: bytes were changed")
    try:
        problems += _lies(images, shard)
        for row in rows:
            _ = images[row]
    except (FileNotFoundError, ImageSetError, ValueError) as error:
        problems.append(f"cannot be read ({reason(error)})")
    return [Problem(what, mend, shard, info.name, span) for what in problems]


def _lies(images: ImageSet, shard: int) -> Iterator[str]:
    """What the row list says otherwise than the tar, which alone is under the set's fingerprint. Raises ValueError."""
    info = images.shards[shard]
    if hashlib.sha256(images.place.read(row_list(info.name))).hexdigest() != info.rows_sha256:
        yield "its row list was changed"
    with images.place.reading(info.name, info.bytes, info.sha256) as tar:
        located = locate_rows(tar)
    said = unseal(images.place.read(row_list(info.name)), SCHEMA_VERSION)["rows"]
    if [row["key"] for row in located] != images.shard_keys(shard):
        yield "the tar holds other keys than its row list"
    elif located != said:
        first = next(row["key"] for row, other in zip(located, said, strict=True) if row != other)
        yield f"the row list says another label, group or place of sample {first} than the tar"


def _is_whole(where: Place, name: str, size: int, sha256: str) -> bool:
    """Whether the bytes that are about to be decoded are those of the record."""
    try:
        with where.reading(name, size, sha256) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _unfit(classes: np.ndarray, count: int) -> np.ndarray:
    """Stored classes [rows,V,K] that cannot be: the first is always there, a later one may be absent."""
    absent = classes == ABSENT
    absent[..., 0] = False
    return ~absent & ((classes < 0) | (classes >= count))
