"""Drawing for the toy data sets: textured backgrounds, posed silhouettes, exact masks; whole batches in numpy.

Everything is float32 of shape [B,S,S] or [B,S,S,3] with S = 48 and colours in 0..1; y points down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.floating[Any]]

SIZE = 48
CHROMA = 0.15  # how much of its own colour a background keeps: with more, guidance on correlated data fails
TEXTURE = 0.6  # strength of what tells land from water: strokes and waves
JITTER = 0.12  # shift of each image's colour channels, so that colour alone does not tell them apart
GREY = np.array([0.28, 0.39, 0.375], np.float32)  # the middle between land and water
GRASS = np.array([[0.30, 0.45, 0.18], [0.48, 0.38, 0.22]], np.float32)
SEA = np.array([0.18, 0.36, 0.55], np.float32)
LAND, WATER, CLOTH = 0, 1, 2
EDGE = 2.5  # slope of the soft mask's edge, per px


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Array:
    return rng.random(shape, np.float32) * np.float32(high - low) + np.float32(low)


# --- textures and backgrounds --------------------------------------------------------------------------------------


def fractal_noise(rng: np.random.Generator, count: int) -> Array:
    """[B,S,S] in 0..1, mean .5: uniform grids of 3, 6, 12, 24 with amplitudes .6^i over the sum of amplitudes."""
    amplitudes = [0.6**octave for octave in range(4)]
    layers = [
        np.float32(amplitude / sum(amplitudes)) * value_noise(rng, count, cells, cells)
        for amplitude, cells in zip(amplitudes, (3, 6, 12, 24), strict=True)
    ]
    return layers[0] + layers[1] + layers[2] + layers[3]


def value_noise(rng: np.random.Generator, count: int, rows: int, columns: int) -> Array:
    """[B,S,S]: a uniform grid of rows x columns, upsampled bilinearly."""
    grid = rng.random((count, rows, columns), np.float32)
    return _bilinear(rows) @ grid @ _bilinear(columns).T


@cache
def _bilinear(cells: int) -> Array:
    """[S,cells] weights of half-pixel bilinear upsampling, edges repeated."""
    at = np.clip((np.arange(SIZE) + 0.5) * cells / SIZE - 0.5, 0, cells - 1)
    distance = np.abs(at[:, None] - np.arange(cells))
    return np.clip(1 - distance, 0, 1).astype(np.float32)


def backgrounds(rng: np.random.Generator, kinds: npt.NDArray[np.int64]) -> Array:
    """[B,S,S,3]: LAND, WATER or CLOTH for each of B kinds."""
    painted = np.empty((len(kinds), SIZE, SIZE, 3), np.float32)
    for kind, paint in ((LAND, _land), (WATER, _water), (CLOTH, _cloth)):
        chosen = kinds == kind
        painted[chosen] = _lit(rng, *paint(rng, int(chosen.sum())))
    return painted


def _land(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Colour [B,3] between grass and earth; texture [B,S,S] of blades that stand upright."""
    share = rng.random((count, 1), np.float32)
    strokes = value_noise(rng, count, 4, SIZE)
    texture = 0.55 * (fractal_noise(rng, count) - 0.5) + 0.45 * TEXTURE * (strokes - 0.5)
    return _muted(GRASS[0] + share * (GRASS[1] - GRASS[0])), texture


