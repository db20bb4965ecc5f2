"""B-cos maps: exact (W(x) x == logit - bias), and exact when trained through (finite differences, replay)."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable

import bcos
import pytest
import torch
import torch.nn.functional as F
from bcos.models import densenet, resnet, vit
from bcos.modules import BcosConv2d, BcosLinear, BcosSequential, LogitLayer, norms
from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline.explain.bcos import BCos, colour
from pipeline.explain.gradcam import Explained
from pipeline.models import bcos_layers
from pipeline.models.bcos import NAMES, TRANSFORMERS, BCosClassifier, bcos_classifier, build_bcos
from pipeline.models.bcos_layers import constant_in_backward

CLASSES, WIDTH = 5, 4
CONVOLUTIONAL = [name for name in NAMES if name not in TRANSFORMERS]
STEPS = (1e-6, 1e-7, 1e-8, 1e-9)
"""Of finite differences, relative to the parameters."""


def images(name: str = "small", batch: int = 2) -> Tensor:
    size = {"small": 24, "densenet169": 64}.get(name, 32 if name in TRANSFORMERS else 48)
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@functools.cache
def _built(name: str) -> BCosClassifier:
    """Random weights; running statistics of the test images, else a deep network's logits are all but 0."""
    torch.manual_seed(0)
    model = BCosClassifier(build_bcos(name, CLASSES, WIDTH)).double()
    norm_layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in norm_layers]
    for layer in norm_layers:
        layer.momentum = None  # the cumulative average: after one pass, that pass
    with torch.no_grad():
        model(images(name))
    for layer, momentum in zip(norm_layers, momenta, strict=True):
        layer.momentum = momentum
    return model


def built(name: str = "small", training: bool = False) -> BCosClassifier:
    return copy.deepcopy(_built(name)).train(training)


def package(name: str) -> nn.Module:
    """The same network by the package alone, as its experiments configure it."""
    settings = {
        "num_classes": CLASSES,
        "norm_layer": norms.NoBias(norms.BatchNormUncentered2d),
        "logit_bias": -math.log(CLASSES - 1),
    }
    if name in TRANSFORMERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = getattr(vit, name)(
                num_classes=CLASSES,
                linear_layer=BcosLinear,
                conv2d_layer=BcosConv2d,
                norm_layer=norms.NoBias(norms.DetachableLayerNorm),
                norm2d_layer=norms.NoBias(norms.DetachableGNLayerNorm2d),
                act_layer=nn.Identity,
            )
        return BcosSequential(body, LogitLayer(logit_bias=-math.log(CLASSES - 1))).double()
    if name == "small":
        net = resnet.BcosResNet(
            resnet.BasicBlock, [1, 1, 1], inplanes=WIDTH, small_inputs=True, **settings
        ).double()
        net.conv1 = BcosConv2d(6, WIDTH, 3, stride=2, padding=1).double()
        return net
    return getattr(densenet if "densenet" in name else resnet, name)(**settings).double()


def explained_logit(out: Explained) -> Tensor:
    return out.logits.gather(1, out.classes[:, None]).squeeze(1)


def cosine_loss(maps: Tensor, target: Tensor | None = None) -> Tensor:
    """Eq. 3 in the maps' own precision, which `losses.explanation_loss` (fp32) is not."""
    if target is None:
        generator = torch.Generator().manual_seed(7)
        target = torch.randn(maps.shape, generator=generator, dtype=maps.dtype)
    return 1 - F.cosine_similarity(maps.flatten(1), target.flatten(1), eps=1e-30).mean()


