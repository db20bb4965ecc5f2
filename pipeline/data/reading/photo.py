"""Reading one photograph: any JPEG, PNG or WebP to upright 8-bit RGB."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from artifacts.errors import DataError
from pipeline.data.reading.regular import regular_size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
FORMATS = ("JPEG", "PNG", "WEBP")  # other decoders stay shut, whatever a file is called
MOST_PIXELS = 2**26
"""Of an image before it is decoded: 8,192 x 8,192. A few kilobytes can say more, and take gigabytes."""
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_photo(path: Path, shorter_side: int | None = None) -> Image.Image:
    """RGB, EXIF orientation applied, alpha over white.

    With `shorter_side`, a large JPEG is decoded at 1/2, 1/4 or 1/8, with both sides at least twice that many px: not
    for images with boxes or masks, which are in px of the whole image. Raises DataError naming the file.
    """
    return _read(path, str(path), shorter_side)


def decode_photo(data: bytes, name: str, shorter_side: int | None = None) -> Image.Image:
    """`read_photo` of an encoded image in memory; `name` says in errors where it came from."""
    return _read(io.BytesIO(data), name, shorter_side)


def read_mask(file: Path | io.BytesIO, name: str, size: tuple[int, int]) -> Image.Image:
    """Mode L, 0..255. Raises DataError naming the file, also if its size is not `size` (width, height) px."""
    try:
        _check_regular(file)
        with _silent(), Image.open(file, formats=("PNG",)) as image:
            if image.size != size:
                found, wanted = (f"{width} x {height}" for width, height in (image.size, size))
                raise DataError(
                    f"the mask {name} has {found} px, its image {wanted}; replace the mask",
                    path=_path(file, name),
                )
            return image.convert("L")
    except UNREADABLE as error:
        raise DataError(
            f"cannot read the mask {name} ({error}); remove or replace it", path=_path(file, name)
        ) from error


def _check_regular(file: Path | io.BytesIO) -> None:
    """Raises OSError for a FIFO, a device, a socket or a folder."""
    if isinstance(file, Path):
        regular_size(file)


@contextmanager
def _silent() -> Iterator[None]:
    """Pillow warns of damaged EXIF beside sound pixels, and of sizes that are refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(file: Path | io.BytesIO, name: str, shorter_side: int | None) -> Image.Image:
    try:
        with _silent():
            return _decode(file, shorter_side)
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not a JPEG, PNG or WebP image; remove or replace it", path=_path(file, name)
        ) from None
    except UNREADABLE as error:
        raise DataError(
            f"cannot read the image {name} ({error}); remove or replace it", path=_path(file, name)
        ) from error


def _path(file: Path | io.BytesIO, name: str) -> Path | str:
    """A file, or the name of what lies in one."""
    return file if isinstance(file, Path) else name


def _decode(file: Path | io.BytesIO, shorter_side: int | None) -> Image.Image:
    _check_regular(file)
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} px, more than {MOST_PIXELS:,} in all")
        if shorter_side is not None:
            image.draft(None, (2 * shorter_side, 2 * shorter_side))
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: 16-bit greys scaled, transparency over white."""
    if image.mode.startswith("I"):
        return _sixteen_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """Modes I;16 and I: greys of 0..65535."""
    grey = np.asarray(image).astype(np.float32) / 257
    return Image.fromarray(np.clip(grey + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
