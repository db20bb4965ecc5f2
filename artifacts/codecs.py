"""How maps and logits become stored numbers: numcodecs `Codec` classes, each with its stated error bound.

They are applied by our code and named in the manifest; on disk the arrays have core Zarr codecs only, so that any
Zarr v3 reader opens them. A stored array never holds `fill_value`: reading one means missing data.

A map is divided by its scale before `encode` and multiplied by it after `decode` (array `map_scale`, one float32 per
map); logits in `uint12` likewise have an offset and a step per row (array `logit_scale`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numcodecs.abc import Codec

from artifacts.errors import ConfigError


class StoredNumbers(Codec):
    """Base: float32 -> `stored_dtype` and back, the same shape."""

    stored_dtype: ClassVar[np.dtype[Any]]
    fill_value: ClassVar[float | int]
    error_bound: ClassVar[str]
    crop_p1: ClassVar[float] = 1.0
    """At least this cosine of decoded and exact map after a random resized crop, for 99 of 100 images."""

    @abstractmethod
    def encode(self, buf: np.ndarray) -> np.ndarray:
        """float32 [rows, ...] -> `stored_dtype`. Raises ValueError naming the first row that is not finite."""

    def decode(self, buf: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """`stored_dtype` -> float32, into `out` if it is given."""
        if out is None:
            return np.asarray(buf).astype(np.float32)
        np.copyto(out, buf)
        return out

    def map_scale(self, maps: np.ndarray) -> np.ndarray:
        """f32 [rows,V,K,c,h,w] -> f32 [rows,V,K], > 0: what each map is divided by; not finite if the map is not."""
        return np.ones(maps.shape[:3], np.float32)

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id}


class Float16Codec(StoredNumbers):
    """Half precision. Maps are first divided by a power of two, which loses nothing, so that any magnitude fits."""

    codec_id = "e2kd.fp16"
    stored_dtype = np.dtype("float16")
    fill_value = float("nan")
    error_bound = "relative 2^-11; below 6.1e-5 (of a map: times its largest value) absolute 2^-25"
    crop_p1 = 0.9999

    def encode(self, buf: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return _finite(np.asarray(buf, np.float32).astype(np.float16))

    def map_scale(self, maps: np.ndarray) -> np.ndarray:
        largest = _largest(maps)
        if not np.isfinite(largest).all():
            return largest
        _, exponent = np.frexp(largest)
        scale = np.ldexp(np.float32(1), exponent - 1)
        rounds_up = ((largest / scale).astype(np.float16) >= 2) & (scale < 2.0**127)
        scale = scale * np.where(
            rounds_up, np.float32(2), np.float32(1)
        )  # so that what is decoded encodes the same
        return np.where(largest > 0, scale, 1).astype(np.float32)


class Float32Codec(StoredNumbers):
    codec_id = "e2kd.fp32"
    stored_dtype = np.dtype("float32")
    fill_value = float("nan")
    error_bound = "exact"

    def encode(self, buf: np.ndarray) -> np.ndarray:
        return _finite(np.array(buf, np.float32))


class _SqrtCodec(StoredNumbers):
    """Maps divided by their scale m / L^2, m the largest |w|: q = rint(sign(w) sqrt(|w|)), and back w = q |q|.

    The square root spends the levels on the small values that dominate B-cos maps: a linear quantiser of the same size
    looks fine on the whole map and collapses after a crop.
    """

    levels: ClassVar[int]
    stored_dtype = np.dtype("int8")
    fill_value = -128

    def encode(self, buf: np.ndarray) -> np.ndarray:
        values = np.asarray(buf, np.float32)
        root = np.abs(values)
        np.sqrt(root, out=root)
        np.rint(root, out=root)
        if root.size and not root.max() <= self.levels:
            raise ValueError(_first_bad(root <= self.levels))
        return np.copysign(root, values, out=root).astype(np.int8)

    def decode(self, buf: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        root = np.asarray(buf).astype(np.float32) if out is None else out
        if out is not None:
            np.copyto(out, buf)
        root *= np.abs(root)
        return root

    def map_scale(self, maps: np.ndarray) -> np.ndarray:
        largest = _largest(maps)
        smallest = np.finfo(np.float32).tiny
        return np.where(largest == 0, np.float32(1), np.maximum(largest / self.levels**2, smallest))


def _sqrt_bound(levels: int) -> str:
    return f"|error| <= m (sqrt(|w|/m)/{levels} + 1/{4 * levels**2}), m the map's largest |w|"


class Int8Codec(_SqrtCodec):
    codec_id = "e2kd.int8"
    levels = 127
    error_bound = _sqrt_bound(127)
    crop_p1 = 0.999


class Int6Codec(_SqrtCodec):
    codec_id = "e2kd.int6"
    levels = 31
    error_bound = _sqrt_bound(31)
    crop_p1 = 0.99


class Int5Codec(_SqrtCodec):
    codec_id = "e2kd.int5"
    levels = 15
    error_bound = _sqrt_bound(15)
    crop_p1 = 0.96


class UInt12Codec(StoredNumbers):
    """Logits as 4096 equal steps between a row's smallest and largest: values arrive as (logit - offset) / step."""

    codec_id = "e2kd.uint12"
    stored_dtype = np.dtype("uint16")
    fill_value = 65535
    error_bound = (
        "half a step, (largest - smallest of the row's logits) / 4095; 1.5 steps where rounded to the top"
    )
    steps: ClassVar[int] = 4095

    def encode(self, buf: np.ndarray) -> np.ndarray:
        values = np.rint(np.asarray(buf, np.float32))
        fits = (values >= 0) & (values <= self.steps)
        if not fits.all():
            raise ValueError(_first_bad(fits))
        return values.astype(np.uint16)


