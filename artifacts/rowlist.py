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

import numpy as np

from artifacts.errors import ImageSetError
from artifacts.places import Place
from artifacts.sealed import unseal

Label = int | tuple[int, ...] | None


class Member(NamedTuple):
    """A file in the tar: `length` bytes from `offset`."""

    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class RowList:
    """What <tar>.rows.json, a sealed file, says: the tar's size and checksum, and what its rows are.

    `members`: by extension (png|jpg|webp, json, mask.png) i64 [rows,3] of offset, length and CRC-32; offset -1 where
    the row has no such file. As arrays, because a big set has millions. `own_sha256` is that of the list itself.
    """

    tar: str
    bytes: int
    sha256: str
    own_sha256: str
    keys: tuple[str, ...]
    labels: tuple[Label, ...]
    groups: tuple[int | None, ...]
    members: dict[str, np.ndarray]

    def extensions(self, position: int) -> list[str]:
        return [name for name, places in self.members.items() if places[position, 0] >= 0]

    def member(self, position: int, extension: str) -> Member:
        return Member(*self.members[extension][position].tolist())


def row_list(tar: str) -> str:
    """The name of a tar's row list."""
    return tar.removesuffix(".tar") + ".rows.json"


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


def read_row_list(where: Place, tar: str, sha256: str | None = None) -> RowList:
    """Raises FileNotFoundError, or ImageSetError where it is no row list, or not the one of this `sha256`."""
    data = where.read(row_list(tar))
    own = hashlib.sha256(data).hexdigest()
    try:
        if sha256 not in (None, own):
            raise ValueError("sha256 differs")
        content = unseal(data, 1)
        rows = content["rows"]
        extensions = dict.fromkeys(name for row in rows for name in row["members"])
        return RowList(
            tar=tar,
            bytes=int(content["tar"]["bytes"]),
            sha256=str(content["tar"]["sha256"]),
            own_sha256=own,
            keys=tuple(row["key"] for row in rows),
            labels=tuple(
                tuple(row["label"]) if isinstance(row["label"], list) else row["label"] for row in rows
            ),
            groups=tuple(row["group"] for row in rows),
            members={
                name: np.array([Member(*row["members"].get(name, (-1, 0, 0))) for row in rows], np.int64)
                for name in extensions
            },
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ImageSetError(
            f"{where}/{row_list(tar)} is damaged ({error}); run: e2kd verify --repair {where}",
            path=f"{where}/{row_list(tar)}",
        ) from None
