"""B-cos networks (Böhle et al. 2022, 2024) on the architectures of the authors' `bcos` package.

As in the papers: B = 2, no ReLU and no bias anywhere, uncentred BatchNorm (ResNet, DenseNet) or LayerNorm
without bias (ViT), logit bias -log(C - 1), and an image x enters as the six channels [x, 1 - x], neither
shifted nor scaled. Every logit is then W(x) [x, 1 - x] + bias, and W(x) explains it (`explainers.bcos`).

State dicts are those of the package, so its published ImageNet weights (C = 1000; release v0.0.1-weights of
B-cos/B-cos-v2; `weights: bcos:TAG`) load as they are:

    resnet18                     resnet_18-68b4160fff.pth
    resnet34                     resnet_34-a63425a03e.pth
    resnet50                     resnet_50-ead259efe4.pth, resnet_50_long-ef38a88533.pth
    densenet169                  densenet_169-7037ee0604.pth
    simple_vit_ti_patch16_224    bcos_simple_vit_ti_patch16_224-4b0824b1c1.pth
    vitc_ti_patch1_14            bcos_vitc_ti_patch1_14-ddd6193a77.pth
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
from bcos.models import densenet, resnet, vit
from bcos.modules import BcosConv2d, BcosLinear, BcosSequential, LogitLayer, norms
from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline.config.problems import near
from pipeline.models.bcos_layers import hold_layers

CONVOLUTIONAL = ("resnet18", "resnet34", "resnet50", "densenet169")
TRANSFORMERS = ("simple_vit_ti_patch16_224", "vitc_ti_patch1_14")
NAMES = ("small", *CONVOLUTIONAL, *TRANSFORMERS)


class BCosClassifier(nn.Module):
    """A B-cos network `net`, of six channels, for plain images: float [B,3,H,W] in 0..1 -> [B,classes].

    `net` may be any of `build_bcos`, or a ResNet, DenseNet or ViT that the `bcos` package built: its layers
    are converted in place (`bcos_layers.hold_layers`). The weights are those of `net`: save and load
    `classifier.net.state_dict()`. Raises ModelError for a network that has no exact B-cos maps.
    """

    explained_by: ClassVar[str] = "bcos"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = hold_layers(net)
        self.classes = _count_classes(net)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.add_inverse(images))

    def map_size(self, image_size: int) -> tuple[int, int]:
        """Height and width of W(x), for square images of `image_size` px: the images' own."""
        return image_size, image_size

    @staticmethod
    def add_inverse(images: Tensor) -> Tensor:
        """[x, 1 - x]: images [B,3,H,W] in 0..1 -> [B,6,H,W]."""
        return torch.cat([images, 1 - images], 1)

    @property
    def preprocess(self) -> dict[str, Any]:
        """What happens to an image before `net`, as the store's manifest records it."""
        return {"kind": "add_inverse"}


def bcos_classifier(net: nn.Module) -> BCosClassifier:
    """`net` as a BCosClassifier; one that is already a BCosClassifier is returned unchanged."""
    return net if isinstance(net, BCosClassifier) else BCosClassifier(net)


def build_bcos(name: str, classes: int, width: int = 16) -> nn.Module:
    """The B-cos network `name`, random weights: [x, 1 - x] float [B,6,H,W] -> logits [B,classes].

    `small`, for images of 48 px or so, has a 3x3 stride-2 stem and three residual blocks of `width`,
    2 `width` and 4 `width` channels with strides 1, 2, 2; other networks have a width of their own. ViTs take
    any height and width that 16 divides. Raises ModelError for an unknown name or fewer than two classes.
    """
    if classes < 2:
        raise ModelError(
            f"a B-cos network needs at least 2 classes, not {classes}: its bias is -log(classes - 1)"
        )
    if name not in NAMES:
        close = " or ".join(near(name, NAMES, 3)) or f"one of {', '.join(NAMES)}"
        raise ModelError(f"unknown B-cos model {name!r}; did you mean {close}?")
    net = _transformer(name, classes) if name in TRANSFORMERS else _convolutional(name, classes, width)
    return hold_layers(net)


def _convolutional(name: str, classes: int, width: int) -> nn.Module:
    settings = {
        "num_classes": classes,
        "norm_layer": _batch_norm,
        "conv_layer": BcosConv2d,
        "logit_bias": -math.log(classes - 1),
    }
    if name == "small":
        return _small(width, settings)
    return getattr(densenet if name.startswith("densenet") else resnet, name)(**settings)


def _small(width: int, settings: dict[str, Any]) -> nn.Module:
    net = resnet.BcosResNet(resnet.BasicBlock, [1, 1, 1], inplanes=width, small_inputs=True, **settings)
    # the package's has stride 1: four times the cost
    net.conv1 = BcosConv2d(6, width, 3, stride=2, padding=1)
    return net


def _transformer(name: str, classes: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for the logit layer, which follows here
        body = getattr(vit, name)(
            num_classes=classes,
            linear_layer=BcosLinear,
            conv2d_layer=BcosConv2d,
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            norm2d_layer=norms.NoBias(norms.DetachableGNLayerNorm2d),
            act_layer=nn.Identity,
        )
    return BcosSequential(body, LogitLayer(logit_bias=-math.log(classes - 1)))


def _batch_norm(channels: int) -> nn.Module:
    """Uncentred BatchNorm without bias. Named, because the network keeps it and a pickle must hold it."""
    return norms.NoBias(norms.BatchNormUncentered2d)(channels)


def _count_classes(net: nn.Module) -> int:
    """Outputs of the last B-cos layer, which gives the logits."""
    last = [module for module in net.modules() if isinstance(module, BcosConv2d | BcosLinear)][-1]
    return int(last.out_channels if isinstance(last, BcosConv2d) else last.out_features)
