"""Two distributed processes train on the gradients of one process on the joined batch, explanations included.

Everything is the pipeline's own: networks, explainers, the loss KD + 5 * (1 - cosine), Fabric's DDP wrapper.
Only the precision is not: in float64 the two agree to rounding errors, so nothing small can hide. The two
gloo processes run this file, `python test_ddp_gradients.py RANK FOLDER`; the same functions, called here, are
the one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline import explain as explainers
from pipeline.augment.counter import Ids
from pipeline.config import StudentConfig
from pipeline.data.batches import Answers, Batch
from pipeline.devices import start
from pipeline.distill.run import StudentStep
from pipeline.models import build
from pipeline.models.sync_norm import convert

ROOT = Path(__file__).parents[2]
CLASSES = 5
HALVES = {0: slice(0, 4), 1: slice(4, 8)}


@dataclass(frozen=True)
class Case:
    model: str
    size: int
    dead: tuple[int, ...] = ()
    """Rows with an all-zero teacher map, which have no explanation loss."""
    steps: int = 2
    """From its second step on, DDP sends the gradients in rebuilt buckets."""


CASES = {
    "gradcam-toy": Case("toy/resnet", 32),
    "gradcam-toy-dead": Case("toy/resnet", 32, dead=(4, 6, 7)),
    "gradcam-resnet18": Case("torchvision/resnet18", 48, steps=1),
    "bcos-small": Case("bcos/small", 24),
    "bcos-small-dead": Case("bcos/small", 24, dead=(4, 6, 7)),
    "bcos-small-all-dead": Case("bcos/small", 24, dead=(4, 5, 6, 7)),
    "bcos-resnet18": Case("bcos/resnet18", 64, steps=1),
    "bcos-vit": Case("bcos/simple_vit_ti_patch16_224", 32),
}


def settings(case: Case) -> StudentConfig:
    return StudentConfig(model=case.model, width=4, explanation_weight=5)


def student(case: Case, synced: bool) -> nn.Module:
    torch.manual_seed(0)
    model = build(settings(case), CLASSES).double()
    if synced:
        convert(model.net)
    return explainers.build("auto", model)


def batch(case: Case, explainer: nn.Module, step: int) -> Batch:
    """All eight samples, with the answers of a teacher that is all noise."""
    random = torch.Generator().manual_seed(step)
    images = torch.rand(8, 3, case.size, case.size, generator=random, dtype=torch.float64)
    logits = torch.randn(8, CLASSES, generator=random, dtype=torch.float64)
    height, width = explainer.map_size(case.size)
    maps = torch.rand(8, explainer.channels, height, width, generator=random, dtype=torch.float64)
    maps[list(case.dead)] = 0
    return Batch(
        torch.arange(8),
        images,
        logits.argmax(1),
        teacher=Answers(logits, logits.argmax(1)[:, None], maps[:, None]),
    )


def part(whole: Batch, rows: slice) -> Batch:
    assert whole.teacher is not None
    answers = Answers(*(tensor[rows] for tensor in whole.teacher))
    return Batch(whole.rows[rows], whole.images[rows], whole.labels[rows], teacher=answers)


def train(fabric: Fabric, case: Case, rows: slice) -> dict[str, Tensor]:
    """Losses and gradients of the steps of SGD on `rows` of each batch, and the buffers after them."""
    explainer = student(case, synced=fabric.world_size > 1).train()
    batches = [part(batch(case, explainer, step), rows) for step in range(case.steps)]
    traffic = _count_all_reduces(explainer)
    wrapped, optimizer = fabric.setup(explainer, torch.optim.SGD(explainer.parameters(), lr=0.01))
    loss_of: Any = StudentStep(settings(case), CLASSES, _AsTheyAre(), fabric)  # type: ignore[arg-type]
    found = {}
    for step, data in enumerate(batches):
        values = loss_of(wrapped, data, epoch=0)
        optimizer.zero_grad()
        fabric.backward(values.total)
        found |= {
            f"{step}.value.{name}": value.detach()
            for name, value in {"loss": values.total, **values.terms}.items()
        }
        found |= {f"{step}.grad.{name}": p.grad.clone() for name, p in explainer.named_parameters()}
        optimizer.step()
    found |= {f"buffer.{name}": buffer for name, buffer in explainer.named_buffers()}
    return found | {"traffic": torch.tensor(traffic)}


class _AsTheyAre:
    """An augmentation that changes nothing."""

    seed = 0

    def __call__(self, images: Tensor, maps: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor, None]:
        return images, maps, None

    def identities(self, rows: Tensor) -> Ids:
        return rows.numpy().astype("uint64")


def _count_all_reduces(explainer: nn.Module) -> list[int]:
    """All-reduces until the end of each forward pass of the net, and of the explainer around it, in turn."""
    counts: list[int] = []
    explainer.model.net.register_forward_hook(lambda *_: counts.append(_Counted.calls))
    explainer.register_forward_hook(lambda *_: counts.append(_Counted.calls))
    return counts


class _Counted:
    calls = 0
    real = staticmethod(dist.all_reduce)

    @classmethod
    def all_reduce(cls, *args: Any, **kwargs: Any) -> Any:
        cls.calls += 1
        return cls.real(*args, **kwargs)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[assignment]  # for the losses
    dist.all_reduce = _Counted.all_reduce
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", meet, timedelta(seconds=60), world_size=2, rank=rank)
    fabric = start()
    for name, case in CASES.items():
        save_file(train(fabric, case, HALVES[rank]), folder / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two gloo processes left what they trained on."""
    folder = tmp_path_factory.mktemp("gloo")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # unused: they meet in the folder
    env = {**os.environ, **torchrun, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return folder


def close(ours: Tensor, expected: Tensor, name: str) -> None:
    """To 1e-10, relative to the tensor's norm."""
    assert ours.shape == expected.shape, name
    error = float((ours - expected).double().norm() / expected.double().norm().clamp(min=1e-300))
    assert error < 1e-10, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_statistics_equal_the_joined_batch(
    name: str, two_processes: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    expected = train(fabric, CASES[name], slice(None))
    zero, one = (load_file(two_processes / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert zero.keys() == one.keys() == expected.keys()
    for key, reference in expected.items():
        if ".grad." in key or "buffer" in key:
            close(zero[key], reference, key)
            assert torch.equal(zero[key], one[key]), key
        elif ".value." in key:
            close((zero[key] + one[key]) / 2, reference, key)


@pytest.mark.parametrize("name", ["gradcam-toy-dead", "bcos-small-dead", "bcos-small-all-dead"])
def test_maps_are_dead_on_one_process_only(name: str, two_processes: Path) -> None:
    """Else the test above would not see the correction by the share of valid samples."""
    for rank, dead in ((0, 0), (1, len(CASES[name].dead))):
        found = load_file(two_processes / f"{name}-{rank}.safetensors")
        assert [float(found[f"{step}.value.valid_maps"]) for step in (0, 1)] == [1 - dead / 4] * 2


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("bcos")])
def test_the_inner_backward_pass_of_bcos_needs_no_other_process(name: str, two_processes: Path) -> None:
    counts = load_file(two_processes / f"{name}-0.safetensors")["traffic"].reshape(-1, 2)
    assert counts[:, 0].tolist() == counts[:, 1].tolist()
    assert name == "bcos-vit" or counts[0, 0] > 0


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
