"""ResNet-9 for CIFAR: the small network of fast-training benchmarks (Page 2018, DAWNBench; as in the BDWP paper)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.models._parts import conv, he_init, scaled


def _block(in_channels: int, channels: int, pool: bool = False) -> nn.Sequential:
    """Convolve 3x3, normalise, ReLU, and with `pool` halve the image."""
    parts = [conv(in_channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*parts, *([nn.MaxPool2d(2)] if pool else []))


class ResNet9(nn.Module):
    """Classify images with eight 3x3 convolutions, two pairs of them residual; 6,573,130 parameters for 10 classes.

    Stages of 64, 128, 256 and 512 channels; the second and the last end with a residual pair. Input float [batch,
    in_channels, height, width] of at least 8x8, output logits [batch, num_classes].
    """

    def __init__(self, *, width: float = 1.0, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        one, two, three, four = (scaled(channels, width) for channels in (64, 128, 256, 512))
        self.conv1 = _block(in_channels, one)
        self.conv2 = _block(one, two, pool=True)
        self.res1 = nn.Sequential(_block(two, two), _block(two, two))
        self.conv3 = _block(two, three, pool=True)
        self.conv4 = _block(three, four, pool=True)
        self.res2 = nn.Sequential(_block(four, four), _block(four, four))
        self.fc = nn.Linear(four, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        x = x + self.res1(x)
        x = self.conv4(self.conv3(x))
        x = x + self.res2(x)
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))
