"""A map over its image."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn


def overlay(axis: Any, image: np.ndarray, heat: Tensor) -> None:
    """Draw the map [h,w] upsampled over the grey image u8 [S,S,3]; transparent where the map is not positive."""
    size = image.shape[:2]
    full = nn.functional.interpolate(
        heat[None, None].float(), size=size, mode="bilinear", align_corners=False
    )[0, 0]
    largest = full.max()
    share = (full / largest).clamp(0, 1).numpy() if largest > 0 else np.zeros(size, np.float32)
    axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
    axis.imshow(share, cmap="inferno", alpha=0.75 * share, vmin=0, vmax=1)