CODECS: dict[str, type[StoredNumbers]] = {
    "fp16": Float16Codec,
    "fp32": Float32Codec,
    "int8": Int8Codec,
    "int6": Int6Codec,
    "int5": Int5Codec,
    "uint12": UInt12Codec,
}
BETTER = {"int5": "int6", "int6": "int8", "int8": "fp16", "fp16": "lossless"}
"""The next more exact codec for maps."""


def get_codec(name: str) -> StoredNumbers:
    """The codec of a config value (`lossless` is fp32) or of a manifest's `codec_id`. Raises ConfigError."""
    short = name.removeprefix("e2kd.")
    short = "fp32" if short == "lossless" else short
    if short not in CODECS:
        raise ConfigError(f"unknown codec {name!r}; one of {', '.join(CODECS)}")
    return CODECS[short]()


def encode_maps(codec: StoredNumbers, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [n,V,K,c,h,w] -> (stored, same shape; scale f32 [n,V,K]). Raises ValueError naming the first bad row."""
    scale = codec.map_scale(maps)
    if not np.isfinite(scale).all():
        raise ValueError(_first_bad(np.isfinite(scale)))
    if (scale != 1).any():
        maps = maps / scale[..., None, None, None]
    return codec.encode(maps), scale


def decode_maps(
    codec: StoredNumbers, stored: np.ndarray, scale: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """The inverse: f32 [n,V,K,c,h,w], into `out` if it is given."""
    maps = codec.decode(stored, out)
    maps *= scale[..., None, None, None]
    return maps


_SMALLEST = 2.0**-149
"""The smallest positive float32: a step below would be 0."""


def encode_logits(codec: StoredNumbers, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """f32 [n,V,C] -> (stored, same shape; scale f32 [n,V,2] = (offset, step), or None for float codecs).

    The top-1 class stays the only largest one: where rounding makes others equal to it, they go one value down.
    Raises ValueError naming the first row that is not finite or does not fit.
    """
    finite = np.isfinite(logits)
    if not finite.all():
        raise ValueError(_first_bad(finite))
    scale = None
    values = logits
    if isinstance(codec, UInt12Codec):
        low = logits.min(2)
        span = logits.max(2).astype(np.float64) - low
        step = np.where(span > 0, np.maximum(span / codec.steps, _SMALLEST), 1).astype(np.float32)
        scale = np.stack([low, step], axis=2).astype(np.float32)
        values = ((logits - low[..., None].astype(np.float64)) / step[..., None]).clip(0, codec.steps)
    stored = codec.encode(values)
    top = logits.argmax(2)[..., None]
    tied = stored == np.take_along_axis(stored, top, 2)
    np.put_along_axis(tied, top, False, 2)
    if tied.any():
        lower = stored - 1 if stored.dtype.kind == "u" else np.nextafter(stored, stored.dtype.type(-np.inf))
        stored = np.where(tied & (logits < np.take_along_axis(logits, top, 2)), lower, stored)
    return stored, scale


def decode_logits(codec: StoredNumbers, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The inverse: f32 [n,V,C]."""
    values = codec.decode(stored)
    return values if scale is None else values * scale[..., 1:] + scale[..., :1]


def _largest(maps: np.ndarray) -> np.ndarray:
    """max |w| of each map: f32 [n,V,K]; NaN and infinity stay."""
    flat = maps.reshape(*maps.shape[:3], -1)
    return np.maximum(flat.max(-1), -flat.min(-1)).astype(np.float32)


def _finite(stored: np.ndarray) -> np.ndarray:
    if not np.isfinite(stored).all():
        raise ValueError(_first_bad(np.isfinite(stored)))
    return stored


def _first_bad(good: np.ndarray) -> int:
    return int(np.argmin(good.reshape(len(good), -1).all(1)))
