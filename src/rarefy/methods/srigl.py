"""Structured RigL: constant fan-in with neurons that may die, so that the network runs on dense small tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.engine import Family, Layer, Sparsifier
from rarefy.engine.options import check_fraction
from rarefy.methods.dynamic import DropAndGrow


@dataclass(frozen=True, kw_only=True)
class SRigL(DropAndGrow):
    """SRigL: RigL with the same number of inputs at every output, and no inputs at outputs that matter little.

    Lasby et al. 2024, "Dynamic Sparse Training with Structured Sparsity" (arXiv 2305.02299, section 3.1). Starts as
    `static` with the pattern fan-in. A layer has C outputs ("neurons"), F inputs each, a budget of n_0 weights (what it
    kept at first), and n of them now. At an update, with f(t) as in `set`, G the dense gradient and k = floor(f(t) n):

        K = the n - k kept weights of largest |w|;
        salient = K and the k weights of largest |G| of all;
        tau = max(1, floor(gamma n_0 / C)), or the salient weights of the floor(n_0 / F)-th best neuron where it has fewer;
        ablate every neuron with fewer than tau salient weights (never in the last layer);
        fan-in = floor(n_0 / live neurons), F at most;
        each live neuron keeps its weights in K, the fan-in largest at most, and grows those of its largest |G| up to the
        fan-in.

    So all live neurons of a layer have one fan-in, and the others have none; an ablated neuron can come back at any later
    update. `rarefy.accelerate` runs the result.

    Where the reference code differs: it truncates a neuron with too many weights by sorting a boolean mask, which keeps
    arbitrary ones (here: the largest); starts weights at a standard deviation of 2/fan-in where sqrt(2/fan-in) is meant
    (here: `init`); and looks for live neurons and kept weights by value at export, which misses grown zeros (here: the
    mask says).

    Options (beside those of `static`, without `pattern`: it is "fan-in"):
        gamma: share of the first fan-in that a neuron needs in salient weights to live, in [0, 1). Default 0.3 (the
            paper's for convolutional networks; 0.95 for vision transformers).
        drop_fraction, every, start, stop, decay: as `rigl` (0.3, 100, 0, three quarters, "cosine": the paper's).

    Raises as `rigl` does.
    """

    name: ClassVar[str] = "srigl"
    family: ClassVar[Family] = "sparse to sparse"
    pattern: ClassVar[str] = "fan-in"
    gamma: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("gamma", self.gamma)

    def initialise(self, sparse: Sparsifier) -> None:
        super().initialise(sparse)
        sparse.memory["budgets"] = {name: layer.nnz for name, layer in sparse.layers.items()}

    def wants_gradient(self, sparse: Sparsifier, step: int) -> bool:
        return self.due(sparse, step)

    def can_grow(self, layer: Layer) -> bool:
        return layer.has_gradient

    def update(self, sparse: Sparsifier, step: int) -> None:
        fraction, last = self.fraction(sparse, step), next(reversed(sparse.layers))
        for layer in self.ready(sparse):
            budget = sparse.memory["budgets"][layer.name]
            moved = int(fraction * layer.nnz)
            survivors = layer.largest_magnitudes(layer.nnz - moved)
            live = torch.ones(layer.groups, dtype=torch.bool)
            if layer.name != last:
                salient = layer.counts(survivors, layer.largest_gradients(moved)).cpu()
                live = salient >= self._least(layer, budget, salient)
            fan_in = min(budget // int(live.sum()), layer.units_per_group)
            kept = layer.counts(survivors).cpu().clamp(max=fan_in) * live
            stay = layer.largest_magnitudes(kept)
            layer.rewire(stay, layer.largest_gradients((fan_in - kept) * live, besides=stay))

    def _least(self, layer: Layer, budget: int, salient: torch.Tensor) -> int:
        """Return tau, low enough that the neurons that live can hold the budget."""
        tau = max(1, int(self.gamma * (budget // layer.groups)))
        fewest = max(1, budget // layer.units_per_group)
        return min(tau, int(salient.sort(descending=True).values[fewest - 1]))