def kd_like_loss(logits: Tensor) -> Tensor:
    return -(
        torch.linspace(0.1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
        * logits.log_softmax(1)
    ).sum()


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """All of a model's gradients as one vector; zero where the loss does not reach."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    pairs = zip(found, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- the map is the decision


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_map_times_input_is_the_logit_minus_the_bias(name: str, training: bool) -> None:
    model, x = built(name, training), images(name)
    for differentiable in (False, True):
        out = BCos(model)(x, differentiable=differentiable)
        bias = -math.log(CLASSES - 1)
        total = (out.maps * model.add_inverse(x)).sum((1, 2, 3))
        torch.testing.assert_close(total, explained_logit(out) - bias, rtol=1e-9, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_vits_positions_take_the_rest_of_the_logit(name: str, training: bool) -> None:
    """The sine embedding is added to the patches: a term beside W(x) x, linear in it as W(x) is in x."""
    model, x = built(name, training), images(name)
    out = BCos(model)(x)
    seen: list[Tensor] = []
    embedding = next(m for m in model.modules() if isinstance(m, vit.PosEmbSinCos2d))
    embedding.register_forward_hook(lambda _, __, result: seen.append(result.requires_grad_()))
    logits = model(x)
    with constant_in_backward():
        (of_positions,) = torch.autograd.grad(logits.gather(1, out.classes[:, None]).sum(), seen)
    assert of_positions.shape == seen[0].shape, "summed over the batch, as positions are shared"
    total = (out.maps * model.add_inverse(x)).sum() + (of_positions * seen[0]).sum()
    torch.testing.assert_close(total, (explained_logit(out) + math.log(CLASSES - 1)).sum(), rtol=1e-9, atol=0)


def test_centred_is_the_logit_minus_the_mean_logit() -> None:
    model, x = built(), images()
    out = BCos(model, logit="centred")(x, torch.tensor([3, 1]))
    total = BCos.heat(out.maps, x).sum((1, 2, 3))
    torch.testing.assert_close(total, explained_logit(out) - out.logits.mean(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["small", "resnet18", *TRANSFORMERS])
def test_maps_are_the_packages_own(name: str) -> None:
    """The package's explanation mode is right where nothing is trained; it also works on our layers."""
    model, x = built(name), images(name)
    theirs = package(name).eval()
    theirs.load_state_dict(model.net.state_dict())
    expected = package_maps(theirs, model.add_inverse(x))
    out = BCos(model)(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(
        package_maps(model.net, model.add_inverse(x)), expected, rtol=1e-10, atol=1e-16
    )
    trained = BCos(model)(x, differentiable=True)
    torch.testing.assert_close(trained, expected, rtol=1e-10, atol=1e-16)


def package_maps(net: nn.Module, x: Tensor) -> Explained:
    x = x.clone().requires_grad_()
    with bcos.explanation_mode(net):
        logits = net(x)
        (maps,) = torch.autograd.grad(logits.amax(1).sum(), x)
    return Explained(logits.detach(), maps, logits.argmax(1))


# --- training through the map


@pytest.mark.parametrize(
    ("name", "training"),
    [("small", True), ("small", False), ("resnet18", True), ("resnet18", False), ("densenet169", True)]
    + [(name, True) for name in TRANSFORMERS],  # which know no modes
)
def test_finite_differences(name: str, training: bool) -> None:
    """Central differences of the explanation loss, along a random direction in all parameters at once.

    A layer's |cos| has a kink at 0. Where one of some 100,000 crosses it within the step, the difference is
    off, not the gradient; so steps shrink until none does. `pytest -s` prints the table.
    """
    model, x = built(name, training), images(name)
    explainer = BCos(model)
    classes = explainer(x).classes
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(11)
    draws = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in start]
    direction = [draw * p.square().mean().sqrt() for draw, p in zip(draws, start, strict=True)]
    found = torch.autograd.grad(cosine_loss(explainer(x, classes, True).maps), parameters)
    slope = float(sum((g * d).sum() for g, d in zip(found, direction, strict=True)))

    def loss_at(offset: float) -> float:
        for parameter, origin, along in zip(parameters, start, direction, strict=True):
            parameter.data = origin + offset * along
        return float(cosine_loss(explainer(x, classes).maps))

    errors = []
    for step in STEPS:
        difference = (loss_at(step) - loss_at(-step)) / (2 * step)
        errors.append(abs(slope - difference) / abs(difference))
        print(
            f"\n{name:26} {'train' if training else 'eval':5} step {step:.0e}  autograd {slope:+.9e}",
            end="  ",
        )
        print(f"differences {difference:+.9e}  relative {errors[-1]:.1e}", end="")
        if errors[-1] < 1e-6:
            break
    assert min(errors) < 1e-5


@pytest.mark.parametrize("name", ["small", "resnet18", "densenet169", *TRANSFORMERS])
def test_gradients_equal_those_of_recorded_and_replayed_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain reference: record the dynamic weights, then differentiate the then linear network twice."""
    model, x = built(name, training=True), images(name)
    out = BCos(model)(x, differentiable=True)
    found = gradients(cosine_loss(out.maps), model)

    recorded: list[Tensor] = []
    monkeypatch.setattr(bcos_layers, "hold", lambda tensor, _: recorded.append(tensor) or tensor)
    model(x)
    replay = iter(recorded)
    monkeypatch.setattr(bcos_layers, "hold", lambda tensor, _: next(replay))
    leaf = model.add_inverse(x).requires_grad_()
    logits = model.net(leaf)
    (maps,) = torch.autograd.grad(logits.gather(1, out.classes[:, None]).sum(), leaf, create_graph=True)
    torch.testing.assert_close(out.maps, maps, rtol=1e-10, atol=1e-16)
    assert relative(found, gradients(cosine_loss(maps), model)) < 1e-10


@pytest.mark.parametrize("name", ["small", "resnet18", "densenet169", *TRANSFORMERS])
def test_the_explanation_leaves_the_kd_gradient_alone(name: str) -> None:
    model, x = built(name, training=True), images(name)
    out = BCos(model)(x, differentiable=True)
    found = gradients(kd_like_loss(out.logits) + 0 * cosine_loss(out.maps), model)
    plain = model(x)
    assert torch.equal(out.logits, plain)
    assert relative(found, gradients(kd_like_loss(plain), model)) < 1e-12


def test_one_backward_pass_gives_the_sum_of_both_terms() -> None:
    model, x = built(training=True), images()
    out = BCos(model)(x, differentiable=True)
    terms = gradients(kd_like_loss(out.logits), model) + 3 * gradients(cosine_loss(out.maps), model)
    (kd_like_loss(out.logits) + 3 * cosine_loss(out.maps)).backward()
    assert relative(torch.cat([p.grad.flatten() for p in model.parameters()]), terms) < 1e-12


def test_training_through_the_packages_explanation_mode_is_wrong() -> None:
    """The trap that the layers here exist for: right maps, right logits, and gradients of something else."""
    model = built("resnet18", training=True)
    x = images("resnet18")
    theirs = package("resnet18").train()
    theirs.load_state_dict(model.net.state_dict())
    leaf = model.add_inverse(x).requires_grad_()
    with bcos.explanation_mode(theirs):
        logits = theirs(leaf)
        (maps,) = torch.autograd.grad(logits.amax(1).sum(), leaf, create_graph=True)
    out = BCos(model)(x, differentiable=True)
    torch.testing.assert_close(maps, out.maps, rtol=1e-10, atol=1e-16)
    for term in (lambda o: cosine_loss(o.maps), lambda o: kd_like_loss(o.logits)):
        naive = gradients(term(Explained(logits, maps, out.classes)), theirs)
        ours = gradients(term(out), model)
        cosine = float(F.cosine_similarity(naive, ours, dim=0))
        print(f"naive against exact: cosine {cosine:.3f}, norm ratio {float(naive.norm() / ours.norm()):.3f}")
        assert cosine < 0.5


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_no_trace(where: str) -> None:
    model, x = built(), images()
    expected = gradients(kd_like_loss(model(x)), model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def fail_in_backward(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(fail)

    hook = model.net.layer2.register_forward_hook(fail if where == "forward" else fail_in_backward)
    for differentiable in (False, True):
        with pytest.raises(KeyboardInterrupt):
            BCos(model)(x, differentiable=differentiable)
        assert not bcos_layers._constant_in_backward
        assert not bcos_layers._constant_in_forward
    hook.remove()
    assert torch.equal(gradients(kd_like_loss(model(x)), model), expected)


# --- a network like any other


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_and_logits_are_the_packages(name: str) -> None:
    ours, theirs = built(name), package(name)
    theirs.load_state_dict(ours.net.state_dict(), strict=True)
    assert list(ours.net.state_dict()) == list(theirs.state_dict())
    x = images(name)
    for training in (False, True):
        expected = theirs.train(training)(ours.add_inverse(x))
        torch.testing.assert_close(ours.train(training)(x), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dict(ours.net.state_dict()), dict(theirs.state_dict()))  # running statistics


def test_published_settings() -> None:
    """The package's own entry points, from which the published weights come."""
    for name in ("resnet18", "simple_vit_ti_patch16_224"):
        theirs, ours = getattr(bcos.pretrained, name)(pretrained=False), build_bcos(name, 1000)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.rand(1, 6, 64, 64)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy])
