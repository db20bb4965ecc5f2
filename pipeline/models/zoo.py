"""Models by name: `toy/resnet`, `torchvision/NAME`, `timm/NAME`, `bcos/NAME`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from artifacts.errors import ModelError
from pipeline.config import ModelConfig
from pipeline.models import lite
from pipeline.models.bcos import BCosClassifier, build_bcos
from pipeline.models.classifier import Classifier
from pipeline.models.toy import ToyResNet
from pipeline.models.weights import load_weights

FAMILIES = ("toy", "torchvision", "timm", "bcos")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Preprocessing = tuple[Sequence[float], Sequence[float]]


def build(config: ModelConfig, classes: int = 1000) -> Classifier | BCosClassifier:
    """The configured network with `classes` logits, its preprocessing inside, random or loaded weights, on
    the CPU.

    `mean` and `std` default to the family's own: 0.5 for toy, ImageNet's for torchvision, the model card's
    for timm; B-cos networks have none. Random weights are drawn from torch's global generator: seed it first.
    Raises ModelError for an unknown model, unfit weights, or a network without spatial features.
    """
    if config.weights == "lite0":
        _check_lite(config.model, classes)
    if config.model.startswith("bcos/"):
        return _bcos(config, classes)
    net, (mean, std) = _network(config, classes)
    model = Classifier(net, *((config.mean, config.std) if config.mean or config.std else (mean, std)))
    if config.weights == "lite0":
        lite.load(net)
    elif config.weights is not None:
        load_weights(net, Path(config.weights))
    return model


def _bcos(config: ModelConfig, classes: int) -> BCosClassifier:
    if config.mean or config.std:
        raise ModelError(f"{config.model} takes an image as [x, 1 - x]: remove mean and std")
    model = BCosClassifier(build_bcos(config.model.removeprefix("bcos/"), classes, config.width))
    if config.weights is not None:
        load_weights(model, Path(config.weights))
    return model


def _network(config: ModelConfig, classes: int) -> tuple[nn.Module, Preprocessing]:
    family, _, name = config.model.partition("/")
    match family:
        case "toy":
            _check_name("toy", name, ["resnet"])
            return ToyResNet(classes, config.width), CENTRED
        case "torchvision":
            return _torchvision(name, classes), IMAGENET
        case "timm":
            return _timm(name, classes)
    raise ModelError(
        f"unknown model {config.model!r}; write FAMILY/NAME with a family of {', '.join(FAMILIES)}"
    )


def _torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    _check_name("torchvision", name, models.list_models(module=models))
    return models.get_model(name, weights=None, num_classes=classes)


def _timm(name: str, classes: int) -> tuple[nn.Module, Preprocessing]:
    import timm

    if not timm.is_model(name):  # also keeps `hf-hub:` names, which would download, out
        _check_name("timm", name, timm.list_models())
    net: Any = timm.create_model(name, pretrained=False, num_classes=classes)
    return net, (net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


def _check_name(family: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=3)
    mend = " or ".join(f"{family}/{match}" for match in close) or f"one of {', '.join(names[:5])}, ..."
    raise ModelError(f"unknown model {family}/{name}; did you mean {mend}?")


def _check_lite(model: str, classes: int) -> None:
    if model != lite.MODEL:
        raise ModelError(f"weights: lite0 fit model: {lite.MODEL}, not {model}")
    if classes != lite.CLASSES:
        raise ModelError(
            f"weights: lite0 know the {lite.CLASSES} ImageNet classes, but {classes} are asked for"
        )
