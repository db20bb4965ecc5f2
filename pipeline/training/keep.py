"""Which epochs' weights stay: the last, the best by a score, and the front that no other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from artifacts.errors import ConfigError
from pipeline.config import DEFAULT_SCORES, Schedule
from pipeline.models import save_weights
from pipeline.training.pareto import ParetoFront
from pipeline.training.run import Run

Scores = Mapping[str, float]


class Keeper:
    """Keeps the weights of the epochs that `keep`, `best_by` and `pareto` ask for, in the run's folder.

    `best`: the highest score so far; -inf before the first. Only the first process writes (`writes`).
    """

    def __init__(
        self, run: Run, settings: Schedule, front: ParetoFront | None, best: float, *, writes: bool
    ) -> None:
        self.run, self.settings, self.front, self.best, self.writes = run, settings, front, best, writes

    def offer(self, epoch: int, scores: Scores, net: nn.Module) -> None:
        """Keep the epoch's weights if its scores earn it. Raises ConfigError if `best_by` is not among them."""
        if self.settings.keep == "best":
            score = scores[best_score(self.settings, scores)]
            if score > self.best:
                self.best = score
                if self.writes:
                    save_weights(net, self.run.path / "best.safetensors")
        if self.front and self.writes:
            self.front.offer(self.run.history(), epoch, scores, net)

    def settle(self) -> None:
        """After a checkpoint, and before a resumed run goes on: drop what the log does not have on its front."""
        if self.front and self.writes:
            self.front.settle(self.run.history())

    def check(self, scores: Scores) -> None:
        """Raises ConfigError if a score that is asked for by name is not among the validation's."""
        if self.settings.keep == "best" and self.settings.best_by is not None:
            best_score(self.settings, scores)
        missing = [name for name in self.front.names if name not in scores] if self.front else []
        if missing:
            raise ConfigError(
                f"pareto asks for {', '.join(missing)}, but validation gives {_listed(scores)}; choose among these"
            )

    @property
    def asks_by_name(self) -> bool:
        return self.front is not None or (self.settings.keep == "best" and self.settings.best_by is not None)


NO_BEST = -math.inf


def best_score(settings: Schedule, scores: Scores) -> str:
    """The score that `keep: best` goes by. Raises ConfigError if validation does not give it."""
    wanted = (settings.best_by,) if settings.best_by else DEFAULT_SCORES
    given = [name for name in wanted if name in scores]
    if not given:
        raise ConfigError(
            f"keep: best needs {' or '.join(wanted)}, but validation gives {_listed(scores)}; "
            "set best_by to one of these, or keep to last"
        )
    return given[0]


def kept_weights(run: Run, keep: str = "best") -> Path:
    """The file that holds the run's result: `best.safetensors` if epochs were selected, else the last."""
    best = run.path / "best.safetensors"
    if best.exists():
        return best
    selected = keep == "best" and any("val_dead" in line for line in run.history())
    return best if selected else run.path / "last.safetensors"


def _listed(scores: Scores) -> str:
    return ", ".join(scores) or "none"
