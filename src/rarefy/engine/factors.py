"""What the gradient of a linear or convolution weight is made of: inputs and output gradients, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.utils.hooks import RemovableHandle

from rarefy.engine.distributed import active, average
from rarefy.engine.passes import Passes
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


def watch_module(module: nn.Module, parameter: nn.Parameter, passes: Passes[Factors]) -> RemovableHandle:
    """Show `passes` the factors of every use of a dense Linear or Conv2d module; the handle ends the watch."""

    def used(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if passes.open and output.requires_grad and parameter.requires_grad:
            x = (args[0] if args else kwargs["input"]).detach()
            output.register_hook(lambda dy: passes.see(_factors(module, x, dy.detach()), parameter.grad))

    return module.register_forward_hook(used, with_kwargs=True)


def _factors(module: nn.Module, x: Tensor, dy: Tensor) -> Factors:
    # copies: the memory may be used again before the optimizer steps
    if not isinstance(module, nn.Conv2d):
        return Factors(x.reshape(-1, x.shape[-1]).clone(), dy.reshape(-1, dy.shape[-1]).clone())
    padding: Any = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
    x, dy = (t if t.dim() == 4 else t[None] for t in (x, dy))
    geometry = (list(module.weight.shape), list(module.stride), list(padding), list(module.dilation), module.groups)
    return Factors(x.clone(), dy.clone(), geometry)


BY = ("uniform", "grabo", "graest")


def draw(
    parts: Sequence[Factors], shape: Sequence[int], groups: int, count: int, by: str, generator: torch.Generator
) -> Tensor:
    """Draw `count` connections of a weight, with replacement; return the ascending flat places of the different ones.

    Connection (o, i) comes with a probability proportional to f_o g_i of `margins`, or with the same for all
    ("uniform"). `parts` are this rank's; every rank must ask, and all get the same. Heddes et al. 2024, arXiv 2401.06898.
    """
    rows, cols = shape[0], math.prod(shape[1:])
    if by == "uniform":
        return torch.randint(rows * cols, (count,), generator=generator).unique()
    signs = None
    if by == "graest":  # one seed for all, so that generators stay in step; other signs on every rank
        seed = int(torch.randint(1 << 62, (1,), generator=generator))
        signs = torch.Generator().manual_seed(seed + (dist.get_rank() if active() else 0))
    f, g = margins(parts, signs, rows, (groups, cols))
    f, g = average(f).abs().cpu(), average(g).abs().cpu()
    group = torch.arange(rows) // (rows // groups)
    outputs = _draw_from((f * g.sum(1)[group])[None], torch.zeros(count, dtype=torch.int64), generator)
    return (outputs * cols + _draw_from(g, group[outputs], generator)).unique()


def _draw_from(weights: Tensor, row: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for every entry of `row` a column, in proportion to the weights of that row."""
    edges = weights.cumsum(1)
    edges = edges / edges[:, -1:].clamp(min=torch.finfo(edges.dtype).tiny)
    chance = torch.rand(row.shape, generator=generator, dtype=edges.dtype)
    column = torch.searchsorted((edges + torch.arange(len(edges))[:, None]).view(-1), row + chance, right=True)
    return (column - row * weights.shape[1]).clamp_(max=weights.shape[1] - 1)


def margins(
    parts: Sequence[Factors], signs: torch.Generator | None, rows: int, inputs: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return f [rows] and g [groups, inputs of a group], float64, whose product stands for the gradient: f_o g_i.

    Without signs ("grabo") f_o = sum_b |delta_bo| and g_i = sum_b |a_bi|, so that f_o g_i is at least |gradient_oi|. With
    signs s_b = +-1 ("graest"), drawn independently for every sample b, the signed sums sum_b s_b delta_bo and
    sum_b s_b a_bi: the mean of their product over draws is the gradient itself. Signed, so that ranks can be averaged.
    """
    device = parts[0].x.device if parts else torch.device("cpu")
    f, g = (torch.zeros(size, dtype=torch.float64, device=device) for size in ((rows,), inputs))
    for part in parts:
        a, delta = part.samples(torch.promote_types(part.x.dtype, torch.float32))
        if signs is None:
            a, delta = a.abs(), delta.abs()
        else:
            s = torch.randint(2, (len(delta), 1), generator=signs).to(delta) * 2 - 1
            a, delta = a * s[:, None], delta * s
        f += delta.sum(0, dtype=f.dtype)
        g += a.sum(0, dtype=g.dtype)
    return f, g
