"""Training with transposable masks: N:M in the forward pass and, by the same mask, in the gradient of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rarefy.engine import Family, Sparsifier
from rarefy.engine.sharing import share
from rarefy.methods.dynamic import Rewiring
from rarefy.methods.straight_through import Refined
from rarefy.nn import Reparametrisation, TransposableMask
from rarefy.patterns import Pattern, TransposableNM


@dataclass(frozen=True, kw_only=True)
class TMask(Refined, Rewiring):
    """T-mask: as `sr-ste`, with a mask that is N:M along inputs and outputs alike, made anew every few steps.

    Hubara et al. 2021, "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M Transposable Masks"
    (arXiv 2102.08124, sec. 4 and 5; there N counts the zeros). S keeps N weights in every row and every column of each M x M
    tile, so that both W S and its transpose are N:M, and serves two products of training, y = x (W S)^T and dx = dy (W S).
    With G = dL/d(W S), dense weights W are trained by

        dL/dW = G + lambda (1 - S) W,

    and every k steps S is the mask of largest |W|, by the pattern's solver; between them it stands still. The paper waits 40
    steps because its solver is slow. Here a mask of 4096 x 4096 takes some hundredths of a second, and waiting costs accuracy:
    pruned weights drift while nothing tells what they would do (docs/results/n-m.md: 3 points in a run of 400 steps).

    The authors' code takes for a tile M^2 weights of one output in a row, which leaves the transpose unstructured, decays
    pruned weights five times as strongly as the others instead of by lambda, and may leave rows of a tile short; here tiles
    lie in the plane of outputs and inputs, and all rows and columns keep N. For a mask that is found once on a trained
    network and then held, use `magnitude` with this pattern.

    On the CPU, in float32, linear layers run both products on native N:M kernels from one packed copy, where M is 2, 4, 8 or 16
    and the batch is large enough to gain by it: less time a step than dense training from some 1,000 samples on
    (docs/performance.md), not only fewer FLOPs. Convolutions, other dtypes and autocast multiply the mask in.

    Layers whose inputs or outputs are not multiples of M, and embeddings, stay dense and are listed with the reason; what
    `include` names must fit.

    Options:
        pattern: "N:Mt". Default "4:8t" (the paper); "4:8t-exact" and "4:8t-approx" name the solver.
        sparsity: 1 - N/M, and nothing else. Default 0.5.
        every: k, steps between masks. Default 1 (the authors' code: 40); some where linear layers are large and batches
            small: a new mask costs about as much as a dense product of 500 samples with the weight.
        start, stop: first and last step of new masks; an int is a step, a float in [0, 1] a fraction of total_steps.
            Defaults 0 and None: to the end of training.
        refine: lambda, not negative. Default 2e-4 (`sr-ste`).

    Raises OptionError for patterns of another kind, for weights that are NaN, and by `step()` where no optimizer is given;
    SelectionError where no layer fits, PatternError where one does not that `include` names.
    """

    name: ClassVar[str] = "t-mask"
    family: ClassVar[Family] = "sparse to sparse"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (TransposableNM,)
    pattern: str | Pattern = "4:8t"
    every: int = 1

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        assert isinstance(self.cut, TransposableNM)  # checked with the options
        return TransposableMask(weight, self.cut)

    def choose(self, sparse: Sparsifier) -> None:
        for name, counts in share(sparse.layers, self.sparsity, "uniform").items():
            layer = sparse.layers[name]
            layer.rewire(layer.best(layer.trained().abs(), counts))

    def update(self, sparse: Sparsifier, step: int) -> None:
        self.choose(sparse)
