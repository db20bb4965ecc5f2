"""The images of another data set without what its people wrote about them, to distil on (config `also`)."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.source import RawSample, Source


@dataclass(frozen=True)
class Unlabelled:
    """`whole` without labels, groups, boxes and masks."""

    whole: Source

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def classes(self) -> list[str]:
        return []

    def __len__(self) -> int:
        return len(self.whole)

    def key(self, row: int) -> str:
        return self.whole.key(row)

    def raw(self, row: int) -> RawSample:
        raw = self.whole.raw(row)
        return RawSample(raw.key, raw.image, source=raw.source)

    def describe(self) -> str:
        return f"without labels: {self.whole.describe()}"
