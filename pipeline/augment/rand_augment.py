"""RandAugment (Cubuk et al. 2020) of images whose teacher is online: torchvision's, the same for a sample in any batch.

Its shears, rotations and shifts move pixels that a stored map would not follow, so frozen students go without, as in
the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment

from pipeline.augment.counter import RAND_AUGMENT_COLUMN, Ids, bits


def rand_augment(images: Tensor, magnitude: int, seed: int, epoch: int, ids: Ids) -> Tensor:
    """Two operations of `magnitude` (of 30 steps) on each image, drawn by (seed, epoch, identity).

    Images float32 [B,3,H,W] in 0..1, before and after; between them 8 bits a channel, for which the operations are.
    torch's own generators are left as they were.
    """
    transform = RandAugment(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    states = bits(seed, epoch, ids, [RAND_AUGMENT_COLUMN])[:, 0]
    pixels = (images * 255).round().to(torch.uint8)
    with torch.random.fork_rng(devices=[]):
        changed = [_one(transform, image, int(state)) for image, state in zip(pixels, states, strict=True)]
    return torch.stack(changed).to(images.dtype) / 255


def _one(transform: RandAugment, image: Tensor, state: int) -> Tensor:
    torch.default_generator.manual_seed(state)  # the CPU's alone, from which torchvision draws
    return transform(image)
