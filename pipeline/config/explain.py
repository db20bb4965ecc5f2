"""The section `explain`: what is explained and how.

An explainer is one class here, which says its name in the literal type of `explainer` and has the explainer's own
settings. The explainer itself is a row of the table in `pipeline/explain/__init__.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.config.base import Positive, Settings


class ExplainConfig(Settings):
    """What is explained and how; the same for teacher and student."""

    explainer: str = "auto"
    logit: Literal["raw", "centred"] = Field(
        "raw", description="raw: paper; centred: class logit minus mean logit"
    )
    compare_at: Literal["student", "input"] = Field(
        "student",
        description="size at which maps are compared: the student's own, or the image's (the authors' code)",
    )
    classes: Literal["top1", "positive"] = Field(
        "top1",
        description="explained: the teacher's first class (paper), or every class with a logit above 0 (multi-label)",
    )
    most: Positive = Field(4, description="positive only: at most so many classes an image, the highest")

    @property
    def stored(self) -> int:
        """K: how many classes an image are explained in the store."""
        return self.most if self.classes == "positive" else 1

    @property
    def settings(self) -> dict[str, Any]:
        """What the explainer is built with, in JSON's types: the logit and the explainer's own settings."""
        return self.model_dump(mode="json", exclude={*ExplainConfig.model_fields} - {"logit"})


class Auto(ExplainConfig):
    """The explainer of the models' family: B-cos networks by their dynamic weights, others by GradCAM."""

    explainer: Literal["auto"] = "auto"


class GradCAM(ExplainConfig):
    """The last features, weighted by the gradient."""

    explainer: Literal["gradcam"]


class BCos(ExplainConfig):
    """The dynamic weights of a B-cos network."""

    explainer: Literal["bcos"]
