"""Writing image sets: whole tars one after another, each with its row list, then the index."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from artifacts.durable import sha256_file
from artifacts.errors import ImageSetError
from artifacts.images import SCHEMA_VERSION, Sample
from artifacts.places import Place, Url, place
from artifacts.rowlist import RowList, locate_rows, read_row_list, row_list
from artifacts.sealed import NewerSchema, seal, unseal

_KEY = re.compile(r"[A-Za-z0-9_-]+")
KEPT = ("schema_version", "view", "classes", "rows_per_shard")
"""What the index repeats of packing.json."""

Members = Mapping[str, bytes]
"""The files of a packed sample by extension."""


def write_images(
    url: Url,
    *,
    count: int,
    get: Callable[[int], Sample | tuple[str, Members]],
    view: dict[str, Any],
    classes: Sequence[str],
    source: str,
    rows_per_shard: int,
    image_format: str = "png",
    again: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Pack rows 0..count-1 that `get(row)` gives, or continue where an interrupted pack of the same stopped.

    `get` gives a Sample, or (key, members) that are packed already. Shards that are finished are not asked for again,
    except tars named in `again`; a finished set of the same description is left alone. Raises ImageSetError for unfit
    or repeated keys, or where the folder holds a set of something else, finished or not.
    """
    where = place(url)
    plan = {
        "view": view,
        "classes": list(classes),
        "source": source,
        "count": count,
        "rows_per_shard": rows_per_shard,
    }
    plan |= {"schema_version": SCHEMA_VERSION, "format": image_format}
    _begin(where, plan)
    seen: dict[str, int] = {}
    lists: list[RowList] = []
    for start in range(0, count, rows_per_shard):
        rows = range(start, min(start + rows_per_shard, count))
        tar = f"shard-{start // rows_per_shard:06d}.tar"
        finished = None if tar in again else _finished(where, tar, len(rows))
        if finished is None:
            where.remove("index.json")
            where.remove(row_list(tar))
            finished = _write_shard(where, tar, rows, get, image_format, seen, progress)
        else:
            for row, key in zip(rows, finished.keys, strict=True):
                _claim(seen, key, row, where)
            if progress:
                progress(len(rows))
        lists.append(finished)
    index = seal(_index(plan, lists))
    if not where.exists("index.json") or where.read("index.json") != index:
        where.write("index.json", index)


def _begin(where: Place, plan: dict[str, Any]) -> None:
    """Write down what is being packed, or raise ImageSetError where the folder holds something else."""
    index, old = _sealed(where, "index.json"), _sealed(where, "packing.json")
    if old is None and index is not None:  # packing.json was lost: the index says most of it
        old = {**plan, **{key: index[key] for key in KEPT}, "count": index["rows"]}
    elif old is None and where.exists("packing.json"):
        raise ImageSetError(
            f"{where}/packing.json is damaged; delete the folder and run: e2kd pack CONFIG",
            path=f"{where}/packing.json",
        )
    differing = [] if old is None else [key for key in plan if old.get(key) != plan[key]]
    if old is not None and differing:
        lines = "\n".join(f"  {key}: packed {old.get(key)!r}, config {plan[key]!r}" for key in differing)
        raise ImageSetError(
            f"{where} holds other images than the config asks for:\n{lines}\n"
            f"use another folder (--out DIR), or delete it: rm -r {where}",
            path=where,
            fields={key: (old.get(key), plan[key]) for key in differing},
        )
    data = seal(plan)
    if not where.exists("packing.json") or where.read("packing.json") != data:
        where.write("packing.json", data)


def _sealed(where: Place, name: str) -> dict[str, Any] | None:
    """None where the file is missing or damaged. Raises ImageSetError for a newer format."""
    try:
        return unseal(where.read(name), SCHEMA_VERSION)
    except NewerSchema as error:
        raise ImageSetError(
            f"{where}/{name} has schema {error}, this e2kd reads {SCHEMA_VERSION}; update e2kd",
            path=f"{where}/{name}",
            fields={"schema_version": (error.args[0], SCHEMA_VERSION)},
        ) from None
    except (FileNotFoundError, ValueError):
        return None


def _write_shard(
    where: Place,
    tar: str,
    rows: range,
    get: Callable[[int], Sample | tuple[str, Members]],
    image_format: str,
    seen: dict[str, int],
    progress: Callable[[int], None] | None,
) -> RowList:
    from webdataset import TarWriter  # it imports torch

    with where.writing(tar) as partial:
        with (
            partial.open("r+b") as file,
            TarWriter(file, mtime=0, user="e2kd", group="e2kd", encoder=False) as writer,
        ):
            for row in rows:
                found = get(row)
                key, members = (
                    (found.key, _members(found, image_format)) if isinstance(found, Sample) else found
                )
                if not _KEY.fullmatch(key):
                    raise ImageSetError(
                        f"key {key!r} of row {row}: use only letters, digits, _ and -",
                        path=where,
                        rows=range(row, row + 1),
                        key=key,
                    )
                _claim(seen, key, row, where)
                writer.write({"__key__": key, **members})
                if progress:
                    progress(1)
        entries = {
            "tar": {"bytes": partial.stat().st_size, "sha256": sha256_file(partial)},
            "rows": locate_rows(partial),
        }
    data = seal(entries)
    where.write(row_list(tar), data)
    return read_row_list(where, tar, hashlib.sha256(data).hexdigest())


def _claim(seen: dict[str, int], key: str, row: int, where: Place) -> None:
    if seen.setdefault(key, row) != row:
        raise ImageSetError(
            f"{where}: rows {seen[key]} and {row} have the same key {key}",
            path=where,
            rows=range(row, row + 1),
            key=key,
        )


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
