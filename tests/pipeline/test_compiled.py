"""The compiled step is the eager one in value, gradient and running statistics; what cannot be compiled is eager."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from bcos.modules import BcosConv2d
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts.errors import ModelError
from pipeline import explain as explainers
from pipeline.config import StudentConfig
from pipeline.data.batches import Targets
from pipeline.distill.compile import CompiledLosses
from pipeline.distill.losses import Terms
from pipeline.distill.step import loss_terms
from pipeline.models import BCosClassifier, build

CLASSES, PX = 5, 24
MODELS = ("toy/resnet", "bcos/small")

# torch's own, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _forget_compiled() -> None:
    torch.compiler.reset()


def settings(model: str, **changes: Any) -> StudentConfig:
    return StudentConfig(model=model, width=4, temperature=2, explanation_weight=5, **changes)


def student(model: str, logit: str = "raw") -> nn.Module:
    torch.manual_seed(0)
    return explainers.build("auto", build(settings(model), CLASSES), logit=logit).train()


def batch(explainer: nn.Module, size: int = 4, px: int = PX, seed: int = 1) -> tuple[Tensor, Tensor, Targets]:
    """Images, labels and a teacher that is all noise; the last map is all-zero."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, px, px, generator=random)
    logits = torch.randn(size, CLASSES, generator=random)
    height, width = explainer.map_size(px)
    maps = torch.rand(size, explainer.channels, height, width, generator=random)
    maps[-1] = 0
    return images, logits.argmax(1), Targets(logits, logits.argmax(1), maps)


def result(losses: Any, explainer: nn.Module, data: Any, explain: bool = True) -> dict[str, Tensor]:
    """Losses, gradients of L = KD + 5 exp, and buffers, of one step."""
    explainer.zero_grad()
    terms = losses(explainer, *data, explain)
    (terms.logits + 5 * (0.0 if terms.explained is None else terms.explained.loss)).backward()
    gradient = torch.cat([p.grad.flatten() for p in explainer.parameters() if p.grad is not None])
    buffers = {name: buffer.clone() for name, buffer in explainer.named_buffers()}
    return scalars(terms) | {"gradient": gradient} | buffers


def scalars(terms: Terms) -> dict[str, Tensor]:
    of_maps = {} if terms.explained is None else terms.explained._asdict()
    every = terms._replace(explained=None)._asdict() | {
        f"maps.{name}": value for name, value in of_maps.items()
    }
    return {name: value.detach() for name, value in every.items() if value is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert error <= within, f"{name}: {float(error):.1e}"


def compiled(
    explainer: nn.Module, fabric: Fabric, said: list[str], backend: Any = "aot_eager", **changes: Any
) -> CompiledLosses:
    losses = partial(
        loss_terms, settings("bcos/small" if explainer.channels == 6 else "toy/resnet", **changes)
    )
    return CompiledLosses(losses, explainer, fabric, said.append, backend=backend)


def check(model: str, logit: str, explain: bool, fabric: Fabric, backend: str) -> None:
    explainer = student(model, logit)
    twin, data, said = copy.deepcopy(explainer), batch(explainer), []
    step = compiled(explainer, fabric, said, backend)
    found = result(step, explainer, data, explain)
    expected = result(step.eager, twin, data, explain)
    assert step.serves, said
    assert len(said) == 1, said
    assert_same(found, expected, within=1e-4)
    other = batch(explainer, seed=2)  # nothing of the first batch is baked in
    assert_same(
        result(step, explainer, other, explain), result(step.eager, twin, other, explain), within=1e-4
    )


def test_labels_beside_the_teacher_compile_too(fabric: Fabric) -> None:
    explainer, said = student("toy/resnet"), []
    twin, data = copy.deepcopy(explainer), batch(explainer)
    step = compiled(explainer, fabric, said, label_weight=0.5)
    found, expected = result(step, explainer, data), result(step.eager, twin, data)
    assert step.serves, said
    assert "labels" in found
    assert_same(found, expected, within=1e-4)


@pytest.mark.parametrize(
    ("model", "logit", "explain"),
    [
        ("toy/resnet", "raw", True),
        ("toy/resnet", "centred", True),
        ("toy/resnet", "raw", False),
        ("bcos/small", "centred", True),
        ("bcos/small", "raw", False),
    ],
)
def test_as_one_graph_it_is_the_eager_step(model: str, logit: str, explain: bool, fabric: Fabric) -> None:
    check(model, logit, explain, fabric, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_compiled_by_inductor_it_is_the_eager_step(model: str, fabric: Fabric) -> None:
    check(model, "raw", True, fabric, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "px"),
    [
        ("torchvision/resnet18", 64),
        ("bcos/resnet18", 64),
        ("bcos/densenet169", 64),
        ("bcos/simple_vit_ti_patch16_224", 32),
        ("bcos/vitc_ti_patch1_14", 32),
    ],
)
def test_large_students_compile_as_one_graph(model: str, px: int, fabric: Fabric) -> None:
    explainer = student(model)
    twin, data, said = copy.deepcopy(explainer), batch(explainer, px=px), []
    step = compiled(explainer, fabric, said)
    assert_same(result(step, explainer, data), result(step.eager, twin, data), within=1e-4)
    assert step.serves, said


@pytest.mark.parametrize("model", MODELS)
def test_the_functional_form_is_the_flagged_one_in_float64(model: str) -> None:
    """Without a compiler and its rounding; `is_compiling` alone chooses the form."""
    explainer = student(model).double()
    images, _, teacher = batch(explainer)
    images, maps = images.double(), teacher.maps.double()

    def gradient() -> tuple[Tensor, Tensor]:
        out = explainer(images, teacher.classes, differentiable=True)
        loss = (out.maps * maps).sum() + out.logits.square().sum()
        found = torch.autograd.grad(loss, list(explainer.parameters()))
        return out.maps.detach(), torch.cat([g.flatten() for g in found])

    expected = gradient()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = gradient()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_a_rehearsal_leaves_no_trace(fabric: Fabric) -> None:
    explainer = student("bcos/small")
    before = {name: value.clone() for name, value in explainer.state_dict().items()}
    random = torch.get_rng_state()
    step = compiled(explainer, fabric, [])
    images, labels, teacher = batch(explainer)
    step._prepare(images, labels, teacher, explain=True)
    for name, value in explainer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in explainer.parameters())


