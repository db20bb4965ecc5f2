"""Stores as plain WebDataset shards, for anyone's pipeline, and back.

    DEST/shard-000000.tar   per sample what the image set has (<key>.png|jpg|webp, <key>.json[, <key>.mask.png]) and
                            <key>.logits.npy [C], <key>.map.npy [c,h,w], <key>.class.json (the explained class)
    DEST/shard-000000.json  the tar's size and sha256: a tar protects only its headers
    DEST/e2kd.json          where it comes from: the packed view and the store's manifest without its shards

With several views or explained classes the arrays keep these dimensions: [V,C], [V,K,c,h,w], [[K classes] of each V].
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from typing import Any, BinaryIO, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from artifacts.durable import sha256_file
from artifacts.errors import ImageSetError, MismatchedStore, StoreError
from artifacts.fields import Positive, Sha256, plain
from artifacts.images import ImageSet, open_images
from artifacts.index import Extension, Packed, Version, tar_name
from artifacts.manifest import SCHEMA_VERSION, ManifestDraft
from artifacts.packing import Packing, write_images
from artifacts.places import Place, Url, place
from artifacts.rowlist import sample_files
from artifacts.rows import TeacherRows
from artifacts.sealed import NewerSchema, parsed, reason, seal, unseal
from artifacts.store import TeacherStore, open_store
from artifacts.writer import StoreWriter

ABOUT = "e2kd.json"
_BATCH = 64
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<f[24])', 'fortran_order': False, 'shape': \([0-9, ]*\), \} *\n", re.S
)
"""The header of a .npy file, as numpy writes it."""


def export_store(
    store: TeacherStore, images: ImageSet, destination: Url, *, progress: Callable[[int], None] | None = None
) -> None:
    """Write the store's rows with their images as WebDataset shards; finished ones are left alone.

    Values are those that `store.read` gives, as float16 if that is exact and else as float32. Raises MismatchedStore
    if the images are not the store's or the destination holds something else.
    """
    from webdataset import TarWriter  # it imports torch

    if store.manifest.images != images.fingerprint:
        raise MismatchedStore(
            f"{store.place} was not made from the images in {images.place}",
            path=store.place,
            fields={"images": (store.manifest.images, images.fingerprint)},
        )
    where = place(destination)
    about = seal(_about(store, images))
    if where.exists(ABOUT):
        if where.read(ABOUT) != about:
            raise MismatchedStore(f"{where} holds another export; give an empty folder", path=where)
    elif where.sizes():
        raise StoreError(f"{where} is not empty and holds no export; give an empty folder", path=where)
    else:
        where.write(ABOUT, about)
    for shard, info in enumerate(images.shards):
        rows = images.shard_rows(shard)
        if not where.exists(_record(info.name)):
            with where.writing(info.name) as partial:
                with (
                    partial.open("r+b") as file,
                    TarWriter(file, mtime=0, user="e2kd", group="e2kd", encoder=False) as writer,
                ):
                    for start in range(rows.start, rows.stop, _BATCH):
                        part = range(start, min(start + _BATCH, rows.stop))
                        answers = store.read(part)
                        for position, row in enumerate(part):
                            key = images.shard_keys(shard)[row - rows.start]
                            writer.write(
                                {"__key__": key, **images.members(row), **_members(answers, position)}
                            )
                record = {"bytes": partial.stat().st_size, "sha256": sha256_file(partial)}
            where.write(_record(info.name), seal(record))
        if progress:
            progress(len(rows))


def import_store(
    source: Url, images: Url, store: Url, *, progress: Callable[[int], None] | None = None
) -> TeacherStore:
    """Rebuild the image set and the store from exported shards, or continue where an interrupted import stopped.

    Lossless at the codec's precision. Raises StoreError if the source is no export or its images were changed.
    """
    exported = _Export(place(source))
    write_images(
        images,
        Packing(
            count=exported.draft.shape.rows,
            get=exported.image_members,
            view=exported.packed.view,
            classes=exported.packed.classes,
            source=exported.packed.source,
            image_format=exported.packed.format,
            rows_per_shard=exported.draft.shape.rows_per_shard,
        ),
        progress=progress,
    )
    packed = open_images(images)
    if packed.fingerprint != exported.draft.images:
        raise StoreError(
            f"the images in {exported.place} are not those that the teacher answered for; export again",
            path=exported.place,
            fields={"images": (exported.draft.images, packed.fingerprint)},
        )
    writer = StoreWriter(store, exported.draft)
    writer.create()
    done = writer.committed()
    for shard in range(exported.draft.shape.shards):
        if shard not in done:
            writer.write_shard(
                shard, exported.answers(shard), packed.keys_sha256(shard), packed.shard_keys(shard)
            )
    writer.finish()
    return open_store(store)


class _About(BaseModel):
    """e2kd.json: packing.json and the store's draft, which are about the same rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Version
    packed: Packed
    store: ManifestDraft

    @model_validator(mode="after")
    def _same_rows(self) -> _About:
        shape = self.store.shape
        if (shape.rows, shape.rows_per_shard) != (self.packed.count, self.packed.rows_per_shard):
            raise ValueError("its images and its store have other rows")
        return self


