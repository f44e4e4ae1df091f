"""Guided stochastic exploration: look at the gradients of a few absent connections that are likely to matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rarefy.engine import Family, Layer, Sparsifier
from rarefy.engine.factors import BY
from rarefy.engine.options import check_positive
from rarefy.engine.sharing import largest_across
from rarefy.errors import OptionError, SelectionError
from rarefy.methods.dynamic import DropAndGrow

_DENSE = 0.5  # above this density, all absent connections are fewer than those that are kept


@dataclass(frozen=True, kw_only=True)
class GSE(DropAndGrow):
    """GSE: sample absent connections where inputs and output gradients are large, and grow those of largest gradient.

    Heddes et al. 2024, "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration"
    (arXiv 2401.06898, algorithm 1). Starts as `static`. With delta_bo the gradient at output o and a_bi the input i of
    sample b, the gradient is G_oi = sum_b delta_bo a_bi. At an update, in a layer with n kept weights,

        S = floor(gamma n) connections, o drawn in proportion to f_o and i to g_i, with replacement; the different ones
            that are absent;
        grow the f(t) n of S of largest |G|;   f(t) = alpha/2 (1 + cos(pi t / T_end)),
        then drop as many of the smallest |w|, but nothing that has just grown.

        uniform: f = g = 1
        GraBo:   f_o = sum_b |delta_bo|,        g_i = sum_b |a_bi|           so that |G_oi| <= f_o g_i
        GraEst:  f_o = |sum_b s_b delta_bo|,    g_i = |sum_b s_b a_bi|       whose product, without the bars, has the mean G_oi

    with random signs s_b. The gradient of a sample costs as much as that of the kept weights; no dense one is ever made,
    on compressed storage no dense anything. Of a convolution the patches are the samples b, at every place of every
    image; in a grouped one o is drawn in proportion to f_o times the sum of its group's g. A layer that keeps more than
    half looks at all its absent connections. Where few connections are found to grow, few are dropped.

    What differs: samples that were drawn twice count once, so S is smaller than gamma n; signs are independent, not only
    four by four as the paper's analysis needs; f, g and G are those of the update step's own batches, not of ten samples
    of each class; all rows of a convolution's output gradients count (the reference code's backward sums use the first).

    Options (beside those of `static`, without `pattern`: single weights only):
        by: "graest" (default), "grabo" or "uniform".
        gamma: samples for each kept weight, above 0. Default 1 (the reference code's, as all of these).
        scope: "global" (default): one ranking for growth over the samples of all layers, and one for |w|, so that weights
            move between layers (each keeps at least one); or "layer": as many in each layer as before.
        drop_fraction: alpha. Default 0.2.
        every: steps between updates. Default 1000, for 200 epochs of 391 steps.
        start, stop, decay: as `set`, but the default stop is 0.6 of total_steps.

    Raises as `set` does, and SelectionError for a weight that is not that of a Linear or Conv2d module, or is tied. Needs
    hooks in the forward pass at update steps: with masked storage, under torch.compile, no layer is seen, a warning says
    so, and masks stay as they are; compressed storage needs none.
    """

    name: ClassVar[str] = "gse"
    family: ClassVar[Family] = "sparse to sparse"
    usual_stop: ClassVar[float | None] = 0.6
    by: str = "graest"
    gamma: float = 1.0
    scope: str = "global"
    drop_fraction: float = 0.2
    every: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in (("by", BY), ("scope", ("global", "layer"))):
            if getattr(self, option) not in known:
                raise OptionError(f"{option}={getattr(self, option)!r} is not one of {', '.join(known)}.")
        check_positive("gamma", self.gamma)

    def check(self, sparse: Sparsifier) -> None:
        if odd := [layer for layer in sparse.layers.values() if not layer.is_product]:
            names = ", ".join(f"{layer.name} {list(layer.shape)}" for layer in odd)
            raise SelectionError(
                f"gse looks at the inputs and output gradients of Linear and Conv2d modules with a weight of their own; "
                f"these are others: {names}. exclude={[layer.target.module_name for layer in odd]}."
            )

    def wants_factors(self, sparse: Sparsifier, step: int) -> bool:
        return self.due(sparse, step)

    def can_grow(self, layer: Layer) -> bool:
        return layer.has_factors

    def update(self, sparse: Sparsifier, step: int) -> None:
        fraction, layers = self.fraction(sparse, step), {layer.name: layer for layer in self.ready(sparse)}
        together = [layers] if self.scope == "global" and layers else [{n: layer} for n, layer in layers.items()]
        for some in together:
            self._rewire(sparse, some, fraction)

    def _rewire(self, sparse: Sparsifier, layers: dict[str, Layer], fraction: float) -> None:
        """Grow and drop over these layers together."""
        places = {name: self._sample(sparse, layer) for name, layer in layers.items()}
        scores = {name: layer.gradients_at(places[name]).abs() for name, layer in layers.items()}
        number = sum(layer.nnz for layer in layers.values())
        count = min(int(fraction * number), sum(found.numel() for found in places.values()))
        grown = largest_across(scores, count)
        stays = largest_across({n: layer.values().abs() for n, layer in layers.items()}, number - count, each=1)
        for name, layer in layers.items():
            layer.rewire(layer.kept(stays[name]), layer.at(places[name][grown[name]]))

    def _sample(self, sparse: Sparsifier, layer: Layer) -> Tensor:
        if layer.density > _DENSE:
            return layer.absent_connections()
        return layer.sample_connections(int(self.gamma * layer.nnz), self.by, sparse.generator)
