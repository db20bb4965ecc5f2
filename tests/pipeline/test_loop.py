"""The training loop on a quadratic, whose gradients are known: every step is compared with one computed by hand.

The loss is 1/2 sum(curvature * (w - target)^2) and the target a mean of the batch's pixels, so that the gradient is
curvature * (w - target). What the loop does to the gradient before it, and to the weights with it, is computed again
here, in float64 numpy and from the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts import Sample, open_images
from artifacts.errors import Diverged
from artifacts.packing import Packing, write_images
from pipeline.config import Schedule
from pipeline.data.batches import Batch, PairedRows, TrainBatches
from pipeline.progress import Quiet
from pipeline.training.keep import kept_weights
from pipeline.training.loop import StepLoss, Training, fit
from pipeline.training.run import Run

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = dict[str, Array]

ROWS, BATCH, STEPS = 12, 4, 3
"""Images, images of a step, steps of an epoch."""
START: Weights = {
    "weight": np.array([[0.0, 0, 0, 0], [1, 2, -1, 1], [20, -30, 40, 10]]),
    "bias": np.array([2.0, -2, 1]),
}
CURVATURE: Weights = {"weight": np.array([[1.0], [5], [0.001]]), "bias": np.array([0.5, 1, 2])}
"""By unit: the first has no weights, the second steep gradients, the third flat ones and large weights."""
PLAIN: dict[str, Any] = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "keep": "last"}
COSINE = (1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447)
"""Rates of six steps, two of them warm-up, of lr 1: (step + 1) / 3, then a half cosine of four steps."""


class Quadratic(nn.Module):
    """Answers with its weights' distances to the targets; keeps a dropout's draw and its mode of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.net.load_state_dict({name: torch.tensor(w, dtype=torch.float32) for name, w in START.items()})
        self.dropout = nn.Dropout(0.5)
        self.draws: list[list[float]] = []
        self.modes: list[bool] = []

    def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        self.draws.append(self.dropout(torch.ones(32)).tolist())
        self.modes.append(self.training)
        return self.net.weight - weight, self.net.bias - bias

    def values(self) -> Weights:
        return {name: p.detach().double().numpy().copy() for name, p in self.net.named_parameters()}


@dataclass
class Trace:
    """What a run did: of every step its number, epoch and images, its targets, and the weights before it."""

    module: Quadratic = field(default_factory=Quadratic)
    steps: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    before: list[Weights] = field(default_factory=list)
    targets: list[Weights] = field(default_factory=list)
    validations: list[tuple[int, bool]] = field(default_factory=list)
    """(steps done, whether the module was in train mode) of every validation."""

    def weights(self, step: int) -> Weights:
        """Before a step of this trace; -1: at the end."""
        return self.module.values() if step in (-1, len(self.before)) else self.before[step]

    def gradient(self, step: int) -> Weights:
        before, target = self.before[step], self.targets[step]
        return {name: CURVATURE[name] * (before[name] - target[name]) for name in before}

    def loss(self, step: int) -> float:
        before, target = self.before[step], self.targets[step]
        return sum(float((CURVATURE[n] * (before[n] - target[n]) ** 2).sum() / 2) for n in before)


class _Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PairedRows:
    def sample(row: int) -> Sample:
        rng = np.random.default_rng(row)
        return Sample(f"image-{row}", rng.integers(0, 256, (3, 8, 8), dtype=np.uint8), label=row % 2)

    where = tmp_path_factory.mktemp("data") / "train"
    write_images(
        where,
        Packing(count=ROWS, get=sample, view={"size": 8}, classes=["a", "b"], source="x", rows_per_shard=8),
    )
    return PairedRows(open_images(where), cache_mib=1)


