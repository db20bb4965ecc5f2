"""The training loop: rates, the kept epoch, Pareto checkpoints, and a checkpoint of the whole trained module."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts import Sample, open_images
from artifacts.errors import CheckpointError, ConfigError
from artifacts.packing import Packing, write_images
from pipeline.config import Schedule
from pipeline.data.batches import Batch, PairedRows, TrainBatches
from pipeline.progress import Quiet
from pipeline.training.keep import best_score, kept_weights
from pipeline.training.loop import StepLoss, Training, Validate, fit
from pipeline.training.pareto import ParetoFront, front
from pipeline.training.run import Run
from pipeline.training.schedule import learning_rate

SIZE, ROWS = 8, 12
Scores = dict[str, float]


class Adapted(nn.Module):
    """A network with an adapter and a moving average beside it, as prior methods train."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4), nn.BatchNorm1d(4))
        self.adapter = nn.Linear(4, 2)
        self.average: Tensor
        self.register_buffer("average", torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.adapter(nn.functional.dropout(self.net(images), training=self.training))
        if self.training:
            self.average = 0.9 * self.average + 0.1 * found.detach().mean(0)
        return found - self.average


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PairedRows:
    def sample(row: int) -> Sample:
        rng = np.random.default_rng(row)
        return Sample(f"image-{row}", rng.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8), label=row % 2)

    where = tmp_path_factory.mktemp("data") / "train"
    write_images(
        where,
        Packing(
            count=ROWS, get=sample, view={"size": SIZE}, classes=["a", "b"], source="x", rows_per_shard=8
        ),
    )
    return PairedRows(open_images(where), cache_mib=1)


class _Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def train(
    fabric: Fabric,
    data: PairedRows,
    path: Path,
    schedule: Schedule,
    *,
    validate: Validate | None = None,
    front: ParetoFront | None = None,
    dies_at: int | None = None,
    module: nn.Module | None = None,
) -> nn.Module:
    """Cross-entropy on the labels; `dies_at` counts steps."""
    torch.manual_seed(0)
    module = module or Adapted()

    def loss(wrapped: nn.Module, batch: Batch, epoch: int, step: int) -> StepLoss:
        if step == dies_at:
            raise _Killed
        logits = wrapped(batch.images.float() / 255)
        return StepLoss(nn.functional.cross_entropy(logits, batch.labels), {})

    path.mkdir(parents=True, exist_ok=True)
    net = module.get_submodule("net")
    training = Training(
        module=module,
        net=net,
        settings=schedule,
        seed=0,
        batches=TrainBatches(data, 4, 0),
        loss=loss,
        run=Run(path),
        label="x",
        validate=validate,
        front=front,
    )
    fit(training, fabric, Quiet())
    return module


def told(*scores: Scores) -> Validate:
    """A validation that gives these scores, one call after the other."""
    following: Iterator[Scores] = iter(scores)
    return lambda: next(following)


def test_step_schedule() -> None:
    schedule = Schedule(lr=1.0, warmup=0, schedule="step", milestones=(0.3, 0.6, 0.9), gamma=0.1)
    rates = [learning_rate(schedule, step, 10) for step in range(10)]
    assert rates == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001])


def test_step_schedule_after_the_warm_up() -> None:
    schedule = Schedule(lr=1.0, warmup=0.4, schedule="step", milestones=(0.2, 0.8), gamma=0.5)
    rates = [learning_rate(schedule, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25])


def test_cosine_schedule() -> None:
    schedule = Schedule(lr=2.0, warmup=0.2)
    rates = [learning_rate(schedule, step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2])
    assert rates[6] == pytest.approx(1)
    assert rates[9] == pytest.approx(1 + math.cos(math.pi * 7 / 8))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"epg": 1, "f1": 1, "accuracy": 1, "agreement": 1}, "f1"),
        ({"epg": 1, "accuracy": 1, "agreement": 1}, "accuracy"),
        ({"epg": 1, "agreement": 1}, "agreement"),
    ],
)
def test_best_is_f1_or_accuracy_or_agreement(scores: Scores, expected: str) -> None:
    assert best_score(Schedule(), scores) == expected


