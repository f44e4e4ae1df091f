"""Wide residual networks for CIFAR (Zagoruyko & Komodakis 2016, arXiv:1605.07146)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import ModelError
from rarefy.models._parts import conv, he_init, scaled


class PreActivationBlock(nn.Module):
    """Normalise, ReLU, convolve, twice; a 1x1 convolution of the first activation where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        same = in_channels == channels and stride == 1
        self.shortcut = None if same else conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
    """Classify images with pre-activation blocks, `widen` times the channels of a CIFAR ResNet (table 1 of the paper).

    Input float [batch, in_channels, height, width] of any size, output logits [batch, num_classes]. `depth` = 6n + 4
    (WRN-28-10: 36,479,194 parameters). No dropout. Raises ModelError for another depth or widen < 1.
    """

    def __init__(
        self, depth: int, widen: int, *, width: float = 1.0, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4 or widen < 1:
            raise ModelError(f"a WRN has 6n + 4 layers (10, 16, 22, ...) and widen >= 1, not {depth} and {widen}")
        channels = scaled(16, width)
        self.conv1 = conv(in_channels, channels, 3)
        self.blocks = nn.Sequential()
        for stage in range(3):
            for i in range((depth - 4) // 6):
                wider = scaled(16 * widen * 2**stage, width)
                self.blocks.append(PreActivationBlock(channels, wider, 2 if stage > 0 and i == 0 else 1))
                channels = wider
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
