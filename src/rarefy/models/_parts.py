"""What several families share: width scaling, convolution + normalisation, He initialisation."""

from __future__ import annotations

from torch import nn


def scaled(units: int, width: float) -> int:
    """Return `units` hidden units multiplied by `width`: rounded to a whole number, never below 1."""
    return max(1, round(units * width))


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the image size at stride 1 (odd `kernel`)."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def he_init(model: nn.Module) -> None:
    """Draw every convolution of `model`, in place, from N(0, 2 / (out_channels * kernel area)).

    This is the "fan out" form of He et al. 2015 (arXiv:1502.01852, eq. 14) that the reference code of ResNet, WRN, VGG
    for CIFAR and MobileNet uses. Normalisations keep PyTorch's 1 and 0, linear layers PyTorch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