def test_the_best_epoch_by_a_score_is_kept(fabric: Fabric, data: PairedRows, tmp_path: Path) -> None:
    scores = [{"accuracy": 0.1 * i, "epg": epg} for i, epg in enumerate([0.0, 0.4, 0.9, 0.3])]  # first: a try
    train(fabric, data, tmp_path / "a", Schedule(epochs=3, best_by="epg"), validate=told(*scores))
    train(fabric, data, tmp_path / "b", Schedule(epochs=3), validate=told(*scores[1:]))
    best, last, default = (
        load_file(tmp_path / name)
        for name in ("a/best.safetensors", "a/last.safetensors", "b/best.safetensors")
    )
    assert not torch.equal(best["1.weight"], last["1.weight"])
    assert torch.equal(default["1.weight"], last["1.weight"])
    assert kept_weights(Run(tmp_path / "a")).name == "best.safetensors"
    assert [line["val_epg"] for line in Run(tmp_path / "a").history()] == [0.4, 0.9, 0.3]


def test_keep_last_selects_nothing(fabric: Fabric, data: PairedRows, tmp_path: Path) -> None:
    schedule = Schedule(epochs=2, keep="last", best_by="f1")
    train(fabric, data, tmp_path, schedule, validate=told({"dead": 0.0}, {"dead": 0.0}))
    assert kept_weights(Run(tmp_path), "last").name == "last.safetensors"


def test_a_score_that_validation_does_not_give_is_an_error_before_training(
    fabric: Fabric, data: PairedRows, tmp_path: Path
) -> None:
    validate = told({"accuracy": 0.5, "epg": 0.5})
    with pytest.raises(ConfigError, match=r"needs f1, but validation gives accuracy, epg; set best_by"):
        train(fabric, data, tmp_path, Schedule(best_by="f1"), validate=validate, dies_at=0)
    missing = ParetoFront(tmp_path, ("epg", "iou"))
    with pytest.raises(ConfigError, match=r"pareto asks for iou, but validation gives accuracy, epg"):
        train(
            fabric,
            data,
            tmp_path,
            Schedule(),
            validate=told({"accuracy": 0.5, "epg": 0.5}),
            front=missing,
            dies_at=0,
        )


def test_without_any_default_score_the_first_validation_says_so(
    fabric: Fabric, data: PairedRows, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs f1 or accuracy or agreement, but validation gives dead"):
        train(fabric, data, tmp_path, Schedule(epochs=1), validate=told({"dead": 0.0}))


def test_scores_need_a_validation_split(fabric: Fabric, data: PairedRows, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.select"):
        train(fabric, data, tmp_path, Schedule(best_by="epg"))


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_killed_run_resumes_with_adapters_and_buffers_bit_for_bit(
    step: int, fabric: Fabric, data: PairedRows, tmp_path: Path
) -> None:
    schedule = Schedule(epochs=3, lr=0.05)
    whole = train(fabric, data, tmp_path / "whole", schedule)
    with pytest.raises(_Killed):
        train(fabric, data, tmp_path / "cut", schedule, dies_at=step)
    torch.manual_seed(999)
    resumed = train(fabric, data, tmp_path / "cut", schedule)
    assert whole.average.abs().sum() > 0  # type: ignore[union-attr, operator]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut"))
    assert set(a) == set(whole.get_submodule("net").state_dict())  # the network alone
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_another_module_is_an_error_with_a_mend(
    fabric: Fabric, data: PairedRows, tmp_path: Path
) -> None:
    train(fabric, data, tmp_path, Schedule(epochs=1))
    bare = nn.Sequential()
    bare.add_module("net", Adapted().net)
    with pytest.raises(CheckpointError, match=r"state\.pt is of another version.*rm -r"):
        train(fabric, data, tmp_path, Schedule(epochs=2), module=bare)


def test_front_by_hand() -> None:
    points = {
        0: {"f1": 0.5, "epg": 0.9},  # the highest epg
        1: {"f1": 0.8, "epg": 0.2},  # beaten by 3
        2: {"f1": 0.6, "epg": 0.6},
        3: {"f1": 0.8, "epg": 0.3},
        4: {"f1": 0.6, "epg": 0.6},  # equal to 2, later
        5: {"f1": 0.4, "epg": 0.9},  # beaten by 0
    }
    assert front(points, ("f1", "epg")) == [0, 2, 3]
    assert front(points, ("f1",)) == [1]
    assert front({}, ("f1",)) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12))
