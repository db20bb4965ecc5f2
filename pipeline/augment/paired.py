"""Paired augmentation: one geometry for an image and its explanation map (paper Sec. 3.3).

Kornia draws and composes; nothing else of it touches pixels. Its children give one matrix per sample, which becomes
`theta`, and image and map are each resampled once, the map straight to the student's resolution. Kornia's draws come
from a counter hash of (seed, epoch, key), so a sample's augmentation is bit-identical in any batch and any process.
Only children whose matrices compose may be added: flips, crops, resize, affine, rotation, translation, shear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import kornia.augmentation as K
import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_hue
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.augment.counter import Ids, key_ids, uniform
from pipeline.augment.warp import Size, as_size, coverage, inside, shrink, warp

if TYPE_CHECKING:
    from pipeline.config import AugmentConfig

__all__ = ["PairedAugment", "warp"]

_NOMINAL = 256
"""Output size the crop is told. theta is normalised, so it cancels; a power of two cancels exactly."""
_ANTIALIAS_ABOVE = 256 / 224
"""A 256 px canvas needs no antialiasing for images of 224 px (>= 48 dB against torchvision's)."""
_COLOUR_COLUMN = 2**20
"""First column of the colour draws: colour settings never change the geometry."""


class PairedAugment:
    """`PairedAugment(config)(images_u8, maps, rows, epoch) -> (images, maps, theta)`.

    keys      keys of the whole image set, by row: a sample's identity; None: the row number is the identity
    size      output side of the images in px; None: the canvas's own
    map_size  (height, width) of the maps that come out; None: the maps' own
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        seed: int = 0,
        keys: Sequence[str] | None = None,
        size: int | None = None,
        map_size: Size | int | None = None,
    ) -> None:
        self.config, self.seed, self.size, self.map_size = config, seed, size, map_size
        self._ids = None if keys is None else key_ids(keys)
        self._geometry = _geometry(config) if config.enabled else None
        self._colour = _colour(config) if config.enabled else None
        self._leaves_frame = config.enabled and _moves(config)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, maps: Tensor | None, rows: Tensor | np.ndarray | Sequence[int], epoch: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Augment a batch, identically for the same (seed, epoch, row's key).

        images  uint8 [B,3,S,S] -> float32 [B,3,size,size] in 0..1
        maps    [B,c,h,w], [B,K,c,h,w] or None -> float32, same axes, (h, w) = map_size
        rows    [B], rows of the image set
        theta   float32 [B,2,3]: output -> canvas position, normalised, align_corners=False (`grid_sample`'s)
        """
        ids = self.identities(rows)
        theta = self._theta(ids, images.shape[-1], epoch)
        out = self._warp_images(images, theta)
        if self._colour is not None:
            params = _params(self._colour, self.seed, epoch, ids, 1, _COLOUR_COLUMN)
            out = _recolour(out, params, hue=self.config.hue > 0)
        theta = theta.to(images.device)
        return out, None if maps is None else self._warp_maps(maps, theta.to(maps.device)), theta

    def _theta(self, ids: Ids, canvas: int, epoch: int) -> Tensor:
        """The geometry of samples `ids` on a canvas of `canvas` px: float32 [B,2,3] on the CPU."""
        if self._geometry is None:
            return torch.eye(2, 3).repeat(len(ids), 1, 1)
        params = _params(self._geometry, self.seed, epoch, ids, canvas, 0)
        frame = torch.empty((), dtype=torch.float64).expand(len(ids), 3, canvas, canvas)
        forward = self._geometry.get_transformation_matrix(frame, params=params, recompute=True)
        output = canvas if self.config.crop_scale is None else _NOMINAL
        return _normalise(torch.linalg.inv(forward), output, canvas).float()

    def identities(self, rows: Tensor | np.ndarray | Sequence[int]) -> Ids:
        """The identities of some rows' keys, from which all their draws come: uint64 [B]."""
        index = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        return index.astype(np.uint64) if self._ids is None else self._ids[index]

    def _warp_images(self, images: Tensor, theta: Tensor) -> Tensor:
        size, canvas = as_size(self.size, images.shape[-2:]), images.shape[-1]
        if self._geometry is None and size == images.shape[-2:]:
            return images.float() / 255
        reduce = canvas / size[0] > _ANTIALIAS_ABOVE
        if reduce and not self._leaves_frame:
            return shrink(images, theta, size) / 255
        theta = theta.to(images.device)
        out = warp(images.float() / 255, theta, size, supersample=-(-canvas // size[0]) if reduce else 1)
        if not self._leaves_frame:
            return out
        fill = torch.tensor(self.config.fill, device=out.device).reshape(-1, 1, 1)
        return torch.where(inside(theta, size), out, fill)

    def _warp_maps(self, maps: Tensor, theta: Tensor) -> Tensor:
        size = as_size(self.map_size, maps.shape[-2:])
        if self._geometry is None and size == maps.shape[-2:]:
            return maps.float()
        out = warp(maps.flatten(1, -3), theta, size)
        if self._leaves_frame:
            out = out * coverage(theta, size)
        return out.reshape(*maps.shape[:-2], *size)


class _CounterDraws(TorchFunctionMode):
    """Inside, `torch.rand(B, ...)` reads the counter hash of each sample instead of torch's generator."""

    def __init__(self, seed: int, epoch: int, ids: Ids, column: int) -> None:
        super().__init__()
        self.seed, self.epoch, self.ids, self.column = seed, epoch, ids, column

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand:
            return self._draw(torch.Size(args if isinstance(args[0], int) else args[0]))
        if func is torch.randperm:
            # ColorJitter's order of steps, one for the whole batch; `_recolour` has a fixed one.
            return torch.arange(args[0])
        return func(*args, **(kwargs or {}))

    def _draw(self, shape: torch.Size) -> Tensor:
        assert shape[0] == len(self.ids), "every draw must be per sample"
        count = shape[1:].numel()
        columns = range(self.column, self.column + count)
        self.column += count
        return torch.from_numpy(uniform(self.seed, self.epoch, self.ids, columns)).reshape(shape)


def _params(sequence: Any, seed: int, epoch: int, ids: Ids, canvas: int, column: int) -> Any:
    """Kornia's parameters for a batch, drawn from `column` on."""
    with _CounterDraws(seed, epoch, ids, column):
        return sequence.forward_parameters(torch.Size([len(ids), 3, canvas, canvas]))


def _geometry(config: AugmentConfig) -> Any:
    """Kornia's sequence of the geometric settings, or None if there are none."""
    children: list[Any] = []
    if _moves(config):
        shift = (config.translate, config.translate) if config.translate else None
        children.append(K.RandomAffine(config.rotate, translate=shift, shear=config.shear or None, p=1.0))
    if config.crop_scale is not None:
        crop = K.RandomResizedCrop(
            (_NOMINAL, _NOMINAL), scale=config.crop_scale, ratio=config.crop_ratio, align_corners=False
        )
        children.append(crop)
    if config.hflip:
        children.append(K.RandomHorizontalFlip(p=config.hflip))
    if config.vflip:
        children.append(K.RandomVerticalFlip(p=config.vflip))
    return K.AugmentationSequential(*children, data_keys=["input"]) if children else None


def _moves(config: AugmentConfig) -> bool:
    """Whether parts of the output can lie outside the canvas."""
    return bool(config.rotate or config.translate or config.shear)


def _colour(config: AugmentConfig) -> Any:
    """Kornia's sequence [ColorJitter, RandomGrayscale], or None if colours stay."""
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    if not any(jitter) and not config.grayscale:
        return None
    children = K.ColorJitter(*jitter), K.RandomGrayscale(p=config.grayscale)
    return K.AugmentationSequential(*children, data_keys=["input"])


def _recolour(images: Tensor, params: Any, *, hue: bool) -> Tensor:
    """Brightness, contrast, saturation, hue (Kornia's `ColorJitter(order=(0, 1, 2, 3))`), then grayscale.

    Images float32 [B,3,H,W] in 0..1, before and after. Applied here rather than by Kornia because the contrast's
    mean must not depend on the batch: torch sums a lone image over threads, a batch image by image.
    """
    jitter, gray = params[0].data, params[1].data["batch_prob"] > 0.5

    def factor(name: str) -> Tensor:
        return jitter[f"{name}_factor"].to(images.device)[:, None, None, None]

    images = (images * factor("brightness")).clamp(0, 1)
    mean = rgb_to_grayscale(images).mean(-1, keepdim=True).mean(-2, keepdim=True)
    images = _blend(images, mean, factor("contrast"))
    images = _blend(images, rgb_to_grayscale(images), factor("saturation"))
    if hue:  # by the settings, not by the drawn factors: the way through HSV and back rounds
        images = adjust_hue(images, jitter["hue_factor"].to(images.device) * 2 * torch.pi).clamp(0, 1)
    return torch.where(gray.to(images.device)[:, None, None, None], rgb_to_grayscale(images), images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + other * (1 - factor)).clamp(0, 1)


def _normalise(backward: Tensor, output: int, canvas: int) -> Tensor:
    """The map of pixel indices, output -> canvas, in half-pixel normalised coordinates: [B,3,3] -> [B,2,3]."""
    linear, shift = backward[:, :2, :2], backward[:, :2, 2]
    # canvas pixel at the output's middle
    centre = (linear[..., 0] + linear[..., 1]) * ((output - 1) / 2) + shift
    return torch.cat([linear * (output / canvas), ((2 * centre + 1) / canvas - 1)[..., None]], dim=-1)
