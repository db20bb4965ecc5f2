"""What `import` takes: exports whose tars hold anything but samples, and e2kd.json without what it needs."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts.sealed import seal

NAME, CLASSES = "img-0000", 3


def repack(world: Any, change: Callable[[dict[str, bytes]], object] | None = None, **extra: Any) -> None:
    """Change the files of the first tar, or append a member (`member`, `data`) or raw bytes; seal it anew."""
    file: Path = world.export / "shard-000000.tar"
    with tarfile.open(file) as old:
        files = {member.name: old.extractfile(member).read() for member in old}  # type: ignore[union-attr]
    if change:
        change(files)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in extra.get("first", ()):
            new.addfile(member)
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            new.addfile(about, io.BytesIO(data))
        for member in extra.get("last", ()):
            new.addfile(member)
    write(world, extra.get("raw", b"") + buffer.getvalue())


def write(world: Any, data: bytes) -> None:
    (world.export / "shard-000000.tar").write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (world.export / "shard-000000.json").write_bytes(seal(record))


def refused(world: Any) -> str:
    with world.frugal():
        said: str = world.refused("import", world.export, world.root / "cache/i", world.root / "cache/s")
    return said


def member(kind: bytes, name: str = f"{NAME}.x", link: str = "", size: int = 0) -> tarfile.TarInfo:
    about = tarfile.TarInfo(name)
    about.type, about.linkname, about.size = kind, link, size
    return about


KINDS = {
    "directory": member(tarfile.DIRTYPE),
    "pipe": member(tarfile.FIFOTYPE),
    "character-device": member(tarfile.CHRTYPE),
    "block-device": member(tarfile.BLKTYPE),
    "link": member(tarfile.SYMTYPE, link="/etc/passwd"),
    "hard-link": member(tarfile.LNKTYPE, link="/etc/passwd"),
    "loop": member(tarfile.SYMTYPE, link=f"{NAME}.x"),
    "hard-loop": member(tarfile.LNKTYPE, link=f"{NAME}.x"),
    "contiguous": member(tarfile.CONTTYPE),
    "unknown": member(b"Z"),
}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_members_that_are_no_files(world: Any, kind: str, where: str) -> None:
    """F15"""
    repack(world, **{where: [KINDS[kind]]})
    said = refused(world)
    assert "shard-000000.tar is damaged" in said
    assert NAME in said


@pytest.mark.parametrize(
    "name", ["../../home/x.png", "/abs.png", "a/b.png", ".png", "x", "ä.png", "a b.png", "a\n.png"]
)
def test_members_that_are_called_otherwise(world: Any, name: str) -> None:
    repack(world, lambda files: files.update({name: b"1"}))
    refused(world)


@pytest.mark.parametrize("extension", ["exe", "png.exe", "PNG", "gif", "mask.png.json", ""])
def test_members_that_are_no_part_of_a_sample(world: Any, extension: str) -> None:
    repack(world, lambda files: files.update({f"{NAME}.{extension}": b"1"}))
    assert "is no part of a sample" in refused(world)


def test_a_member_twice(world: Any) -> None:
    again = tarfile.TarInfo(f"{NAME}.png")
    repack(world, last=[again])
    assert "is there twice" in refused(world)


@pytest.mark.parametrize("gone", ["png", "json", "logits.npy", "map.npy", "class.json"])
def test_a_sample_that_lacks_something(world: Any, gone: str) -> None:
    repack(world, lambda files: files.pop(f"{NAME}.{gone}"))
    refused(world)


def test_two_images_of_a_sample(world: Any) -> None:
    repack(world, lambda files: files.update({f"{NAME}.jpg": files[f"{NAME}.png"]}))
    refused(world)


def header(size: bytes, kind: bytes = b"0", name: bytes = b"img-0000.x") -> bytes:
    """A tar header with this size field."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124 : 124 + len(size)], block[136:148] = size, b"00000000000\0"
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


BIG = b"\x80" + b"\0" * 3 + struct.pack(">Q", 2**60)
NEGATIVE = b"\xff" * 10 + b"\xfc\x00"


@pytest.mark.parametrize(
    "size", [BIG, NEGATIVE, b"77777777777\0", b"nonsense\0\0\0\0"], ids=["big", "negative", "8e9", "x"]
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"5", b"7"])
def test_members_of_odd_sizes(world: Any, size: bytes, kind: bytes) -> None:
    """A negative size leads back, a large one out of the tar."""
    repack(world, raw=header(size, kind))
    refused(world)


def test_a_sparse_member(world: Any) -> None:
    """a15: 10 kB that were 3 GB."""
    block = bytearray(header(b"00000001000\0", b"S"))
    block[386:398], block[398:410] = b"00000000000\0", b"00000001000\0"
    block[482:483], block[483:495] = b"\0", b"30000000000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    repack(world, raw=bytes(block) + bytes(512))
    assert "no regular file" in refused(world)
    block[482:483] = b"\1"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    write(world, bytes(block))
    refused(world)


