"""How far a frozen map is from the teacher's own map of the augmented image (paper Sec. 3.3 calls it approximate)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from artifacts import ImageSet, TeacherStore
from pipeline.augment.paired import PairedAugment
from pipeline.config import AugmentConfig
from pipeline.explain import Explainer
from pipeline.explain.maps import cosine

SAMPLE = 256
"""Images looked at; the standard error of the mean cosine is then about .01 for GradCAM."""


def freezing_gap(
    explainer: Explainer, images: ImageSet, store: TeacherStore, augment: AugmentConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """Cosine between the warped stored map and the live map of the warped image, for crop, flip and both.

    Returns {"crop" | "flip" | "both": {"mean": -1..1, "p1": 1st percentile, "images": n}}. Samples of which either map
    is dead are left out, as the explanation loss leaves them out.
    """
    rows = sample_rows(images)
    crop = augment.model_copy(update={"hflip": 0.0, "vflip": 0.0})
    flip = augment.model_copy(
        update={"crop_scale": None, "hflip": 1.0, "rotate": 0.0, "translate": 0.0, "shear": 0.0}
    )
    kinds = {"crop": crop, "flip": flip, "both": augment}
    return {name: _cosines(explainer, images, store, rows, config, device) for name, config in kinds.items()}


def sample_rows(images: ImageSet) -> np.ndarray:
    """Up to SAMPLE rows, evenly over the set."""
    return np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().astype(np.int64)


def summary(cosines: Tensor) -> dict[str, float]:
    """Mean and 1st percentile of cosines, and of how many images."""
    if not len(cosines):
        return {"mean": 0.0, "p1": 0.0, "images": 0}
    return {
        "mean": round(float(cosines.mean()), 5),
        "p1": round(float(cosines.quantile(0.01)), 5),
        "images": len(cosines),
    }


def _cosines(
    explainer: Explainer,
    images: ImageSet,
    store: TeacherStore,
    rows: np.ndarray,
    config: AugmentConfig,
    device: torch.device,
) -> dict[str, float]:
    paired = PairedAugment(config, keys=images.keys)
    found = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        stored = store.read(part)
        frozen = torch.from_numpy(stored.maps[:, 0, 0]).to(device)
        classes = torch.from_numpy(stored.explained_class[:, 0, 0]).to(device)
        pixels = torch.from_numpy(images.read_images(part)).to(device)
        warped_images, warped_maps, _ = paired(pixels, frozen, torch.from_numpy(part), 0)
        assert warped_maps is not None
        found.append(both_alive(warped_maps, explainer(warped_images, classes).maps))
    return summary(torch.cat(found).cpu())


def both_alive(frozen: Tensor, live: Tensor) -> Tensor:
    """Cosines of the pairs of which neither map is dead: at most [B]."""
    value, alive = cosine(frozen, live)
    return value[alive]


def tell(gap: dict[str, dict[str, float]]) -> str:
    parts = ", ".join(
        f"{name} {values['mean']:.3f} (1% below {values['p1']:.2f})" for name, values in gap.items()
    )
    return f"freezing gap, cosine of frozen and live map: {parts}"
