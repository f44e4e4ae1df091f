"""Keep dropped weights at exactly zero."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.native import native, threads

_BITS = {
    torch.float32: torch.uint32,
    torch.float64: torch.uint64,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.uint16,
}


def apply_mask_(weight: Tensor, mask: Tensor) -> Tensor:
    """Set `weight` to exactly 0.0 where `mask` is False, in place, and return it.

    `weight` is a floating-point tensor, `mask` bool of the same shape on the same device. A dropped NaN or infinity
    becomes 0.0 too, which `weight.mul_(mask)` would not do. Autograd does not see the change.
    Raises OptionError when shape, dtype or device do not fit.

    >>> apply_mask_(torch.tensor([1.0, -2.0]), torch.tensor([True, False])).tolist()
    [1.0, 0.0]
    """
    if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
        raise OptionError(
            f"the mask of a weight of shape {list(weight.shape)} on {weight.device} must be bool, "
            f"of that shape and on that device; this one is {mask.dtype} of shape {list(mask.shape)} on {mask.device}"
        )
    with torch.no_grad():
        if weight.device.type != "cpu" or weight.dtype not in _BITS or not weight.is_contiguous():
            return reference.apply_mask_(weight, mask)
        flat = weight.detach().view(-1).view(_BITS[weight.dtype])
        native.zero_out(flat.numpy(), mask.contiguous().view(-1).view(torch.uint8).numpy(), threads())
    return weight
