"""Augmentations of whole batches, as tensor code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def crop_flip(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift every image by up to `pad` pixels (black comes in at the border) and mirror half of them.

    The usual augmentation of CIFAR: pad by 4, crop at random, flip left-right with probability 1/2 (He et al. 2016,
    "Deep residual learning", section 4.2). `x` is [B, C, H, W] of any dtype; the result is new memory of the same
    shape. The draws come from the CPU `generator`, whatever the device of `x`.
    """
    count, channels, height, width = x.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator).to(x.device)
    flip = (torch.rand(count, generator=generator) < 0.5).to(x.device)
    padded = x.new_zeros(count, channels, height + 2 * pad, width + 2 * pad)
    padded[:, :, pad : pad + height, pad : pad + width] = x
    # a view of all (2 pad + 1)^2 crops of every image, of which one is copied
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    out = crops[torch.arange(count, device=x.device), :, shifts[0], shifts[1]]
    return torch.where(flip.view(-1, 1, 1, 1), out.flip(-1), out)


AUGMENTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"crop-flip": crop_flip}
