"""MobileNet V1 (Howard et al. 2017, arXiv:1704.04861) and V2 (Sandler et al. 2018, arXiv:1801.04381) for ImageNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.models._parts import conv, he_init, scaled

V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _unit(
    in_channels: int, out_channels: int, kernel: int, activation: type[nn.Module], stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels), activation()
    )


class MobileNetV1(nn.Module):
    """Classify images with 13 pairs of a depthwise 3x3 and a pointwise 1x1 convolution (table 1); 4,231,976 parameters.

    Input float [batch, in_channels, height, width] of any size, output logits [batch, num_classes].
    """

    def __init__(self, *, width: float = 1.0, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        current = scaled(32, width)
        self.features = nn.Sequential(_unit(in_channels, current, 3, nn.ReLU, 2))
        for channels, stride in V1:
            wider = scaled(channels, width)
            self.features.append(_unit(current, current, 3, nn.ReLU, stride, current))
            self.features.append(_unit(current, wider, 1, nn.ReLU))
            current = wider
        self.classifier = nn.Linear(current, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class InvertedResidual(nn.Module):
    """Widen `expand` times, filter each channel, narrow linearly (figure 3b of V2); add the input where `residual`."""

    def __init__(self, in_channels: int, out_channels: int, expand: int, stride: int, residual: bool) -> None:
        super().__init__()
        hidden = in_channels * expand
        self.residual = residual
        self.conv = nn.Sequential()
        if expand > 1:
            self.conv.append(_unit(in_channels, hidden, 1, nn.ReLU6))
        self.conv.append(_unit(hidden, hidden, 3, nn.ReLU6, stride, hidden))
        self.conv.extend([conv(hidden, out_channels, 1), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Classify images with inverted residual blocks (table 2); 3,504,872 parameters, named as torchvision's.

    Input float [batch, in_channels, height, width] of any size, output logits [batch, num_classes]. `dropout` is the
    probability of dropping a feature before the classifier while training (torchvision's default 0.2). Channels are
    not rounded to multiples of 8, so that `width` moves the parameter count in small steps.
    """

    def __init__(
        self, *, width: float = 1.0, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2
    ) -> None:
        super().__init__()
        current, last = scaled(32, width), scaled(1280, width)
        self.features = nn.Sequential(_unit(in_channels, current, 3, nn.ReLU6, 2))
        for expand, channels, repeats, stride in V2:
            wider = scaled(channels, width)
            for i in range(repeats):
                self.features.append(InvertedResidual(current, wider, expand, stride if i == 0 else 1, i > 0))
                current = wider
        self.features.append(_unit(current, last, 1, nn.ReLU6))
        head = nn.Linear(last, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.classifier = nn.Sequential(nn.Dropout(dropout), head)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
