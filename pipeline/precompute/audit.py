"""Asking the teacher again: does a store say what its teacher says?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from artifacts import ImageSet, TeacherStore
from artifacts.codecs import get_codec
from artifacts.errors import ConfigError
from pipeline.devices import device_of
from pipeline.explain import Explainer
from pipeline.explain.maps import cosine, dead
from pipeline.progress import Advance
from pipeline.provenance import expected, matching_store
from pipeline.training.trained import LiveTeacher
from pipeline.workspace import Workspace

LOGIT_TOLERANCE = 0.01
"""Of the mean range of an image's logits: far above codecs and other devices' arithmetic, far below another model."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    """What a random sample of rows showed. `deviating` counts rows of another top-1 class, with logits off by more than
    LOGIT_TOLERANCE, or with a map further from the teacher's than its codec promises.

    logit_error: mean and largest of max |stored - live|, divided by the mean range (largest - smallest) of the rows'
    live logits. map_cosine: mean and smallest; two dead maps count 1.
    """

    rows: int
    of: int
    agreement: float
    logit_error: tuple[float, float]
    map_cosine: tuple[float, float]
    deviating: int

    @property
    def at_most(self) -> float:
        """With CONFIDENCE, at most this share of the store's rows deviates (Clopper-Pearson, one-sided)."""
        return upper_bound(self.deviating, self.rows, CONFIDENCE)

    def __str__(self) -> str:
        return (
            f"against the teacher: {self.rows} of {self.of} rows at random, agreement {self.agreement:.1%}, "
            f"logit error {self.logit_error[0]:.1e} of their range (largest {self.logit_error[1]:.1e}), map cosine "
            f"{self.map_cosine[0]:.4f} (smallest {self.map_cosine[1]:.4f}); {self.deviating} rows deviate: "
            f"with {CONFIDENCE:.0%} confidence at most {self.at_most:.2%} of the store's rows do"
        )


def audit_store(workspace: Workspace, split: str, share: str) -> Audit:
    """Ask the teacher again for `1%` or `200` random rows of a split's store. Raises ConfigError for another share."""
    images = workspace.open_images(split)
    store = matching_store(workspace, split, images)
    try:
        rows = random_rows(len(store), share)
    except ValueError:
        raise ConfigError(
            f"--against-teacher {share}: give a share like 1% or a number of rows like 200"
        ) from None
    teacher, size = LiveTeacher(workspace), workspace.experiment.store.batch_size
    # a store is of its record; here the network itself is looked at
    store.check_same(expected(workspace.experiment, teacher.record, images))
    with workspace.progress.bar("ask the teacher", len(rows), "image") as advance:
        return audit(teacher.explainer, images, store, rows, batch_size=size, advance=advance)


@torch.no_grad()
def audit(
    explainer: Explainer,
    images: ImageSet,
    store: TeacherStore,
    rows: np.ndarray,
    *,
    batch_size: int,
    advance: Advance,
) -> Audit:
    """Compare the stored answers for `rows` with the teacher's, now."""
    device = device_of(explainer)
    allowed = min(0.99, get_codec(store.manifest.maps.codec).crop_p1)
    same, errors, ranges, cosines = [], [], [], []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        stored = store.read(part)
        pixels = torch.from_numpy(images.read_images(part)).to(device)
        classes = torch.from_numpy(stored.explained_class[:, 0, 0]).to(device)
        live = explainer(pixels.float() / 255, classes)
        logits, maps = live.logits.cpu().double(), live.maps.cpu().float()
        ranges.append(logits.amax(1) - logits.amin(1))
        errors.append((logits - torch.from_numpy(stored.logits[:, 0]).double()).abs().amax(1))
        same.append(logits.argmax(1) == classes.cpu())
        cosines.append(_similarity(torch.from_numpy(stored.maps[:, 0, 0]), maps))
        advance(len(part))
    agrees, similarity = torch.cat(same), torch.cat(cosines)
    error = torch.cat(errors) / torch.cat(ranges).mean().clamp(min=1e-12)
    # NaN deviates
    deviates = ~(agrees & (error <= LOGIT_TOLERANCE) & (similarity >= allowed))
    return Audit(
        rows=len(rows),
        of=len(store),
        agreement=float(agrees.double().mean()),
        logit_error=(float(error.mean()), float(error.max())),
        map_cosine=(float(similarity.mean()), float(similarity.min())),
        deviating=int(deviates.sum()),
    )


def random_rows(count: int, share: str) -> np.ndarray:
    """`1%` or `200` of `count` rows, drawn without replacement by a fixed seed, in order. ValueError for other text."""
    wanted = count * float(share[:-1]) / 100 if share.endswith("%") else float(int(share))
    if not 0 < wanted <= max(count, 1):
        raise ValueError(share)
    return np.sort(np.random.default_rng(0).choice(count, max(1, math.ceil(wanted)), replace=False))


def upper_bound(failures: int, trials: int, confidence: float) -> float:
    """The largest p at which at most `failures` of `trials` still has a probability of 1 - `confidence`."""
    if failures >= trials:
        return 1.0
    low, high = failures / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(failures, trials, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(failures: int, trials: int, p: float) -> float:
    """P(X <= failures), X binomial."""
    return sum(
        math.exp(
            math.lgamma(trials + 1)
            - math.lgamma(k + 1)
            - math.lgamma(trials - k + 1)
            + k * math.log(p)
            + (trials - k) * math.log1p(-p)
        )
        for k in range(failures + 1)
        if 0 < p < 1
    )


def _similarity(stored: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    return torch.where(dead(stored) & dead(live), torch.ones(()), cosine(stored, live).value)
