"""Where an experiment keeps what it makes: one git-ignored folder `out/<experiment>/`, and, where the config says
`artifacts: URL`, its image sets and stores there, for other experiments and machines to use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import DataError
from artifacts.places import Place, place


@dataclass(frozen=True)
class Layout:
    """The folders of one experiment: `root`, here, and `shared`, a folder or fsspec URL for images and stores."""

    root: Path
    shared: str | None = None

    @property
    def config(self) -> Path:
        """The resolved config of the last precompute or distill, so that the folder explains itself."""
        return self.root / "config.yaml"

    def images(self, split: str) -> Place:
        return self._shared / f"images/{split}"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    def stores(self, name: str) -> Place:
        """The stores of all splits, and beside them what was measured about them."""
        return self._shared / f"stores/{name}"

    def store(self, name: str, split: str) -> Place:
        return self.stores(name) / split

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def run(self, student: str, seed: int) -> Path:
        return self.runs / student / f"seed-{seed}"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def _shared(self) -> Place:
        return place(self.shared or self.root)


FREEZING_GAP = "freezing-gap.json"
SHIFT_CURVE = "shift-curve.json"
CODEC_COST = "codec-cost.json"


def read_measured(beside: Place, name: str) -> dict[str, Any]:
    """What stage 1 measured and wrote beside the stores, or nothing. Raises DataError for a damaged file."""
    if not beside.exists(name):
        return {}
    try:
        return dict(json.loads(beside.read(name)))
    except (ValueError, TypeError):
        raise DataError(
            f"{beside / name} is damaged; delete it and run e2kd precompute CONFIG again"
        ) from None


def teacher_scores(split: str) -> str:
    """The file beside the stores with the teacher's own scores on a split."""
    return f"teacher-{split.replace('/', '--')}.json"
