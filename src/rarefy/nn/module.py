"""What sparse layers share: kept values as the parameter, their indices as buffers, and how both are saved and changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import OptionError
from rarefy.kernels.sampling import sample
from rarefy.nn.topology import Move, compress, flat_positions, problem, replace_, rows_of

_INDEX = ("values", "crow", "col")


class SparseModule(nn.Module):
    """A layer whose weight exists only where it is kept.

    Attributes:
        values: the parameter, float [nnz]; gradients and optimizer state have its shape.
        crow: buffer, int64 [rows + 1]; the kept weights of row r are values[crow[r] : crow[r + 1]].
        col: buffer, int32 [nnz]; their columns in the weight flattened to [rows, cols], ascending within a row.
        bias: parameter [rows], or None.

    The state dict holds all four. Loading one of another topology changes this layer's, also its number of kept weights;
    loading a dense `weight` takes its entries at the kept positions. There is no `weight` attribute: see `dense_weight`.
    """

    values: nn.Parameter
    crow: Tensor
    col: Tensor
    bias: nn.Parameter | None

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape that the dense weight would have."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        return self.weight_shape[0]

    @property
    def cols(self) -> int:
        return math.prod(self.weight_shape[1:])

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / math.prod(self.weight_shape)

    def positions(self) -> Tensor:
        """Return the kept weights' positions in the flattened weight, ascending; int64 [nnz]."""
        return flat_positions(self.crow, self.col, self.cols)

    def row_indices(self) -> Tensor:
        """Return the output unit of every kept weight; int64 [nnz]."""
        return rows_of(self.crow, self.nnz)

    def mask(self) -> Tensor:
        """Return a bool tensor of the dense weight's shape; True = kept."""
        flat = torch.zeros(math.prod(self.weight_shape), dtype=torch.bool, device=self.crow.device)
        flat[self.positions()] = True
        return flat.view(self.weight_shape)

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense tensor, detached."""
        flat = self.values.new_zeros(math.prod(self.weight_shape))
        flat[self.positions()] = self.values.detach()
        return flat.view(self.weight_shape)

    def _repr_kept(self) -> str:
        return f"nnz={self.nnz}, sparsity={self.sparsity:.6g}, bias={self.bias is not None}"

    # --- making and changing it -------------------------------------------------------------------------------------

    def _set_weight(self, values: Tensor, positions: Tensor, requires_grad: bool = True) -> None:
        """Take these values at these ascending positions as the weight."""
        if self.cols >= 1 << 31:
            raise OptionError(f"{type(self).__name__}: a weight of {self.cols} columns; indices reach to 2^31 - 1.")
        crow, col = compress(positions, self.rows, self.cols)
        self.register_buffer("crow", crow.to(values.device))
        self.register_buffer("col", col.to(values.device))
        self.values = nn.Parameter(values, requires_grad=requires_grad)

    def _draw(
        self, sparsity: float, bias: bool, generator: torch.Generator | None, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Choose the kept weights at random, and the weights as dense layers do with as many inputs."""
        if isinstance(sparsity, bool) or not 0 <= sparsity < 1:
            raise OptionError(f"sparsity={sparsity!r} must be a number in [0, 1).")
        numel = math.prod(self.weight_shape)
        kept = math.floor((1 - sparsity) * numel + 0.5)
        if kept == 0:
            raise OptionError(f"sparsity={sparsity} leaves none of {list(self.weight_shape)} weights; lower it.")
        positions = sample(numel, kept, generator).sort().values
        crow, _ = compress(positions, self.rows, self.cols)
        bound = crow.diff().clamp(min=1).rsqrt()[rows_of(crow, kept)]
        values = torch.empty(kept).uniform_(-1, 1, generator=generator).mul_(bound)
        self._set_weight(values.to(device=device, dtype=dtype or torch.get_default_dtype()), positions)
        if bias:
            limit = 1 / math.sqrt(self.cols)
            start = torch.empty(self.rows).uniform_(-limit, limit, generator=generator)
            self.bias = nn.Parameter(start.to(self.values))
        else:
            self.register_parameter("bias", None)

    @torch.no_grad()
    def rewire_(self, positions: Tensor) -> Move:
        """Keep exactly these ascending positions, in place: a weight that stays keeps its value, a new one is 0.

        The parameter stays the same object; `.grad` follows it. Returns the move, for what else is kept per weight.
        """
        positions = positions.to(self.crow.device).contiguous()
        move = Move(self.positions(), positions)
        grad = self.values.grad
        self.values.grad = None
        replace_(self.values, move.carry(self.values.detach()))
        self.values.grad = None if grad is None else move.carry(grad)
        self._set_index(*compress(positions, self.rows, self.cols))
        return move

    def _set_index(self, crow: Tensor, col: Tensor) -> None:
        self.crow.copy_(crow)
        if col.shape == self.col.shape:
            self.col.copy_(col)
        else:
            self.col = col.to(self.col.device)

    # --- loading ----------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = dict(state_dict)
        dense = state.get(f"{prefix}weight")
        if isinstance(dense, Tensor) and f"{prefix}values" not in state:
            if tuple(dense.shape) != self.weight_shape:
                error_msgs.append(f"{prefix}weight is {list(dense.shape)}; this layer's is {list(self.weight_shape)}.")
                return
            state |= self._from_dense(prefix, state.pop(f"{prefix}weight"))
        parts = [state.get(prefix + name) for name in _INDEX]
        if all(isinstance(part, Tensor) for part in parts):
            values, crow, col = (part for part in parts if isinstance(part, Tensor))
            if wrong := problem(values, crow, col, self.rows, self.cols):
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {wrong}.")
                return
            if values.shape != self.values.shape:
                self.values.grad = None
                with torch.no_grad():
                    replace_(self.values, self.values.new_zeros(values.shape))
                self.col = self.col.new_zeros(col.shape)
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _from_dense(self, prefix: str, weight: Tensor) -> dict[str, Tensor]:
        kept = weight.reshape(-1)[self.positions().to(weight.device)]
        lost = int(weight.count_nonzero()) - int(kept.count_nonzero())
        if lost:
            warnings.warn(
                f"{prefix}weight holds {lost:,} non-zero weights where this layer keeps none: they were left out.",
                stacklevel=2,
            )
        return {f"{prefix}values": kept, f"{prefix}crow": self.crow, f"{prefix}col": self.col}
