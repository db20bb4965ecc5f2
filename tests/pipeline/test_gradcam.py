"""GradCAM against its definition: plain autograd, twice where it trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision import models as tv

from artifacts.errors import ConfigError, ModelError
from pipeline import explain as explainers
from pipeline.explain import Explained
from pipeline.models import Classifier, classifier
from pipeline.models.toy import ToyResNet

NETS = {
    "toy": lambda: ToyResNet(5, 8),
    "resnet18": lambda: tv.resnet18(num_classes=5),
    "mobilenet_v3_small": lambda: tv.mobilenet_v3_small(num_classes=5, dropout=0.2),
    "convnext_tiny": lambda: tv.convnext_tiny(num_classes=5),
    "densenet121": lambda: tv.densenet121(num_classes=5),
    "shufflenet_v2_x0_5": lambda: tv.shufflenet_v2_x0_5(num_classes=5),
    "efficientnet_v2_s": lambda: tv.efficientnet_v2_s(num_classes=5, dropout=0.2),
}


def images(size: int = 48, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def toy(classes: int = 5) -> Classifier:
    torch.manual_seed(0)
    return classifier(ToyResNet(classes, 8).double().eval())


def plain_gradcam(model: Classifier, x: Tensor, *, centred: bool = False) -> Explained:
    """The definition, through a graph of the gradient: what the fast path must equal."""
    features = model.features(x)
    logits = model.head(features)
    classes = logits.argmax(1)
    explained = logits.gather(1, classes[:, None]).squeeze(1) - centred * logits.mean(1)
    (gradient,) = torch.autograd.grad(explained.sum(), features, create_graph=True)
    maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    return Explained(logits, maps, classes)


def parameter_gradients(model: Classifier, out: Explained) -> list[Tensor]:
    shape = torch.linspace(-1, 2, out.maps.numel(), dtype=out.maps.dtype).reshape(out.maps.shape)
    peaks = out.maps.detach().amax((1, 2, 3), keepdim=True)
    loss = ((out.maps / peaks - shape) ** 2).sum() + out.logits.log_softmax(1)[:, 0].sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", NETS)
def test_maps_and_parameter_gradients_equal_plain_double_backward(name: str) -> None:
    """In training mode: batch statistics, and one draw of dropout for logits and map."""
    torch.manual_seed(0)
    model = classifier(NETS[name]().double().train())
    x = images(48 if name == "toy" else 64)
    torch.manual_seed(1)
    expected = plain_gradcam(model, x)
    torch.manual_seed(1)
    out = explainers.build("gradcam", model)(x, differentiable=True)
    assert (out.maps.amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    pairs = list(zip(parameter_gradients(model, out), parameter_gradients(model, expected), strict=True))
    largest = max(float(reference.norm()) for _, reference in pairs)
    for ours, reference in pairs:
        assert float((ours - reference).norm()) <= 1e-10 * max(float(reference.norm()), 1e-3 * largest)


class Anywhere(nn.Module):
    """Its head weighs every place of the features on its own, so that a gradient differs from place to place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 5)
        self.pretrained_cfg = {"input_size": (3, 8, 8)}

    def forward_features(self, images: Tensor) -> Tensor:
        return self.layer(images).relu()

    def forward_head(self, features: Tensor) -> Tensor:
        return self.linear(features.flatten(1))


def test_a_gradient_that_differs_between_places_counts_by_its_mean() -> None:
    torch.manual_seed(0)
    model = classifier(Anywhere()).double()
    expected, out = plain_gradcam(model, images(8)), explainers.GradCAM(model)(images(8))
    assert (out.maps.amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(out.maps, expected.maps.detach(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("logit", ["raw", "centred"])
def test_explains_the_logit_or_the_logit_minus_the_mean_logit(logit: str) -> None:
    model = toy()
    out = explainers.build("gradcam", model, logit=logit)(images())
    expected = plain_gradcam(model, images(), centred=logit == "centred")
    torch.testing.assert_close(out.maps, expected.maps.detach(), rtol=1e-10, atol=1e-14)


def test_centred_does_not_see_a_shift_of_all_logits() -> None:
    model = toy(classes=2)
    shifted = copy.deepcopy(model)
    shifted.net.fc.weight.data += torch.linspace(-3, 3, 32, dtype=torch.float64)
    explainer, other = (explainers.build("gradcam", m, logit="centred") for m in (model, shifted))
    classes = torch.tensor([0, 1])
    torch.testing.assert_close(explainer(images(), classes).maps, other(images(), classes).maps)


def test_with_a_global_average_and_a_linear_head_it_is_the_class_activation_map() -> None:
    model = toy()
    out = explainers.build("gradcam", model)(images(), torch.tensor([3, 1]))
    with torch.no_grad():
        features = model.features(images())
        weights = model.net.fc.weight[[3, 1]] / features[0, 0].numel()
        expected = torch.einsum("bd,bdhw->bhw", weights, features).relu()[:, None]
    torch.testing.assert_close(out.maps, expected)
    assert out.classes.tolist() == [3, 1]


def test_explains_the_top_1_and_keeps_no_graph_unless_asked() -> None:
    model = toy()
    explainer = explainers.build("gradcam", model)
    out = explainer(images())
    assert torch.equal(out.logits, model(images()))
    assert torch.equal(out.classes, out.logits.argmax(1))
    assert out.maps.shape == (2, 1, 12, 12)
    assert not out.maps.requires_grad
    assert not out.logits.requires_grad
    trained = explainer(images(), differentiable=True)
    assert torch.equal(trained.maps, out.maps)


def test_maps_are_fp32_under_autocast() -> None:
    model = toy().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = explainers.build("gradcam", model)(images(dtype=torch.float32), differentiable=True)
    assert out.maps.dtype == out.logits.dtype == torch.float32
    expected = explainers.build("gradcam", model)(images(dtype=torch.float32), out.classes).maps
    assert torch.cosine_similarity(out.maps.flatten(1), expected.flatten(1)).min() > 0.99


def test_takes_a_bare_network() -> None:
    net = ToyResNet(5, 8).eval()
    x = images(dtype=torch.float32)
    assert torch.equal(explainers.build("gradcam", net)(x).logits, net(x))


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean gradcam"):
        explainers.build("grad-cam", toy())
    with pytest.raises(ConfigError, match="did you mean centred"):
        explainers.build("gradcam", toy(), logit="centered")
    with pytest.raises(ModelError, match="no spatial features"):
        explainers.build("gradcam", nn.Flatten())
