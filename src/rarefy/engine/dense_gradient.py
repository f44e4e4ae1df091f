"""The largest entries of a dense gradient: held as its factors where those are smaller, and made a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import kernels
from rarefy.engine.distributed import active, average, on_any_rank
from rarefy.engine.factors import TILE, Factors
from rarefy.engine.passes import Passes
from rarefy.kernels.watch import watch
from rarefy.nn import SparseModule

BLOCK = 1 << 24  # entries of the gradient that exist at once
Part = Tensor | Factors


class DenseGradient:
    """One optimizer step's dense gradient, of all its backward passes, as `.grad` sums them.

    The operator tells what each pass multiplies: a part is kept as these factors or as their product, whichever is
    smaller; so is what earlier steps gathered, where a step goes on from that.
    """

    def __init__(self) -> None:
        self.past: list[tuple[float, Part]] = []  # of earlier steps: how many times, and what
        self._module: SparseModule | None = None
        self._end: Any = None
        self._step: Passes[Part] = Passes()

    @property
    def parts(self) -> list[tuple[float, Part]]:
        """All that was gathered so far."""
        return self.past + [(1.0, part) for part in self._step.parts]

    def watch(self, module: SparseModule | None, carry: float | None = 0.0) -> None:
        """Begin a step's sum; None: forget it. `carry` as in `GradientSum.watch`."""
        self.close()
        if module is None or carry == 0:
            self.past = []
        elif carry is not None:
            self.past = [(times * carry, part) for times, part in (self.parts if self._finite() else self.past)]
            self._fold(module)
        self._step = Passes()
        if module is not None and module.values.requires_grad:
            self._module = module
            self._step.begin()
            self._end = watch(module.crow, self._see)

    def close(self) -> None:
        """Take in nothing more."""
        if self._end is not None:
            self._end()
        self._end, self._module = None, None
        self._step.close()

    def _see(self, x: Tensor, dy: Tensor, *geometry: Any) -> None:
        if self._module is None:
            return
        x, dy, rows, cols = x.detach(), dy.detach(), self._module.rows, self._module.cols
        part: Part
        if rows * cols > x.numel() + dy.numel():  # copies: the memory may be used again before the optimizer steps
            part = Factors(x.clone(), dy.clone(), geometry)
        else:
            part = self._module.values.detach().new_zeros(rows, cols)
            Factors(x, dy, geometry).add_rows(part, 0, rows)
        self._step.see(part, self._module.values.grad)

    def commit(self, parameter: nn.Parameter) -> None:
        """Take in the pass that was seen last, now that it is part of `parameter.grad`."""
        self._step.commit(parameter.grad)

    def _fold(self, module: SparseModule) -> None:
        """Hold what was gathered as one product, where that is smaller."""
        size = module.rows * module.cols
        if len(self.past) > 1 and sum(size if isinstance(p, Tensor) else p.numel for _, p in self.past) > size:
            whole = module.values.detach().new_zeros(module.rows, module.cols)
            for times, part in self.past:
                _add(whole, times, part, 0, module.rows)
            self.past = [(1.0, whole)]

    def _finite(self) -> bool:
        tensors = [t for p in self._step.parts for t in ((p,) if isinstance(p, Tensor) else (p.x, p.dy))]
        return all(bool(t.isfinite().all()) for t in tensors)

    def usable(self, device: torch.device) -> bool:
        """Whether a finite gradient was collected, on any rank; every rank must ask."""
        overflow = on_any_rank(not self._finite(), device)
        return on_any_rank(bool(self.parts), device) and not overflow

    def at(self, module: SparseModule, positions: Tensor) -> Tensor:
        """Return the gradient at these ascending flat positions, averaged over ranks."""
        values, rows, cols = module.values.detach(), module.rows, module.cols
        total = values.new_zeros(positions.shape)
        for times, part in self.parts:
            found = (
                part.view(-1)[positions] if isinstance(part, Tensor) else part.at(positions, rows, cols, values.dtype)
            )
            total.add_(found, alpha=times)
        return average(total)

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
            for times, part in self.parts:
                _add(block, times, part, low, high)
            block = (average(block) if active() else block).abs_()
            ends = torch.tensor([low * cols, high * cols], device=besides.device)
            start, stop = torch.searchsorted(besides, ends).tolist()
            block.view(-1)[besides[start:stop] - low * cols] = -1
            yield low, block

    # --- saving -----------------------------------------------------------------------------------------------------

    def state(self) -> list[list[Any]]:
        """Return what earlier steps gathered, as plain tensors, numbers and lists."""
        return [[times, part] if isinstance(part, Tensor) else [times, *part] for times, part in self.past]

    @staticmethod
    def fits(state: Any, rows: int, cols: int) -> bool:
        """Whether `state` is what `state` returned, of a weight [rows, cols]."""
        if not isinstance(state, list) or not all(isinstance(part, list) and len(part) in (2, 4) for part in state):
            return False
        return all(
            isinstance(times, float)
            and isinstance(first, Tensor)
            and (
                isinstance(rest[0], Tensor) and isinstance(rest[1], list | tuple)
                if rest
                else first.shape == (rows, cols)
            )
            for times, first, *rest in state
        )

    def load_state(self, state: list[list[Any]], like: Tensor) -> None:
        """Take over what `state` returned."""
        self.past = []
        for times, first, *rest in state:
            first = first.to(like.device)
            self.past.append((times, first if not rest else Factors(first, rest[0].to(like.device), tuple(rest[1]))))


def _add(block: Tensor, times: float, part: Part, low: int, high: int) -> None:
    if isinstance(part, Tensor):
        block.add_(part[low:high], alpha=times)
    else:
        part.add_rows(block, low, high, times)


def _above(flat: Tensor, least: float) -> Tensor:
    """Return where `flat` is larger than `least`, ascending; fast where few are."""
    whole = flat.numel() // TILE * TILE if least > 0 else 0
    tiles = flat[:whole].view(-1, TILE)
    rich = (tiles.amax(1) > least).nonzero().squeeze(1)
    tile, entry = (tiles[rich] > least).nonzero(as_tuple=True)
    rest = (flat[whole:] > least).nonzero().squeeze(1)
    return torch.cat([rich[tile] * TILE + entry, rest + whole])


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
