"""The families of models, `FAMILY/NAME`, and what a config must know about them; `pipeline.models.zoo` builds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """`explainer`: what `explain.explainer: auto` means for its models. `published`: its weights have tags."""

    explainer: str
    published: bool


FAMILIES: dict[str, Family] = {
    "toy": Family("gradcam", published=False),
    "torchvision": Family("gradcam", published=True),
    "timm": Family("gradcam", published=True),
    "bcos": Family("bcos", published=True),
}


def family(model: str) -> Family | None:
    """The family of `FAMILY/NAME`; None if there is no such family, which the zoo refuses."""
    return FAMILIES.get(model.partition("/")[0])


def explained_by(model: str) -> str:
    """The explainer of a model's family."""
    known = family(model)
    return known.explainer if known else "gradcam"
