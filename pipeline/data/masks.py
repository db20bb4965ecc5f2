"""Boxes as masks."""

from __future__ import annotations

import torch
from torch import Tensor


def boxes_to_mask(boxes: Tensor, size: int, cls: int | None = None) -> Tensor:
    """Union of the boxes, of class `cls` only if given: boxes [N,5] (class,x0,y0,x1,y1 in px) -> bool [size,size].

    A pixel is inside where its centre is.
    """
    if cls is not None:
        boxes = boxes[boxes[:, 0] == cls]
    centres = torch.arange(size, device=boxes.device) + 0.5
    x = (boxes[:, 1:2] <= centres) & (centres < boxes[:, 3:4])
    y = (boxes[:, 2:3] <= centres) & (centres < boxes[:, 4:5])
    return (y[:, :, None] & x[:, None, :]).any(0)
