"""How close two images are: PSNR, and the luma that super-resolution papers measure it on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rarefy.errors import OptionError


def luma(rgb: Tensor) -> Tensor:
    """Return the Y channel of YCbCr (ITU-R BT.601, studio range as MATLAB's rgb2ycbcr), in [16, 235] / 255.

    Args:
        rgb: [..., 3, height, width], in [0, 1].

    Returns:
        [..., 1, height, width]: (65.481 R + 128.553 G + 24.966 B + 16) / 255.
    """
    if rgb.dim() < 3 or rgb.shape[-3] != 3:
        raise OptionError(f"luma takes images [..., 3, height, width]; these are {list(rgb.shape)}.")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=rgb.dtype, device=rgb.device).view(3, 1, 1)
    return ((rgb * weights).sum(-3, keepdim=True) + 16) / 255


def psnr(images: Tensor, targets: Tensor, *, border: int = 0) -> float:
    """Return the peak signal-to-noise ratio in dB, averaged over the images: -10 log10 of each one's mean squared error.

    Args:
        images, targets: [n, channels, height, width], peak 1. Papers on super-resolution pass `luma` of both, and a
            border as wide as the scale.
        border: pixels at each side that are left out.

    Returns:
        dB; infinity where an image equals its target.

    Example:
        >>> round(psnr(torch.full((1, 1, 4, 4), 0.6), torch.full((1, 1, 4, 4), 0.5)), 3)
        20.0
    """
    if images.shape != targets.shape or images.dim() != 4:
        raise OptionError(
            f"psnr takes two tensors [n, channels, height, width] of one shape; these are {list(images.shape)} and "
            f"{list(targets.shape)}."
        )
    if not 0 <= 2 * border < min(images.shape[2:]):
        raise OptionError(f"border={border} leaves nothing of images of {list(images.shape[2:])} pixels.")
    inner = (slice(None), slice(None), *(slice(border, size - border) for size in images.shape[2:]))
    errors = (images[inner].double() - targets[inner].double()).square().flatten(1).mean(1)
    return sum(math.inf if e == 0 else -10 * math.log10(e) for e in errors.tolist()) / len(errors)
