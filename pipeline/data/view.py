"""The canonical view: one deterministic resize and centre crop to S x S px; mask and boxes follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from artifacts.errors import DataError
from artifacts.images import Sample
from pipeline.config import ViewConfig
from pipeline.data.reading.photo import MOST_PIXELS
from pipeline.data.source import RawSample

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class CanonicalView:
    """Shorter side to `resize` px (antialiased), then the centre `size` x `size`: as torchvision's
    Resize + CenterCrop on PIL images. `squash`: both sides to `resize` px, as its Resize((resize, resize)).
    An image that already has the size stays as it is.
    """

    size: int
    resize: int
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop: Literal["centre", "squash"] = "centre"

    @classmethod
    def of(cls, config: ViewConfig) -> CanonicalView:
        return cls(config.size, config.resize or config.size, config.interpolation, config.crop)

    def describe(self) -> dict[str, Any]:
        """For the index and the fingerprint: everything that changes the pixels."""
        return {
            "size": self.size,
            "resize": self.resize,
            "interpolation": self.interpolation,
            "antialias": True,
            "crop": self.crop,
        }

    def apply(self, raw: RawSample) -> Sample:
        """The sample as packed: image u8 [3,S,S], mask u8 [S,S], boxes f32 [N,5] clipped to the canvas.

        Boxes that the crop leaves nothing of are dropped; the array may end empty. Raises DataError for an image that
        would be enlarged to more than 2^26 px.
        """
        width, height = self._resized(raw.image.size)
        if width * height > MOST_PIXELS:
            raise DataError(
                f"the image {raw.source or raw.key} is too long: its shorter side being {self.resize} px, "
                f"it has {width} x {height} px, more than {MOST_PIXELS:,} in all; remove or crop it",
                key=raw.key,
            )
        pixels = np.asarray(self._crop(raw.image, FILTERS[self.interpolation]))
        mask = None if raw.mask is None else np.array(self._crop(raw.mask, Image.Resampling.BILINEAR))
        return Sample(
            key=raw.key,
            image=np.ascontiguousarray(pixels.transpose(2, 0, 1)),
            label=raw.label,
            group=raw.group,
            boxes=None if raw.boxes is None else self._boxes(raw.boxes, raw.image.size),
            mask=mask,
            source=raw.source,
        )

    def _crop(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        resized = self._resized(image.size)
        left, top = self._corner(resized)
        scaled = image if image.size == resized else image.resize(resized, resample)
        return scaled.crop((left, top, left + self.size, top + self.size))

    def _boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Source px to canvas px: f32 [N',5]."""
        resized = self._resized(size)
        left, top = self._corner(resized)
        scale = np.tile(np.array(resized) / np.array(size), 2)
        corners = np.clip(boxes[:, 1:] * scale - np.array([left, top, left, top]), 0, self.size)
        moved = np.concatenate([boxes[:, :1], corners], axis=1).astype(np.float32)
        return moved[(moved[:, 3] > moved[:, 1]) & (moved[:, 4] > moved[:, 2])]

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        width, height = size
        if self.crop == "squash":
            return self.resize, self.resize
        short = min(width, height)
        return int(self.resize * width / short), int(self.resize * height / short)

    def _corner(self, resized: tuple[int, int]) -> tuple[int, int]:
        """Left and top of the centre crop."""
        width, height = resized
        return round((width - self.size) / 2), round((height - self.size) / 2)
