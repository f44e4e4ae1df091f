"""VGG-19 with batch normalisation for CIFAR (Simonyan & Zisserman 2015, arXiv:1409.1556)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.models._parts import conv, he_init, scaled

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGG19(nn.Module):
    """Classify images with 16 normalised 3x3 convolutions and one linear layer; 20,035,018 parameters for 10 classes.

    The form that sparse-training papers train on CIFAR (first in network slimming, arXiv:1708.06519): no biases before
    normalisation, average pooling and a single 512 -> classes layer instead of the two of 4,096 units. Input float
    [batch, in_channels, height, width] of at least 16x16, output logits [batch, num_classes].
    """

    def __init__(self, *, width: float = 1.0, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential()
        current = in_channels
        for i, (channels, repeats) in enumerate(STAGES):
            if i > 0:
                self.features.append(nn.MaxPool2d(2))
            for _ in range(repeats):
                wider = scaled(channels, width)
                self.features.extend([conv(current, wider, 3), nn.BatchNorm2d(wider), nn.ReLU()])
                current = wider
        self.classifier = nn.Linear(current, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
