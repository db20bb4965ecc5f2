"""Packed images: three formats by name, of the size that the set says, before a pixel is decoded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from artifacts import ImageSetError, open_images
from artifacts.packing import write_images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(%stdin) run\n%%EOF\n"


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG of one bit per pixel, all black, made without making the pixels at once."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pressed, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    data = b"".join(pressed.compress(row) for _ in range(height)) + pressed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    """The header of a lossless WebP of that size, and nothing that fits it."""
    bits = (width - 1) | (height - 1) << 14
    data = b"\x2f" + struct.pack("<I", bits) + bytes(64)
    body = b"WEBPVP8L" + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def of_members(world: Any, tools: Any, **members: bytes) -> Path:
    """An image set of one row with these files; `mask` is the mask."""
    files = {"mask.png" if name == "mask" else name: data for name, data in members.items()}
    files.setdefault("json", b'{"label": 0}')
    folder: Path = world.strange / "images/odd"
    write_images(folder, tools.packing(count=1, get=lambda row: ("a", files)))
    return folder


def refused(world: Any, folder: Path) -> str:
    with world.untouched(), world.frugal(), pytest.raises(ImageSetError) as caught:
        _ = open_images(folder)[0]
    assert "cannot be decoded" in world.refused("verify", folder, code=3)
    return str(caught.value)


@pytest.fixture
def ghostscript(world: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `gs` that says that it ran."""
    tool = world.root / "bin/gs"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho ran > {world.home}/ran\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return Path(world.home / "ran")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "mask"])
def test_no_postscript_runs(world: Any, tools: Any, ghostscript: Path, extension: str) -> None:
    """a14"""
    members = {extension: EPS} if extension != "mask" else {"png": encoded("PNG"), "mask": EPS}
    refused(world, of_members(world, tools, **members))
    assert not ghostscript.exists()


@pytest.mark.parametrize(
    "kind", ["GIF", "TIFF", "BMP", "PPM", "TGA", "PCX", "ICO", "JPEG2000", "PDF", "SGI", "DDS"]
)
def test_other_formats_are_none(world: Any, tools: Any, kind: str) -> None:
    refused(world, of_members(world, tools, png=encoded(kind)))


@pytest.mark.parametrize(("extension", "kind"), [("png", "JPEG"), ("jpg", "PNG"), ("webp", "PNG")])
def test_an_image_is_of_the_format_that_it_is_called(
    world: Any, tools: Any, extension: str, kind: str
) -> None:
    refused(world, of_members(world, tools, **{extension: encoded(kind)}))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_mask_is_a_png(world: Any, tools: Any, kind: str) -> None:
    refused(world, of_members(world, tools, png=encoded("PNG"), mask=encoded(kind)))


@pytest.mark.parametrize("size", [(13_000, 13_000), (17, 16), (16, 15), (1, 256), (60_000, 2)])
def test_an_image_of_another_size_is_not_decoded(world: Any, tools: Any, size: tuple[int, int]) -> None:
    """a14: 493 kB that were 2.3 GB."""
    assert "pixels" in refused(world, of_members(world, tools, png=png(*size)))
    assert "pixels" in refused(world, of_members_again(world, tools, png=encoded("PNG"), mask=png(*size)))


def of_members_again(world: Any, tools: Any, **members: bytes) -> Path:
    shutil.rmtree(world.strange / "images/odd")
    return of_members(world, tools, **members)


def test_a_webp_of_another_size_is_not_decoded(world: Any, tools: Any) -> None:
    """a14: 6.3 kB that were 3.5 GB."""
    refused(world, of_members(world, tools, webp=webp(16_384, 16_384)))


def test_texts_in_an_image_stay_packed(world: Any, tools: Any) -> None:
    text = zlib.compress(bytes(120_000_000), 1)
    data = b"k\0\0" + text
    extra = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    refused(world, of_members(world, tools, png=png(16, 16, extra)))


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "16", None, 1e30, 2**70, [16], 5000])
def test_the_size_of_a_set_is_a_number_of_pixels(world: Any, size: Any) -> None:
    world.reseal(world.images / "index.json", lambda index: index["view"].update(size=size))
    for command, code in (("inspect", 2), ("verify", 3)):
        assert "index.json is damaged (view: " in world.refused(command, world.images, code=code)


@pytest.mark.parametrize(
    "about",
    [
        b"",
        b"[]",
        b"{}",
        b'{"label": -1}',
        b'{"label": true}',
        b'{"label": 1.0}',
        b'{"label": 1e400}',
        b'{"label": NaN}',
        b'{"label": 0, "boxes": [[1,2,3,4]]}',
        b'{"label": 0, "boxes": [[1,2,3,4,1e400]]}',
        b'{"label": 0, "boxes": 7}',
        b'{"label": 0, "group": "a"}',
        b'{"label": 0, "source": 7}',
        b'{"label": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"label": 0, "x": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"label": ' + b"9" * 5000 + b"}",
        b'{"label": ' + b"9" * 300 + b"}",
        b'{"label": 0, "x": ' + b"9" * 300 + b"}",
        b"\xff\xfe\0",
    ],
)
def test_what_a_sample_says_of_itself(world: Any, tools: Any, about: bytes) -> None:
    """It is refused when it is packed (`import`), and when it is read."""
    with pytest.raises(ImageSetError, match="cannot be packed"):
        of_members(world, tools, png=encoded("PNG"), json=about)
    (world.strange / "images/odd/packing.json").unlink()
    sound = json.dumps({"label": 0, "source": "x" * 12_000}).encode()
    folder = of_members(world, tools, png=encoded("PNG"), json=sound)
    put_about(world, folder, about, len(sound))
    with world.untouched(), pytest.raises(ImageSetError):
        _ = open_images(folder)[0]
    world.refused("verify", folder, code=3)


def put_about(world: Any, folder: Path, about: bytes, length: int) -> None:
    """Change the JSON in the tar, and seal everything so that it fits."""
    tar = folder / "shard-000000.tar"
    data = about + b" " * (length - len(about))
    rows = json.loads((folder / "shard-000000.rows.json").read_bytes())["rows"]
    offset = rows[0]["members"]["json"][0]
    whole = bytearray(tar.read_bytes())
    whole[offset : offset + length] = data
    tar.write_bytes(whole)
    sums = {"sha256": hashlib.sha256(whole).hexdigest()}

    def change(content: dict[str, Any]) -> None:
        content["tar"].update(sums)
        content["rows"][0]["members"]["json"][2] = zlib.crc32(data)

    world.reseal(folder / "shard-000000.rows.json", change)
    sums["rows_sha256"] = hashlib.sha256((folder / "shard-000000.rows.json").read_bytes()).hexdigest()
    world.reseal(folder / "index.json", lambda index: index["shards"][0].update(sums))


def test_labels_are_classes_that_there_are(world: Any) -> None:
    world.mislabel(lambda rows: rows["rows"][0].update(label=3))
    assert "labels that are none of the 3 classes" in world.refused("inspect", world.images)


def test_the_set_itself_is_sound(world: Any, tools: Any) -> None:
    folder = of_members(world, tools, png=png(16, 16), mask=png(16, 16))
    assert open_images(folder)[0].image.shape == (3, 16, 16)
    assert np.array_equal(open_images(folder)[0].image, np.zeros((3, 16, 16)))
    assert world("verify", folder).code == 0