@pytest.fixture
def train(fabric: Fabric, data: PairedRows, tmp_path: Path) -> Callable[..., Trace]:
    """(settings, folder="run", seed=0, scores of the validations, dies_at, infinite: steps) -> Trace."""

    def trained(
        settings: dict[str, Any],
        folder: str = "run",
        *,
        seed: int = 0,
        scores: Sequence[float] | None = None,
        dies_at: int | None = None,
        infinite: Sequence[int] = (),
        trace: Trace | None = None,
    ) -> Trace:
        trace = trace or Trace()
        module, following = trace.module.eval(), iter(scores or ())

        def loss(wrapped: nn.Module, batch: Batch, epoch: int, step: int) -> StepLoss:
            if step == dies_at:
                raise _Killed
            pixels = (batch.images.double() / 255).mean(0).flatten()
            targets = {"weight": pixels[:12].reshape(3, 4), "bias": pixels[12:15]}
            trace.steps.append(step)
            trace.epochs.append(epoch)
            trace.rows.append(batch.rows.tolist())
            trace.before.append(module.values())
            trace.targets.append({name: target.numpy() for name, target in targets.items()})
            found = zip(wrapped(*(target.float() for target in targets.values())), targets, strict=True)
            parts = [(torch.tensor(CURVATURE[name]).float() * away**2).sum() / 2 for away, name in found]
            total = torch.stack(parts).sum() * (math.inf if step in infinite else 1)
            return StepLoss(total, {"even": torch.tensor(float(step))} if step % 2 == 0 else {})

        def validate() -> dict[str, float]:
            trace.validations.append((len(trace.before), module.training))
            torch.rand(7)
            return {"accuracy": next(following)}

        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        batches = TrainBatches(data, BATCH, seed)
        training = Training(
            module=module,
            net=module.net,
            settings=Schedule(**settings),
            seed=seed,
            batches=batches,
            loss=loss,
            run=Run(path),
            label="x",
            validate=None if scores is None else validate,
        )
        fit(training, fabric, Quiet())
        return trace

    return trained


Train = Callable[..., Trace]


def assert_equal(found: Weights, expected: Weights, place: str = "") -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=2e-6, err_msg=f"{name} {place}")


def kept(tmp_path: Path, name: str, folder: str = "run") -> Weights:
    return {key: w.double().numpy() for key, w in load_file(tmp_path / folder / name).items()}


def history(tmp_path: Path, folder: str = "run") -> list[dict[str, Any]]:
    lines = Run(tmp_path / folder).history()
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def norm(gradients: Weights) -> float:
    return math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))


def scaled(values: Weights, factor: float) -> Weights:
    return {name: factor * value for name, value in values.items()}


def clipped_by_unit(gradients: Weights, weights: Weights, factor: float) -> Weights:
    """|g_u| <= factor * max(|w_u|, 1e-3) (Brock et al. 2021): a unit is a row of a matrix, or all of a vector."""

    def bounded(gradient: Array, weight: Array) -> Array:
        most = factor * max(np.sqrt((weight**2).sum()), 1e-3)
        size = np.sqrt((gradient**2).sum())
        return gradient * (most / size) if size > most else gradient

    rows = zip(gradients["weight"], weights["weight"], strict=True)
    return {
        "weight": np.stack([bounded(*row) for row in rows]),
        "bias": bounded(gradients["bias"], weights["bias"]),
    }


def assert_steps(trace: Trace, rates: Sequence[float], change: Callable[[int], Weights]) -> None:
    """Every step subtracts its rate times `change(step)` from the weights."""
    assert trace.steps == list(range(len(rates)))
    for step, rate in enumerate(rates):
        expected = {name: w - rate * change(step)[name] for name, w in trace.before[step].items()}
        assert_equal(trace.weights(step + 1), expected, f"step {step}")


# --- what one step does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"warmup": 1 / 3}, COSINE),
        ({"warmup": 0}, (1, 0.933013, 0.75, 0.5, 0.25, 0.066987)),
        ({"warmup": 0, "schedule": "step", "milestones": (0.5,)}, (1, 1, 1, 0.1, 0.1, 0.1)),
        (
            {"warmup": 1 / 3, "schedule": "step", "milestones": (0.5, 2 / 3), "gamma": 0.5},
            (1 / 3, 2 / 3, 1, 0.5, 0.25, 0.25),
        ),
    ],
    ids=["warm-up and cosine", "cosine", "step", "warm-up and step"],
)
def test_every_update_is_the_rate_of_its_step_times_the_gradient(
    settings: dict[str, Any], rates: Sequence[float], train: Train
) -> None:
    """Each step's own gradient: none is left from the step before."""
    trace = train({**PLAIN, "epochs": 2, "lr": 0.1, **settings})
    assert_steps(trace, [0.1 * rate for rate in rates], trace.gradient)
    assert trace.epochs == [0, 0, 0, 1, 1, 1]
    assert min(norm(trace.gradient(step)) for step in range(6)) > 1


