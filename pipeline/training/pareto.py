"""The checkpoints that no other beats: `pareto/epoch-012.safetensors` each, and `pareto.json` with their scores.

The front follows from the run's log alone. A checkpoint's weights are written before its line is logged, and what it
beats is removed after its checkpoint, so a run killed anywhere and resumed has the front of an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from artifacts.access import writing_to
from artifacts.durable import write_atomic
from pipeline.models import save_weights

Scores = Mapping[str, float]


@dataclass(frozen=True)
class ParetoFront:
    """The front of one run in its folder, by the scores `names`, all the higher the better."""

    folder: Path
    names: tuple[str, ...]

    def weights(self, epoch: int) -> Path:
        return self.folder / "pareto" / f"epoch-{epoch:03d}.safetensors"

    def offer(self, log: Iterable[Mapping[str, Any]], epoch: int, scores: Scores, net: nn.Module) -> None:
        """Write the epoch's weights unless an epoch of the log beats it. `log`: the lines of metrics.jsonl."""
        if epoch in front({**self._logged(log), epoch: scores}, self.names):
            save_weights(net, self.weights(epoch))

    def settle(self, log: Iterable[Mapping[str, Any]]) -> None:
        """Write pareto.json for the log and remove the weights of every epoch that is not on its front."""
        logged = self._logged(log)
        kept = {epoch: logged[epoch] for epoch in front(logged, self.names)}
        write_atomic(self.folder / "pareto.json", (json.dumps(kept, indent=2) + "\n").encode())
        current = {self.weights(epoch) for epoch in kept}
        for file in (self.folder / "pareto").glob("epoch-*.safetensors"):
            if file not in current:
                with writing_to(file):
                    file.unlink()

    def best(self, log: Iterable[Mapping[str, Any]], by: str, within: float) -> int:
        """The epoch that is the best by one of the scores, of those whose first score is at most `within` below the
        highest. It is on the front: what beats an epoch is at least as good in both."""
        logged = self._logged(log)
        kept = {epoch: logged[epoch] for epoch in front(logged, self.names)}
        highest = max(scores[self.names[0]] for scores in kept.values())
        near = {epoch: scores for epoch, scores in kept.items() if scores[self.names[0]] >= highest - within}
        return max(near, key=lambda epoch: near[epoch][by])

    def _logged(self, log: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
        """Validated epochs -> their scores."""
        return {
            line["epoch"]: {name: line[f"val_{name}"] for name in self.names}
            for line in log
            if all(f"val_{name}" in line for name in self.names)
        }


def front(points: Mapping[int, Scores], names: Sequence[str]) -> list[int]:
    """The epochs that no other beats: is at least as good in all scores `names` and better in one.

    Of epochs that are equal in all of them the first stays.
    """
    values = {epoch: tuple(scores[name] for name in names) for epoch, scores in sorted(points.items())}
    first = {value: epoch for epoch, value in reversed(values.items())}
    return [
        epoch
        for epoch, value in values.items()
        if first[value] == epoch
        and not any(
            other != value and all(a >= b for a, b in zip(other, value, strict=True)) for other in first
        )
    ]
