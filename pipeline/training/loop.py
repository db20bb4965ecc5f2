"""The training loop, for teachers and students alike. What a step minimises is the caller's `loss`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts.errors import CheckpointError, ConfigError, Diverged
from pipeline.config import Schedule
from pipeline.data.batches import Batch, TrainBatches
from pipeline.devices import reduced
from pipeline.models import save_weights
from pipeline.progress import Progress
from pipeline.training.keep import NO_BEST, Keeper
from pipeline.training.pareto import ParetoFront
from pipeline.training.run import Run
from pipeline.training.schedule import build_optimizer, clip_gradients, learning_rate


class StepLoss(NamedTuple):
    """What one step minimises, a scalar on the graph, and the scalars that are logged beside it, by name."""

    total: Tensor
    terms: dict[str, Tensor]


LossFn = Callable[[nn.Module, Batch, int, int], StepLoss]
"""(module, batch on the device, epoch, step of the run) -> its loss."""

Validate = Callable[[], dict[str, float]]
"""Scores by name, the higher the better; the same ones at every call."""


@dataclass(frozen=True)
class Training:
    """One network in training.

    module    what is trained and checkpointed; it contains `net`
    net       the bare network, whose weights are kept
    settings  its schedule
    seed      decides dropout, with the epoch
    batches   what an epoch's steps see
    loss      what a step minimises
    run       the folder of the checkpoints and the log
    label     what the progress bar says
    validate  scores of an epoch; None: no epoch is selected
    front     keeps the checkpoints that no other beats; None: none of them
    """

    module: nn.Module
    net: nn.Module
    settings: Schedule
    seed: int
    batches: TrainBatches
    loss: LossFn
    run: Run
    label: str
    validate: Validate | None = None
    front: ParetoFront | None = None


def fit(training: Training, fabric: Fabric, progress: Progress) -> float:
    """Train from the run's checkpoint to the last epoch. Returns the seconds it took, those of earlier sessions too.

    The result is in `last.safetensors` or, by `keep` and `best_by`, `best.safetensors` (`keep.kept_weights`), and the
    checkpoints of `front` in its files. Killed and started again, it ends with the same weights as in one go on the
    same device: order, augmentation and the random state are functions of (seed, epoch), and a checkpoint is one
    atomic file with all of `module`. Raises ConfigError if validation does not give a score that was asked for,
    Diverged if the loss is not finite.
    """
    module, settings, run = training.module, training.settings, training.run
    optimizer = build_optimizer(module, settings)
    state = run.load_state()
    if state:
        _resume(module, state, run)
    wrapped, optimizer = fabric.setup(module, optimizer)
    keeper = Keeper(
        run, settings, training.front, state["best"] if state else NO_BEST, writes=fabric.is_global_zero
    )
    if state:
        _resume_optimizer(optimizer, state, run)
    else:
        _try_scores(keeper, wrapped, training.validate)
    first = state["epochs_done"] if state else 0
    if fabric.is_global_zero:
        run.forget_after(first)
    keeper.settle()

    steps = len(training.batches)
    pending: list[dict[str, float]] = []
    started = time.monotonic() - _seconds_so_far(run, fabric)
    with progress.bar(training.label, settings.epochs * steps, "step") as advance:
        advance(first * steps)
        for epoch in range(first, settings.epochs):
            # dropout
            torch.manual_seed(_epoch_seed(training.seed, epoch, fabric.global_rank))
            wrapped.train()
            logged = []
            for index, batch in enumerate(training.batches.epoch(epoch)):
                step = epoch * steps + index
                _set_rate(optimizer, learning_rate(settings, step, settings.epochs * steps))
                loss = training.loss(wrapped, batch.to(fabric.device), epoch, step)
                optimizer.zero_grad(set_to_none=True)
                fabric.backward(loss.total)
                norm = clip_gradients(module, settings)
                optimizer.step()
                logged.append(_detached({"loss": loss.total, **loss.terms, "grad_norm": norm}))
                advance(1)
            line = _mean_of_epoch(fabric, logged, epoch, steps)
            due = (epoch + 1) % settings.validate_every == 0 or epoch + 1 == settings.epochs
            if due and training.validate:
                wrapped.eval()
                scores = training.validate()
                line |= {f"val_{name}": value for name, value in scores.items()}
                keeper.offer(epoch, scores, training.net)
            pending.append(line | {"seconds": round(time.monotonic() - started, 2)})
            if due:
                if fabric.is_global_zero:
                    # The log goes first: lines after the checkpoint's epoch are dropped on resume.
                    run.log(pending)
                    _checkpoint(training, optimizer, epoch + 1, keeper.best)
                keeper.settle()
                pending.clear()
            fabric.barrier()
    return time.monotonic() - started


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def _seconds_so_far(run: Run, fabric: Fabric) -> float:
    history = run.history() if fabric.is_global_zero else []
    return float(history[-1]["seconds"]) if history else 0.0


def _try_scores(keeper: Keeper, wrapped: nn.Module, validate: Validate | None) -> None:
    """If scores are asked for by name, validate the untrained model: a wrong name is an error now, not later."""
    if not keeper.asks_by_name:
        return
    if validate is None:
        raise ConfigError("best_by and pareto need a validation split: set evaluate.select")
    wrapped.eval()
    keeper.check(validate())


def _resume(module: nn.Module, state: Mapping[str, Any], run: Run) -> None:
    """Raises CheckpointError if the checkpoint is not of this module."""
    try:
        module.load_state_dict(state["module"])
    except (KeyError, RuntimeError, TypeError, AttributeError):
        raise _of_another_version(run) from None


def _resume_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], run: Run) -> None:
    """Raises CheckpointError if the checkpoint is not of this optimizer."""
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError):
        raise _of_another_version(run) from None


def _of_another_version(run: Run) -> CheckpointError:
    return CheckpointError(
        f"{run.path / 'state.pt'} is of another version of e2kd; delete the run and train it again: rm -r {run.path}",
        path=run.path / "state.pt",
    )


def _checkpoint(training: Training, optimizer: torch.optim.Optimizer, epochs: int, best: float) -> None:
    """All of the module for the resumed run, the network alone for its users."""
    save_weights(training.net, training.run.path / "last.safetensors")
    training.run.save_state(
        {
            "module": training.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epochs_done": epochs,
            "best": best,
        }
    )


def _mean_of_epoch(
    fabric: Fabric, logged: list[dict[str, Tensor]], epoch: int, steps: int
) -> dict[str, float | int]:
    """Means over the epoch's steps and the processes; stops at a loss that is not finite, naming the step."""
    names = list(dict.fromkeys(name for values in logged for name in values))
    # a term that a step does not have is left out of its mean
    absent = logged[0]["loss"].new_full((), torch.nan, dtype=torch.float32)
    table = torch.stack(
        [torch.stack([values.get(name, absent).float() for name in names]) for values in logged]
    )
    table = reduced(fabric, table, "mean")
    bad = (~table[:, names.index("loss")].isfinite()).nonzero()
    if len(bad):
        raise Diverged(
            f"the loss is not finite at step {epoch * steps + int(bad[0])} (epoch {epoch}); "
            "lower train.lr or set train.clip_norm; the last good checkpoint is kept"
        )
    means = table.double().nanmean(0)
    return {"epoch": epoch, **{name: float(mean) for name, mean in zip(names, means, strict=True)}}


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """Never a small number: the seeds of runs begin the networks."""
    return ((seed + 1) * 1_000_003 + epoch) * 1_009 + rank