def _water(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Colour [B,3] of the sea; texture [B,S,S] of three trains of nearly level waves."""
    colour = SEA + uniform(rng, -0.06, 0.06, count, 3)
    noise = fractal_noise(rng, count) - 0.5
    texture = 0.10 * TEXTURE * _waves(rng, noise) + 0.55 * noise
    return _muted(colour), texture


def _waves(rng: np.random.Generator, noise: Array) -> Array:
    """[B,S,S]: sum of 3 sin(2 pi frequency (y + slope x) + phase + 3 noise), x and y in 0..1."""
    x, y = _pixel_centres()
    total = np.zeros_like(noise)
    for _ in range(3):
        frequency = uniform(rng, 4, 10, len(noise), 1, 1)
        slope = uniform(rng, -0.3, 0.3, len(noise), 1, 1)
        phase = uniform(rng, 0, 2 * np.pi, len(noise), 1, 1)
        total += np.sin(2 * np.float32(np.pi) * frequency * (y + slope * x) + phase + 3 * noise)
    return total


def _cloth(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Any colour [B,3]; a coarse fractal texture [B,S,S]."""
    return uniform(rng, 0.15, 0.7, count, 3), 1.2 * (fractal_noise(rng, count) - 0.5)


def _muted(colour: Array) -> Array:
    return GREY + CHROMA * (colour - GREY)


def _lit(rng: np.random.Generator, colour: Array, texture: Array) -> Array:
    """colour * tone * (1 + 1.2 texture) +- JITTER: [B,S,S,3]."""
    tone = uniform(rng, 0.75, 1.25, len(colour), 1)
    shift = uniform(rng, -JITTER, JITTER, len(colour), 1, 1, 3)
    return (colour * tone)[:, None, None] * (1 + 1.2 * texture)[..., None] + shift


# --- silhouettes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """Where B silhouettes stand: half extent, centre (both as shares of the image), angle in radians, mirrored."""

    extent: Array
    x: Array
    y: Array
    angle: Array
    mirror: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int, extent: tuple[float, float], degrees: float) -> Pose:
        """Half extents in a range, angles within +- degrees, mirrored or not, anywhere inside the frame."""
        half = uniform(rng, *extent, count)
        place = half[:, None] + rng.random((count, 2), np.float32) * (1 - 2 * half[:, None])
        angle = uniform(rng, -np.deg2rad(degrees), np.deg2rad(degrees), count)
        mirror = rng.integers(0, 2, count).astype(np.float32) * 2 - 1
        return cls(half, place[:, 0], place[:, 1], angle, mirror)

    def __getitem__(self, rows: npt.NDArray[np.bool_]) -> Pose:
        return Pose(self.extent[rows], self.x[rows], self.y[rows], self.angle[rows], self.mirror[rows])

    def coordinates(self) -> tuple[Array, Array]:
        """x and y [B,S,S] in the silhouette's own frame, which spans about -1..1."""
        x, y = _pixel_centres()
        dx = (x - self.x[:, None, None]) / self.extent[:, None, None]
        dy = (y - self.y[:, None, None]) / self.extent[:, None, None]
        cos, sin = np.cos(self.angle)[:, None, None], np.sin(self.angle)[:, None, None]
        return (cos * dx + sin * dy) * self.mirror[:, None, None], cos * dy - sin * dx

    def pixels(self, distance: Array) -> Array:
        """Distances of the silhouette's frame in px."""
        return distance * (self.extent * SIZE)[:, None, None]


@cache
def _pixel_centres() -> tuple[Array, Array]:
    at = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    return at[None, None, :], at[None, :, None]


def soft_mask(distance: Array) -> Array:
    """sigmoid(2.5 d) of the signed distance in px, positive inside: 0..1."""
    return 1 / (1 + np.exp(np.clip(-EDGE * distance, -60, 60)))


def paint_objects(rng: np.random.Generator, background: Array, mask: Array) -> npt.NDArray[np.uint8]:
    """[B,S,S,3] u8: an object clearly lighter or darker than its image, with its own texture; pixel noise over all."""
    count = len(background)
    side = rng.integers(0, 2, (count, 1)).astype(np.float32) * 2 - 1
    colour = background.mean((1, 2)) + side * 0.8 * uniform(rng, 0.25, 0.55, count, 1)
    colour += uniform(rng, -0.125, 0.125, count, 3)
    body = np.clip(colour, 0, 1)[:, None, None] + 0.5 * (fractal_noise(rng, count) - 0.5)[..., None]
    image = background + mask[..., None] * (body - background)
    image += 0.03 * rng.standard_normal(image.shape, np.float32)
    return to_bytes(image)


def to_bytes(values: Array) -> npt.NDArray[np.uint8]:
    """0..1 to 0..255, rounded and clipped."""
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
