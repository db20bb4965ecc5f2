"""The slim residual network of the toy experiments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut, a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, second_kernel: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, second_kernel, padding=second_kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ToyResNet(nn.Module):
    """3x3 stride-2 stem, residual blocks of w, 2w and 4w channels with strides 1, 2, 1, global average,
    linear.

    Four times downsampled: 48 px give 12x12 features. The last block's second convolution is 1x1, which keeps
    the receptive field of a map cell, and with it the map, local. Splits as timm's models do:
    `forward_features`, `forward_head`.
    """

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 1, second_kernel=1),
        )
        self.fc = nn.Linear(4 * width, classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] -> features [B,4w,H/4,W/4]."""
        return self.blocks(self.stem(images))

    def forward_head(self, features: Tensor) -> Tensor:
        """Features [B,4w,h,w] -> logits [B,classes]."""
        return self.fc(features.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))
