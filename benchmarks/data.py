"""How fast the toy images are drawn: images/s on one core.

OMP_NUM_THREADS=1 python benchmarks/data.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.data.toys.blocks import BLOCK, Block
from pipeline.data.toys.toybirds import draw_block as bird_block
from pipeline.data.toys.toyshapes import draw_block as shape_block

BLOCKS = 20


def images_per_second(draw: Callable[[int, str, int], Block], split: str) -> float:
    """Best of three rounds over fresh seeds (drawn blocks are cached), in CPU time."""
    rounds = []
    for seed in range(1, 4):
        start = time.process_time()
        for number in range(BLOCKS):
            draw(seed, split, number)
        rounds.append(BLOCKS * BLOCK / (time.process_time() - start))
    return max(rounds)


def main() -> None:
    print(f"toybirds  {images_per_second(bird_block, 'train'):6.0f} images/s/core (aim: > 500)")
    print(f"toyshapes {images_per_second(shape_block, 'teach'):6.0f} images/s/core (aim: > 500)")


if __name__ == "__main__":
    main()
