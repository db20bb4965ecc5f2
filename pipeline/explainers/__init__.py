"""Explanations of a classifier's decision, as maps.

An explainer is a module: calling it runs the network inside its forward pass, so that distributed wrappers
see all of it, and returns an `Explained`.
"""

from __future__ import annotations

import difflib

from torch import nn

from artifacts.errors import ConfigError
from pipeline.explainers.gradcam import LOGITS, Explained, GradCAM
from pipeline.models.classifier import classifier

EXPLAINERS = ("gradcam",)

__all__ = ["EXPLAINERS", "Explained", "GradCAM", "build"]


def build(name: str, model: nn.Module, *, logit: str = "raw") -> GradCAM:
    """The explainer called `name` of a Classifier, or of a bare network (`pipeline.models.classifier`).

    `logit`: what is explained, the class logit (`raw`, the paper) or that minus the mean logit (`centred`).
    Raises ConfigError for an unknown name or logit, ModelError for a network without spatial features.
    """
    _check("explainer", name, EXPLAINERS)
    _check("explained logit", logit, LOGITS)
    return GradCAM(classifier(model), logit=logit)


def _check(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"unknown {what} {name!r}; " + (f"did you mean {close[0]}?" if close else f"use {known}")
        )
