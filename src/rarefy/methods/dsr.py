"""Dynamic sparse reparameterisation: one threshold for all layers, and what it drops goes to layers that keep much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rarefy.allocation import spread
from rarefy.engine import Family, Sparsifier
from rarefy.engine.options import check_positive
from rarefy.errors import OptionError
from rarefy.methods.dynamic import Rewiring
from rarefy.methods.static import RandomStart


@dataclass(frozen=True, kw_only=True)
class DSR(Rewiring, RandomStart):
    """DSR: drop below one threshold for all layers, and regrow in proportion to what each layer has left.

    Mostafa & Wang 2019, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
    Reparameterization" (arXiv 1902.05967, algorithm 1). Starts as `static`. At an update, with one threshold H,

        drop every weight with |w| < H, but keep the largest of each layer; K of them in all;
        H <- H/2 if K > 1.1 N_p,  2H if K < 0.9 N_p   (for the next update);
        grow K weights: R_l / sum R of them in layer l, which has R_l left, uniformly at random where it keeps none now.

    So weights move between layers, and their number over all layers never changes. Shares are rounded to whole numbers
    with the largest remainders; what a layer has no room for goes to the others. A weight that was just dropped is
    grown again only where its layer has no other absent weights. No gradient is needed but that of the kept weights.

    Options (beside those of `static`, without `pattern`: single weights only):
        target: N_p, how many weights an update should drop over all layers; an int, or a float in (0, 1), a share of the
            kept weights. Default 0.05. (The implementation in sparse_learning uses 600.)
        threshold: H at the start. Default 0.001 (the same implementation's). It takes an update to double.
        every: steps between updates. Default 100.
        start, stop: as `set`, but by default updates go on to the end of training.

    Raises OptionError where the target is not below the number of kept weights, and as `static` does.
    """

    name: ClassVar[str] = "dsr"
    family: ClassVar[Family] = "sparse to sparse"
    target: int | float = 0.05
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.target, int | float) and not isinstance(self.target, bool)
        if not number or not self.target > 0 or (isinstance(self.target, float) and self.target >= 1):
            raise OptionError(f"target={self.target!r} must be a whole number of weights, or a share in (0, 1).")
        check_positive("threshold", self.threshold)

    def choose(self, sparse: Sparsifier) -> None:
        super().choose(sparse)
        if self.target >= sparse.nnz:
            raise OptionError(f"target={self.target} weights to drop are not below the {sparse.nnz} that are kept.")
        sparse.memory["threshold"] = self.threshold

    def update(self, sparse: Sparsifier, step: int) -> None:
        threshold = sparse.memory["threshold"]
        before, survivors = {}, {}
        for name, layer in sparse.layers.items():
            before[name] = layer.kept()
            large = layer.kept(layer.values().abs() >= threshold)
            survivors[name] = large if layer.counts(large).any() else layer.largest_magnitudes(min(1, layer.nnz))
        left = {name: int(layer.counts(survivors[name])) for name, layer in sparse.layers.items()}
        dropped = sparse.nnz - sum(left.values())
        room = {name: layer.numel - left[name] for name, layer in sparse.layers.items()}
        for name, count in spread(dropped, left, room).items():
            layer = sparse.layers[name]
            taken = before[name] if count <= layer.numel - layer.nnz else survivors[name]
            layer.rewire(survivors[name], layer.random(torch.tensor([count]), sparse.generator, besides=taken))
        wanted = self.target if isinstance(self.target, int) else self.target * sparse.nnz
        if dropped > 1.1 * wanted:
            sparse.memory["threshold"] = threshold / 2
        elif dropped < 0.9 * wanted:
            sparse.memory["threshold"] = threshold * 2
