"""Which rows of a packed split a student sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.source import Label


def select_rows(labels: Sequence[Label], rows: int | None, shots: int | None) -> np.ndarray:
    """The student's rows: the first `rows` of the split, of which the first `shots` of each class."""
    chosen = np.arange(len(labels) if rows is None else min(rows, len(labels)))
    if shots is None:
        return chosen
    seen: dict[Label, int] = {}
    kept: list[int] = []
    for row in chosen.tolist():
        label = labels[row]
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= shots:
            kept.append(row)
    return np.array(kept)
