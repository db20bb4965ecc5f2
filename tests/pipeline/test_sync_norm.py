"""Two processes that share their batch statistics compute what one process does on the joined batch.

The two gloo processes run this file: `python test_sync_norm.py RANK FOLDER`. The same functions, called here
without a process group on the joined batch, are the reference.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bcos.modules.norms import BatchNormUncentered2d
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from artifacts.errors import ModelError
from pipeline import explain as explainers
from pipeline.models.bcos_layers import HeldBatchNorm2d, constant_in_backward
from pipeline.models.sync_norm import SyncedBatchNorm2d, SyncedHeldBatchNorm2d, convert
from pipeline.models.toy import ToyResNet

ROOT = Path(__file__).parents[2]
ROWS = {0: slice(0, 4), 1: slice(4, 6)}  # uneven, to be fair to the last batch of an epoch
HALVES = {0: slice(0, 3), 1: slice(3, 6)}


def batch(size: int) -> Tensor:
    shape = (6, 3, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 + 30


def norms() -> nn.Sequential:
    """Two normalisations with a curved function between: one on running averages, one cumulative."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Softplus(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)
    )
    return net.double()


def held_norms() -> nn.Sequential:
    """The same of a B-cos network."""
    net = norms()
    net[0], net[3] = HeldBatchNorm2d(3), HeldBatchNorm2d(4, momentum=None)
    net[3].bias = None
    return net.double()


def second_order(net: nn.Module, rows: slice, held: bool = False) -> dict[str, Tensor]:
    """Outputs, statistics and gradients of sum(f) + sum(|d sum(f) / d x|^2): differentiates the net twice.

    `held`: d sum(f) / d x takes held statistics as constants.
    """
    x = batch(6)[rows].requires_grad_()
    y = net(x)
    with constant_in_backward() if held else nullcontext():
        (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    (y.tanh().sum() + slope.square().sum()).backward()
    gradients = {f"grad.{name}": parameter.grad for name, parameter in net.named_parameters()}
    return {"y": y.detach(), "grad": x.grad, **gradients, **dict(net.named_buffers())}


NETS = {"norms": (norms, False), "held": (held_norms, True), "held, not constant": (held_norms, False)}


def student() -> nn.Module:
    torch.manual_seed(0)
    return explainers.build("gradcam", convert(ToyResNet(4, 4).double()), logit="centred")


def training_step(explainer: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Parameter gradients of a loss on logits and maps, the mean over the batch; it may be wrapped."""
    out = explainer(batch(16)[rows], differentiable=True)
    loss = (out.logits.square().sum(1) + (out.maps - 1).square().sum((1, 2, 3))).mean()
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in explainer.named_parameters()}


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, (net, held) in NETS.items():
        save_file(second_order(convert(net()), ROWS[rank], held), folder / f"{name}-{rank}.safetensors")
    wrapped = DistributedDataParallel(student())
    save_file(training_step(wrapped, HALVES[rank]), folder / f"step-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two gloo processes left their results."""
    folder = tmp_path_factory.mktemp("gloo")
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]).lstrip(os.pathsep)
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in (0, 1)]
    assert [process.wait(timeout=100) for process in ranks] == [0, 0]
    return folder


def close(ours: Tensor, expected: Tensor) -> None:
    """To 1e-10, relative or (a bias before a norm has gradient 0) absolute."""
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_outputs_statistics_and_second_order_gradients_equal_the_joined_batch(
    name: str, two_processes: Path
) -> None:
    zero, one = (load_file(two_processes / f"{name}-{rank}.safetensors") for rank in (0, 1))
    net, held = NETS[name]
    expected = second_order(net(), slice(None), held)
    for key, reference in expected.items():
        if key in ("y", "grad"):
            close(torch.cat([zero[key], one[key]]), reference)
        elif key.startswith("grad."):
            close(zero[key] + one[key], reference)
        else:
            close(zero[key].double(), reference.double())
            assert torch.equal(zero[key], one[key])


def test_a_distributed_explaining_student_gets_the_joined_batchs_gradients(two_processes: Path) -> None:
    expected = training_step(student(), slice(None))
    for rank in (0, 1):
        for name, gradient in load_file(two_processes / f"step-{rank}.safetensors").items():
            close(gradient, expected[name])


@pytest.mark.parametrize("name", NETS)
def test_alone_it_is_batch_norm(name: str) -> None:
    net, held = NETS[name]
    plain, synced = second_order(net(), slice(None), held), second_order(convert(net()), slice(None), held)
    assert plain.keys() == synced.keys()
    assert all(torch.equal(plain[k], v) for k, v in synced.items())


def test_converting_keeps_parameters_state_and_mode() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3).eval()))
    state, weight = net.state_dict(), net[1][0].weight
    convert(net)
    assert isinstance(net[1][0], SyncedBatchNorm2d)
    assert net[1][0].weight is weight
    assert (net[1][0].eps, net[1][0].training) == (1e-3, False)
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)


def test_converting_a_held_norm_keeps_parameters_state_and_mode() -> None:
    net = held_norms().eval()
    state, weight = net.state_dict(), net[3].weight
    convert(convert(net))
    assert type(net[3]) is SyncedHeldBatchNorm2d
    assert net[3].weight is weight
    assert (net[3].bias, net[3].momentum, net[3].training) == (None, None, False)
    assert list(net.state_dict()) == list(state)
    copy.deepcopy(net).load_state_dict(state)


def test_timms_norm_with_an_activation_is_converted() -> None:
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(layers.BatchNormAct2d(3, inplace=False))
    x = torch.randn(4, 3, 5, 5)
    expected, state = net.eval()(x), list(net.state_dict())
    torch.testing.assert_close(convert(net)(x), expected)
    assert list(net.state_dict()) == state


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, BatchNormUncentered2d])
def test_other_batch_norms_are_refused(layer: type[nn.Module]) -> None:
    with pytest.raises(ModelError, match=f"{layer.__name__} cannot be synchronised"):
        convert(nn.Sequential(layer(3)))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