def test_a_sparse_member_in_pax(world: Any) -> None:
    record = member(tarfile.REGTYPE)
    record.pax_headers = {"GNU.sparse.map": "0,1,3000000000,0", "GNU.sparse.size": "3000000000"}
    repack(world, first=[record])
    refused(world)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_headers_in_headers(world: Any, kind: bytes) -> None:
    content = b"14 path=img-0000.x\n".ljust(512, b"\0") if kind == b"x" else b"img-0000.x".ljust(512, b"\0")
    repack(world, raw=(header(b"00000000023\0", kind) + content) * 2000)
    refused(world)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 1024, b"\x1f\x8b" + bytes(600), b"garbage" * 100, b"PK\3\4" + bytes(600)]
)
def test_what_is_no_tar(world: Any, data: bytes) -> None:
    write(world, data)
    refused(world)


def npy(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def npz(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, values)
    return buffer.getvalue()


def claims(shape: str, descr: str = "<f4", data: bytes = b"") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def arrays(n: int) -> dict[str, bytes]:
    """Files in the place of one of `n` numbers."""
    return {
        "empty": b"",
        "npz": npz(np.zeros(n, np.float32)),
        "objects": npy(np.full(n, None), allow_pickle=True),
        "texts": npy(np.full(n, "a")),
        "integers": npy(np.zeros(n, np.int64)),
        "complex": npy(np.zeros(n, np.complex64)),
        "bools": npy(np.zeros(n, bool)),
        "records": npy(np.zeros(n, [("a", "<f4")])),
        "too-few": npy(np.zeros(n - 1, np.float32)),
        "too-many": npy(np.zeros(400, np.float32)),
        "not-finite": npy(np.full(n, np.nan, np.float32)),
        "infinite": npy(np.full(n, np.inf, np.float16)),
        "too-large": npy(np.full(n, 1e300)),
        "a-million-million": claims("(1000000000000,)"),
        "negative": claims("(-3,)"),
        "code": claims("(__import__('os').system('touch x'),)"),
        "deep": claims("(" * 5000 + ")" * 5000),
        "minus": claims("(" + "-" * 9000 + "3,)"),
        "short": npy(np.zeros(n, np.float32))[:-1],
        "version-9": b"\x93NUMPY\x09\x00" + bytes(100),
        "pickle": b"\x80\x04cos\nsystem\n(S'touch x'\ntR.",
    }


@pytest.mark.parametrize("file", ["logits.npy", "map.npy"])
@pytest.mark.parametrize("what", arrays(1))
def test_arrays_that_are_none(world: Any, what: str, file: str) -> None:
    data = arrays(CLASSES if file == "logits.npy" else 4)[what]
    repack(world, lambda files: files.update({f"{NAME}.{file}": data}))
    refused(world)


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"1e400",
            b"NaN",
            b"-1",
            b"3",
            b"1.5",
            b"true",
            b"null",
            b'"0"',
            b"[0, 1]",
            b"[[0], [0, 1]]",
            b"{}",
        ),
        *(b"9" * 5000, b"9" * 300, b"[" * 5000, b"[" * 50 + b"0" + b"]" * 50),
    ],
)
def test_classes_that_are_none(world: Any, data: bytes) -> None:
    repack(world, lambda files: files.update({f"{NAME}.class.json": data}))
    refused(world)


def test_members_that_are_no_images_are_found_by_verify(world: Any) -> None:
    """The fingerprint of the images tells that they were changed."""
    repack(world, lambda files: files.update({f"{NAME}.png": b"%!PS"}))
    assert "are not those that the teacher answered for" in refused(world)


@pytest.mark.parametrize("key", ["packed", "store", "schema_version"])
@pytest.mark.parametrize("value", [None, 7, [], "x", {}])
def test_an_export_without_what_it_needs(world: Any, key: str, value: Any) -> None:
    if value is None:
        world.reseal(world.export / "e2kd.json", lambda about: about.pop(key))
    else:
        world.reseal(world.export / "e2kd.json", lambda about: about.update({key: value}))
    refused(world) if (key, value) != ("schema_version", 7) else refused(world).index("update e2kd")


@pytest.mark.parametrize("rows", [0, -1, 9, 11, 10**12, 10**30, 1.5, True, "10", None])
def test_an_export_of_other_rows(world: Any, rows: Any) -> None:
    def change(about: dict[str, Any]) -> None:
        about["packed"]["count"] = about["store"]["shape"]["rows"] = rows

    world.reseal(world.export / "e2kd.json", change)
    refused(world)


@pytest.mark.parametrize("value", [0, -1, 2**60, 1.5, True, "9", None, 10**30])
@pytest.mark.parametrize("field", ["bytes", "sha256"])
def test_a_record_of_a_tar(world: Any, field: str, value: Any) -> None:
    world.reseal(world.export / "shard-000000.json", lambda record: record.update({field: value}))
    refused(world)


def test_a_sound_export_is_imported(world: Any) -> None:
    """What `repack` makes of a tar without a change is still one."""
    repack(world)
    to = (world.root / "cache/i", world.root / "cache/s")
    with world.untouched("cache"):
        assert world("import", world.export, *to).code == 0
    assert json.loads((to[1] / "manifest.json").read_bytes())["shape"]["rows"] == 10
