"""Writing image sets: whole tars one after another, each with its row list, then the index."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel

from artifacts.durable import sha256_file
from artifacts.errors import ImageSetError
from artifacts.images import Sample
from artifacts.index import SCHEMA_VERSION, Index, Packed, tar_name
from artifacts.places import Place, Url, place
from artifacts.rowlist import RowList, locate_rows, read_row_list, row_list
from artifacts.sealed import NewerSchema, reason, seal, shown, unseal

_KEY = re.compile(r"[A-Za-z0-9_-]+")
KEPT = ("schema_version", "view", "classes", "rows_per_shard")
"""What the index repeats of packing.json."""

Members = Mapping[str, bytes]
"""The files of a packed sample by extension."""


@dataclass(frozen=True)
class Packing:
    """What an image set is made of: rows 0..count-1 that `get(row)` gives, a Sample or (key, members) as they are.

    view, classes and source describe the set: a pack that was interrupted continues only if they are the same.
    """

    count: int
    get: Callable[[int], Sample | tuple[str, Members]]
    view: dict[str, Any]
    classes: Sequence[str]
    source: str
    rows_per_shard: int
    image_format: str = "png"

    def describe(self) -> dict[str, Any]:
        return {
            "view": self.view,
            "classes": list(self.classes),
            "source": self.source,
            "count": self.count,
            "rows_per_shard": self.rows_per_shard,
            "schema_version": SCHEMA_VERSION,
            "format": self.image_format,
        }


def write_images(
    url: Url,
    packing: Packing,
    *,
    again: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Pack an image set, or continue if an interrupted pack of the same stopped.

    Shards that are finished are not asked for again, except tars named in `again`; a finished set of the same
    description is left alone. Raises ImageSetError for unfit or repeated keys, or if the folder holds a set of
    something else, finished or not.
    """
    where, advance = place(url), progress or _ignore
    _begin(where, packing.describe())
    keys = _Keys(where)
    lists: list[RowList] = []
    for start in range(0, packing.count, packing.rows_per_shard):
        rows = range(start, min(start + packing.rows_per_shard, packing.count))
        tar = tar_name(start // packing.rows_per_shard)
        finished = None if tar in again else _finished(where, tar, len(rows))
        if finished is None:
            where.remove("index.json")
            where.remove(row_list(tar))
            finished = _write_shard(where, tar, _packed(packing, rows, keys, advance))
        else:
            for row, key in zip(rows, finished.keys, strict=True):
                keys.claim(key, row)
            advance(len(rows))
        lists.append(finished)
    index = seal(_index(packing.describe(), lists))
    if not where.exists("index.json") or where.read("index.json") != index:
        where.write("index.json", index)


def _ignore(done: int) -> None:
    pass


def _begin(where: Place, plan: dict[str, Any]) -> None:
    """Write down what is being packed, or raise ImageSetError if the folder holds something else."""
    index, old = _sealed(where, "index.json", Index), _sealed(where, "packing.json", Packed)
    if old is None and index is not None:  # packing.json was lost: the index says most of it
        old = {**plan, **{key: index[key] for key in KEPT}, "count": index["rows"]}
    elif old is None and where.exists("packing.json"):
        raise ImageSetError(
            f"{where}/packing.json is damaged; delete the folder and run: e2kd pack CONFIG",
            path=f"{where}/packing.json",
        )
    differing = [] if old is None else [key for key in plan if old.get(key) != plan[key]]
    if old is not None and differing:
        lines = "\n".join(
            f"  {key}: packed {shown(old.get(key))}, config {shown(plan[key])}" for key in differing
        )
        raise ImageSetError(
            f"{where} holds other images than the config asks for:\n{lines}\n"
            f"use another folder (--out DIR), or delete it: rm -r {where}",
            path=where,
            fields={key: (old.get(key), plan[key]) for key in differing},
        )
    data = seal(plan)
    if not where.exists("packing.json") or where.read("packing.json") != data:
        where.write("packing.json", data)


def _sealed(where: Place, name: str, model: type[BaseModel]) -> dict[str, Any] | None:
    """None if the file is missing or damaged. Raises ImageSetError for a newer format."""
    try:
        return model.model_validate(unseal(where.read(name), SCHEMA_VERSION)).model_dump()
    except NewerSchema as error:
        raise ImageSetError(
            f"{where}/{name} has schema {error}, this e2kd reads {SCHEMA_VERSION}; update e2kd",
            path=f"{where}/{name}",
            fields={"schema_version": (error.args[0], SCHEMA_VERSION)},
        ) from None
    except (FileNotFoundError, ValueError):
        return None


def _packed(
    packing: Packing, rows: range, keys: _Keys, advance: Callable[[int], None]
) -> Iterator[tuple[str, Members]]:
    """(key, members) of each row. Raises ImageSetError for an unfit or repeated key."""
    for row in rows:
        sample = packing.get(row)
        if isinstance(sample, Sample):
            sample = sample.key, _members(sample, packing.image_format)
        key, members = sample
        keys.claim(key, row)
        yield key, members
        advance(1)


def _write_shard(where: Place, tar: str, samples: Iterator[tuple[str, Members]]) -> RowList:
    from webdataset import TarWriter  # it imports torch

    with where.writing(tar) as partial:
        with (
            partial.open("r+b") as file,
            TarWriter(file, mtime=0, user="e2kd", group="e2kd", encoder=False) as writer,
        ):
            for key, members in samples:
                writer.write({"__key__": key, **members})
        entries = {
            "tar": {"bytes": partial.stat().st_size, "sha256": sha256_file(partial)},
            "rows": _located(where, tar, partial),
        }
    data = seal(entries)
    where.write(row_list(tar), data)
    return read_row_list(where, tar, hashlib.sha256(data).hexdigest())


def _located(where: Place, tar: str, partial: Path) -> list[dict[str, Any]]:
    """Raises ImageSetError if what was packed is no sample."""
    try:
        with partial.open("rb") as file:
            return locate_rows(file)
    except ValueError as error:
        raise ImageSetError(
            f"{where}/{tar} cannot be packed: {reason(error)}", path=f"{where}/{tar}"
        ) from None


class _Keys:
    """The keys of a set so far, each of them one row's."""

    def __init__(self, where: Place) -> None:
        self.where = where
        self.rows: dict[str, int] = {}

    def claim(self, key: str, row: int) -> None:
        """Raises ImageSetError if the key is unfit, or another row's."""
        if not _KEY.fullmatch(key):
            raise self._error(f"key {key!r} of row {row}: use only letters, digits, _ and -", key, row)
        if self.rows.setdefault(key, row) != row:
            first = self.rows[key]
            raise self._error(f"{self.where}: rows {first} and {row} have the same key {key}", key, row)

    def _error(self, message: str, key: str, row: int) -> ImageSetError:
        return ImageSetError(message, path=self.where, rows=range(row, row + 1), key=key)


def _finished(where: Place, tar: str, count: int) -> RowList | None:
    """The row list of a shard whose tar is there in full, else None."""
    try:
        found = read_row_list(where, tar)
    except (FileNotFoundError, ImageSetError):
        return None
    return found if len(found.keys) == count and where.size(tar) == found.bytes else None


def _members(sample: Sample, image_format: str) -> dict[str, bytes]:
    about: dict[str, Any] = {"label": sample.label}
    if sample.group is not None:
        about["group"] = sample.group
    if sample.boxes is not None:
        about["boxes"] = np.asarray(sample.boxes, np.float64).tolist()
    if sample.source is not None:
        about["source"] = sample.source
    members = {image_format: _encode(sample.image.transpose(1, 2, 0), image_format)}
    members["json"] = json.dumps(about).encode()
    if sample.mask is not None:
        members["mask.png"] = _encode(sample.mask, "png")
    return members


def _encode(pixels: np.ndarray, image_format: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {
        "png": {"format": "PNG", "compress_level": 6},
        "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
        "webp": {"format": "WEBP", "lossless": True},
    }[image_format]
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def _index(plan: dict[str, Any], lists: Sequence[RowList]) -> dict[str, Any]:
    shards = [
        {
            "name": found.tar,
            "rows": len(found.keys),
            "bytes": found.bytes,
            "sha256": found.sha256,
            "rows_sha256": found.own_sha256,
        }
        for found in lists
    ]
    return {**{key: plan[key] for key in KEPT}, "rows": plan["count"], "shards": shards}
