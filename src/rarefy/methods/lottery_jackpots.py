"""Search a mask in a trained network without touching a weight: lottery jackpots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from rarefy.engine import Family, Layer, Method, Sparsifier
from rarefy.engine.options import (
    check_allocation,
    check_clock,
    check_decay,
    check_fraction,
    check_free,
    check_pattern,
    check_sparsity,
)
from rarefy.engine.sharing import Rule, share
from rarefy.nn import Reparametrisation, ScoreMask
from rarefy.patterns import Pattern
from rarefy.schedules import Clock, decay


@dataclass(frozen=True, kw_only=True)
class LotteryJackpots(Method):
    """Lottery jackpots: find a good mask in a trained network by training scores; no weight changes.

    Zhang et al. 2023, "Lottery Jackpots Exist in Pre-trained Models" (arXiv 2104.08700, TPAMI 45(12)). Each layer starts from
    its weights of largest |w|, with scores A = 1 where they are kept and `initial` where not, and keeps as many to
    the end. The network computes with W' = W B. All its own parameters stand still, biases and norms too (running
    statistics of batch norm still follow the data); only A is trained, through B:

        dL/dA = W dL/dW'   (kept or not).

    After every step, let q be the number of weights that would have to be swapped so that those of largest A are kept.
    The short restriction swaps

        n = max(1, ceil(rho q))   (0 where q = 0)

    of them: in come the n largest A of the dropped, out go the n smallest of the kept. Many swaps at once would void the
    first-order estimate behind the gradient, the fewer the later: rho falls from 1 to 0 over the search. The authors'
    newest code rounds it up to 1, which is no restriction at all; here it is the paper's.

    For a trained network: on random weights it is a search for a supermask (edge-popup). Leave the classifier dense as the
    paper does: `exclude="fc"`. The scores join the optimizer in the group of their weight; the paper: SGD, learning rate
    0.1 falling along a cosine, momentum 0.9, weight decay 5e-4 (CIFAR-10), 30 epochs.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: "global" (default, the paper's: one magnitude threshold over all layers), "uniform", "uniform+",
            "er", "erk", "lamp", or sparsities by layer-name glob.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in"; a unit's score is its sum.
        initial: score of what is dropped at first, in [0, 1). Default 0.99 (0.95 in the authors' first code).
        restriction: how rho falls with the share p of the search that is over: "power" (default: (1 - p)^4), "cosine",
            "linear", or "constant" (1: no restriction). Without total_steps rho stays 1.
        stop: the last step of the search; an int is a step, a float in [0, 1] a fraction of total_steps. From there on the
            mask is fixed and the weights are trained. Default None: the search lasts for ever.

    Raises OptionError where no optimizer is given, and for a fraction without total_steps; AllocationError and
    PatternError as `magnitude`.
    """

    name: ClassVar[str] = "lottery-jackpots"
    family: ClassVar[Family] = "after training"
    sparsity: float = 0.9
    allocation: Rule = "global"
    pattern: str | Pattern = "unstructured"
    initial: float = 0.99
    restriction: str = "power"
    stop: int | float | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_free(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        check_allocation(self.allocation)
        check_fraction("initial", self.initial)
        check_decay(self.restriction)
        check_clock(1, 0, self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        return Clock(every=1, stop=self.stop, total=total_steps)

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        return ScoreMask(weight)

    def choose(self, sparse: Sparsifier) -> None:
        for name, counts in share(sparse.layers, self.sparsity, self.allocation, sparse.magnitudes).items():
            layer = sparse.layers[name]
            layer.rewire(layer.largest_magnitudes(counts))

    def initialise(self, sparse: Sparsifier) -> None:
        for layer in sparse.layers.values():
            layer.extras["scores"].fill_(self.initial).masked_fill_(layer.mask(), 1.0)

    def freezes(self, sparse: Sparsifier, step: int) -> bool:
        return sparse.clock.last is None or step <= sparse.clock.last

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if self.freezes(sparse, step):
            rho = decay(self.restriction, q=4)(1.0, sparse.clock.progress(step))
            for layer in sparse.layers.values():
                swap(layer, layer.extras["scores"].detach(), rho)


def swap(layer: Layer, scores: Tensor, share: float) -> None:
    """Swap this share of what keeps the layer from keeping its largest scores; one at least, where there is any."""
    kept, counts = layer.kept(), layer.counts()
    late = layer.newcomers(layer.best(scores, counts))
    number = (share * late.double()).ceil().long().clamp(min=1).minimum(late)
    if number.any():
        layer.rewire(
            layer.best(scores, counts - number, among=kept),
            layer.best(scores, number, besides=kept),
        )
