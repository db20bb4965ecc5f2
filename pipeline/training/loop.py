"""The training loop, for teachers and students alike. What a step minimises is the caller's `loss`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts.errors import ConfigError, E2kdError
from pipeline.config import Schedule
from pipeline.data.batches import Batch, TrainBatches
from pipeline.devices import reduced
from pipeline.models import save_weights
from pipeline.progress import Progress
from pipeline.training.pareto import ParetoFront
from pipeline.training.run import CheckpointError, Run

LossFn = Callable[[nn.Module, Batch, int, int], dict[str, Tensor]]
"""(module, batch on the device, epoch, step of the run) -> {"loss": scalar, ...other scalars to log}."""

Validate = Callable[[], dict[str, float]]
"""Scores by name, the higher the better; the same ones at every call."""

DEFAULT_SCORES = ("f1", "accuracy", "agreement")
"""What `keep: best` goes by where `best_by` says nothing: the first of them that validation gives."""


class Diverged(E2kdError):
    """The loss, or what the network answers, became NaN or infinite."""


def fit(
    fabric: Fabric,
    module: nn.Module,
    net: nn.Module,
    settings: Schedule,
    seed: int,
    batches: TrainBatches,
    loss: LossFn,
    run: Run,
    *,
    validate: Validate | None = None,
    front: ParetoFront | None = None,
    progress: Progress,
    label: str,
) -> float:
    """Train `module` (which contains `net`, whose weights are kept) from the run's checkpoint to its last epoch.

    The result is in `last.safetensors` or, by `settings.keep` and `best_by`, `best.safetensors` (`kept_weights`), and
    the checkpoints of `front` in its files. Killed and started again, it ends with the same weights as in one go on the
    same device: order, augmentation and the random state are functions of (seed, epoch), and a checkpoint is one atomic
    file with all of `module`. Returns the seconds it took, those up to the checkpoint included (on the first process).
    Raises ConfigError where validation does not give a score that was asked for.
    """
    optimizer = build_optimizer(module, settings)
    state = run.load_state()
    if state:
        _resume(module, state, run)
    wrapped, optimizer = fabric.setup(module, optimizer)
    first, best = 0, -math.inf
    if state:
        optimizer.load_state_dict(state["optimizer"])
        first, best = state["epochs_done"], state["best"]
    else:
        _try_scores(settings, front, wrapped, validate)
    if fabric.is_global_zero:
        run.forget_after(first)
        if front:
            front.settle(run.history())

    total = settings.epochs * len(batches)
    pending: list[dict[str, float]] = []
    history = run.history() if fabric.is_global_zero else []
    started = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
    with progress.bar(label, total, "step") as advance:
        advance(first * len(batches))
        for epoch in range(first, settings.epochs):
            torch.manual_seed(_epoch_seed(seed, epoch, fabric.global_rank))  # dropout
            wrapped.train()
            logged: list[dict[str, Tensor]] = []
            for index, batch in enumerate(batches.epoch(epoch)):
                step = epoch * len(batches) + index
                rate = learning_rate(settings, step, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                values = loss(wrapped, batch.to(fabric.device), epoch, step)
                optimizer.zero_grad(set_to_none=True)
                fabric.backward(values["loss"])
                norm = _clip(module, settings)
                optimizer.step()
                logged.append({name: value.detach() for name, value in values.items()} | {"grad_norm": norm})
                advance(1)
            line = _mean_of_epoch(fabric, logged, epoch, len(batches))
            due = (epoch + 1) % settings.validate_every == 0 or epoch + 1 == settings.epochs
            if due and validate:
                wrapped.eval()
                scores = validate()
                line |= {f"val_{name}": value for name, value in scores.items()}
                score = scores[best_score(settings, scores)] if settings.keep == "best" else -math.inf
                if score > best:
                    best = score
                    if fabric.is_global_zero:
                        save_weights(net, run.path / "best.safetensors")
                if front and fabric.is_global_zero:
                    front.offer(run.history(), epoch, scores, net)
            pending.append(line | {"seconds": round(time.monotonic() - started, 2)})
            if due and fabric.is_global_zero:
                # The log goes first: lines after the checkpoint's epoch are dropped on resume.
                for entry in pending:
                    run.log(entry)
                _checkpoint(run, module, net, optimizer, epoch + 1, best)
                if front:
                    front.settle(run.history())
            if due:
                pending.clear()
            fabric.barrier()
    return time.monotonic() - started


def _clip(module: nn.Module, settings: Schedule) -> Tensor:
    """Clip the gradients as the settings say; returns their norm before that."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if settings.agc:
        from timm.utils.agc import adaptive_clip_grad  # timm takes a second to import

        adaptive_clip_grad(parameters, settings.agc, eps=1e-3)
    if settings.clip_norm:
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    return norm


