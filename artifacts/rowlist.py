"""The row list beside each tar: keys, labels, and where a row's members lie, so that rows are read without a scan.

A tar protects its headers only, and of the image formats only PNG its pixels: each member has its CRC-32 here.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from artifacts.errors import ImageSetError

Label = int | tuple[int, ...] | None


class Member(NamedTuple):
    """A file in the tar: `length` bytes from `offset`."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Row:
    """What is known of a row without its tar. Members by extension: png|jpg|webp, json, mask.png."""

    key: str
    label: Label
    group: int | None
    members: dict[str, Member]


def row_list(tar: Path) -> Path:
    return tar.with_suffix(".rows.json")


def locate_rows(tar: Path) -> list[dict[str, Any]]:
    """The row list of a tar, read off it as any reader sees it."""
    rows: dict[str, dict[str, Any]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, extension = member.name.split(".", 1)
            row = rows.setdefault(key, {"key": key, "members": {}})
            file = archive.extractfile(member)
            assert file is not None
            data = file.read()
            row["members"][extension] = Member(member.offset_data, member.size, zlib.crc32(data))
            if extension == "json":
                about = json.loads(data)
                row["label"], row["group"] = about["label"], about.get("group")
    return list(rows.values())


def read_rows(file: Path, sha256: str | None = None) -> tuple[Row, ...]:
    """A row list. Raises ImageSetError where it is not one, or not the one of this `sha256`."""
    data = file.read_bytes()
    try:
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("sha256 differs")
        return tuple(
            Row(
                key=row["key"],
                label=tuple(row["label"]) if isinstance(row["label"], list) else row["label"],
                group=row["group"],
                members={name: Member(*place) for name, place in row["members"].items()},
            )
            for row in json.loads(data)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ImageSetError(
            f"{file} is damaged ({error}); delete it and {file.with_name('index.json')} and run: e2kd pack CONFIG"
        ) from None
