"""Linear layers whose weight keeps N in every run of M inputs (N:M): kept values in tiles, forward and backward.

The weight [out, in] is cut into tiles of 16 x 16; M divides 16, so every output keeps N * 16 / M weights of a tile, and a tile
is that many *steps* of one weight for each output. A transposable mask (every M x M tile keeps N in each row and each column)
makes every step a permutation of the tile's inputs: then one packed copy serves y = x W^T and dx = dy W alike, and the gradient
of the values as well. `csrc/n_m.hpp` has the layout. On the CPU float32 runs natively (bfloat16 and float16 by way of it),
everything else on the references.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.errors import OptionError, PatternError
from rarefy.kernels import n_m_ops as ops
from rarefy.kernels import reference
from rarefy.kernels.native import cpu_empty, native, threads
from rarefy.kernels.planes import Layer, _array, _known, _said

__all__ = ["TILE", "NMIndex", "n_m_dense", "n_m_gather", "n_m_index", "n_m_linear", "n_m_linear_layer", "n_m_steps"]

TILE = ops.TILE
_FULL = 0.85  # of the places in a tile's steps: below, a weight is not N:M but merely sparse


@dataclass(frozen=True, eq=False)
class NMIndex:
    """Where the kept weights of an N:M weight stand. Made by `n_m_index`.

    Attributes:
        index: int32 [row tiles, column tiles, ceil(steps / 4), 16]; four bits a step for either direction.
        used: int16 [row tiles, column tiles, steps]; bit r tells whether output r has a weight in this step.
        shape: (out, in) of the dense weight.
        transposable: whether every step is a permutation, so that the same copy serves the input's gradient. Without it,
            the input's gradient runs on the unstructured kernel.

    Values are float [row tiles, column tiles, steps, 16] (`values_shape`), zero where a place is not used.
    """

    index: Tensor
    used: Tensor
    shape: tuple[int, int]
    transposable: bool

    @property
    def steps(self) -> int:
        return self.used.shape[2]

    @property
    def values_shape(self) -> tuple[int, int, int, int]:
        return (*self.used.shape, TILE)

    def mask(self) -> Tensor:
        """Return the mask, bool [out, in]."""
        return reference.n_m_mask(self.index, self.used, *self.shape)

    def to(self, device: torch.device | str) -> NMIndex:
        """Return it with its tensors on a device."""
        return NMIndex(self.index.to(device), self.used.to(device), self.shape, self.transposable)


def n_m_index(mask: Tensor, n: int, m: int, *, transposable: bool = False) -> NMIndex:
    """Return the index of a mask that keeps at most n in every run of m inputs.

    Args:
        mask: bool [out, in], True = kept; out and in need not be multiples of 16.
        n, m: of the pattern; m is 2, 4, 8 or 16, 1 <= n <= m.
        transposable: also keep the way back. At most n of every m outputs may then be kept per input.

    Raises:
        OptionError: n or m is none of these, or the mask is not bool [out, in].
        PatternError: the mask keeps more than n of m somewhere.

    >>> mask = torch.tensor([[True, False], [False, True]]).repeat(8, 8)
    >>> index = n_m_index(mask, 1, 2, transposable=True)
    >>> index.steps, bool((index.mask() == mask).all())
    (8, True)
    """
    if m not in (2, 4, 8, 16) or not 1 <= n <= m:
        raise OptionError(f"{n}:{m} has no N:M kernel: M must be 2, 4, 8 or 16, and 1 <= N <= M; use sparse_linear")
    if mask.dtype != torch.bool or mask.dim() != 2 or 0 in mask.shape:
        raise OptionError(f"n_m_index: the mask must be bool [out, in], not {mask.dtype} {list(mask.shape)}")
    for dim, what in ((1, "inputs"), (0, "outputs"))[: 1 + transposable]:
        most = _most_of(mask, m, dim)
        if most > n:
            also = f", as a transposable {n}:{m} needs" if dim == 0 else ""
            raise PatternError(
                f"n_m_index: mask {list(mask.shape)} keeps {most} of {m} {what} somewhere, not {n}{also}"
            )
    return index_of_tiles(mask, n * (TILE // m), transposable)


def n_m_steps(mask: Tensor) -> int | None:
    """Return how many steps a tile of this mask [out, in] takes if it is N:M along its inputs for some M, else None.

    That is: no output keeps more in 16 inputs than nearly all of them keep (85 % of the places are used), and not all are kept.

    >>> n_m_steps(torch.tensor([[True, False, False, False]]).repeat(16, 8))
    4
    """
    steps = _most_of(mask, TILE, 1)
    kept = int(mask.sum())
    places = steps * mask.shape[0] * (mask.shape[1] / TILE)
    return steps if 0 < steps < TILE and kept >= _FULL * places else None


def n_m_gather(weight: Tensor, index: NMIndex) -> Tensor:
    """Return the kept values of a dense weight [out, in], in the layout of the kernels; differentiable.

    Raises OptionError where the weight does not have the shape, or lies on another device.
    """
    if tuple(weight.shape) != index.shape or weight.device != index.index.device:
        raise OptionError(
            f"n_m_gather: the weight is {list(weight.shape)} on {weight.device}; the index is for {list(index.shape)} "
            f"on {index.index.device}"
        )
    values: Tensor = torch.ops.rarefy.n_m_gather(weight, index.index, index.used)
    return values


def n_m_dense(values: Tensor, index: NMIndex) -> Tensor:
    """Return the dense weight [out, in] with zeros where nothing is kept; differentiable.

    Raises OptionError as `n_m_linear` does.
    """
    _check_values("n_m_dense", values, index)
    weight: Tensor = torch.ops.rarefy.n_m_scatter(values, index.index, index.used, *index.shape)
    return weight


def n_m_linear(
    x: Tensor, values: Tensor, index: NMIndex, bias: Tensor | None = None, *, straight_through: Tensor | None = None
) -> Tensor:
    """Return x W^T + bias for an N:M weight W: x [..., in] -> [..., out], in the dtype of x; differentiable.

    Args:
        x, values, bias: of one float dtype and device (under autocast: are cast to it); `values` as `n_m_gather` gives them.
        straight_through: the dense weight [out, in] that the values were gathered from. The gradient then goes to all of
            it, as if nothing were masked (a dense product), and none goes to `values`. A gradient of that gradient takes
            the kept values for constants.

    Raises OptionError where shapes, dtypes or devices do not fit.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, values = x.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        straight_through = None if straight_through is None else straight_through.to(dtype)
    out, inside = index.shape
    _check_values("n_m_linear", values, index)
    if x.shape[-1] != inside or x.dtype != values.dtype or x.device != values.device:
        raise OptionError(
            f"n_m_linear: x is {x.dtype} {list(x.shape)} on {x.device}; with values of {values.dtype} on {values.device} and "
            f"{inside} inputs it must be {values.dtype} [..., {inside}] there"
        )
    if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != x.dtype or bias.device != x.device):
        raise OptionError(f"n_m_linear: the bias must be {x.dtype} [{out}]; it is {bias.dtype} {list(bias.shape)}")
    flat, index_tensors = x.reshape(-1, inside), (index.index, index.used)
    if straight_through is None:
        y = torch.ops.rarefy.n_m_linear(flat, values, *index_tensors, bias, out, index.transposable)
    else:
        if tuple(straight_through.shape) != index.shape or straight_through.dtype != x.dtype:
            raise OptionError(
                f"n_m_linear: straight_through must be the dense weight, {x.dtype} {list(index.shape)}; it is "
                f"{straight_through.dtype} {list(straight_through.shape)}"
            )
        y = torch.ops.rarefy.n_m_linear_straight(
            flat, values.detach(), *index_tensors, bias, straight_through, index.transposable
        )
    result: Tensor = y.view(*x.shape[:-1], out)
    return result


