"""EfficientNet-B0 (Tan & Le 2019, arXiv:1905.11946) for ImageNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.models._parts import conv, he_init, scaled

# expansion, channels, repeats, stride, kernel (table 1)
B0 = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def _unit(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    norm = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)
    return nn.Sequential(conv(in_channels, out_channels, kernel, stride, groups), norm, nn.SiLU())


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) that looks at the means of all channels (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return x * gate.sigmoid()


class MBConv(nn.Module):
    """Widen, filter each channel, squeeze and excite, narrow linearly; add the input where `residual`."""

    def __init__(
        self, in_channels: int, out_channels: int, expand: int, stride: int, kernel: int, residual: bool
    ) -> None:
        super().__init__()
        hidden = in_channels * expand
        self.residual = residual
        self.conv = nn.Sequential()
        if expand > 1:
            self.conv.append(_unit(in_channels, hidden, 1))
        self.conv.append(_unit(hidden, hidden, kernel, stride, hidden))
        self.conv.append(SqueezeExcite(hidden, max(1, in_channels // 4)))
        self.conv.extend([conv(hidden, out_channels, 1), nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class EfficientNetB0(nn.Module):
    """Classify images with mobile inverted bottlenecks and squeeze-excitation (table 1); 5,288,548 parameters.

    Input float [batch, in_channels, height, width] of any size, output logits [batch, num_classes]. `dropout` is the
    probability of dropping a feature before the classifier while training (the paper's 0.2). Without stochastic depth.
    Channels are not rounded to multiples of 8, so that `width` moves the parameter count in small steps.
    """

    def __init__(
        self, *, width: float = 1.0, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2
    ) -> None:
        super().__init__()
        current, last = scaled(32, width), scaled(1280, width)
        self.features = nn.Sequential(_unit(in_channels, current, 3, 2))
        for expand, channels, repeats, stride, kernel in B0:
            wider = scaled(channels, width)
            for i in range(repeats):
                self.features.append(MBConv(current, wider, expand, stride if i == 0 else 1, kernel, i > 0))
                current = wider
        self.features.append(_unit(current, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
