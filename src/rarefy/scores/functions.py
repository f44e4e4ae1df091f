"""The scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from rarefy.errors import OptionError

SCORES: Mapping[str, str] = MappingProxyType(
    {
        "magnitude": "|w|: large weights matter",
        "random": "uniform noise: a baseline that knows nothing",
        "gradient": "|g|: weights that the loss would move most",
        "snip": "|w g|: what the loss would lose, to first order, without the weight",
        "grasp": "w (H g): how much of the gradient's norm would be lost without the weight; signed",
        "synflow": "|w dR/dw|: the flow through the weight from all inputs to all outputs, without data",
        "lamp": "w^2 over the squares of the weights at least as large: comparable between layers",
    }
)
"""Name -> one line, for every score."""


def magnitude(w: Tensor) -> Tensor:
    """Score a weight by its size: |w|.

    Args:
        w: any shape, floating point.

    Returns:
        Same shape and dtype, without gradient.

    Source: Zhu & Gupta 2017, arXiv 1710.01878.

    Example:
        >>> import torch
        >>> from rarefy.scores import magnitude
        >>> magnitude(torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """
    return w.detach().abs()


def random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Score weights by uniform noise in [0, 1), which makes the kept positions uniformly random.

    Args:
        shape: of the weight.
        generator: a CPU generator; it moves on by one draw per weight. The same state gives the same scores on every
            machine.

    Returns:
        CPU float32 [shape].

    Raises:
        OptionError: the generator lives on another device.

    Source: Liu et al. 2022, arXiv 2202.02643 (random positions at given densities).

    Example:
        >>> import torch
        >>> from rarefy.scores import random
        >>> random([2, 3], torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    if generator.device.type != "cpu":
        raise OptionError(f"random scores for {list(shape)}: the generator is on {generator.device}; pass a CPU one")
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32)


def gradient(g: Tensor) -> Tensor:
    """Score a weight by how strongly the loss pulls at it: |g|.

    Args:
        g: gradient of the loss in the weight, any shape; also at weights that are zero now (RigL's growth score).

    Returns:
        Same shape and dtype.

    Source: Evci et al. 2020 (RigL), arXiv 1911.11134.

    Example:
        >>> import torch
        >>> from rarefy.scores import gradient
        >>> gradient(torch.tensor([0.5, -3.0]))
        tensor([0.5000, 3.0000])
    """
    return g.detach().abs()


def snip(w: Tensor, g: Tensor) -> Tensor:
    """Score a weight by what the loss would change, to first order, without it: |w g|.

    Args:
        w: weight, any shape.
        g: gradient of the loss in w, summed over the batches that score (the absolute value comes after the sum).

    Returns:
        Same shape, no gradient; the dtype both promote to, float32 for half-precision weights (products of small
        numbers underflow there).

    Raises:
        OptionError: w and g differ in shape.

    Source: Lee, Ajanthan & Torr 2019 (SNIP), arXiv 1810.02340, |dL/dm| at m = 1.

    Example:
        >>> import torch
        >>> from rarefy.scores import snip
        >>> snip(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
        tensor([1., 3.])
    """
    return _product("snip", w, g).abs()


def grasp(w: Tensor, hg: Tensor) -> Tensor:
    """Score a weight by what the gradient's norm would lose, to first order, without it: w (H g), signed.

    Removing weight q changes g^T g by -2 w_q (H g)_q + O(w_q^2). Where that product is negative, training would start
    faster without the weight: the smallest scores go first, and no absolute value is taken.

    Args:
        w: weight, any shape.
        hg: the Hessian of the loss times its gradient, in w.

    Returns:
        Same shape, no gradient, of both signs; dtype as for `snip`.

    Raises:
        OptionError: w and hg differ in shape.

    Source: Wang, Zhang & Grosse 2020 (GraSP), arXiv 2002.07376, eq. 8; there S = -w (H g), and the largest are removed.

    Example:
        >>> import torch
        >>> from rarefy.scores import grasp
        >>> grasp(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
        tensor([ 1., -3.])
    """
    return _product("grasp", w, hg)


def synflow(w: Tensor, r: Tensor) -> Tensor:
    """Score a weight by the flow through it from all inputs to all outputs: |w dR/dw|.

    R is the sum of the outputs for an input of ones, in the network with every value replaced by its absolute value. So
    in a chain of linear and ReLU layers without biases a weight's score is the sum, over all paths through it, of the
    products of |w| along them; the scores of each layer add up to R, and what flows into a unit flows out of it.

    Args:
        w: weight, any shape, zero where it is pruned (it then scores 0).
        r: dR/dw, the same shape.

    Returns:
        Same shape, no gradient, not negative; dtype as for `snip`.

    Raises:
        OptionError: w and r differ in shape.

    Source: Tanaka, Kunin, Yamins & Ganguli 2020 (SynFlow), arXiv 2006.05467, eq. 5.

    Example:
        >>> import torch
        >>> from rarefy.scores import synflow
        >>> synflow(torch.tensor([-2.0, 0.0]), torch.tensor([0.5, 3.0]))
        tensor([1., 0.])
    """
    return _product("synflow", w, r).abs()


def lamp(w: Tensor) -> Tensor:
    """Score a weight by its share in the squares of all weights of its layer that are no smaller.

    LAMP(u) = w_u^2 / sum of w_v^2 over v with |w_v| >= |w_u|. The largest weight of every layer scores 1, so scores
    are comparable between layers: kept globally they choose how dense each layer is. Of equal weights the one with the
    lower index counts as the larger. Inside a layer the order is that of |w|.

    Args:
        w: weight of one layer, any shape, floating point, finite (NaN in, NaN out).

    Returns:
        Same shape, values in [0, 1] (0 for zero weights), float32; float64 for float64 weights. Sums run in float64.

    Source: Lee, Park, Mo, Ahn & Shin 2021, arXiv 2010.07611, the definition of the LAMP score.

    Example:
        >>> import torch
        >>> from rarefy.scores import lamp
        >>> lamp(torch.tensor([1.0, -2.0, 2.0]))
        tensor([0.1111, 1.0000, 0.5000])
    """
    flat = w.detach().reshape(-1)
    squares = flat.to(torch.float32 if flat.device.type == "mps" else torch.float64).square()
    order = flat.abs().argsort(descending=True, stable=True)
    ranked = squares[order]
    at_least = ranked.cumsum(0)
    share = ranked / at_least.masked_fill(at_least == 0, 1.0)  # zero weights score 0, also where all are zero
    scores = torch.empty_like(share).scatter_(0, order, share)
    return scores.to(_at_least_float32(flat).dtype).reshape(w.shape)


def _product(name: str, w: Tensor, g: Tensor) -> Tensor:
    if w.shape != g.shape:
        raise OptionError(f"{name}: the weight is {list(w.shape)}, its gradient {list(g.shape)}; pass the same layer's")
    return _at_least_float32(w.detach()) * g.detach()


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
