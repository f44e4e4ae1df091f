"""The naive truth of every kernel, in plain PyTorch: slow, short, and what the fast versions are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import grad


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bits: entry i is bit i % 8 of byte i // 8."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_mask`."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.reshape(-1)[: math.prod(shape)].bool().view(tuple(shape))


def select_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the k largest of scores [n], or of each row of scores [rows, n]; ties go to the lower index."""
    rows = scores if scores.dim() == 2 else scores[None]
    order = rows.sort(dim=1, descending=True, stable=True).indices
    counts = torch.as_tensor(k, device=scores.device).reshape(-1, 1).expand(rows.shape[0], 1)
    first = torch.arange(rows.shape[1], device=scores.device)[None] < counts
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, first).view(scores.shape)


def apply_mask_(weight: Tensor, mask: Tensor) -> Tensor:
    """Zero `weight` in place where `mask` is False."""
    return weight.masked_fill_(~mask, 0)


def capped_simplex(a: Tensor, c: Tensor, k: Tensor) -> Tensor:
    """u = clip(mu a - c, 0, 1) with sum k (one per row): sort the breakpoints, search among them, solve the last segment."""
    a, c, wanted = a.double(), c.double(), k.double().reshape(-1, 1)
    live = a > 0
    points = (
        torch.cat([c / a, (1 + c) / a], dim=1).masked_fill(~torch.cat([live, live], dim=1), torch.inf).sort(1).values
    )
    low = torch.zeros(
        a.shape[0], 1, dtype=torch.int64, device=a.device
    )  # the last breakpoint where the sum is at most k
    high = torch.full_like(low, points.shape[1])
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        p = points.gather(1, middle)
        reached = torch.where(p.isinf(), torch.inf, (p.nan_to_num(posinf=0.0) * a - c).clamp(0, 1).sum(1, keepdim=True))
        low, high = torch.where(reached <= wanted, middle, low), torch.where(reached <= wanted, high, middle)
    at = points.gather(1, low).nan_to_num(posinf=0.0)
    full, between = live & ((1 + c) / a <= at), live & (c / a <= at) & ((1 + c) / a > at)
    slope, offset = torch.where(between, a, 0).sum(1, keepdim=True), torch.where(between, c, 0).sum(1, keepdim=True)
    mu = torch.where(slope > 0, (wanted - full.sum(1, keepdim=True) + offset) / slope, at)
    u = (mu * a - c).clamp(0, 1) if a.numel() else a
    return torch.where(live.sum(1, keepdim=True) <= wanted, live.double(), u)


# --- sparse weights as compressed rows: crow int64 [M + 1], col int32 [nnz] over the flattened weight [M, K] ---------------


def rows_of(crow: Tensor, nnz: int) -> Tensor:
    """Return the row of each nonzero, int64 [nnz]."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff(), output_size=nnz)


def _chunks(n: int, nnz: int) -> list[slice]:
    """Cut n samples so that a chunk times the nonzeros stays small."""
    step = max(1, (1 << 22) // max(nnz, 1))
    return [slice(i, i + step) for i in range(0, n, step)]


def sparse_linear(x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, K] -> [n, M]: add up value * x[col] for each row."""
    y = x.new_zeros(x.shape[0], crow.shape[0] - 1)
    rows = rows_of(crow, col.shape[0])
    for part in _chunks(x.shape[0], col.shape[0]):
        y[part].index_add_(1, rows, x[part, col.long()] * values)
    return y if bias is None else y + bias


def sparse_linear_input_gradient(dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, in_features: int) -> Tensor:
    """dy [n, M] -> dx [n, K]: the product with the transposed weight."""
    dx = dy.new_zeros(dy.shape[0], in_features)
    rows = rows_of(crow, col.shape[0])
    for part in _chunks(dy.shape[0], col.shape[0]):
        dx[part].index_add_(1, col.long(), dy[part, rows] * values)
    return dx


