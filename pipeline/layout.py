"""Where an experiment keeps what it makes under one git-ignored root, `out/<experiment>/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The folders of one experiment under `root`."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config of the last distill, so that the folder explains itself."""
        return self.root / "config.yaml"

    def images(self, split: str) -> Path:
        return self.root / "images" / split

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    def stores(self, name: str) -> Path:
        return self.root / "stores" / name

    def store(self, name: str, split: str) -> Path:
        return self.stores(name) / split

    def teacher_scores(self, name: str, split: str) -> Path:
        return self.stores(name) / f"teacher-{split}.json"

    def freezing_gap(self, name: str) -> Path:
        return self.stores(name) / "freezing-gap.json"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def run(self, student: str, seed: int) -> Path:
        return self.runs / student / f"seed-{seed}"

    @property
    def report(self) -> Path:
        return self.root / "report"