class _TarRecord(BaseModel):
    """shard-%06d.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Positive
    sha256: Sha256


class _Export:
    """The shards of an export, one in memory at a time."""

    def __init__(self, where: Place) -> None:
        self.place = where
        try:
            about = _About.model_validate(unseal(where.read(ABOUT), SCHEMA_VERSION))
        except FileNotFoundError:
            raise StoreError(
                f"{where} has no {ABOUT}: make an export with: e2kd export STORE DEST",
                path=f"{where}/{ABOUT}",
            ) from None
        except NewerSchema as error:
            raise StoreError(
                f"{where}/{ABOUT} has schema {error}; update e2kd",
                path=f"{where}/{ABOUT}",
                fields={"schema_version": (error.args[0], SCHEMA_VERSION)},
            ) from None
        except ValueError as error:
            raise StoreError(
                f"{where}/{ABOUT} is damaged ({reason(error)}); export again", path=f"{where}/{ABOUT}"
            ) from None
        self.packed, self.draft = about.packed, about.store
        self._shard, self._samples = -1, list[tuple[str, dict[str, bytes]]]()

    def image_members(self, row: int) -> tuple[str, dict[str, bytes]]:
        shard, position = divmod(row, self.draft.shape.rows_per_shard)
        key, members = self._read(shard)[position]
        return key, {name: data for name, data in members.items() if name not in _ANSWERS}

    def answers(self, shard: int) -> TeacherRows:
        """Raises StoreError if they are not what the store says."""
        s, samples = self.draft.shape, self._read(shard)
        head = (s.views, s.explained)
        logits = np.empty((len(samples), s.views, s.classes), np.float32)
        maps = np.empty((len(samples), *head, s.channels, s.height, s.width), np.float32)
        classes = np.empty((len(samples), *head), np.int64)
        for position, (key, members) in enumerate(samples):
            try:
                logits[position] = _array(members["logits.npy"], logits[position].size).reshape(
                    logits.shape[1:]
                )
                maps[position] = _array(members["map.npy"], maps[position].size).reshape(maps.shape[1:])
                classes[position] = _classes(members["class.json"], s.classes).reshape(head)
            except (ValueError, EOFError) as error:
                raise self._damaged(tar_name(shard), f"{key}: {reason(error)}") from None
        return TeacherRows(logits, classes, maps)

    def _read(self, shard: int) -> list[tuple[str, dict[str, bytes]]]:
        if shard != self._shard:
            name, samples = tar_name(shard), dict[str, dict[str, bytes]]()
            try:
                with self._tar(name) as tar:
                    for _, key, extension, data in sample_files(tar):
                        if extension not in _MEMBERS or extension in samples.setdefault(key, {}):
                            raise ValueError(f"{key}.{extension} is no part of a sample, or is there twice")
                        samples[key][extension] = data
            except (FileNotFoundError, ValueError) as error:
                raise self._damaged(name, reason(error)) from None
            rows = self.draft.shape.shard_rows(shard)
            lacking = [key for key, members in samples.items() if not set(members) >= _ANSWERS]
            if lacking or len(samples) != len(rows):
                raise self._damaged(
                    name, f"{lacking[0]} lacks its answers" if lacking else f"{len(samples)} samples"
                )
            self._shard, self._samples = shard, list(samples.items())
        return self._samples

    def _tar(self, name: str) -> BinaryIO:
        """Raises ValueError if it is not the one of its record, looked at before it is read."""
        record = _TarRecord.model_validate(unseal(self.place.read(_record(name)), SCHEMA_VERSION))
        size = self.place.size(name)
        if size is not None and size != record.bytes:
            raise ValueError(f"it has {size} bytes, not {record.bytes}")
        tar = self.place.reading(name, record.bytes, record.sha256)
        if hashlib.file_digest(tar, "sha256").hexdigest() != record.sha256:
            raise ValueError("its checksum differs")
        return tar

    def _damaged(self, name: str, what: object) -> StoreError:
        line = str(what).splitlines()[0] if str(what) else type(what).__name__
        return StoreError(
            f"{self.place}/{name} is damaged or missing ({line}); export again", path=f"{self.place}/{name}"
        )


def _record(tar: str) -> str:
    return tar.removesuffix(".tar") + ".json"


_ANSWERS = {"logits.npy", "map.npy", "class.json"}
_MEMBERS = {*get_args(Extension), *_ANSWERS}


def _about(store: TeacherStore, images: ImageSet) -> dict[str, Any]:
    draft = {name: getattr(store.manifest, name) for name in ManifestDraft.model_fields}
    try:
        packed = unseal(images.place.read("packing.json"), SCHEMA_VERSION)
        Packed.model_validate(packed)
    except (FileNotFoundError, NewerSchema, ValueError):
        raise ImageSetError(
            f"{images.place}/packing.json is missing or damaged; run: e2kd verify --repair {images.place}",
            path=f"{images.place}/packing.json",
        ) from None
    return {
        "schema_version": SCHEMA_VERSION,
        "packed": packed,
        "store": ManifestDraft(**draft).model_dump(mode="json"),
    }


def _members(answers: TeacherRows, position: int) -> dict[str, bytes]:
    single = answers.maps.shape[1] == answers.maps.shape[2] == 1
    logits, maps, classes = (
        part[position] for part in (answers.logits, answers.maps, answers.explained_class)
    )
    if single:
        logits, maps = logits[0], maps[0, 0]
    return {
        "logits.npy": _npy(logits),
        "map.npy": _npy(maps),
        "class.json": json.dumps(int(classes[0, 0]) if single else classes.tolist()).encode(),
    }


def _npy(values: np.ndarray) -> bytes:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    buffer = io.BytesIO()
    np.save(buffer, half if np.array_equal(half.astype(np.float32), values) else values, allow_pickle=False)
    return buffer.getvalue()


def _array(data: bytes, count: int) -> np.ndarray:
    """The numbers of a .npy file: `count` floating-point ones, and nothing else. Raises ValueError."""
    header = _NPY.match(data)
    if header is None or int.from_bytes(data[8:10], "little") != header.end() - 10:
        raise ValueError("it is no .npy file of floating-point numbers")
    values = np.frombuffer(data, header[1].decode(), offset=header.end())
    if values.size != count:
        raise ValueError(f"it does not hold {count} numbers")
    return values


def _classes(data: bytes, classes: int) -> np.ndarray:
    """The explained classes, i64. Raises ValueError."""
    values = np.array(plain(parsed(data)))
    if values.dtype != np.int64:
        raise ValueError("its classes are no whole numbers")
    if ((values < 0) | (values >= classes)).any():
        raise ValueError(f"its class is not in 0 to {classes - 1}")
    return values
