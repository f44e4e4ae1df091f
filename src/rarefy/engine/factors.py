"""What the gradient of a linear or convolution weight is made of: inputs and output gradients, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from rarefy.nn.topology import compress

TILE = 1024  # columns of a product that stay in the cache; entries that are looked at together


class Factors(NamedTuple):
    """One use of a weight in one backward pass.

    x [n, in], dy [n, out] and no geometry for a linear layer; for a convolution x [n, in, h, w], already padded where its
    padding is not zeros, dy [n, out, h', w'], and (weight shape, stride, padding, dilation, groups).
    """

    x: Tensor
    dy: Tensor
    geometry: tuple[Any, ...] = ()

    @property
    def numel(self) -> int:
        return self.x.numel() + self.dy.numel()

    @property
    def groups(self) -> int:
        return int(self.geometry[4]) if self.geometry else 1

    def samples(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a [m, groups, inputs of one output] and delta [m, out], so that the gradient is the sum of delta_o a_i.

        A convolution's patches are its samples: every place of every image is one.
        """
        if not self.geometry:
            return self.x.to(dtype)[:, None], self.dy.to(dtype)
        shape, stride, padding, dilation, groups = self.geometry
        patches = F.unfold(self.x.to(dtype), shape[2:], dilation, padding, stride)  # [n, in * kernel, places]
        a = patches.transpose(1, 2).reshape(-1, groups, patches.shape[1] // groups)
        return a, self.dy.to(dtype).flatten(2).transpose(1, 2).reshape(-1, shape[0])

    def add_rows(self, block: Tensor, low: int, high: int, times: float = 1.0) -> None:
        """Add rows [low, high) of the dense weight's gradient, `times` over, to `block`."""
        x, dy = self.x, self.dy
        if not self.geometry:
            left = dy[:, low:high].T.contiguous()
            if x.dtype == block.dtype:
                step = TILE if x.shape[1] > 16 * TILE else x.shape[1]
                for first in range(0, x.shape[1], step):
                    block[:, first : first + step].addmm_(left, x[:, first : first + step], alpha=times)
            else:  # autocast
                block.add_(left @ x, alpha=times)
            return
        (rows, inputs, *kernel), stride, padding, dilation, groups = self.geometry
        if high - low < rows:
            group = low // (rows // groups)
            x, groups = x[:, group * inputs : (group + 1) * inputs], 1
            dy = dy[:, low:high]
        shape = (high - low, inputs, *kernel)
        found = conv2d_weight(x, shape, dy, stride, padding, dilation, groups).reshape(high - low, -1)
        block.add_(found, alpha=times)

    def at(self, positions: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """Return the gradient at these ascending places of the flattened weight [rows, cols], in their order."""
        crow, col = compress(positions, rows, cols)
        x, dy = self.x.to(dtype).contiguous(), self.dy.to(dtype).contiguous()
        if not self.geometry:
            return torch.ops.rarefy.sparse_linear_values_gradient(x, dy, crow, col)
        shape, *geometry = self.geometry
        return torch.ops.rarefy.sparse_conv2d_values_gradient(x, dy, crow, col, list(shape), *geometry)


def margins(parts: Sequence[Factors], signs: torch.Generator | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return f [out] and g [groups, inputs], whose product stands for |gradient|: f_o g_i.

    Without signs f_o = sum_b |delta_bo| and g_i = sum_b |a_bi|, so that f_o g_i is at least |gradient_oi|. With signs
    s_b = +-1, drawn independently for every sample, the signed sums sum_b s_b delta_bo and sum_b s_b a_bi: the mean of
    their product over draws is the gradient itself. (Signed: take the absolute value after averaging over ranks.)
    """
    f = g = torch.zeros(())
    for part in parts:
        a, delta = part.samples(dtype)
        if signs is None:
            a, delta = a.abs(), delta.abs()
        else:
            s = torch.randint(2, (len(delta), 1), generator=signs).to(delta) * 2 - 1
            a, delta = a * s[:, None], delta * s
        f, g = f + delta.sum(0), g + a.sum(0)
    return f, g
