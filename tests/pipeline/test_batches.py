"""Which rows each batch has: all of them once an epoch, in that epoch's and seed's own order, shared by processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from artifacts.errors import DataError
from pipeline.augment.counter import epoch_order
from pipeline.data.batches import TrainBatches

ROWS = np.array([3, 4, 7, 8, 10, 15, 16, 20, 21, 22, 30, 31])
SIZE = 4


class Rows:
    """What TrainBatches reads of PairedRows; a batch is its rows."""

    def __init__(self, rows: np.ndarray = ROWS) -> None:
        self.rows = rows

    def __getitems__(self, rows: list[int]) -> list[int]:
        return rows


def epoch(number: int, seed: int = 0, rows: np.ndarray = ROWS, **processes: int) -> list[list[int]]:
    """The rows of each batch."""
    data: Any = Rows(rows)
    batches: Any = TrainBatches(data, SIZE, seed, **processes)
    found = list(batches.epoch(number))
    assert len(found) == len(batches)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_every_epoch_has_every_row_once_in_its_own_order(number: int, seed: int) -> None:
    expected = ROWS[epoch_order(len(ROWS), seed, number)]
    assert [row for batch in epoch(number, seed) for row in batch] == expected.tolist()


def test_orders_differ_between_epochs_and_seeds_and_come_again() -> None:
    orders = {str(epoch(number, seed)) for number in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert epoch(2, 3) == epoch(2, 3)


def test_processes_share_the_batches_of_one() -> None:
    parts = [epoch(1, rank=rank, world=2) for rank in (0, 1)]
    for whole, first, second in zip(epoch(1), *parts, strict=True):
        assert len(first) == len(second) == SIZE // 2
        assert sorted(first + second) == sorted(whole)


def test_batches_are_full_but_for_a_set_smaller_than_one() -> None:
    assert [len(batch) for batch in epoch(0, rows=ROWS[:11])] == [4, 4]
    assert [len(batch) for batch in epoch(0, rows=ROWS[:3])] == [3]
    assert [len(batch) for batch in epoch(0, rows=ROWS[:3], world=2)] == [1]


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(DataError, match="multiple of the 3 processes"):
        epoch(0, world=3)
    with pytest.raises(DataError, match="1 rows cannot be split over 2 processes"):
        epoch(0, rows=ROWS[:1], world=2)