def test_clip_norm_shortens_long_gradients_and_leaves_short_ones(train: Train) -> None:
    trace = train({**PLAIN, "epochs": 2, "lr": 0.2, "warmup": 1 / 3, "clip_norm": 5})

    def clipped(step: int) -> Weights:
        gradient = trace.gradient(step)
        return scaled(gradient, min(1, 5 / norm(gradient)))

    sizes = [norm(trace.gradient(step)) for step in range(6)]
    assert sizes[0] > 8
    assert sizes[-1] < 4
    assert_steps(trace, [0.2 * rate for rate in COSINE], clipped)


def test_adaptive_clipping_bounds_the_gradient_of_each_unit_by_its_weights(train: Train) -> None:
    trace = train({**PLAIN, "epochs": 2, "lr": 0.1, "warmup": 1 / 3, "agc": 0.02})

    def clipped(step: int) -> Weights:
        return clipped_by_unit(trace.gradient(step), trace.before[step], 0.02)

    assert_steps(trace, [0.1 * rate for rate in COSINE], clipped)
    whole, first = trace.gradient(0), clipped(0)
    assert np.linalg.norm(first["weight"][0]) == pytest.approx(0.02 * 1e-3)
    assert np.linalg.norm(first["weight"][1]) == pytest.approx(0.02 * math.sqrt(7))
    assert np.array_equal(first["weight"][2], whole["weight"][2])
    assert np.linalg.norm(first["bias"]) == pytest.approx(0.02 * 3)


def test_adaptive_clipping_comes_before_clip_norm(train: Train) -> None:
    trace = train({**PLAIN, "epochs": 2, "lr": 0.1, "warmup": 1 / 3, "agc": 0.5, "clip_norm": 0.7})

    def clipped(step: int) -> Weights:
        by_unit = clipped_by_unit(trace.gradient(step), trace.before[step], 0.5)
        return scaled(by_unit, min(1, 0.7 / norm(by_unit)))

    assert_steps(trace, [0.1 * rate for rate in COSINE], clipped)


def test_sgd_has_momentum_and_weight_decay(train: Train) -> None:
    """v = 0.8 v + (g + 0.3 w); w = w - rate v."""
    trace = train({**PLAIN, "epochs": 2, "lr": 0.02, "warmup": 1 / 3, "momentum": 0.8, "weight_decay": 0.3})
    velocity = {name: np.zeros_like(w) for name, w in START.items()}
    velocities = []
    for step in range(6):
        gradient, before = trace.gradient(step), trace.before[step]
        velocity = {n: 0.8 * v + gradient[n] + 0.3 * before[n] for n, v in velocity.items()}
        velocities.append(velocity)
    assert_steps(trace, [0.02 * rate for rate in COSINE], velocities.__getitem__)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_by_hand(optimizer: str, train: Train) -> None:
    """m / (sqrt(v) + 1e-8), both without their bias (Kingma & Ba 2015); weight decay is a part of the gradient in Adam
    and beside it in AdamW (Loshchilov & Hutter 2019)."""
    settings = {"optimizer": optimizer, "weight_decay": 0.3, "keep": "last", "lr": 0.05, "warmup": 1 / 3}
    trace = train({**settings, "epochs": 2})
    m, v = ({name: np.zeros_like(w) for name, w in START.items()} for _ in range(2))
    changes = []
    for step in range(6):
        gradient, decay = trace.gradient(step), scaled(trace.before[step], 0.3)
        if optimizer == "adam":
            gradient = {name: g + decay[name] for name, g in gradient.items()}
            decay = scaled(decay, 0)
        m = {name: 0.9 * m[name] + 0.1 * g for name, g in gradient.items()}
        v = {name: 0.999 * v[name] + 0.001 * g**2 for name, g in gradient.items()}
        ups, downs = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
        changes.append({n: m[n] / ups / (np.sqrt(v[n] / downs) + 1e-8) + decay[n] for n in m})
    assert_steps(trace, [0.05 * rate for rate in COSINE], changes.__getitem__)


