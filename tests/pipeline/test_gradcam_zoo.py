"""GradCAM of every student, of a deep copy at that, against plain autograd through a hook: the split plays no part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline import explain as explainers
from pipeline.config import ModelConfig
from pipeline.explain import Explained
from pipeline.models import build

LAST_STAGE = {  # the module whose output is the last stage's features
    "torchvision/resnet18": "layer4",
    "torchvision/resnet34": "layer4",
    "torchvision/resnet50": "layer4",
    "torchvision/convnext_tiny": "features",
    "torchvision/efficientnet_v2_s": "features",
    "torchvision/mobilenet_v2": "features",
    "torchvision/shufflenet_v2_x0_5": "conv5",
    "timm/convnext_atto": "stages",  # norm between pool and linear
    "timm/mobilenetv3_small_050": "blocks",  # convolution and activation between them
    "timm/regnety_002": "s4",
}


def by_a_hook(net: nn.Module, stage: str, images: Tensor) -> Explained:
    seen: list[Tensor] = []
    hook = net.get_submodule(stage).register_forward_hook(lambda _, __, result: seen.append(result))
    logits = net(images)
    hook.remove()
    (features,), classes = seen, logits.argmax(1)
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features, create_graph=True)
    maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    return Explained(logits, maps, classes)


def parameter_gradients(net: nn.Module, out: Explained) -> dict[str, Tensor]:
    target = torch.linspace(-1, 2, out.maps.numel(), dtype=out.maps.dtype).reshape(out.maps.shape)
    peaks = out.maps.detach().amax((1, 2, 3), keepdim=True)
    loss = ((out.maps / peaks - target) ** 2).sum() + out.logits.log_softmax(1)[:, 0].sum()
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", LAST_STAGE)
def test_maps_and_gradients_of_a_copy_equal_plain_double_backward(name: str) -> None:
    """In training mode: batch statistics, and one draw of dropout and stochastic depth for logits and map."""
    torch.manual_seed(0)
    model = build(ModelConfig(model=name), 5).double().train()
    twin = copy.deepcopy(explainers.build("gradcam", model))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.manual_seed(1)
    expected = by_a_hook(model.net, LAST_STAGE[name], (images - model.mean) / model.std)
    references = parameter_gradients(model.net, expected)
    nn.init.zeros_(next(model.net.parameters()))  # the copy never looks at the original
    torch.manual_seed(1)
    out = twin(images, differentiable=True)
    assert (out.maps.amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    largest = max(float(reference.norm()) for reference in references.values())
    for key, ours in parameter_gradients(twin.model.net, out).items():
        reference = references[key]
        assert float((ours - reference).norm()) <= 1e-10 * max(float(reference.norm()), 1e-3 * largest), key