def build_optimizer(module: nn.Module, settings: Schedule) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )


def learning_rate(settings: Schedule, step: int, total: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a half cosine to 0; or, by `schedule: step`, the
    rate times gamma from each milestone on, a share of all steps."""
    warm = settings.warmup * total
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    if settings.schedule == "step":
        passed = sum(step >= round(share * total) for share in settings.milestones)
        return settings.lr * settings.gamma**passed
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def kept_weights(run: Run, keep: str = "best") -> Path:
    """The file that holds the run's result: `best.safetensors` where epochs were selected, else the last."""
    best = run.path / "best.safetensors"
    if best.exists():
        return best
    selected = keep == "best" and any("val_dead" in line for line in run.history())
    return best if selected else run.path / "last.safetensors"


def best_score(settings: Schedule, scores: Mapping[str, float]) -> str:
    """The score that `keep: best` goes by. Raises ConfigError where validation does not give it."""
    wanted = (settings.best_by,) if settings.best_by else DEFAULT_SCORES
    found = [name for name in wanted if name in scores]
    if not found:
        raise ConfigError(
            f"keep: best needs {' or '.join(wanted)}, but validation gives {_listed(scores)}; "
            "set best_by to one of these, or keep to last"
        )
    return found[0]


def _try_scores(
    settings: Schedule, front: ParetoFront | None, wrapped: nn.Module, validate: Validate | None
) -> None:
    """Where scores are asked for by name, validate the untrained model: a wrong name is an error now, not later."""
    by_name = settings.keep == "best" and settings.best_by is not None
    if not by_name and front is None:
        return
    if validate is None:
        raise ConfigError("best_by and pareto need a validation split: set evaluate.select")
    wrapped.eval()
    scores = validate()
    if by_name:
        best_score(settings, scores)
    missing = [name for name in front.names if name not in scores] if front else []
    if missing:
        raise ConfigError(
            f"pareto asks for {', '.join(missing)}, but validation gives {_listed(scores)}; choose among these"
        )


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(scores) or "none"


def _resume(module: nn.Module, state: Mapping[str, Any], run: Run) -> None:
    """Raises CheckpointError where the checkpoint is not of this module."""
    try:
        module.load_state_dict(state["module"])
    except (KeyError, RuntimeError):
        raise CheckpointError(
            f"{run.path / 'state.pt'} is of another version of e2kd; delete the run and train it again: "
            f"rm -r {run.path}"
        ) from None


def _checkpoint(
    run: Run, module: nn.Module, net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, best: float
) -> None:
    """All of `module` for the resumed run, `net` alone for its users."""
    save_weights(net, run.path / "last.safetensors")
    run.save_state(
        {
            "module": module.state_dict(),
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
    absent = logged[0]["loss"].new_full(
        (), torch.nan, dtype=torch.float32
    )  # not of this step: left out of the mean
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
    return (
        (seed + 1) * 1_000_003 + epoch
    ) * 1_009 + rank  # never a small number: runs' seeds begin the networks
