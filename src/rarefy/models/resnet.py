"""Residual networks for CIFAR and for ImageNet (He et al. 2016, arXiv:1512.03385)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import ModelError, nearest
from rarefy.models._parts import conv, he_init, scaled

SHORTCUTS = ("pad", "conv")
STEMS = ("large", "small")


class PadShortcut(nn.Module):
    """Option A of the paper (section 3.3): skip pixels, add channels of zeros on both sides; no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(shortcut, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which holds the stride, as in torchvision) and 1x1 convolutions around a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Classify images with stages of residual blocks; parameter names are torchvision's.

    Input float [batch, in_channels, height, width] of any size, output logits [batch, num_classes]. `channels` gives
    the inner width of each stage, `blocks` its number of blocks; every stage but the first halves the image.
    `large_stem`: ImageNet's 7x7 stride-2 convolution and max pooling instead of one 3x3 convolution.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        channels: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        shortcut: str,
        large_stem: bool,
    ) -> None:
        super().__init__()
        current = channels[0]
        self.conv1 = conv(in_channels, current, 7, 2) if large_stem else conv(in_channels, current, 3)
        self.bn1 = nn.BatchNorm2d(current)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large_stem else nn.Identity()
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, name in enumerate(self.stages):
            stage = nn.Sequential()
            for j in range(blocks[i]):
                stage.append(block(current, channels[i], 2 if i > 0 and j == 0 else 1, shortcut))
                current = channels[i] * block.expansion
            self.add_module(name, stage)
        self.fc = nn.Linear(current, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(
    depth: int, *, width: float = 1.0, num_classes: int = 10, in_channels: int = 3, shortcut: str = "pad"
) -> ResNet:
    """Return the CIFAR ResNet of `depth` = 6n + 2 layers (section 4.2): stages of 16, 32, 64 channels, n blocks each.

    `shortcut`: "pad" is option A without parameters (ResNet-20: 269,722; ResNet-56: 853,018 parameters), "conv" is
    option B, a 1x1 convolution where the shape changes. Raises ModelError for another shortcut or depth.
    """
    if shortcut not in SHORTCUTS:
        hint = nearest(str(shortcut), SHORTCUTS)
        raise ModelError(f"shortcut is {shortcut!r}; expected one of {', '.join(SHORTCUTS)}{hint}")
    if depth < 8 or depth % 6 != 2:
        raise ModelError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...), not {depth}")
    return ResNet(
        BasicBlock,
        [(depth - 2) // 6] * 3,
        [scaled(c, width) for c in (16, 32, 64)],
        num_classes=num_classes,
        in_channels=in_channels,
        shortcut=shortcut,
        large_stem=False,
    )


def imagenet_resnet(
    depth: int, *, width: float = 1.0, num_classes: int = 1000, in_channels: int = 3, stem: str = "large"
) -> ResNet:
    """Return the ImageNet ResNet-18 (11,689,512 parameters) or ResNet-50 (25,557,032), loadable from torchvision's.

    `stem`: "large" is a 7x7 convolution and pooling, "small" the single 3x3 convolution that CIFAR and Tiny ImageNet
    papers put in its place. Raises ModelError for another stem or depth.
    """
    if stem not in STEMS:
        raise ModelError(f"stem is {stem!r}; expected one of {', '.join(STEMS)}{nearest(str(stem), STEMS)}")
    plans: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
        18: (BasicBlock, (2, 2, 2, 2)),
        50: (Bottleneck, (3, 4, 6, 3)),
    }
    if depth not in plans:
        raise ModelError(f"an ImageNet ResNet of {depth} layers is not built here; expected 18 or 50")
    block, blocks = plans[depth]
    return ResNet(
        block,
        blocks,
        [scaled(c, width) for c in (64, 128, 256, 512)],
        num_classes=num_classes,
        in_channels=in_channels,
        shortcut="conv",
        large_stem=stem == "large",
    )