def test_maps_are_compared_where_the_teachers_are(fabric: Fabric) -> None:
    explainer = student("toy/resnet")
    images, labels, teacher = batch(explainer)
    data = (images, labels, teacher._replace(maps=torch.rand(len(images), 1, PX, PX)))
    twin, said = copy.deepcopy(explainer), []
    step = compiled(explainer, fabric, said)
    assert_same(result(step, explainer, data), result(step.eager, twin, data), within=1e-4)
    assert step.serves, said


def test_a_smaller_last_batch_runs_eagerly(fabric: Fabric) -> None:
    explainer = student("toy/resnet")
    twin, said = copy.deepcopy(explainer), []
    step = compiled(explainer, fabric, said)
    result(step, explainer, batch(explainer))
    result(step.eager, twin, batch(explainer))
    last = batch(explainer, size=3)
    assert_same(result(step, explainer, last), result(step.eager, twin, last), within=1e-6)
    assert step.serves


def test_what_cannot_be_compiled_says_so_once_and_runs_eagerly(fabric: Fabric) -> None:
    def broken(graph: object, inputs: object) -> Any:
        raise RuntimeError("no compiler here")

    explainer = student("bcos/small")
    twin, said = copy.deepcopy(explainer), []
    step = compiled(explainer, fabric, said, broken)
    for seed in (1, 2):
        data = batch(explainer, seed=seed)
        assert_same(result(step, explainer, data), result(step.eager, twin, data), within=0)
    assert not step.serves
    assert [line for line in said if "runs eagerly" in line and "no compiler here" in line] == said[1:]
    assert len(said) == 2


def test_several_processes_run_eagerly() -> None:
    class Two:
        world_size = 2

    said: list[str] = []
    explainer = student("toy/resnet")
    step = CompiledLosses(partial(loss_terms, settings("toy/resnet")), explainer, Two(), said.append)  # type: ignore[arg-type]
    result(step, explainer, batch(explainer))
    assert said == ["train.compile: several processes are not compiled; they run eagerly"]


def test_bf16_compiles(fabric: Fabric) -> None:
    half = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    half.launch()
    explainer = student("bcos/small")
    twin, said = copy.deepcopy(explainer), []
    step = compiled(explainer, half, said)
    data = batch(explainer)
    found = result(step, explainer, data)
    with half.autocast():
        expected = result(step.eager, twin, data)
    assert step.serves, said
    assert_same(found, expected, within=0.2)


# --- the combination that is silently wrong


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_traced_autograd_and_the_flag_are_refused(fullgraph: bool) -> None:
    """`torch._dynamo.config.trace_autograd_ops`: the flag is refused, and the explainer, compiled, needs none."""
    explainer = student("bcos/small")
    images, _, teacher = batch(explainer)

    def maps(images: Tensor) -> Tensor:
        return explainer(images, teacher.classes, differentiable=True).maps

    expected = maps(images)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        with pytest.raises(ModelError, match="trace_autograd_ops"):
            maps(images)
        found = torch.compile(maps, backend="aot_eager", fullgraph=fullgraph)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_a_plain_pass_of_held_layers_is_never_compiled_unasked() -> None:
    """Autograd of its graph with the layers constant would find nothing held."""
    net = student("bcos/small").model
    assert isinstance(net, BCosClassifier)
    assert any(isinstance(module, BcosConv2d) for module in net.modules())
    with pytest.raises(Exception, match="B-cos explanations cannot be compiled"):
        torch.compile(net, backend="aot_eager", fullgraph=True)(torch.rand(2, 3, PX, PX))
