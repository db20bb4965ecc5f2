"""How maps and logits become stored numbers: numcodecs `Codec` classes, each with its stated error bound.

They are applied by our code and named in the manifest; on disk the arrays have core Zarr codecs only, so that any
Zarr v3 reader opens them. A stored array of `stored_dtype` never holds `fill_value`: reading one means missing data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numcodecs.abc import Codec

from artifacts.errors import ConfigError


class _FloatCodec(Codec):
    """Casts float32 to a float type. `encode` raises ValueError where a value is not finite afterwards."""

    stored_dtype: ClassVar[np.dtype[Any]]
    error_bound: ClassVar[str]
    fill_value: ClassVar[float] = float("nan")

    def encode(self, buf: np.ndarray) -> np.ndarray:
        """float32 [rows, ...] -> `stored_dtype`, same shape. Raises ValueError naming the first bad row."""
        with np.errstate(over="ignore"):
            stored: np.ndarray = np.asarray(buf, np.float32).astype(self.stored_dtype)
        finite = np.isfinite(stored).reshape(len(stored), -1).all(1)
        if not finite.all():
            raise ValueError(int(np.argmin(finite)))
        return stored

    def decode(self, buf: np.ndarray, out: Any = None) -> np.ndarray:
        """`stored_dtype` -> float32, same shape."""
        return np.asarray(buf).astype(np.float32)

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id}


class Float16Codec(_FloatCodec):
    codec_id = "e2kd.fp16"
    stored_dtype = np.dtype("float16")
    error_bound = "relative 2^-11, absolute 2^-25 below 6.1e-5; values up to 65504"


class Float32Codec(_FloatCodec):
    codec_id = "e2kd.fp32"
    stored_dtype = np.dtype("float32")
    error_bound = "exact"


CODECS: dict[str, type[_FloatCodec]] = {"fp16": Float16Codec, "fp32": Float32Codec}


def get_codec(name: str) -> _FloatCodec:
    """The codec of a config value or of a manifest's `codec_id`. Raises ConfigError for an unknown one."""
    short = name.removeprefix("e2kd.")
    if short not in CODECS:
        raise ConfigError(f"unknown codec {name!r}; one of {', '.join(CODECS)}")
    return CODECS[short]()
