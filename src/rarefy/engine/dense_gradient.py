"""The largest entries of a dense gradient: held as its factors where those are smaller, and made a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from rarefy import kernels
from rarefy.engine.distributed import active, average, on_any_rank
from rarefy.kernels.watch import watch
from rarefy.nn import SparseModule

BLOCK = 1 << 24  # entries of the gradient that exist at once
_TILE = 1024  # columns of a product that stay in the cache; entries that are looked at together
_Factors = tuple[Tensor, Tensor, tuple[Any, ...]]  # x, dy and a convolution's geometry


class DenseGradient:
    """One optimizer step's dense gradient, of all its backward passes, as `.grad` sums them.

    The operator tells what each pass multiplies: a part is kept as these factors or as their product, whichever is
    smaller. The sum takes it in once the pass has been accumulated, so that `torch.autograd.grad` leaves no trace. It
    begins anew when `.grad` was dropped or zeroed.
    """

    def __init__(self) -> None:
        self._module: SparseModule | None = None
        self._end: Any = None
        self._seen: list[Tensor | _Factors] = []
        self._task = -1
        self._anew = False
        self._left_zero = False
        self.parts: list[Tensor | _Factors] = []

    def watch(self, module: SparseModule | None) -> None:
        """Begin a new sum; None: forget it."""
        self.close()
        self.parts, self._left_zero = [], False
        if module is not None and module.values.requires_grad:
            self._module = module
            self._end = watch(module.crow, self._see)

    def close(self) -> None:
        """Take in nothing more."""
        if self._end is not None:
            self._end()
        self._end, self._module, self._seen = None, None, []

    def _see(self, x: Tensor, dy: Tensor, *geometry: Any) -> None:
        if self._module is None:
            return
        task = torch._C._current_graph_task_id()
        if not self._seen or task != self._task:  # a new pass; what an earlier one left was not accumulated
            self._seen, self._task = [], task
            old = self._module.values.grad
            self._anew = old is None or (not self._left_zero and not bool(old.any()))
        x, dy, rows, cols = x.detach(), dy.detach(), self._module.rows, self._module.cols
        if rows * cols > x.numel() + dy.numel():  # copies: the memory may be used again before the optimizer steps
            self._seen.append((x.clone(), dy.clone(), geometry))
        else:
            whole = self._module.values.detach().new_zeros(rows, cols)
            _add_rows(whole, x, dy, geometry, 0, rows)
            self._seen.append(whole)

    def commit(self, parameter: nn.Parameter) -> None:
        """Take in the pass that was seen last, now that it is part of `parameter.grad`."""
        if self._seen:
            self.parts = self._seen if self._anew else self.parts + self._seen
            self._seen = []
        if self._end is not None:
            self._left_zero = parameter.grad is not None and not bool(parameter.grad.any())

    def usable(self, device: torch.device) -> bool:
        """Whether a finite gradient was collected, on any rank; every rank must ask."""
        found = self.parts
        tensors = [t for part in found for t in ((part,) if isinstance(part, Tensor) else part[:2])]
        overflow = on_any_rank(any(not bool(t.isfinite().all()) for t in tensors), device)
        return on_any_rank(bool(found), device) and not overflow

    def largest(self, module: SparseModule, count: int, besides: Tensor) -> Tensor:
        """Return the ascending flat positions of the `count` largest |entries| outside `besides`; ties: the lowest."""
        device, cols = module.values.device, module.cols
        scores = torch.empty(0, dtype=module.values.dtype, device=device)
        places = torch.empty(0, dtype=torch.int64, device=device)
        least = -0.5
        for first, block in self._blocks(module, besides):
            flat = block.view(-1)
            if scores.numel() == 0 < count < flat.numel():  # the first block: no need to look at more than `count`
                found = kernels.select_k(flat, count).nonzero().squeeze(1)
                found = found[flat[found] > least]
            else:
                found = _above(flat, least)
            scores = torch.cat([scores, flat[found]])
            places = torch.cat([places, found + first * cols])
            if scores.numel() > count:
                chosen = kernels.select_k(scores, count)
                scores, places = scores[chosen], places[chosen]
            if scores.numel() == count:  # what comes later must be larger: ties go to the lowest position
                least = float(scores.min()) if count else float("inf")
        return places

    def largest_in_rows(self, module: SparseModule, counts: Tensor, besides: Tensor) -> Tensor:
        """As `largest`, with one count for each row."""
        found = []
        for first, block in self._blocks(module, besides):
            chosen = kernels.select_k(block, counts[first : first + block.shape[0]])
            found.append(chosen.reshape(-1).nonzero().squeeze(1) + first * module.cols)
        return torch.cat(found)

    def _blocks(self, module: SparseModule, besides: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of rows of |gradient| with their first row; -1 in `besides`."""
        cols = module.cols
        blocks = _row_blocks(module)
        buffer = module.values.detach().new_empty(max(high - low for low, high in blocks), cols)
        for low, high in blocks:
            block = buffer[: high - low].zero_()
            for part in self.parts:
                if isinstance(part, Tensor):
                    block += part[low:high]
                else:
                    _add_rows(block, *part, low, high)
            block = (average(block) if active() else block).abs_()
            ends = torch.tensor([low * cols, high * cols], device=besides.device)
            start, stop = torch.searchsorted(besides, ends).tolist()
            block.view(-1)[besides[start:stop] - low * cols] = -1
            yield low, block


def _above(flat: Tensor, least: float) -> Tensor:
    """Return where `flat` is larger than `least`, ascending; fast where few are."""
    whole = flat.numel() // _TILE * _TILE if least > 0 else 0
    tiles = flat[:whole].view(-1, _TILE)
    rich = (tiles.amax(1) > least).nonzero().squeeze(1)
    tile, entry = (tiles[rich] > least).nonzero(as_tuple=True)
    rest = (flat[whole:] > least).nonzero().squeeze(1)
    return torch.cat([rich[tile] * _TILE + entry, rest + whole])


def _row_blocks(module: SparseModule) -> list[tuple[int, int]]:
    """Cut the rows into blocks; one that is not the whole weight stays within a group of a convolution."""
    rows, step = module.rows, max(1, BLOCK // module.cols)
    if rows <= step:
        return [(0, rows)]
    size = rows // int(getattr(module, "groups", 1))
    return [
        (low, min(low + step, start + size))
        for start in range(0, rows, size)
        for low in range(start, start + size, step)
    ]


def _add_rows(block: Tensor, x: Tensor, dy: Tensor, geometry: tuple[Any, ...], low: int, high: int) -> None:
    """Add rows [low, high) of the dense weight's gradient to `block`."""
    if not geometry:
        left = dy[:, low:high].T.contiguous()
        if x.dtype == block.dtype:
            step = _TILE if x.shape[1] > 16 * _TILE else x.shape[1]
            for first in range(0, x.shape[1], step):
                block[:, first : first + step].addmm_(left, x[:, first : first + step])
        else:  # autocast
            block += left @ x
        return
    (rows, inputs, *kernel), stride, padding, dilation, groups = geometry
    if high - low < rows:
        group = low // (rows // groups)
        x, groups = x[:, group * inputs : (group + 1) * inputs], 1
        dy = dy[:, low:high]
    shape = (high - low, inputs, *kernel)
    block += conv2d_weight(x, shape, dy, stride, padding, dilation, groups).reshape(high - low, -1)
