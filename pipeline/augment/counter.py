"""Random numbers as a pure function of (seed, epoch, identity, column): SplitMix64 used as a counter hash.

No state is kept, so a sample's draws are the same in any batch, order, process or resumed run.
numpy only: data-loader workers and `e2kd pack` use it without torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ORDER_COLUMN = 2**32
"""Far from the columns that augmentation draws from, so that order and augmentation are independent."""
CLASS_COLUMN = 2**33
"""Which of its explained classes a sample's step is about."""
_MIXUP_COLUMN = 2**34
GUIDED_CLASS_COLUMN = 2**35
"""Which of its labels a teacher's step is guided about."""
RAND_AUGMENT_COLUMN = 2**36
"""A sample's RandAugment."""


def key_ids(keys: Sequence[str]) -> Ids:
    """The identities of sample keys: the first 8 bytes of BLAKE2b, uint64 [N]."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def bits(seed: int, epoch: int, ids: Ids, columns: Sequence[int]) -> Ids:
    """64 random bits for every identity and column, uint64 [len(ids), len(columns)]."""
    stream = np.array([(seed * _GOLDEN) & _MASK], dtype=np.uint64)
    stream = _mix(_mix(stream) ^ np.array([epoch & _MASK], dtype=np.uint64))
    steps = np.array([(column + 1) * _GOLDEN & _MASK for column in columns], dtype=np.uint64)
    return _mix(_mix(stream ^ ids.astype(np.uint64))[:, None] + steps)


def uniform(seed: int, epoch: int, ids: Ids, columns: Sequence[int]) -> NDArray[np.float32]:
    """Uniform draws in [0, 1), float32 [len(ids), len(columns)]: multiples of 2^-24, so none rounds up to 1."""
    return (bits(seed, epoch, ids, columns) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which epoch `epoch` visits rows 0..n-1: a permutation, int64 [n]."""
    keys = bits(seed, epoch, np.arange(n, dtype=np.uint64), [_ORDER_COLUMN])[:, 0]
    return np.argsort(keys, kind="stable").astype(np.int64)


def mixup_share(alpha: float, seed: int, epoch: int, step: int) -> float:
    """lambda ~ Beta(alpha, alpha) of one step of a run, in 0..1."""
    state = bits(seed, epoch, np.array([step], dtype=np.uint64), [_MIXUP_COLUMN])[0, 0]
    return float(np.random.default_rng(int(state)).beta(alpha, alpha))


def _mix(state: Ids) -> Ids:
    """SplitMix64's output function (Steele et al. 2014): a bijection whose output bits all depend on all input bits."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
