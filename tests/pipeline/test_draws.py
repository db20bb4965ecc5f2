"""The counter hash: reproducible for ever, uniform, independent of the batch; the order is a permutation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment.counter import bits, epoch_order, key_ids, uniform

seeds = st.integers(-(2**63), 2**63)
IDS = key_ids([f"bird/{i:04d}" for i in range(4000)])


def splitmix(state: int) -> int:
    """Plain-integer reference of the output function."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@given(seeds, st.integers(0, 2**40), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_bits_equal_the_integer_reference(seed: int, epoch: int, identity: int, column: int) -> None:
    golden = 0x9E3779B97F4A7C15
    stream = splitmix(splitmix(seed * golden % 2**64) ^ epoch)
    expected = splitmix((splitmix(stream ^ identity) + (column + 1) * golden) % 2**64)
    assert int(bits(seed, epoch, np.array([identity], dtype=np.uint64), [column])[0, 0]) == expected


def test_key_ids_never_change() -> None:
    """A golden value: other identities would change every student trained so far."""
    assert [hex(i) for i in key_ids(["train/0001", "ä"])] == KEY_IDS
    assert key_ids([]).shape == (0,)


KEY_IDS = ["0x11e62f00f808e517", "0x39a02b5ee2bb4df0"]


def test_draws_are_uniform_and_independent_between_columns_epochs_and_seeds() -> None:
    first = uniform(0, 0, IDS, range(8))
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in first.T])
    chi_square = ((counts - 200) ** 2 / 200).sum(1)
    assert chi_square.max() < 50  # 19 degrees of freedom: P(> 50) = 1e-4
    others = np.concatenate([first, uniform(0, 1, IDS, range(8)), uniform(1, 0, IDS, range(8))], axis=1)
    correlation = np.corrcoef(others.T) - np.eye(24)
    assert np.abs(correlation).max() < 0.07  # 4.4 standard errors


def test_draws_stay_uniform_for_row_numbers() -> None:
    rows = np.arange(4000, dtype=np.uint64)
    draws = uniform(3, 2, rows, [0, 1])
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.07
    assert np.abs(draws.mean(0) - 0.5).max() < 0.02


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = uniform(7, 3, IDS[:100], [4, 9, 2])
    picked = np.array([41, 3, 99])
    np.testing.assert_array_equal(uniform(7, 3, IDS[picked], [4, 9, 2]), whole[picked])
    np.testing.assert_array_equal(uniform(7, 3, IDS[:100], [9]), whole[:, 1:2])


@settings(max_examples=30)
@given(st.integers(0, 300), seeds, st.integers(0, 10**6))
def test_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(order, epoch_order(n, seed, epoch))


def test_order_changes_with_epoch_and_seed() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_row_visits_every_place() -> None:
    places = np.stack([np.argsort(epoch_order(10, 0, epoch)) for epoch in range(1000)])
    assert np.abs(places.mean(0) - 4.5).max() < 0.45  # 5 standard errors


def test_needs_no_torch() -> None:
    code = "import sys, pipeline.augment.counter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
