"""Resampling by theta: one affine map from output to source for images, maps and masks of any resolution.

theta is float [B,2,3] as `torch.nn.functional.grid_sample` reads it: normalised coordinates, half-pixel
(`align_corners=False`), output position -> source position. Being normalised it fits an image and its map alike.

Every function works sample by sample with elementwise operations in a fixed order: what a sample becomes does not
depend on the batch around it. (`affine_grid` and batched matrix products do not promise that.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def warp(
    tensor: Tensor, theta: Tensor, size: Size | int | None = None, *, supersample: int | None = None
) -> Tensor:
    """Resample [B,c,h,w] bilinearly at `theta` to `size` (None: its own size); outside, the border is repeated.

    Returns float32 [B,c,*size], also under autocast. Where the source is finer than the output, each output cell is
    the mean of at least 4x4 samples, one per source cell or more; `supersample` overrides that number.
    """
    height, width = as_size(size, tensor.shape[-2:])
    ratio = max(tensor.shape[-2] / height, tensor.shape[-1] / width)
    fine = supersample or (max(4, math.ceil(ratio)) if ratio > 1 else 1)
    grid = sampling_grid(theta, (height * fine, width * fine))
    with torch.autocast(tensor.device.type, enabled=False):
        out = F.grid_sample(tensor.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(out, fine) if fine > 1 else out


def resample(maps: Tensor, size: Size | int | None) -> Tensor:
    """[B,c,h,w] -> float32 [B,c,*size] without any geometry."""
    return warp(maps, torch.eye(2, 3, device=maps.device).expand(len(maps), 2, 3), size)


def shrink(images: Tensor, theta: Tensor, size: Size) -> Tensor:
    """Antialiased crop and flip, torchvision's: [B,3,S,S] (any dtype) -> float32 [B,3,*size].

    For canvases that are larger than the output. `theta` must be a crop of whole pixels with or without flips.
    """
    scale, centre = (
        torch.stack([theta[:, 0, 0], theta[:, 1, 1]], 1).double().cpu(),
        theta[:, :, 2].double().cpu(),
    )
    extent = torch.tensor([images.shape[-1], images.shape[-2]], dtype=torch.float64)
    start = ((centre - scale.abs() + 1) / 2 * extent).round().long().tolist()
    stop = ((centre + scale.abs() + 1) / 2 * extent).round().long().tolist()
    flipped = (scale < 0).tolist()
    samples = zip(images, start, stop, flipped, strict=True)
    return torch.stack(
        [_shrink_one(image[:, y0:y1, x0:x1], size, *flip) for image, (x0, y0), (x1, y1), flip in samples]
    )


def _shrink_one(crop: Tensor, size: Size, flip_x: bool, flip_y: bool) -> Tensor:
    resized = F.interpolate(crop[None].float().contiguous(), size, mode="bilinear", antialias=True)[0]
    return resized.flip([dim for dim, flip in ((-1, flip_x), (-2, flip_y)) if flip])


def inside(theta: Tensor, size: Size) -> Tensor:
    """Which output pixels lie within the source's frame: bool [B,1,*size]."""
    return (sampling_grid(theta, size).abs() <= 1).all(-1)[:, None]


def coverage(theta: Tensor, size: Size) -> Tensor:
    """Share of each output cell that lies within the source's frame (in 1/16): float32 [B,1,*size], 0..1."""
    return F.avg_pool2d(inside(theta, (size[0] * 4, size[1] * 4)).float(), 4)


def sampling_grid(theta: Tensor, size: Size) -> Tensor:
    """Source positions of the output pixels, float32 [B,*size,2] (x, y): `F.affine_grid`, batch-independent."""
    y, x = (_centres(n, theta.device) for n in size)
    rows = theta.float()[:, :, :, None, None]
    return torch.stack([rows[:, i, 0] * x + rows[:, i, 1] * y[:, None] + rows[:, i, 2] for i in (0, 1)], -1)


def _centres(n: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(n, dtype=torch.float32, device=device) + 1) / n - 1


def as_size(size: Size | int | None, default: torch.Size | Size) -> Size:
    """(height, width); an int means a square, None `default`."""
    if size is None:
        return int(default[0]), int(default[1])
    return (size, size) if isinstance(size, int) else size
