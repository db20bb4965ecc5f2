"""Explanations of a classifier's decision, as maps.

An explainer is a module: calling it runs the network inside its forward pass, so that distributed wrappers
see all of it, and returns an `Explained`.
"""

from __future__ import annotations

from torch import Tensor, nn

from artifacts.errors import ConfigError, ModelError
from pipeline.config.problems import did_you_mean
from pipeline.explain.bcos import BCos, contributions
from pipeline.explain.gradcam import LOGITS, Classes, Explained, GradCAM
from pipeline.models.bcos import BCosClassifier, bcos_classifier
from pipeline.models.classifier import classifier

EXPLAINERS = ("gradcam", "bcos")

__all__ = ["EXPLAINERS", "BCos", "Classes", "Explained", "GradCAM", "build", "heat"]


def build(name: str, model: nn.Module, *, logit: str = "raw") -> GradCAM | BCos:
    """The explainer called `name` of a Classifier, or of a bare network (`pipeline.models.classifier`).

    `auto` is `bcos` for B-cos networks and `gradcam` for others. `logit`: what is explained, the class logit (`raw`,
    the paper) or that minus the mean logit (`centred`). Raises ConfigError for an unknown name or logit, ModelError
    for a network that the explainer does not fit.
    """
    if name == "auto":
        name = "bcos" if isinstance(model, BCosClassifier) else "gradcam"
    _check("explainer", name, EXPLAINERS)
    _check("explained logit", logit, LOGITS)
    if name == "bcos":
        return BCos(bcos_classifier(model), logit=logit)
    if isinstance(model, BCosClassifier):
        raise ModelError("a B-cos network explains itself: set explain.explainer to bcos (or leave it out)")
    return GradCAM(classifier(model), logit=logit)


def heat(maps: Tensor, images: Tensor) -> Tensor:
    """What each place adds to the explained logit, for metrics, guidance and pictures: [B,1,h,w].

    GradCAM maps [B,1,h,w] as they are; of B-cos maps [B,6,H,W] the contributions W(x) * x to images [B,3,H,W].
    """
    return maps if maps.shape[1] == 1 else contributions(maps, images)


def _check(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(f"unknown {what} {name!r}; {did_you_mean(name, known, f'use {known}')}")
