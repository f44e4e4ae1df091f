"""SqueezeNet 1.0 (Iandola et al. 2016, arXiv:1602.07360) for ImageNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.models._parts import he_init, scaled

FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
POOLED = (3, 7)  # these follow a pooling


class Fire(nn.Module):
    """Squeeze to a few channels by 1x1, then expand by 1x1 and by 3x3, side by side (figure 1)."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Classify images with eight fire modules and no linear layer (table 1); 1,248,424 parameters, named as torchvision's.

    Input float [batch, in_channels, height, width], output logits [batch, num_classes]. `dropout` is the probability of
    dropping a feature before the classifier while training. The classifier's 1x1 convolution pads its input by
    `pad_classifier` pixels: Caffe's network, whose weights are published, has 1, later ones 0.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        pad_classifier: bool = False,
    ) -> None:
        super().__init__()
        current = scaled(96, width)
        self.features = nn.Sequential(nn.Conv2d(in_channels, current, 7, 2), nn.ReLU(), _pool())
        for i, (squeezed, expanded) in enumerate(FIRES):
            if i in POOLED:
                self.features.append(_pool())
            self.features.append(Fire(current, scaled(squeezed, width), scaled(expanded, width)))
            current = 2 * scaled(expanded, width)
        last = nn.Conv2d(current, num_classes, 1, padding=int(pad_classifier))
        self.classifier = nn.Sequential(nn.Dropout(dropout), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        he_init(self)
        nn.init.normal_(last.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)
