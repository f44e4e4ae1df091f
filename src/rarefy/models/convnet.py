"""A small plain convolutional network for experiments that have to be quick."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.models._parts import scaled


class ConvNet(nn.Module):
    """Classify small images with four 3x3 convolutions of 16, 32, 64 and 64 filters; 61,050 parameters for one channel.

    Each is followed by batch norm and a ReLU, all but the last have stride 2; then the mean over positions and a linear
    layer. Input float [batch, in_channels, height, width] of any size, output logits [batch, num_classes]. Initialised as
    PyTorch does. All widths but the input's are multiples of 16, so that N:M patterns fit.
    """

    def __init__(self, *, width: float = 1.0, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        widths = [in_channels, *(scaled(units, width) for units in (16, 32, 64, 64))]
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(before, after, 3, stride=1 if i == 3 else 2, padding=1, bias=False)
            for i, (before, after) in enumerate(pairwise(widths))
        )
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(units) for units in widths[1:])
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.fc(x.mean((2, 3)))
