"""Static random sparsity: a mask drawn before training and never changed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rarefy.engine import Family, Layer, Method, Sparsifier
from rarefy.engine.options import check_allocation, check_pattern, check_sparsity
from rarefy.engine.sharing import Rule, share
from rarefy.errors import OptionError
from rarefy.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class RandomStart(Method):
    """What `static` and the methods that go on from it share: a random mask at given layer densities."""

    more_rules: ClassVar[Collection[str]] = ()  # names of allocations that a subclass adds
    sparsity: float = 0.9
    allocation: Rule = "erk"
    init: str = "fan-in"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, getattr(self, "pattern", "unstructured"))
        check_allocation(self.allocation, self.more_rules)
        if self.init not in ("fan-in", "dense"):
            raise OptionError(f"init={self.init!r} must be 'fan-in' or 'dense'.")

    def choose(self, sparse: Sparsifier) -> None:
        for name, counts in share(sparse.layers, self.sparsity, self.allocation, sparse.magnitudes).items():
            layer = sparse.layers[name]
            if not layer.given:
                layer.rewire(layer.random(counts, sparse.generator))

    def initialise(self, sparse: Sparsifier) -> None:
        if self.init == "fan-in":
            for layer in sparse.layers.values():
                if not layer.given and not isinstance(layer.module, nn.Embedding | nn.EmbeddingBag):
                    layer.scale_outputs(fan_in_gain(layer))


@dataclass(frozen=True, kw_only=True)
class Static(RandomStart):
    """Static random sparsity: draw a mask at given layer densities, then train what is left.

    The baseline of sparse training (Evci et al. 2020, arXiv 1911.11134), and how `set`, `rigl` and their kin begin. Layer l
    with N_l weights keeps n_l of them, exactly, chosen uniformly at random; n_l comes from the allocation. The mask never
    changes. For the recipe of "The Unreasonable Effectiveness of Random Pruning", with the dense network's initial weights
    and with layer densities taken from other methods, see `random-pruning`.

    Options:
        sparsity: fraction of zeros over the sparse layers, in [0, 1). Default 0.9.
        allocation: how the layers share it: "erk" (default), "er", "erk+" (last layer dense), "uniform", "uniform+" (first
            layer dense, last at least 0.2 dense), or sparsities by layer-name glob. "global" and "lamp" rank by |w|, and
            give random positions in the layer densities that come of it.
        pattern: "unstructured" (default), "N:M", "RxC", "channel", "column", "fan-in", "groupG".
        init: "fan-in" (default) multiplies each output unit's weights by sqrt(fan-in / kept fan-in), so that signals
            keep their variance (Evci et al. 2022, arXiv 2010.03533, eq. 2); "dense" leaves the weights as they are:
            use it for a trained network.

    Raises AllocationError where a layer would keep nothing, PatternError where a layer does not fit the pattern.
    """

    name: ClassVar[str] = "static"
    family: ClassVar[Family] = "before training"
    pattern: str | Pattern = "unstructured"

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        super().__post_init__()


def fan_in_gain(layer: Layer) -> torch.Tensor:
    """Return sqrt(fan-in / kept fan-in) of every output unit; 1 where nothing is kept. Float [outputs]."""
    kept = layer.kept_per_output()
    return torch.where(kept > 0, (layer.numel / layer.shape[0] / kept.clamp(min=1)).sqrt(), 1.0)
