"""Top-KAST: use the largest weights, train some more, and remember all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rarefy.engine import Family, Sparsifier
from rarefy.engine.distributed import from_first_rank
from rarefy.engine.options import check_positive, check_time
from rarefy.engine.reserve import ReservingLayer, reserving
from rarefy.engine.sharing import share
from rarefy.methods.dynamic import Rewiring
from rarefy.methods.static import RandomStart
from rarefy.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class TopKAST(Rewiring, RandomStart):
    """Top-KAST: the forward pass uses the top D weights, gradients go to the top D + M, and all others wait unchanged.

    Jayakumar, Pascanu, Rae, Osindero & Elsen 2020, "Top-KAST: Top-K Always Sparse Training" (arXiv 2106.03517, section
    2). Every weight has a value theta. In each layer

        A = the D weights of largest |theta|,   B = the D + M of largest |theta|,   so A is in B;
        forward: theta on A, 0 elsewhere;   backward: gradients for B;   the optimizer moves B;
        theta outside B stays as it is, bit for bit, and has no optimizer state.

    A and B are chosen anew at every step of the first `explore`, and then every `every` steps. The network is A: masks,
    sparsity, the state dict and what is exported. A penalty lambda (||theta_A|| + ||theta_B\\A|| / d), with d = D / N the
    density, makes weights in B that do not earn their place give way; its gradient is applied after the optimizer's step,
    times the learning rate, so that momentum and adaptive rates do not distort it:

        theta_A <- (1 - eta lambda / ||theta_A||) theta_A,   theta_B\\A <- (1 - eta lambda / (d ||theta_B\\A||)) theta_B\\A.

    Training FLOPs: forward and input gradients on A, weight gradients on B. Memory: the method needs every theta, so
    either storage holds one dense tensor of values for each layer; compressed storage saves gradients and optimizer
    state, of B's length, and computes all three products over B, with zeros where weights rest (the count above is that of an
    implementation that skips them). An optimizer that is not torch's (see `Sparsifier.step`) moves B\\A as from zero.

    Where the reference code differs: it writes only A back into its store before it selects anew, yet adds what B\\A has
    learned on top. Here there is one store.

    Options (beside those of `static`, without `pattern`: single weights only):
        exploration: M / D, above 0. Default 1 (mikeheddes' implementation).
        strength: lambda, not negative. Default 1e-4.
        explore: how long A and B are chosen at every step; an int is a step, a float in [0, 1] a fraction of total_steps.
            Default: a tenth of total_steps (20 of 200 epochs, the same implementation); 0 where they are not known.
        init: "fan-in" multiplies all of a layer's theta by ||theta|| / ||theta_A||, so that signals keep their variance.
        every: steps between choices after that. Default 100 (its value for 391 steps an epoch: 1000).
        start, stop: as `set`, but by default choices go on to the end of training.

    Raises as `static` does, and SelectionError for a layer that is sparse from the start: it has no values but those kept.
    """

    name: ClassVar[str] = "top-kast"
    family: ClassVar[Family] = "sparse to sparse"
    reserves: ClassVar[bool] = True
    exploration: float = 1.0
    strength: float = 1e-4
    explore: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("exploration", self.exploration)
        check_positive("strength", self.strength, zero=True)
        if self.explore is not None:
            check_time("explore", self.explore)

    def due(self, sparse: Sparsifier, step: int) -> bool:
        explore = (0.1 if sparse.total_steps else 0) if self.explore is None else self.explore
        return super().due(sparse, step) or Clock(every=1, stop=explore, total=sparse.total_steps).due(step)

    def choose(self, sparse: Sparsifier) -> None:
        counts = share(sparse.layers, self.sparsity, self.allocation, sparse.magnitudes)
        sparse.memory["kept"] = {name: int(count) for name, count in counts.items()}
        for layer in reserving(sparse.layers).values():
            self._select(sparse, layer)

    def initialise(self, sparse: Sparsifier) -> None:
        for layer in reserving(sparse.layers).values():
            if self.init == "fan-in" and not isinstance(layer.module, nn.Embedding | nn.EmbeddingBag):
                whole, kept = layer.theta().norm(), layer.weight().norm()
                gain = whole / kept if kept > 0 else torch.ones_like(kept)
                layer.scale_outputs(from_first_rank(gain).expand(layer.shape[0]))

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        for layer in reserving(sparse.layers).values():
            rate = layer.learning_rate * self.strength
            layer.write(_shrunk(layer.values(), rate))
            layer.write_resting(_shrunk(layer.resting_values(), rate / max(layer.density, 1 / layer.numel)))
        super().after_step(sparse, step)

    def update(self, sparse: Sparsifier, step: int) -> None:
        for layer in reserving(sparse.layers).values():
            self._select(sparse, layer)

    def _select(self, sparse: Sparsifier, layer: ReservingLayer) -> None:
        kept = sparse.memory["kept"][layer.name]
        trained = min(layer.numel, math.floor((1 + self.exploration) * kept + 0.5))
        scores = layer.theta().abs()
        layer.rewire_within(*(layer.best(scores, torch.tensor([count])) for count in (kept, trained)))


def _shrunk(theta: Tensor, by: float) -> Tensor:
    """Move against the gradient of ||theta||, but not through zero."""
    norm = float(theta.norm())
    return theta * (max(0.0, 1 - by / norm) if norm > 0 else 1.0)
