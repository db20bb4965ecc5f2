"""Where a network's spatial features end and its head begins.

Features are the output of the last convolutional stage [B,D,h,w], after its activation; the head is all that
follows. `head(net, features(net, x))` is the network's own forward pass, operation by operation. The two
parts are plain functions of the network, so that copying or wrapping a network never leaves them bound to the
old one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from artifacts.errors import ModelError


class Split(NamedTuple):
    """`features(net, images) -> [B,D,h,w]` and `head(net, features) -> [B,C]`."""

    features: Callable[[Any, Tensor], Tensor]
    head: Callable[[Any, Tensor], Tensor]


def split(net: nn.Module) -> Split:
    """The split of a torchvision network, or of one with timm's `forward_features` and `forward_head`.

    Raises ModelError for any other network.
    """
    found = _torchvision(net) if type(net).__module__.startswith("torchvision.models.") else _timm(net)
    if found is None:
        raise no_features(net)
    return found


def no_features(net: nn.Module) -> ModelError:
    """The error for a network that explanations of spatial features cannot serve."""
    return ModelError(
        f"{type(net).__name__} gives no spatial features [batch, channel, y, x], which GradCAM needs; use a "
        "convolutional network (torchvision resnet, resnext, convnext, densenet, efficientnet, mobilenet, "
        "regnet, shufflenet, squeezenet, vgg, googlenet, inception, swin, maxvit; most of timm), a transformer "
        "that explains itself (bcos/vitc_ti_patch1_14), or a module with forward_features(images) and "
        "forward_head(features)"
    )


def _timm(net: nn.Module) -> Split | None:
    if not (hasattr(net, "forward_features") and hasattr(net, "forward_head")):
        return None
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        return Split(_timm_features_channels_last, _timm_head_channels_last)
    return Split(_timm_features, _timm_head)


def _torchvision(net: nn.Module) -> Split | None:
    from torchvision import models as tv  # two seconds to import: only for its own networks

    match net:
        case tv.ResNet():  # ResNeXt and Wide ResNet too
            return Split(_resnet_features, _pool_fc)
        case tv.RegNet():
            return Split(_regnet_features, _pool_fc)
        case tv.ShuffleNetV2():
            return Split(_shufflenet_features, _mean_fc)
        case tv.DenseNet():
            return Split(_densenet_features, _mean_pool_classifier)
        case tv.MobileNetV2():
            return Split(_features, _mean_pool_classifier)
        case tv.MobileNetV3() | tv.EfficientNet() | tv.VGG() | tv.AlexNet():
            return Split(_features, _pool_classifier)
        case tv.MNASNet():
            return Split(_mnasnet_features, _mean_classifier)
        case tv.ConvNeXt():
            return Split(_features, _convnext_head)
        case tv.SqueezeNet():
            return Split(_features, _squeezenet_head)
        case tv.SwinTransformer():
            return Split(_swin_features, _swin_head)
        case tv.GoogLeNet():  # without the auxiliary classifiers of training
            return Split(_googlenet_features, _pool_dropout_fc)
        case tv.Inception3():
            return Split(_inception_features, _pool_dropout_fc)
        case tv.MaxVit():
            return Split(_maxvit_features, _classifier)
    return None


# Named, not lambdas: a model can then be pickled to a spawned process.


def _timm_features(net: Any, x: Tensor) -> Tensor:
    return net.forward_features(x)


def _timm_head(net: Any, features: Tensor) -> Tensor:
    return net.forward_head(features)


def _timm_features_channels_last(net: Any, x: Tensor) -> Tensor:
    return net.forward_features(x).permute(0, 3, 1, 2)


def _timm_head_channels_last(net: Any, features: Tensor) -> Tensor:
    return net.forward_head(features.permute(0, 2, 3, 1))


def _features(net: Any, x: Tensor) -> Tensor:
    return net.features(x)


def _resnet_features(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def _regnet_features(net: Any, x: Tensor) -> Tensor:
    return net.trunk_output(net.stem(x))


def _shufflenet_features(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.conv1(x))
    return net.conv5(net.stage4(net.stage3(net.stage2(x))))


def _densenet_features(net: Any, x: Tensor) -> Tensor:
    return F.relu(net.features(x))


def _mnasnet_features(net: Any, x: Tensor) -> Tensor:
    return net.layers(x)


def _swin_features(net: Any, x: Tensor) -> Tensor:
    return net.permute(net.norm(net.features(x)))  # kept channels last inside


def _googlenet_features(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool1(net.conv1(net._transform_input(x)))
    x = net.maxpool2(net.conv3(net.conv2(x)))
    x = net.maxpool3(net.inception3b(net.inception3a(x)))
    x = net.inception4c(net.inception4b(net.inception4a(x)))
    x = net.maxpool4(net.inception4e(net.inception4d(x)))
    return net.inception5b(net.inception5a(x))


def _inception_features(net: Any, x: Tensor) -> Tensor:
    x = net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(net._transform_input(x))))
    x = net.maxpool2(net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(net.maxpool1(x))))
    x = net.Mixed_5d(net.Mixed_5c(net.Mixed_5b(x)))
    x = net.Mixed_6e(net.Mixed_6d(net.Mixed_6c(net.Mixed_6b(net.Mixed_6a(x)))))
    return net.Mixed_7c(net.Mixed_7b(net.Mixed_7a(x)))


def _maxvit_features(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    for block in net.blocks:
        x = block(x)
    return x


def _classifier(net: Any, features: Tensor) -> Tensor:
    return net.classifier(features)


def _pool_dropout_fc(net: Any, features: Tensor) -> Tensor:
    return net.fc(torch.flatten(net.dropout(net.avgpool(features)), 1))


def _pool_fc(net: Any, features: Tensor) -> Tensor:
    return net.fc(torch.flatten(net.avgpool(features), 1))


def _mean_fc(net: Any, features: Tensor) -> Tensor:
    return net.fc(features.mean([2, 3]))


def _pool_classifier(net: Any, features: Tensor) -> Tensor:
    return net.classifier(torch.flatten(net.avgpool(features), 1))


def _mean_classifier(net: Any, features: Tensor) -> Tensor:
    return net.classifier(features.mean([2, 3]))


def _mean_pool_classifier(net: Any, features: Tensor) -> Tensor:
    return net.classifier(torch.flatten(F.adaptive_avg_pool2d(features, (1, 1)), 1))


def _convnext_head(net: Any, features: Tensor) -> Tensor:
    return net.classifier(net.avgpool(features))


def _squeezenet_head(net: Any, features: Tensor) -> Tensor:
    return torch.flatten(net.classifier(features), 1)


def _swin_head(net: Any, features: Tensor) -> Tensor:
    return net.head(net.flatten(net.avgpool(features)))