def n_m_linear_layer(
    weight: Tensor, bias: Tensor | None, *, tokens: int = 1, act: str = "none", steps: int | None = None
) -> Layer:
    """Linear layer of a native network, with an N:M `weight` [out, in], for samples of [tokens, in].

    `steps`: as `n_m_steps` tells. Raises OptionError where the weight is not N:M (for any M that divides 16).
    """
    weight = weight.detach().to("cpu", torch.float32)
    mask = weight != 0
    steps = n_m_steps(mask) if steps is None else steps
    if steps is None:
        raise OptionError(
            f"n_m_linear_layer: this weight {list(weight.shape)} does not keep N in every run of M inputs"
        )
    index = index_of_tiles(mask, steps, False)
    values = n_m_gather(weight, index)
    with _said("n_m_linear_layer"):
        return native.NMLinear(
            *index.shape, steps, values.reshape(-1).numpy(), index.index.reshape(-1).numpy(), tokens, _array(bias), _known(act)
        )  # fmt: skip


def index_of_tiles(mask: Tensor, steps: int, transposable: bool) -> NMIndex:
    """Return the index of a mask of which every tile of 16 x 16 keeps at most `steps` in a row, and transposable in a column.

    That is all that the kernels need; `n_m_index` also checks the pattern. Made on the CPU. Raises PatternError.
    """
    rows, cols = (-(-size // TILE) for size in mask.shape)
    index = cpu_empty(rows, cols, -(-steps // 4), TILE, dtype=torch.int32)
    used = cpu_empty(rows, cols, steps, dtype=torch.int16)
    bools = mask.detach().cpu().contiguous().view(torch.uint8).numpy()
    fits = native.n_m_index(bools, steps, transposable, index.view(-1).numpy(), used.view(-1).numpy(), threads())
    if not fits:
        raise PatternError(f"mask {list(mask.shape)}: a tile of 16 x 16 keeps more than {steps} in a row or column")
    return NMIndex(index, used, (mask.shape[0], mask.shape[1]), transposable).to(mask.device)


def _most_of(mask: Tensor, m: int, dim: int) -> int:
    """Most kept in any run of m neighbours along a dimension; the last run may be shorter."""
    runs = mask if dim == 1 else mask.t()
    missing = -runs.shape[1] % m
    padded = torch.nn.functional.pad(runs, (0, missing)) if missing else runs
    return int(padded.reshape(runs.shape[0], -1, m).sum(2, dtype=torch.uint8).max())


def _check_values(what: str, values: Tensor, index: NMIndex) -> None:
    if tuple(values.shape) != index.values_shape or not values.dtype.is_floating_point:
        raise OptionError(
            f"{what}: values must be floats {list(index.values_shape)} for a weight {list(index.shape)}; they are "
            f"{values.dtype} {list(values.shape)}"
        )
    if values.device != index.index.device:
        raise OptionError(f"{what}: the values are on {values.device}, the index is on {index.index.device}")
