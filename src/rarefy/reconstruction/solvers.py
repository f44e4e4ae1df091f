"""Bring a layer's outputs back once its mask is chosen: two solvers of one problem, min ||y - x (w * mask)^T||^2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.engine.options import check_count, check_not_negative, check_positive
from rarefy.errors import OptionError, nearest
from rarefy.reconstruction.moments import Moments

_FLOATS = 1 << 24  # in systems that are solved at once


class Solver(ABC):
    """Finds weights on a mask that give a layer's outputs."""

    @abstractmethod
    def solve(self, moments: Moments, mask: Tensor, run: int) -> Tensor:
        """Return weight and bias, float64 as `Moments.joined`, exactly zero where the mask is.

        The calibration error is never above that of the masked weights.

        Args:
            moments: of the layer's calibration data; its weight is the dense one.
            mask: bool, weight-shaped, True = kept.
            run: M of the pattern.
        """


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Solver):
    """The exact minimum, row by row: each row's kept weights and its bias solve their normal equations, in float64.

    With S the kept inputs of a row, w its masked weights, and l = damping * mean(diag G),

        (G_SS + l I) d = C_S - G_SS w_S,    w_S <- w_S + d,

    which is the minimum of the squared error + l |change|^2: what the data say nothing about stays as it is. All rows of a
    layer are solved together by Cholesky. The bias is free of the damping.

    Options:
        damping: l in units of the mean of diag G. Default 0.1: measured on ten images, where 0.001 to 0.01 follow them too
            closely; with a hundred or more it makes no difference.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        check_not_negative("damping", self.damping)

    def solve(self, moments: Moments, mask: Tensor, run: int) -> Tensor:
        free = moments.free(mask)
        solved = moments.joined() * free
        for group in range(moments.groups):
            gram = moments.gram[group]
            squares = gram.diagonal()[: moments.inputs]
            if not bool(squares.any()):
                continue  # no input was ever other than zero
            ridge = torch.full_like(gram.diagonal(), self.damping * float(squares.mean()))
            ridge[moments.inputs :] = 0.0
            missing = moments.cross[group].T - solved[group] @ gram
            solved[group] += self._change(gram, ridge, missing, free[group])
        return solved

    def _change(self, gram: Tensor, ridge: Tensor, missing: Tensor, free: Tensor) -> Tensor:
        """Solve every row's equations on its free inputs; rows with fewer of them are filled up with w = 0."""
        most = int(free.sum(1).max())
        places = (~free).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        real = free.gather(1, places)
        change = torch.zeros_like(missing)
        step = max(1, _FLOATS // max(1, most * most))
        for rows in torch.arange(len(free), device=free.device).split(step):
            at, mine = places[rows], real[rows]
            system = gram[at[:, :, None], at[:, None, :]] + torch.diag_embed(ridge[at])
            system = torch.where(
                mine[:, :, None] & mine[:, None, :], system, torch.eye(most, dtype=system.dtype, device=system.device)
            )
            factor, failed = torch.linalg.cholesky_ex(system)
            if bool(failed.any()):
                raise OptionError(
                    f"weight {[*free.shape]}: with damping={self.damping:g} its inputs do not determine the kept weights; use "
                    "more calibration data, or more damping"
                )
            right = missing[rows].gather(1, at) * mine
            change[rows] = change[rows].scatter(1, at, torch.cholesky_solve(right[..., None], factor)[..., 0] * mine)
        return change


@dataclass(frozen=True, kw_only=True)
class AdaPrune(Solver):
    """The paper's: absorb what was pruned, then 1000 steps of Adam on the kept weights and the bias.

    Absorption adds to each kept weight of a run of M inputs the mean share of what the run has lost, so that its sum stays. The
    gradient is that of the whole calibration set, 2 (w G - C) / (samples * rows), from the sums of `Moments`; the paper's
    batches of 50 images are an estimate of it. The best step's weights are returned; the masked ones where none is better.

    Options:
        steps: default 1000. lr: of the weights, 1e-3. lr_bias: 1e-2. (All: the paper.)

    Source: Hubara et al. 2021, arXiv 2102.08124, AdaPrune.
    """

    steps: int = 1000
    lr: float = 1e-3
    lr_bias: float = 1e-2

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_positive("lr", self.lr)
        check_positive("lr_bias", self.lr_bias)

    def solve(self, moments: Moments, mask: Tensor, run: int) -> Tensor:
        free = moments.free(mask)
        best = moments.joined() * free
        lowest = float(moments.errors(best).sum())
        start = F.pad(absorb(moments.layer.weight.detach().double(), mask, run).reshape(moments.groups, -1, moments.inputs),
                      (0, int(moments.biased)))  # fmt: skip
        weight, bias = start[..., : moments.inputs].clone(), moments.joined()[..., moments.inputs :].clone()
        adam = torch.optim.Adam([{"params": [weight], "lr": self.lr}, {"params": [bias], "lr": self.lr_bias}])
        scale = 2 / (moments.count * moments.power.numel())
        for step in range(self.steps + 1):
            now = torch.cat([weight, bias], 2)
            product = now @ moments.gram
            error = float((now * (product - 2 * moments.cross.mT)).sum() + moments.power.sum())
            if error < lowest:
                lowest, best = error, now
            if step < self.steps:
                gradient = (product - moments.cross.mT) * free * scale
                weight.grad, bias.grad = gradient.split([moments.inputs, int(moments.biased)], 2)
                adam.step()
        return best


def absorb(weight: Tensor, mask: Tensor, run: int) -> Tensor:
    """Return the masked weight, with the mean share of what each run of inputs has lost added to its kept weights.

    Runs are `run` neighbours along dimension 1, at every position of the others; a run that keeps nothing stays empty. So each
    run's sum is preserved: what it adds up to for inputs that are alike.

    Args:
        weight: [out, in, ...]. mask: bool of that shape, True = kept.
    """
    missing = -weight.shape[1] % run
    whole, kept = (F.pad(t.movedim(1, -1), (0, missing)).unflatten(-1, (-1, run)) for t in (weight, mask))
    lost = (whole * ~kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    filled = (whole + lost) * kept
    return filled.flatten(-2)[..., : weight.shape[1]].movedim(-1, 1).contiguous()


SOLVERS: Mapping[str, Solver] = MappingProxyType({"least-squares": LeastSquares(), "adaprune": AdaPrune()})
"""Texts that `convert(solver=...)` reads."""


def parse_solver(solver: str | Solver | None) -> Solver | None:
    """Read a solver from its name; a solver, or None, is returned as it is."""
    if solver is None or isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise OptionError(
            f"solver={solver!r} is not known{nearest(str(solver), SOLVERS)}; it is one of {', '.join(SOLVERS)}, None for masks "
            "alone, or a rarefy.reconstruction.Solver"
        )
    return SOLVERS[solver]