@pytest.mark.parametrize("name", ["small", "simple_vit_ti_patch16_224"])
def test_copies_are_whole_and_apart(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    explainer, x = BCos(built(name)), images(name)
    twin = copied(explainer)
    torch.testing.assert_close(twin(x), explainer(x), rtol=0, atol=0)
    for parameter in twin.parameters():
        parameter.data.neg_()
    torch.testing.assert_close(built(name)(x), explainer(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["small", "resnet18", "densenet169", *TRANSFORMERS])
def test_chunks_of_a_batch_give_the_whole_batchs_maps(name: str) -> None:
    explainer, x = BCos(built(name)), images(name, batch=3)
    whole = explainer(x)
    parts = [explainer(chunk) for chunk in x.split(2)]
    for field in range(3):
        torch.testing.assert_close(
            torch.cat([part[field] for part in parts]), whole[field], rtol=1e-10, atol=1e-14
        )


def test_explains_the_top_1_and_keeps_no_graph_unless_asked() -> None:
    model, x = built(), images()
    explainer = BCos(model)
    out = explainer(x)
    assert torch.equal(out.logits, model(x))
    assert torch.equal(out.classes, out.logits.argmax(1))
    assert out.maps.shape == (2, 6, 24, 24)
    assert not out.maps.requires_grad
    assert not out.logits.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(explainer(x.clone()), out, rtol=0, atol=0)
    with torch.no_grad():
        assert explainer(x, differentiable=True).maps.requires_grad
    frozen = model.requires_grad_(False)
    torch.testing.assert_close(BCos(frozen)(x), out, rtol=0, atol=0)


def test_maps_are_fp32_under_autocast() -> None:
    model, x = built("resnet18").float(), images("resnet18").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = BCos(model)(x, differentiable=True)
    assert out.maps.dtype == out.logits.dtype == torch.float32
    expected = BCos(model)(x, out.classes).maps
    assert F.cosine_similarity(out.maps.flatten(1), expected.flatten(1)).min() > 0.9


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile's own, at a graph break
def test_compiled_it_falls_back_to_eager_or_refuses() -> None:
    layer = bcos_layers.hold_layers(nn.Sequential(BcosConv2d(6, 4, 3), BcosConv2d(4, CLASSES, 1)))
    explainer = BCos(BCosClassifier(nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    x = images().float()
    expected = explainer(x)
    found = torch.compile(explainer, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    torch.compiler.reset()
    with pytest.raises(Exception, match="B-cos explanations cannot be compiled"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(explainer.model.add_inverse(x))


def test_pictures_are_the_papers() -> None:
    model, x = built(), images()
    out = BCos(model)(x)
    pictures = colour(out.maps, x, smooth=5)
    assert pictures.shape == (2, 4, 24, 24)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    for picture, maps, image in zip(pictures, out.maps, model.add_inverse(x), strict=True):
        expected = torch.from_numpy(bcos.gradient_to_image(image, maps, smooth=5)).permute(2, 0, 1)
        torch.testing.assert_close(picture, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(colour(torch.zeros(1, 6, 9, 9), torch.rand(1, 3, 9, 9)), torch.zeros(1, 4, 9, 9))


def test_says_what_it_is() -> None:
    model = built()
    assert model.classes == CLASSES
    assert model.preprocess == {"kind": "add_inverse"}
    assert bcos_classifier(model) is model
    assert bcos_classifier(package("simple_vit_ti_patch16_224")).classes == CLASSES


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ModelError, match="did you mean resnet18"):
        build_bcos("resnet81", 5)
    with pytest.raises(ModelError, match="at least 2 classes"):
        build_bcos("resnet18", 1)
    with pytest.raises(ModelError, match="has no B-cos layers"):
        BCosClassifier(nn.Conv2d(6, 3, 1))
    with pytest.raises(ModelError, match="without exact B-cos maps: DetachablePositionNorm2d"):
        BCosClassifier(resnet.resnet18(num_classes=CLASSES))  # the package's default norm
