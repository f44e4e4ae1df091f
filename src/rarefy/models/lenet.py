"""LeNet-300-100 and LeNet-5, the two small nets of the pruning literature (LeCun et al. 1998; Han et al. 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import ModelError
from rarefy.models._parts import scaled


class LeNet300(nn.Module):
    """Classify images with two hidden layers of 300 and 100 ReLU units; 266,610 parameters on 28x28 digits.

    Input float [batch, in_channels, image_size, image_size], or anything that flattens to the same length;
    output logits [batch, num_classes]. Initialised as PyTorch does (the papers do not say).
    """

    def __init__(
        self, *, width: float = 1.0, num_classes: int = 10, in_channels: int = 1, image_size: int = 28
    ) -> None:
        super().__init__()
        first, second = scaled(300, width), scaled(100, width)
        self.fc1 = nn.Linear(in_channels * image_size**2, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class LeNet5(nn.Module):
    """Classify images with 20 and 50 filters of 5x5 and 500 hidden units; 431,080 parameters on 28x28 digits.

    Caffe's variant, which the pruning papers count: max pooling, and a ReLU after the hidden linear layer only. Input
    float [batch, in_channels, image_size, image_size] with image_size >= 16, output logits [batch, num_classes].
    Initialised as PyTorch does. Raises ModelError for smaller images.
    """

    def __init__(
        self, *, width: float = 1.0, num_classes: int = 10, in_channels: int = 1, image_size: int = 28
    ) -> None:
        super().__init__()
        if image_size < 16:
            raise ModelError(f"lenet-5 pools twice and needs images of at least 16x16, not {image_size}x{image_size}")
        first, second, hidden = scaled(20, width), scaled(50, width), scaled(500, width)
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * side**2, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))