def test_the_log_has_the_epochs_mean_loss_and_mean_gradient_norm_before_clipping(
    train: Train, tmp_path: Path
) -> None:
    trace = train({**PLAIN, "epochs": 2, "lr": 0.1, "clip_norm": 0.5, "agc": 0.02})
    lines = history(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1]
    for line, steps in zip(lines, ([0, 1, 2], [3, 4, 5]), strict=True):
        losses = [trace.loss(step) for step in steps]
        norms = [norm(trace.gradient(step)) for step in steps]
        assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
        assert min(norms) > 0.5
        assert np.ptp(losses) > 1e-3 * line["loss"]


def test_a_value_of_some_steps_is_logged_as_their_mean(train: Train, tmp_path: Path) -> None:
    train({**PLAIN, "epochs": 2})
    assert [line["even"] for line in history(tmp_path)] == [(0 + 2) / 2, 4]


# --- epochs: validation, what is kept, modes and seeds --------------------------------------------------------------


def test_the_best_epoch_is_kept(train: Train, tmp_path: Path) -> None:
    """Of equal ones the first."""
    settings = {**PLAIN, "keep": "best", "epochs": 5, "lr": 0.1}
    trace = train(settings, scores=[0.2, 0.7, 0.9, 0.9, 0.5])
    assert_equal(kept(tmp_path, "best.safetensors"), trace.before[3 * STEPS])
    assert_equal(kept(tmp_path, "last.safetensors"), trace.weights(-1))
    assert kept_weights(Run(tmp_path / "run")).name == "best.safetensors"
    assert [line["val_accuracy"] for line in history(tmp_path)] == [0.2, 0.7, 0.9, 0.9, 0.5]
    biases = [trace.weights(epoch * STEPS)["bias"][0] for epoch in range(6)]
    assert min(abs(a - b) for a, b in pairwise(biases)) > 1e-4


def test_keep_last_keeps_the_last_epoch(train: Train, tmp_path: Path) -> None:
    trace = train({**PLAIN, "epochs": 3, "lr": 0.1}, scores=[0.2, 0.9, 0.5])
    assert not (tmp_path / "run/best.safetensors").exists()
    assert kept_weights(Run(tmp_path / "run"), "last").name == "last.safetensors"
    assert_equal(kept(tmp_path, "last.safetensors"), trace.weights(-1))


def test_validation_comes_every_so_many_epochs_and_after_the_last(train: Train, tmp_path: Path) -> None:
    trace = train({**PLAIN, "epochs": 5, "validate_every": 2}, scores=[0.3, 0.2, 0.1])
    assert [steps for steps, _ in trace.validations] == [2 * STEPS, 4 * STEPS, 5 * STEPS]
    validated = {line["epoch"]: line.get("val_accuracy") for line in history(tmp_path)}
    assert validated == {0: None, 1: 0.3, 2: None, 3: 0.2, 4: 0.1}


def test_steps_are_in_train_mode_and_validations_in_eval_mode(train: Train) -> None:
    """The network comes to the loop in eval mode."""
    trace = train({**PLAIN, "epochs": 3}, scores=[0.1, 0.2, 0.3])
    assert trace.module.modes == [True] * 3 * STEPS
    assert [training for _, training in trace.validations] == [False] * 3


