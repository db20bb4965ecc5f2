"""The row list beside each tar: keys, labels, and where a row's members lie, so that rows are read without a scan.

A tar protects its headers only, and of the image formats only PNG its pixels: each member has its CRC-32 here.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np

from artifacts.errors import ImageSetError
from artifacts.fields import plain
from artifacts.index import About, Rows
from artifacts.places import Place
from artifacts.sealed import parsed, reason, unseal

_KEY = re.compile(r"[A-Za-z0-9_-]+")
LARGEST_MEMBER = 2**28
"""Bytes of a file in a tar."""
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


def locate_rows(tar: IO[bytes]) -> list[dict[str, Any]]:
    """The row list of a tar, read off it as any reader sees it.

    Raises ValueError for a member that is no regular file or no part of a sample, and for what is no tar.
    """
    rows: dict[str, dict[str, Any]] = {}
    for member, key, extension, data in sample_files(tar):
        row = rows.setdefault(key, {"key": key, "members": {}})
        if extension in row["members"]:
            raise ValueError(f"{member.name!r} is there twice")
        row["members"][extension] = [member.offset_data, member.size, zlib.crc32(data)]
        if extension == "json":
            about = read_about(data)
            row["label"], row["group"] = about.label, about.group
    return list(rows.values())


def sample_files(tar: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, str, str, bytes]]:
    """(member, key, extension, bytes) of each file of a tar, whose members are regular files that lie in it.

    Raises ValueError for any other member, and for what is no tar.
    """
    size = tar.seek(0, io.SEEK_END)
    tar.seek(0)
    for archive, member in _members(tar):
        if not member.isreg() or member.issparse() or not 0 <= member.size <= size - member.offset_data:
            raise ValueError(f"its member {member.name!r} is no regular file that lies in it")
        if member.size > LARGEST_MEMBER:
            raise ValueError(f"its member {member.name!r} has {member.size} bytes")
        key, _, extension = member.name.partition(".")
        if not _KEY.fullmatch(key):
            raise ValueError(f"its member {member.name!r} has no key of letters, digits, _ and -")
        file = archive.extractfile(member)
        yield member, key, extension, file.read() if file else b""


def _members(tar: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Raises ValueError."""
    try:
        archive = tarfile.open(fileobj=tar, mode="r:")  # noqa: SIM115
        while (member := archive.next()) is not None:
            yield archive, member
    except ValueError:
        raise
    # tarfile raises whatever it raises for odd headers
    except Exception as error:
        raise ValueError(f"it cannot be read as a tar ({type(error).__name__}: {error})") from None


def read_about(data: bytes) -> About:
    """What the JSON file of a sample says. Raises ValueError."""
    return About.model_validate(plain(parsed(data)))


def read_row_list(where: Place, tar: str, sha256: str | None = None) -> RowList:
    """Raises FileNotFoundError, or ImageSetError if it is no row list, or not the one of this `sha256`."""
    data = where.read(row_list(tar))
    own = hashlib.sha256(data).hexdigest()
    try:
        if sha256 not in (None, own):
            raise ValueError("sha256 differs")
        return _row_list(tar, own, Rows.model_validate(unseal(data, 1)))
    except ValueError as error:
        raise ImageSetError(
            f"{where}/{row_list(tar)} is damaged ({reason(error)}); run: e2kd verify --repair {where}",
            path=f"{where}/{row_list(tar)}",
        ) from None


def _row_list(tar: str, own_sha256: str, content: Rows) -> RowList:
    rows = content.rows
    extensions = dict.fromkeys(name for row in rows for name in row.members)
    return RowList(
        tar=tar,
        bytes=content.tar.bytes,
        sha256=content.tar.sha256,
        own_sha256=own_sha256,
        keys=tuple(row.key for row in rows),
        labels=tuple(tuple(row.label) if isinstance(row.label, list) else row.label for row in rows),
        groups=tuple(row.group for row in rows),
        members={
            name: np.array([row.members.get(name, (-1, 0, 0)) for row in rows], np.int64)
            for name in extensions
        },
    )