def test_front_is_what_nothing_beats_and_its_complement_is_beaten_by_it(
    values: list[tuple[int, ...]],
) -> None:
    points = {i: dict(zip("abc", map(float, value), strict=True)) for i, value in enumerate(values)}
    kept = front(points, "abc")
    for i, value in enumerate(values):
        others = [values[j] for j in kept if j != i]
        covered = any(all(a >= b for a, b in zip(other, value, strict=True)) for other in others)
        assert covered == (i not in kept)


POINTS: tuple[Scores, ...] = (
    {"accuracy": 0.5, "epg": 0.9},
    {"accuracy": 0.6, "epg": 0.4},
    {"accuracy": 0.7, "epg": 0.5},  # beats the second
    {"accuracy": 0.4, "epg": 0.4},  # beaten when it comes
)


def _files(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "pareto").iterdir())


def test_pareto_checkpoints(fabric: Fabric, data: PairedRows, tmp_path: Path) -> None:
    kept = ParetoFront(tmp_path, ("accuracy", "epg"))
    train(fabric, data, tmp_path, Schedule(epochs=4), validate=told(POINTS[0], *POINTS), front=kept)
    assert _files(tmp_path) == ["epoch-000.safetensors", "epoch-002.safetensors"]
    assert json.loads((tmp_path / "pareto.json").read_text()) == {"0": POINTS[0], "2": POINTS[2]}
    best = load_file(tmp_path / "best.safetensors")  # by accuracy
    assert all(torch.equal(best[name], tensor) for name, tensor in load_file(kept.weights(2)).items())


@pytest.mark.parametrize("step", [2, 3, 5, 7, 11])
def test_the_front_of_a_killed_run_is_that_of_a_whole_one(
    step: int, fabric: Fabric, data: PairedRows, tmp_path: Path
) -> None:
    schedule = Schedule(epochs=4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kept = [ParetoFront(path, ("accuracy", "epg")) for path in (whole, cut)]
    train(fabric, data, whole, schedule, validate=told(POINTS[0], *POINTS), front=kept[0])
    with pytest.raises(_Killed):
        train(fabric, data, cut, schedule, validate=told(POINTS[0], *POINTS), front=kept[1], dies_at=step)
    done = step // 3  # epochs
    rest = told(*([] if done else POINTS[:1]), *POINTS[done:])
    train(fabric, data, cut, schedule, validate=rest, front=kept[1])
    assert _files(cut) == _files(whole)
    assert (cut / "pareto.json").read_bytes() == (whole / "pareto.json").read_bytes()
    for name in _files(whole):
        a, b = load_file(whole / "pareto" / name), load_file(cut / "pareto" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_killed_between_weights_and_log_the_front_forgets_the_epoch(tmp_path: Path) -> None:
    """What was written for an epoch that is not in the log goes; nothing that the log's front needs went before."""
    kept = ParetoFront(tmp_path, ("epg",))
    log = [{"epoch": 0, "val_epg": 0.4}, {"epoch": 1}]  # not every epoch is validated
    kept.offer([], 0, {"epg": 0.4}, nn.Linear(1, 1))
    kept.settle(log)
    kept.offer(log, 2, {"epg": 0.6}, nn.Linear(1, 1))
    assert _files(tmp_path) == ["epoch-000.safetensors", "epoch-002.safetensors"]
    kept.settle(log)
    assert _files(tmp_path) == ["epoch-000.safetensors"]
    assert json.loads((tmp_path / "pareto.json").read_text()) == {"0": {"epg": 0.4}}