def test_every_epoch_sees_all_images_in_an_order_of_its_own(train: Train) -> None:
    rows = train({**PLAIN, "epochs": 3}).rows
    epochs = [list(chain(*rows[first : first + STEPS])) for first in range(0, 3 * STEPS, STEPS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_dropout_differs_between_steps_epochs_and_seeds(train: Train) -> None:
    """Equal runs draw alike, whatever the random state was before."""
    first = train({**PLAIN, "epochs": 3}, "first").module.draws
    torch.manual_seed(999)
    again = train({**PLAIN, "epochs": 3}, "again").module.draws
    other = train({**PLAIN, "epochs": 3}, "other", seed=1).module.draws
    assert first == again
    assert len({tuple(draw) for draw in first + other}) == 2 * 3 * STEPS


# --- runs that end early --------------------------------------------------------------------------------------------

RESUMED = [
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "lr": 0.02},
    {"optimizer": "adam", "lr": 0.05},
    {"optimizer": "adamw", "lr": 0.05, "agc": 0.02, "schedule": "step"},
]


@pytest.mark.parametrize("dies_at", [1, 3, 5, 7, 10])
@pytest.mark.parametrize("settings", RESUMED, ids=lambda settings: settings["optimizer"])
def test_a_killed_run_continues_its_curve(
    settings: dict[str, Any], dies_at: int, train: Train, tmp_path: Path
) -> None:
    """The steps, losses, draws, kept weights and log of a run that was not killed. The best epoch is the second."""
    scores = [0.4, 0.8, 0.6, 0.5]
    settings = {**settings, "epochs": 4, "keep": "best"}
    whole, begun, done = train(settings, "whole", scores=scores), Trace(), dies_at // STEPS
    with pytest.raises(_Killed):
        train(settings, "cut", scores=scores, dies_at=dies_at, trace=begun)
    torch.manual_seed(999)
    resumed = train(settings, "cut", scores=scores[done:])
    first = done * STEPS
    assert begun.steps == whole.steps[:dies_at]
    assert resumed.steps == whole.steps[first:]
    assert resumed.epochs == whole.epochs[first:]
    assert resumed.rows == whole.rows[first:]
    assert resumed.module.draws == whole.module.draws[first:]
    assert [resumed.loss(i) for i in range(len(resumed.steps))] == [
        whole.loss(i) for i in range(first, 4 * STEPS)
    ]
    for name in ("best.safetensors", "last.safetensors"):
        a, b = kept(tmp_path, name, "whole"), kept(tmp_path, name, "cut")
        assert all(np.array_equal(a[key], b[key]) for key in a), name
    assert_equal(kept(tmp_path, "best.safetensors", "cut"), whole.before[2 * STEPS])
    assert history(tmp_path, "cut") == history(tmp_path, "whole")


def test_a_killed_run_continues_after_its_last_validation(train: Train, tmp_path: Path) -> None:
    """A line that was logged without its checkpoint is logged again."""
    settings = {**PLAIN, "momentum": 0.9, "epochs": 5, "validate_every": 2}
    train(settings, "whole", scores=[0.1, 0.2, 0.3])
    with pytest.raises(_Killed):
        train(settings, "cut", scores=[0.1], dies_at=3 * STEPS + 1)
    Run(tmp_path / "cut").log([{"epoch": 2, "loss": 1.0, "seconds": 0.0}])
    assert train(settings, "cut", scores=[0.2, 0.3]).steps[0] == 2 * STEPS
    assert history(tmp_path, "cut") == history(tmp_path, "whole")


@pytest.mark.parametrize("infinite", [[0], [4], [4, 5], [5]])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_first_such_step(
    infinite: list[int], train: Train, tmp_path: Path
) -> None:
    """The checkpoint of the epoch before stays."""
    trace, epoch = Trace(), infinite[0] // STEPS
    with pytest.raises(Diverged, match=rf"not finite at step {infinite[0]} \(epoch {epoch}\)"):
        train({**PLAIN, "epochs": 3}, infinite=infinite, trace=trace)
    assert len(trace.steps) == (epoch + 1) * STEPS
    assert [line["epoch"] for line in history(tmp_path)] == list(range(epoch))
    assert (tmp_path / "run/last.safetensors").exists() == (epoch > 0)
    if epoch:
        assert_equal(kept(tmp_path, "last.safetensors"), trace.before[epoch * STEPS])