def sparse_linear_values_gradient(x: Tensor, dy: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """x [n, K], dy [n, M] -> [nnz]: for each nonzero the dot product of its column of x and its row's dy."""
    out = dy.new_zeros(col.shape)
    rows = rows_of(crow, col.shape[0])
    for part in _chunks(x.shape[0], col.shape[0]):
        out += (x[part, col.long()] * dy[part, rows]).sum(0)
    return out


def _dense(values: Tensor, crow: Tensor, col: Tensor, weight_shape: Sequence[int]) -> Tensor:
    weight = values.new_zeros(weight_shape[0], math.prod(weight_shape[1:]))
    weight[rows_of(crow, col.shape[0]), col.long()] = values
    return weight.view(tuple(weight_shape))


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve with the weight made dense."""
    weight = _dense(values, crow, col, weight_shape)
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)


def sparse_conv2d_input_gradient(
    dy: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    size: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dy -> dx [batch, in, *size], with the weight made dense."""
    weight = _dense(values, crow, col, weight_shape)
    shape = (dy.shape[0], weight_shape[1] * groups, *size)
    return grad.conv2d_input(shape, weight, dy, stride, padding, dilation, groups)


def sparse_conv2d_values_gradient(
    x: Tensor,
    dy: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x, dy -> [nnz]: the dense weight's gradient where it is kept."""
    dense = grad.conv2d_weight(x, tuple(weight_shape), dy, stride, padding, dilation, groups)
    return dense.reshape(weight_shape[0], -1)[rows_of(crow, col.shape[0]), col.long()]


# --- N:M weights in tiles of 16 x 16 (csrc/n_m.hpp): values [R, C, steps, 16], index [R, C, lines, 16], used [R, C, steps] ----


def n_m_places(index: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column in the dense weight of every place, int64 [R, C, 4 lines, 16]; some lie beyond its edges."""
    shifts = torch.arange(0, 16, 4, device=index.device).view(4, 1)
    inputs = (index.long()[:, :, :, None] >> shifts & 15).flatten(2, 3)
    r, c, _, lanes = (torch.arange(size, device=index.device) for size in inputs.shape)
    rows = (16 * r.view(-1, 1, 1, 1) + lanes).expand(inputs.shape)
    return rows, 16 * c.view(1, -1, 1, 1) + inputs


def n_m_used(used: Tensor) -> Tensor:
    """Return whether each place holds a weight, bool [R, C, steps, 16]."""
    return (used.int()[..., None] >> torch.arange(16, device=used.device) & 1).bool()


def n_m_mask(index: Tensor, used: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the mask, bool [out, in]."""
    return n_m_scatter(n_m_used(used).float(), index, used, out_features, in_features) != 0


def n_m_gather(weight: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """weight [out, in] -> values: the weight's entry at every place that is used, zero elsewhere."""
    rows, cols = (place[:, :, : used.shape[2]] for place in n_m_places(index))
    kept = n_m_used(used)
    return torch.where(kept, weight[torch.where(kept, rows, 0), torch.where(kept, cols, 0)], 0)


def n_m_scatter(values: Tensor, index: Tensor, used: Tensor, out_features: int, in_features: int) -> Tensor:
    """values -> weight [out, in]: the other way, zeros where nothing is kept."""
    rows, cols = (place[:, :, : used.shape[2]] for place in n_m_places(index))
    kept = n_m_used(used)
    weight = values.new_zeros(out_features, in_features)
    weight[rows[kept], cols[kept]] = values[kept]
    return weight


def n_m_linear(
    x: Tensor, values: Tensor, index: Tensor, used: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """x [n, in] -> [n, out], with the weight made dense."""
    return torch.nn.functional.linear(x, n_m_scatter(values, index, used, out_features, x.shape[1]), bias)


def n_m_input_gradient(dy: Tensor, values: Tensor, index: Tensor, used: Tensor, in_features: int) -> Tensor:
    """dy [n, out] -> dx [n, in], with the weight made dense."""
    return dy @ n_m_scatter(values, index, used, dy.shape[1], in_features)


def n_m_values_gradient(x: Tensor, dy: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """x, dy -> [R, C, steps, 16]: the dense weight's gradient where it is kept."""
    return n_m_gather(dy.t() @ x, index, used)
