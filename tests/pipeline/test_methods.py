"""The prior methods: their losses by hand, the stages they compare, and students that train with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts.errors import ConfigError, DataError, ModelError
from pipeline import explain as explainers
from pipeline.config import Experiment, ModelConfig, PriorConfig
from pipeline.config.training import PriorName
from pipeline.distill.prior import METHODS, Beside, TrainingRows, build
from pipeline.distill.prior.feature_stages import Stages
from pipeline.distill.prior.losses import (
    AttentionTransfer,
    ClassAttentionTransfer,
    Contrast,
    KnowledgeReview,
    Seen,
    attention,
    contrast_loss,
    pyramid_distance,
)
from pipeline.distill.run import distill
from pipeline.models import Classifier
from pipeline.models import build as build_model
from pipeline.training.run import Run
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
ROWS = torch.arange(4)

STAGES = {
    "toy/resnet": [(16, 32), (64, 16)],
    "torchvision/resnet18": [(64, 16), (128, 8), (256, 4), (512, 2)],
    "torchvision/resnet50": [(256, 16), (512, 8), (1024, 4), (2048, 2)],
    "torchvision/convnext_tiny": [(96, 16), (192, 8), (384, 4), (768, 2)],
    "torchvision/efficientnet_v2_s": [(48, 16), (64, 8), (160, 4), (1280, 2)],
    "torchvision/mobilenet_v2": [(24, 16), (32, 8), (96, 4), (1280, 2)],
    "torchvision/shufflenet_v2_x0_5": [(24, 16), (48, 8), (96, 4), (1024, 2)],
    "torchvision/densenet121": [(256, 16), (512, 8), (1024, 4), (1024, 2)],
    "timm/resnet18": [(64, 16), (128, 8), (256, 4), (512, 2)],
    "timm/convnext_atto": [(40, 16), (80, 8), (160, 4), (320, 2)],
    "timm/tf_efficientnet_lite0": [(24, 16), (40, 8), (112, 4), (1280, 2)],
    "bcos/small": [(16, 32), (32, 16), (64, 8)],
    "bcos/resnet18": [(64, 16), (128, 8), (256, 4), (512, 2)],
    "bcos/densenet169": [(256, 16), (512, 8), (1280, 4), (1664, 2)],
}
NORM_AFTER_POOLING = ("torchvision/convnext_tiny", "timm/convnext_atto")


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_the_last_features_of_each_size(name: str) -> None:
    model = build_model(ModelConfig(model=name), 10).eval()
    before = torch.get_rng_state()
    stages = Stages(model, 64)
    assert [(shape[1], shape[2]) for shape in stages.shapes] == STAGES[name]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    copies: dict[str, Tensor] = {}
    with torch.no_grad(), stages.recording() as found, copying(model.net, stages.names, copies):
        logits = model(images)
    assert [tuple(f.shape[1:3]) for f in stages.features(found)] == STAGES[name]
    assert all(torch.equal(found[layer], copies[layer]) for layer in stages.names)  # nothing writes into them
    if isinstance(model, Classifier):  # DenseNet: after the relu that no module applies
        assert torch.equal(model.head(stages.features(found)[-1]), logits)
    if name not in NORM_AFTER_POOLING:  # class maps average to the logits, up to the bias
        bias = getattr(stages._linear(), "bias", 0) if isinstance(model, Classifier) else -math.log(9)
        assert torch.allclose(stages.activation_maps(found).mean((2, 3)) + bias, logits, atol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


@contextmanager
def copying(net: nn.Module, names: list[str], copies: dict[str, Tensor]) -> Iterator[None]:
    """Keeps a copy of what each module gives at the moment when it gives it."""

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: copies.update({name: output.clone()})

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    yield
    for hook in hooks:
        hook.remove()


def test_a_stage_ends_with_its_last_block() -> None:
    names = {
        name: Stages(build_model(ModelConfig(model=name), 10), 64).names
        for name in ("toy/resnet", "timm/convnext_atto")
    }
    assert names["toy/resnet"] == [
        "blocks.0",
        "blocks",
    ]  # not the stem, which has the size and width of blocks.0
    assert names["timm/convnext_atto"][:3] == ["stages.0", "stages.1", "stages.2"]


def test_hooks_go_when_the_pass_fails() -> None:
    model = build_model(ModelConfig(model="toy/resnet", width=4), 3)
    stages = Stages(model, 32)
    with pytest.raises(RuntimeError, match="channels"), stages.recording():
        model.net(torch.rand(1, 5, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_head_without_class_activation_maps_is_named_before_training() -> None:
    model, teacher = (
        build_model(ModelConfig(model=f"torchvision/{name}"), 3) for name in ("squeezenet1_1", "resnet18")
    )
    settings = PriorConfig(method="catkd")
    with pytest.raises(ModelError, match="SqueezeNet has no linear layer from its last"):
        build(settings, explainers.build("auto", model), model, teacher, TrainingRows(64, ROWS, ROWS))


def test_a_transformer_has_no_stages() -> None:
    with pytest.raises(ModelError, match="use a convolutional network"):
        Stages(build_model(ModelConfig(model="bcos/simple_vit_ti_patch16_224"), 10), 224)


def test_attention_transfer_by_hand() -> None:
    features = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])  # squares' mean over channels: 4.5, 8
    expected = torch.tensor([[4.5, 8.0]]) / math.hypot(4.5, 8)
    assert torch.allclose(attention(features), expected)
    other = torch.ones(1, 1, 1, 2)
    loss = AttentionTransfer()(Seen([features], None), Seen([other], None), ROWS, 0)
    assert float(loss) == pytest.approx(float((expected - 0.5**0.5).square().mean()))


def test_attention_transfer_ignores_scale_and_surplus_stages() -> None:
    deep = torch.rand(2, 5, 4, 4)
    student = Seen([torch.rand(2, 3, 8, 8), deep], None)
    teacher = Seen([3 * deep], None)
    assert float(AttentionTransfer()(student, teacher, ROWS, 0)) == pytest.approx(0, abs=1e-12)


def test_class_attention_transfer_by_hand() -> None:
    own = torch.zeros(1, 1, 4, 4)
    own[0, 0, :2, :2] = 5.0  # pooled: one of four places, normalised to 1
    theirs = torch.ones(1, 1, 4, 4)  # pooled and normalised: four times 1/2
    loss = ClassAttentionTransfer(2)(Seen([], own), Seen([], theirs), ROWS, 0)
    assert float(loss) == pytest.approx((0.5**2 + 3 * 0.5**2) / 4)


def test_pyramid_distance_by_hand() -> None:
    own, theirs = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    at = [F.mse_loss(F.adaptive_avg_pool2d(own, s), F.adaptive_avg_pool2d(theirs, s)) for s in (4, 2, 1)]
    assert torch.allclose(pyramid_distance(own, theirs), (at[0] + at[1] / 2 + at[2] / 4) / 1.75)


def test_review_is_the_papers_formula_and_sees_the_pooled_features() -> None:
    torch.manual_seed(0)
    shapes = [torch.Size([1, 3, 8, 8]), torch.Size([1, 5, 4, 4])]
    others = [torch.Size([1, 4, 8, 8]), torch.Size([1, 6, 2, 2])]
    review = KnowledgeReview(shapes, others)
    own, theirs = ([torch.rand(2, *shape[1:]) for shape in sizes] for sizes in (shapes, others))
    shallow, deep, pooled = review.fusions
    middle = [
        f.reduce(x) for f, x in zip(review.fusions, [*own, own[1].mean((2, 3), keepdim=True)], strict=True)
    ]
    first = middle[2]
    shares = deep.attention(torch.cat([middle[1], first.expand(-1, -1, 4, 4)], 1))
    fused = F.interpolate(middle[1] * shares[:, :1] + first * shares[:, 1:], (2, 2))
    wide = F.interpolate(fused, (8, 8))
    shares = shallow.attention(torch.cat([middle[0], wide], 1))
    last = middle[0] * shares[:, :1] + wide * shares[:, 1:]
    expected = pyramid_distance(shallow.expand(last), theirs[0]) + pyramid_distance(
        deep.expand(fused), theirs[1]
    )
    expected = expected + F.mse_loss(pooled.expand(first), theirs[1].mean((2, 3), keepdim=True))
    seen = Seen(own, None), Seen(theirs, None)
    for epoch, share in ((0, 0.0), (5, 0.25), (20, 1.0), (30, 1.0)):
        assert torch.allclose(review(*seen, ROWS, epoch), share * expected)
    review.ramp = 0
    assert torch.allclose(review(*seen, ROWS, 0), expected)


def test_contrast_loss_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.5, 1.0]])
    noise = 2 / 8
    expected = -(math.log(2 / 2.25) + math.log(0.25 / 0.75) + math.log(0.25 / 1.25))
    assert float(contrast_loss(scores, rows=8)) == pytest.approx(expected)
    assert noise == 0.25


def test_negatives_are_of_other_classes_and_all_of_them() -> None:
    torch.manual_seed(0)
    rows, labels = torch.tensor([3, 5, 8, 9, 11, 20]), torch.tensor([1, 0, 1, 2, 0, 2])
    contrast = Contrast(4, 4, rows, labels, 400)
    slots = contrast.slots[rows]  # type: ignore[index]
    assert sorted(slots.tolist()) == list(range(6))
    label_at = torch.empty(6, dtype=torch.int64)
    label_at[slots] = labels
    for row, chosen in zip(range(6), contrast._other_classes(slots), strict=True):
        expected = {slot for slot in range(6) if label_at[slot] != labels[row]}
        assert set(chosen.tolist()) == expected
    unlabelled = Contrast(4, 4, rows, torch.full((6,), -1), 400)
    for slot, chosen in zip(range(6), unlabelled._other_classes(torch.arange(6)), strict=True):
        assert set(chosen.tolist()) == set(range(6)) - {slot}


def test_a_sample_without_negatives_is_an_error() -> None:
    for labels in (torch.zeros(4, dtype=torch.int64), torch.full((1,), -1)):
        with pytest.raises(DataError, match="crd needs images of two classes"):
            Contrast(4, 4, torch.arange(len(labels)), labels, 8)


def test_contrast_is_the_papers_estimate_on_both_sides() -> None:
    torch.manual_seed(0)
    rows, labels = torch.arange(3), torch.tensor([0, 1, 2])
    contrast = Contrast(2, 2, rows, labels, 500, width=4).eval()  # eval: the memories stay
    seen = Seen([torch.rand(1, 2, 3, 3)], None), Seen([torch.rand(1, 2, 1, 1)], None)
    state = torch.get_rng_state()
    loss = contrast(*seen, torch.tensor([1]), 0)
    torch.set_rng_state(state)
    expected = 0.0
    chosen = [1, *contrast._other_classes(torch.tensor([1]))[0].tolist()]
    for side in (0, 1):
        embedded = contrast.embeddings[side](seen[side].features[-1].mean((2, 3)))[0]
        embedded = (embedded / embedded.norm()).detach()
        raw = [math.exp(float(contrast.memory[1 - side, slot] @ embedded) / 0.07) for slot in chosen]
        constant = sum(raw) / len(raw) * 3
        assert float(contrast.normaliser[side]) == pytest.approx(constant, rel=1e-5)
        noise = 500 / 3
        h = [score / constant / (score / constant + noise) for score in raw]
        expected -= math.log(h[0]) + sum(math.log(1 - each) for each in h[1:])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_contrast_is_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    contrast = Contrast(4, 4, ROWS, ROWS, 8).eval()
    seen = Seen([torch.rand(4, 4, 2, 2)], None), Seen([torch.rand(4, 4, 2, 2)], None)
    state = torch.get_rng_state()
    plain = contrast(*seen, ROWS, 0)
    torch.set_rng_state(state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrast(*seen, ROWS, 0), plain)


def test_contrast_remembers_and_keeps_its_constant() -> None:
    torch.manual_seed(0)
    contrast = Contrast(4, 6, torch.arange(10), torch.arange(10) % 2, 5, width=8).train()
    seen = Seen([torch.rand(3, 4, 2, 2)], None), Seen([torch.rand(3, 6, 2, 2)], None)
    before = contrast.memory.clone()
    first = contrast(*seen, torch.tensor([0, 1, 2]), 0)
    constant = contrast.normaliser.clone()
    assert (constant > 0).all()
    changed = (contrast.memory != before).any(2)
    assert changed[0].sum() == changed[1].sum() == 3
    assert torch.allclose(contrast.memory[:, changed[0]].norm(dim=2), torch.ones(2, 3))
    second = contrast(*seen, torch.tensor([0, 1, 2]), 1)
    assert torch.equal(contrast.normaliser, constant)
    assert second != first


def test_the_table_has_one_row_for_each_name_in_the_config() -> None:
    assert tuple(METHODS) == get_args(PriorName)


PRIORS: dict[str, dict[str, Any]] = {
    "at": {"method": "at"},
    "reviewkd": {"method": "reviewkd"},
    "catkd": {"method": "catkd"},
    "crd": {"method": "crd", "negatives": 16},
}


@pytest.mark.parametrize("kind", ["toy/resnet", "bcos/small"])
@pytest.mark.parametrize("name", PRIORS)
def test_gradients_reach_the_first_layer_and_every_adapter(name: str, kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = (build_model(ModelConfig(model=kind, width=width), 3) for width in (4, 8))
    explainer = explainers.build("auto", student)
    rows, labels = torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])
    settings = PriorConfig.model_validate(PRIORS[name])
    with_prior = build(settings, explainer, student, teacher, TrainingRows(32, rows, labels)).train()
    images = torch.rand(6, 3, 32, 32)
    answer, seen = with_prior.ask(explainers.build("auto", teacher.eval()), images, None, True)
    found = with_prior(images, answer.classes, differentiable=True, beside=Beside(seen, rows, 20))
    assert found.prior_loss is not None
    assert found.maps.requires_grad
    found.prior_loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in with_prior.method.parameters())
    first: Tensor = next(student.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert not any(p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("kind", ["toy/resnet", "bcos/small"])
@pytest.mark.parametrize("name", PRIORS)
def test_three_steps_lower_the_prior_loss(name: str, kind: str) -> None:
    torch.manual_seed(0)
    student, teacher = (build_model(ModelConfig(model=kind, width=width), 3) for width in (4, 8))
    rows, labels = torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])
    settings = PriorConfig.model_validate(PRIORS[name])
    module = build(
        settings, explainers.build("auto", student), student, teacher, TrainingRows(32, rows, labels)
    ).train()
    images = torch.rand(6, 3, 32, 32)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    _, seen = module.ask(explainers.build("auto", teacher.eval()), images, None, False)
    found = []
    for _ in range(4):
        torch.manual_seed(1)  # the same negatives
        loss = module(images, explain=False, beside=Beside(seen, rows, 20)).prior_loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[3] < found[0]


STUDENTS = {
    name: {
        "loss": "ce",
        "mode": "online",
        "prior": prior,
        **({"explanation_weight": 1} if name == "crd" else {}),
    }
    for name, prior in PRIORS.items()
}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_train_with_a_prior_method(
    name: str, prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    distill(Workspace(experiment_of(students=STUDENTS), prepared, fabric), name, 0)
    history = Run(prepared.run(name, 0)).history()
    assert all(math.isfinite(line["prior_loss"]) for line in history)
    assert history[-1]["prior_loss"] > 0
    assert ("explanation_loss" in history[0]) == (name == "crd")
    for line in history:
        terms = line["logit_loss"] + line["prior_loss"] + line.get("explanation_loss", 0.0)
        assert line["loss"] == pytest.approx(terms, rel=1e-4)


@pytest.mark.parametrize("name", ["reviewkd", "crd"])
def test_killed_and_resumed_is_bit_identical(
    name: str,
    prepared: Layout,
    experiment_of: Tiny,
    compare_killed_run: Callable[[Experiment, Layout, str, Sequence[int]], None],
) -> None:
    compare_killed_run(experiment_of(students=STUDENTS), prepared, name, [5])


def test_frozen_students_have_no_features_to_compare(experiment_of: Tiny) -> None:
    with pytest.raises(ConfigError, match="set mode to online"):
        experiment_of(students={"at": {"loss": "ce", "prior": {"method": "at"}}})
