"""Which weights are kept: compressed rows, flat positions, and the way from one topology to another.

A weight is flattened to [rows, cols] (rows = outputs). `crow` int64 [rows + 1] and `col` int32 [nnz], ascending within a
row, say which entries are kept; so do their flat positions row * cols + col, int64 [nnz], ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def compress(positions: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Return (crow, col) of ascending flat positions."""
    crow = torch.zeros(rows + 1, dtype=torch.int64, device=positions.device)
    torch.cumsum(torch.bincount(positions // cols, minlength=rows), 0, out=crow[1:])
    return crow, (positions % cols).to(torch.int32)


def rows_of(crow: Tensor, nnz: int) -> Tensor:
    """Return the row of every kept weight, int64 [nnz]."""
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff(), output_size=nnz)


def flat_positions(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """Return the ascending flat positions of (crow, col)."""
    return rows_of(crow, col.numel()) * cols + col


def problem(values: Tensor, crow: Tensor, col: Tensor, rows: int, cols: int) -> str | None:
    """Say what is wrong with values and indices that came from outside; None when nothing is."""
    if crow.dtype != torch.int64 or tuple(crow.shape) != (rows + 1,):
        return f"crow must be int64 [{rows + 1}], not {crow.dtype} {list(crow.shape)}"
    if col.dtype != torch.int32 or col.dim() != 1 or values.shape != col.shape:
        return (
            f"col must be int32 and as long as values; they are {col.dtype} {list(col.shape)} and {list(values.shape)}"
        )
    if values.is_meta or crow.is_meta or col.is_meta:
        return None
    if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool((crow.diff() < 0).any()):
        return f"crow must rise from 0 to {col.numel()}"
    if col.numel() and (int(col.min()) < 0 or int(col.max()) >= cols):
        return f"col must lie in [0, {cols})"
    if bool((flat_positions(crow, col, cols).diff() <= 0).any()):
        return "col must ascend within each row"
    return None


def union(*parts: Tensor) -> Tensor:
    """Return every position that is in any of the parts, ascending, once."""
    return parts[0] if len(parts) == 1 else torch.cat(parts).unique()


class Move:
    """The way from one topology to another: where each weight kept by the new one lies among those of the old one."""

    def __init__(self, old: Tensor, new: Tensor) -> None:
        if old.numel() == 0:
            self._stays, self._at = torch.zeros_like(new, dtype=torch.bool), torch.zeros_like(new)
        else:
            self._at = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
            self._stays = old[self._at] == new
        self.staying = int(self._stays.sum())
        self.dropped = old.numel() - self.staying
        self.grown = new.numel() - self.staying

    def carry(self, tensor: Tensor, fresh: float = 0.0) -> Tensor:
        """Return per-weight numbers of the old topology in the order of the new one; `fresh` for what has grown."""
        if tensor.numel() == 0:
            return tensor.new_full(self._at.shape, fresh)
        return torch.where(self._stays.to(tensor.device), tensor[self._at.to(tensor.device)], fresh)


def replace_(tensor: Tensor, new: Tensor) -> None:
    """Give a parameter (or another tensor that must stay the same object) new content, of any length."""
    if tensor.shape == new.shape:
        tensor.copy_(new)
        return
    if isinstance(tensor, nn.Parameter):
        # A graph that is still alive knows the old length; a change of dtype makes autograd look at the parameter anew.
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = new
