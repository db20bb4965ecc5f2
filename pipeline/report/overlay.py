"""A map over its image, and figures as files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from artifacts.durable import appearing
from artifacts.names import printable
from pipeline.report.plotting import plt


def overlay(axis: Any, image: np.ndarray, heat: Tensor) -> None:
    """Draw the map [h,w] upsampled over the grey image u8 [S,S,3]; transparent where the map is not positive."""
    size = image.shape[:2]
    full = nn.functional.interpolate(
        heat[None, None].float(), size=size, mode="bilinear", align_corners=False
    )[0, 0]
    largest = full.max()
    share = (full / largest).clamp(0, 1).numpy() if largest > 0 else np.zeros(size, np.float32)
    axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
    axis.imshow(share, cmap="inferno", alpha=0.75 * share, vmin=0, vmax=1)


def drawn(text: str, most: int = 60) -> str:
    """A text from a file as a picture can show it: no control characters, at most `most` letters. Give it to matplotlib
    with parse_math=False: `$` begins a formula there."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return printable(short)


def save(figure: Any, path: Path, dpi: int = 144) -> None:
    """As PNG, whole or not at all; closes the figure. A letter that the font lacks becomes an empty box."""
    with appearing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(partial, dpi=dpi, format="png")
    plt.close(figure)
