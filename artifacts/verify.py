"""Full checks of a store and of an image set: nothing is believed because a file exists."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from artifacts.codecs import get_codec
from artifacts.durable import sha256_file
from artifacts.errors import DamagedStore, ImageSetError, StoreError
from artifacts.images import ImageSet, load_images, local_path, open_images, wrong_tars
from artifacts.manifest import ShardRecord
from artifacts.rowlist import row_list
from artifacts.store import ARRAYS, TeacherStore, load_store, wrong_sizes


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; rows are (first, last)."""

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
        return f"{place}: {self.what}; {self.mend}" if place else f"{self.what}; {self.mend}"


@dataclass(frozen=True)
class VerifyReport:
    """`ok` when there are no problems."""

    path: Path
    shards: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


Advance = Callable[[int], None]


def verify_store(
    url: str | Path, images: str | Path | None = None, *, quick: bool = False, progress: Advance | None = None
) -> VerifyReport:
    """Check a store: sizes; unless `quick`, sha256, decoding, finiteness, and rows and keys against `images`.

    `progress` is called with 1 per shard. A store that cannot be opened is one problem.
    """
    path = local_path(url)
    try:
        store = load_store(path)
        beside = open_images(images) if images is not None else None
    except (StoreError, ImageSetError) as error:
        return VerifyReport(path, 0, (Problem(str(error), "see there"),))
    changed = list(_changed_arrays(store))
    if changed:
        return VerifyReport(path, len(store.manifest.shards), tuple(changed))
    problems = list(_alignment(store, beside)) if beside else []
    for record in store.manifest.shards:
        problems += _shard_problems(store, record, beside, quick)
        if progress:
            progress(1)
    return VerifyReport(path, len(store.manifest.shards), tuple(problems))


def verify_images(url: str | Path, *, quick: bool = False, progress: Advance | None = None) -> VerifyReport:
    """Check an image set: sizes; unless `quick`, sha256, tar contents, and that every image decodes."""
    path = local_path(url)
    try:
        images = load_images(path)
    except ImageSetError as error:
        return VerifyReport(path, 0, (Problem(str(error), "see there"),))
    problems: list[Problem] = []
    wrong = wrong_tars(images)
    for shard in range(len(images.shards)):
        if shard in wrong or not quick:
            problems += _tar_problems(images, shard, wrong.get(shard))
        if progress:
            progress(1)
    return VerifyReport(path, len(images.shards), tuple(problems))


def _changed_arrays(store: TeacherStore) -> Iterator[Problem]:
    for name in ARRAYS:
        try:
            store.array(name)
        except DamagedStore as error:
            yield Problem(str(error), "see there", array=name)


def _alignment(store: TeacherStore, images: ImageSet) -> Iterator[Problem]:
    if store.manifest.images != images.fingerprint:
        yield Problem(
            f"the store was made from other images than {images.path} (fingerprint {store.manifest.images[:12]}, "
            f"not {images.fingerprint[:12]})",
            "delete the store and run: e2kd precompute CONFIG",
        )
    elif len(store) != len(images):
        yield Problem(f"the store has {len(store)} rows, {images.path} has {len(images)}", "precompute again")


def _shard_problems(
    store: TeacherStore, record: ShardRecord, images: ImageSet | None, quick: bool
) -> list[Problem]:
    rows = (record.start, record.stop - 1)
    mend = f"delete {store.path / 'commits' / f'{record.shard:06d}.json'} and run: e2kd precompute CONFIG"
    wrong = wrong_sizes(store.path, record)
    found = [Problem(what, mend, record.shard, name, rows) for name, what in wrong.items()]
    if quick:
        return found
    for name, item in record.arrays.items():
        if name in wrong:
            continue
        if sha256_file(store.path / item.path) != item.sha256:
            found.append(Problem("sha256 differs: bytes were changed", mend, record.shard, name, rows))
        what = _undecodable(store, name, record.shard)
        if what:
            found.append(Problem(what, mend, record.shard, name, rows))
    try:
        known = images is not None and record.shard < len(images.shards)
        if images is not None and known and images.keys_sha256(record.shard) != record.keys_sha256:
            found.append(
                Problem("its rows are other samples than the image set's", mend, record.shard, None, rows)
            )
    except ImageSetError as error:
        found.append(Problem(str(error), "see there", record.shard, None, rows))
    return found


def _undecodable(store: TeacherStore, name: str, shard: int) -> str | None:
    try:
        stored = store.read_shard(name, shard)
    except DamagedStore:
        return "cannot be decoded"
    if name in ("logits", "maps"):
        values = get_codec(getattr(store.manifest, name).codec).decode(stored)
        return None if np.isfinite(values).all() else "has values that are not finite"
    classes = store.manifest.shape.classes
    return "has classes out of range" if name == "explained_class" and (stored >= classes).any() else None


def _tar_problems(images: ImageSet, shard: int, wrong: str | None) -> list[Problem]:
    info, rows = images.shards[shard], images.shard_rows(shard)
    span = (rows.start, rows.stop - 1)
    tar, mend = images.path / info.name, f"delete {info.name} and index.json, run: e2kd pack CONFIG"
    if wrong:
        return [Problem(wrong, mend, shard, info.name, span)]
    found = []
    if sha256_file(tar) != info.sha256:
        found.append(Problem("sha256 differs: bytes were changed", mend, shard, info.name, span))
    if sha256_file(row_list(tar)) != info.rows_sha256:
        found.append(Problem("its row list was changed", mend, shard, info.name, span))
    try:
        with tarfile.open(tar) as archive:
            keys = [name.split(".", 1)[0] for name in archive.getnames()]
        if list(dict.fromkeys(keys)) != images.shard_keys(shard):
            found.append(Problem("the tar holds other keys than its row list", mend, shard, info.name, span))
        for row in rows:
            sample = images[row]
            if sample.image.shape != (3, images.size, images.size):
                found.append(
                    Problem(
                        f"{sample.key} has shape {sample.image.shape}", mend, shard, info.name, (row, row)
                    )
                )
    except (tarfile.TarError, ImageSetError, ValueError, KeyError) as error:
        found.append(Problem(f"cannot be read ({error})", mend, shard, info.name, span))
    return found
