"""Models: the split is the network itself, weights go in and out exactly, and unfit ones are refused clearly."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline.config import ModelConfig
from pipeline.models import build, classifier, load_weights, save_weights, weights_sha256
from pipeline.models.toy import ToyResNet

STUDENTS = (  # the paper's
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "efficientnet_v2_s",
    "mobilenet_v2",
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    "densenet121",
)
OTHERS = ("regnet_y_400mf", "mnasnet0_5", "squeezenet1_1", "swin_t", "googlenet")
TIMM = ("tf_efficientnet_lite0", "resnet10t", "mambaout_femto")  # the last keeps its channels last
MODELS = ("toy/resnet", *(f"torchvision/{n}" for n in STUDENTS + OTHERS), *(f"timm/{n}" for n in TIMM))


def toy(width: int = 4, classes: int = 3) -> nn.Module:
    return build(ModelConfig(model="toy/resnet", width=width), classes)


@pytest.mark.parametrize("name", MODELS)
def test_features_then_head_is_the_network_itself(name: str) -> None:
    torch.manual_seed(0)
    model = build(ModelConfig(model=name, width=8), 7)
    x = torch.rand(2, 3, 64, 64)
    for training in (True, False):  # dropout, stochastic depth and batch statistics; and without
        model.train(training)
        with torch.no_grad():
            torch.manual_seed(1)
            expected = model.net((x - model.mean) / model.std)
            torch.manual_seed(1)
            features = model.features(x)
            logits = model.head(features)
        assert features.dim() == 4
        assert features.shape[2] == features.shape[3] < 20
        assert torch.equal(logits, expected)
        assert model.classes == logits.shape[1] == 7


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 80), ("maxvit_t", 224)])
def test_networks_that_need_large_images_split_too(name: str, size: int) -> None:
    model = build(ModelConfig(model=f"torchvision/{name}"), 7).eval()
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model.head(model.features(x)), model.net((x - model.mean) / model.std))


def test_toy_features_are_12_by_12_of_48_px() -> None:
    model = toy(width=8)
    assert model.features(torch.rand(1, 3, 48, 48)).shape == (1, 32, 12, 12)


def test_a_copy_is_independent() -> None:
    model = toy().eval()
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.net.fc.weight)
    x = torch.rand(1, 3, 48, 48)
    assert not torch.equal(model(x), twin(x))


def test_preprocessing_is_the_familys_own_unless_set() -> None:
    assert build(ModelConfig(model="torchvision/squeezenet1_1"), 2).preprocess["mean"][0] == pytest.approx(
        0.485
    )
    config = ModelConfig(model="toy/resnet", mean=(0.0, 0.25, 0.5), std=(1.0, 2.0, 4.0))
    assert build(config, 2).preprocess == {"kind": "mean_std", "mean": [0, 0.25, 0.5], "std": [1, 2, 4]}


def test_a_bare_network_takes_images_as_they_are() -> None:
    net = ToyResNet(3, 4).eval()
    x = torch.rand(2, 3, 48, 48)
    model = classifier(net)
    assert torch.equal(model(x), net(x))
    assert model.preprocess == {"kind": "none"}
    assert classifier(model) is model


def test_building_leaves_the_weights_and_statistics_alone() -> None:
    net = ToyResNet(3, 4)
    before = weights_sha256(net)
    assert weights_sha256(classifier(net)) == before


def test_mean_without_std_is_refused() -> None:
    with pytest.raises(ModelError, match="give both or neither"):
        build(ModelConfig(model="toy/resnet", mean=(0.5, 0.5, 0.5)), 2)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("torchvision/resnet81", "did you mean torchvision/resnet18"),
        ("timm/tf_eficientnet_lite0", "did you mean timm/tf_efficientnet_lite0"),
        ("toy/resnets", "did you mean toy/resnet"),
        ("timm/hf-hub:someone/resnet18", "unknown model"),
        ("resnet18", "FAMILY/NAME"),
    ],
)
def test_unknown_models_are_named_with_the_closest(name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        build(ModelConfig(model=name), 2)


class Tokens(nn.Module):
    """As a vision transformer: features are a sequence."""

    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def forward_head(self, f: Tensor) -> Tensor:
        return f.mean(1)


@pytest.mark.parametrize("net", [Tokens(), nn.Sequential(nn.Conv2d(3, 4, 3))], ids=["tokens", "no split"])
def test_networks_without_spatial_features_are_refused_when_wrapped(net: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"no spatial features.*use a convolutional network"):
        classifier(net)


def test_vision_transformers_are_refused() -> None:
    with pytest.raises(ModelError, match="VisionTransformer gives no spatial features"):
        build(ModelConfig(model="timm/vit_tiny_patch16_224"), 2)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    model, path = toy(), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_weights(model, path)
    else:
        torch.save({"state_dict": model.net.state_dict()}, path)
    loaded = build(ModelConfig(model="toy/resnet", width=4, weights=str(path)), 3)
    assert weights_sha256(loaded) == weights_sha256(model) == weights_sha256(model.net)
    assert os.listdir(tmp_path) == [path.name]


def test_fingerprint_sees_one_changed_bit() -> None:
    model = toy()
    before = weights_sha256(model)
    model.net.fc.bias.data.view(torch.int32)[0] ^= 1
    assert weights_sha256(model) != before


def test_weights_of_another_shape_are_listed(tmp_path: Path) -> None:
    save_weights(toy(classes=5), tmp_path / "five.safetensors")
    with pytest.raises(ModelError, match="number of classes") as caught:
        load_weights(toy(), tmp_path / "five.safetensors")
    assert str(caught.value).splitlines()[1:] == [
        "  other shape: fc.weight: file [5, 16], model [3, 16]; fc.bias: file [5], model [3]"
    ]


def test_missing_and_unexpected_weights_are_listed_five_at_most(tmp_path: Path) -> None:
    torch.save({"stranger": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(
        ModelError, match=r"missing in the file: .*; and \d+ more\n  unknown to the model: stranger$"
    ) as c:
        load_weights(toy(), tmp_path / "other.pt")
    assert len(str(c.value)) < 450


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights at"):
        load_weights(toy(), tmp_path / "none.pt")
    torch.save({"net": toy()}, tmp_path / "pickled.pt")
    with pytest.raises(ModelError, match="more than tensors"):
        load_weights(toy(), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="no state dict"):
        load_weights(toy(), tmp_path / "list.pt")
    for name in ("torn.safetensors", "torn.pt"):
        (tmp_path / name).write_bytes(b"\x10\0\0\0\0\0\0\0{")
        with pytest.raises(ModelError, match="damaged"):
            load_weights(toy(), tmp_path / name)
