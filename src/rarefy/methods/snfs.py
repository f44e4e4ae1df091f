"""Sparse networks from scratch: momentum says where the network wants weights, in which layer and at which place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rarefy.allocation import spread
from rarefy.engine import Family, Layer, Sparsifier
from rarefy.engine.options import check_fraction
from rarefy.errors import OptionError
from rarefy.methods.dynamic import WholeRun

_FULL = 0.99  # of a layer's absent weights, the most that growth takes while other layers have room


@dataclass(frozen=True, kw_only=True)
class SNFS(WholeRun):
    """SNFS: drop the smallest weights, and regrow where the momentum is largest, in the layers where it is largest.

    Dettmers & Zettlemoyer 2019, "Sparse Networks from Scratch: Faster Training without Losing Performance"
    (arXiv 1907.04840, algorithm 1). Starts as `static`. The momentum is that of the dense gradients G, absent weights too,

        M <- beta M + G,

    and at an update, with f(t) = f_end + (alpha - f_end)/2 (1 + cos(pi t / T)) over the whole run,

        share_l = mean |M| over the kept weights of layer l, over the sum of these means;
        f_l = f(t); but min(f(t), sparsity_l) where sparsity_l < 0.2 and share_l > 1/L: a layer that is nearly dense and
              wants more is not torn down;
        drop the ceil(f_l n_l) weights of smallest |w| in each layer (never its last one), R in all layers;
        grow share_l R of them in layer l, those outside the survivors of largest |M|.

    Numbers are whole and exact: largest remainders, at most 99 % of what is absent in a layer, and what has no room goes
    to the other layers. So the number kept over all layers never changes (the reference code lets it drift, and steers it
    back with a controller).

    M is kept apart from the optimizer's own momentum, which holds kept weights only, so any optimizer will do. It is
    gathered afresh after an update, over the last `window` steps before the next: beta^50 = 0.5 %, and what lies before
    an update belongs to other masks. Only those steps need a dense gradient; the paper's cost, one at every step, is that
    of `every` <= `window`. Memory: on masked storage one dense tensor for each layer while M is gathered. On compressed
    storage the factors of the steps' gradients, batch x (inputs + outputs) numbers a step, or their dense sum, whichever
    is smaller: a layer too large to be dense stays so, but short windows and small batches then matter.

    A layer that no backward pass reached at an update, or with an overflow, takes no part in it; a warning says so.

    Options (beside those of `static`, without `pattern`: single weights only):
        drop_fraction: alpha. Default 0.5, and
        final_fraction: f_end, below it. Default 0.005 (both the paper's).
        momentum: beta, in [0, 1). Default 0.9 (the optimizer's, in the paper).
        window: steps that M reaches back. Default 50.
        every: steps between updates. Default 100 (the paper: once an epoch).
        start, stop, decay: as `set`, but by default updates go on to the end of training.

    Raises as `set` does.
    """

    name: ClassVar[str] = "snfs"
    family: ClassVar[Family] = "sparse to sparse"
    momentum: float = 0.9
    window: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("momentum", self.momentum)
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise OptionError(f"window={self.window!r} must be a whole number of steps, 1 or more.")

    def wants_gradient(self, sparse: Sparsifier, step: int) -> bool:
        return any(self.due(sparse, soon) for soon in range(step, step + self.window))

    def carries_gradient(self, sparse: Sparsifier, step: int) -> float:
        return 0.0 if self.due(sparse, step - 1) else self.momentum

    def can_grow(self, layer: Layer) -> bool:
        return layer.has_gradient

    def update(self, sparse: Sparsifier, step: int) -> None:
        fraction, layers = self.fraction(sparse, step), {layer.name: layer for layer in self.ready(sparse)}
        wanted = {name: layer.mean_gradient() for name, layer in layers.items()}
        total = sum(wanted.values())
        survivors, left = {}, {}
        for name, layer in layers.items():
            eager = wanted[name] * len(layers) > total
            here = min(fraction, layer.sparsity) if layer.sparsity < 0.2 and eager else fraction
            left[name] = max(min(1, layer.nnz), layer.nnz - math.ceil(here * layer.nnz))
            survivors[name] = layer.largest_magnitudes(left[name])
        dropped = sum(layer.nnz - left[name] for name, layer in layers.items())
        absent = {name: layer.numel - left[name] for name, layer in layers.items()}
        room = {name: int(_FULL * count) for name, count in absent.items()}
        for name, count in spread(dropped, wanted, room if sum(room.values()) >= dropped else absent).items():
            layers[name].rewire(survivors[name], layers[name].largest_gradients(count, besides=survivors[name]))
