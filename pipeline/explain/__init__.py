"""Explanations of a classifier's decision, as maps. A new explainer is one file here, one config class and one row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import nn

from artifacts.errors import ConfigError
from pipeline.explain.bcos import BCos
from pipeline.explain.explainer import LOGITS, Classes, Explained, Explainer
from pipeline.explain.gradcam import GradCAM
from pipeline.models import Classifier

EXPLAINERS: dict[str, type[Explainer]] = {
    "gradcam": GradCAM,
    "bcos": BCos,
}
"""By the name that the config and a store's manifest have."""

__all__ = ["EXPLAINERS", "BCos", "Classes", "Explained", "Explainer", "GradCAM", "build", "by_name"]


def build(name: str, model: nn.Module, *, logit: str = "raw", **settings: Any) -> Explainer:
    """The explainer called `name` of a Classifier, or of a bare network (`pipeline.models.classifier`).

    `auto` is `bcos` for B-cos networks and `gradcam` for others. `logit`: what is explained, the class logit (`raw`,
    the paper) or that minus the mean logit (`centred`). `settings` are the explainer's own. Raises ConfigError for an
    unknown name or logit, ModelError for a network that the explainer does not fit.
    """
    if name == "auto":
        name = getattr(model, "explained_by", Classifier.explained_by)
    _check("explained logit", logit, LOGITS)
    return by_name(name)(model, logit=logit, **settings)


def by_name(name: str) -> type[Explainer]:
    """The class of an explainer: of how many channels its maps are, how they are stored and shown.

    Raises ConfigError for an unknown name.
    """
    _check("explainer", name, EXPLAINERS)
    return EXPLAINERS[name]


def _check(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"unknown {kind} {name!r}; "
            + (f"did you mean {close[0]}?" if close else f"use {', '.join(known)}")
        )
