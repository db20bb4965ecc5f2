"""The shift curve (paper Fig. 5): do explanations move with the image?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from artifacts import ImageSet
from artifacts.errors import ConfigError, Diverged
from pipeline.config import EvaluateConfig
from pipeline.evaluate.metrics import shift_similarity

BATCH = 32


@torch.no_grad()
def shift_curve(
    explainer: nn.Module, images: ImageSet, settings: EvaluateConfig, device: torch.device
) -> dict[str, list[Any]]:
    """{"shifts": px, "cosine": mean over images}: maps of diagonally shifted images on the area that both show.

    The explained class is the model's own for the image that is not shifted. Up to `evaluate.shift_images` images,
    evenly over the set; one whose own map is all-zero does not count. Raises ConfigError for a shift of a whole image,
    Diverged for maps that are not finite.
    """
    if max(settings.shifts, default=0) >= images.size:
        raise ConfigError(
            f"evaluate.shifts: {max(settings.shifts)} px leaves nothing of the {images.size} px images of "
            f"{images.place} to compare; use shifts below {images.size}"
        )
    rows = np.linspace(0, len(images) - 1, min(settings.shift_images, len(images))).round().astype(np.int64)
    found = []
    for start in range(0, len(rows), BATCH):
        pixels = torch.from_numpy(images.read_images(rows[start : start + BATCH])).to(device).float() / 255
        classes = explainer(pixels, explain=False).logits.argmax(1)

        def explain(shifted: Tensor, classes: Tensor = classes) -> Tensor:
            maps: Tensor = explainer(shifted, classes).maps
            return maps

        found.append(shift_similarity(explain, pixels, (0, *settings.shifts)))
    cosines = torch.cat(found, 1).cpu()
    if not cosines.isfinite().all():
        raise Diverged("the network's maps of shifted images are NaN or infinite; train it with a lower lr")
    alive = cosines[0] > 0.5  # an all-zero map is not even like itself
    means = cosines[1:, alive].mean(1) if alive.any() else torch.zeros(len(settings.shifts))
    return {"shifts": list(settings.shifts), "cosine": [round(float(value), 5) for value in means]}
