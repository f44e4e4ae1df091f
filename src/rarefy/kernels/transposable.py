"""The best N:M mask along rows and columns at once, for many tiles: a flow problem on each, solved to its optimum."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import transposable_torch
from rarefy.kernels.native import cpu_empty, native, threads

SOLVERS = ("fast", "exact", "approx")
LARGEST_M = 32
_AT_ONCE = 1 << 26  # numbers in the largest tensor that a part of the tiles needs


def transposable_nm(scores: Tensor, n: int, m: int, solver: str = "fast") -> Tensor:
    """Keep n in every row and every column of each m x m tile so that the kept scores add up to the most.

    `scores` is [rows, columns] or [rows, columns, positions] (tiles lie in the first two dimensions, at every position by
    itself), rows and columns multiples of m <= 32; float32, float64, bfloat16 or float16, contiguous or not, any device.
    Returns bool of that shape. Minus infinity means: keep only where no other mask of the tile would do.

    Solvers: "exact" is optimal on every tile for its scores held to 50 bits below the tile's largest (40 where minus infinity
    stands), "fast" to 22 bits or more, "approx" the 2-approximation of arXiv 2102.08124 (prune the lightest until every row
    and column is covered), then repaired so that no row is short. The mask depends on the scores alone: not on threads or the
    instruction set.
    Raises OptionError for another shape or dtype, an n outside [0, m], and for scores that hold NaN or plus infinity.

    >>> transposable_nm(torch.tensor([[9.0, 8.0], [7.0, 1.0]]), 1, 2).tolist()
    [[False, True], [True, False]]
    """
    if solver not in SOLVERS:
        raise OptionError(f"solver={solver!r} is not known; it is one of {', '.join(SOLVERS)}")
    if not 1 <= m <= LARGEST_M or not 0 <= n <= m:
        raise OptionError(f"{n}:{m} along rows and columns needs 0 <= N <= M and M from 1 to {LARGEST_M}")
    if scores.dim() not in (2, 3) or scores.shape[0] % m or scores.shape[1] % m:
        raise OptionError(
            f"scores must be [rows, columns] or [rows, columns, positions], multiples of {m}; they are "
            f"{list(scores.shape)}"
        )
    if scores.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise OptionError(f"transposable_nm takes floating-point scores; these are {scores.dtype}")
    scores = scores.detach()
    if n in (0, m) or scores.numel() == 0:
        _check_numbers(scores)
        return torch.full(scores.shape, n > 0, dtype=torch.bool, device=scores.device)
    if scores.device.type == "cpu":
        wide = scores if scores.dtype == torch.float64 else scores.float()
        planes = wide.reshape(*wide.shape[:2], -1).contiguous()
        mask = cpu_empty(*planes.shape, dtype=torch.bool)
        if not native.transposable(planes.numpy(), n, m, solver, mask.view(torch.uint8).numpy(), threads()):
            _check_numbers(scores)
        return mask.view(scores.shape)
    _check_numbers(scores)
    return solve_in_torch(scores, n, m, solver)


def solve_in_torch(scores: Tensor, n: int, m: int, solver: str = "fast") -> Tensor:
    """Solve with PyTorch's own operators, on any device; scores as `transposable_nm` takes them, checked."""
    rows, columns = scores.shape[:2]
    tiles = scores.reshape(rows // m, m, columns // m, m, -1).permute(0, 2, 4, 1, 3)
    solve = transposable_torch.prune_cover if solver == "approx" else transposable_torch.optimum
    mask = torch.cat([solve(part, n) for part in tiles.reshape(-1, m, m).split(max(1, _AT_ONCE // m**3))])
    return mask.view(tiles.shape).permute(0, 3, 1, 4, 2).reshape(scores.shape)


def _check_numbers(scores: Tensor) -> None:
    wrong = scores.isnan() | (scores == torch.inf)
    if bool(wrong.any()):
        where = int(wrong.reshape(-1).nonzero()[0])
        what = "NaN" if bool(scores.isnan().any()) else "infinity"
        raise OptionError(
            f"scores hold {what} (the first at position {where} of {scores.numel()}): the loss or a weight has diverged"
        )
