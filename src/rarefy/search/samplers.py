"""What a random search draws: sparse networks inside a dense parent, as masks of its weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from glob import escape
from typing import Protocol

import torch
from torch import Tensor, nn

import rarefy
from rarefy import methods
from rarefy.allocation import densities
from rarefy.engine import Method, find_targets
from rarefy.engine.options import check_fraction
from rarefy.engine.sharing import Rule
from rarefy.errors import OptionError
from rarefy.patterns import Pattern
from rarefy.search.nodes import draw_nodes, hidden_layers, kept_nodes, weight_masks

Masks = dict[str, Tensor]


class Sampler(Protocol):
    """Draws one candidate: masks by parameter name, True = kept."""

    def draw(self, model: nn.Module, generator: torch.Generator) -> Masks: ...


@dataclass(frozen=True)
class Nodes:
    """Whole hidden nodes: `keep` of those of every hidden layer (see `nodes.hidden_layers`), exact counts, at least 1.

    A kept node keeps its row and column of weights, so between two such layers 1 - keep^2 of the weights are zero.

    Raises OptionError for a keep outside (0, 1], ModelError where the model has no hidden layers.
    """

    keep: float

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise OptionError(f"keep={self.keep!r} must lie in (0, 1]: the fraction of nodes that stay.")

    def draw(self, model: nn.Module, generator: torch.Generator) -> Masks:
        return weight_masks(model, draw_nodes(model, self.keep, generator))

    def count(self, model: nn.Module) -> dict[str, int]:
        """Return how many nodes each hidden layer keeps."""
        return {layer.name: kept_nodes(layer.nodes, self.keep) for layer in hidden_layers(model)}


@dataclass(frozen=True)
class Edges:
    """Single weights (or units of a pattern) at random, at layer densities "erk" (default), "er", "uniform" or by name.

    With a pattern such as "2:4" the pattern's own sparsity holds: leave `sparsity` None.
    """

    sparsity: float | None = None
    allocation: Rule = "erk"
    pattern: str | Pattern = "unstructured"

    def __post_init__(self) -> None:
        _static(self)

    def draw(self, model: nn.Module, generator: torch.Generator) -> Masks:
        return _drawn(model, _static(self), generator)


@dataclass(frozen=True)
class LayerRatios:
    """Layer densities at random too: each layer's share of the kept weights is ERK's times a factor from [1 / spread, spread].

    The factor is drawn log-uniformly, the total is that of the sparsity (up to rounding and layers that are full).
    """

    sparsity: float
    spread: float = 2.0

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)
        if not self.spread >= 1:
            raise OptionError(f"spread={self.spread!r} must be at least 1.")

    def draw(self, model: nn.Module, generator: torch.Generator) -> Masks:
        shapes = {target.name: target.shape for target in find_targets(model)[0]}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        base = densities(shapes, self.sparsity, "erk")
        factors = self.spread ** (2 * torch.rand(len(shapes), generator=generator, dtype=torch.float64) - 1)
        wanted = {n: base[n] * float(f) for n, f in zip(shapes, factors, strict=True)}
        budget, low, high = (1 - self.sparsity) * sum(sizes.values()), 0.0, 1e6
        for _ in range(100):  # the scale at which the full layers and the others keep the budget
            scale = (low + high) / 2
            over = sum(min(1.0, scale * wanted[n]) * sizes[n] for n in sizes) > budget
            low, high = (low, scale) if over else (scale, high)
        by_name = {escape(n): 1 - max(min(1.0, high * wanted[n]), 1 / sizes[n]) for n in sizes}
        method = methods.make("static", sparsity=self.sparsity, allocation=by_name, init="dense")
        return _drawn(model, method, generator)


def _static(edges: Edges) -> Method:
    options = {"allocation": edges.allocation, "pattern": edges.pattern, "init": "dense"}
    return methods.make("static", sparsity=edges.sparsity, **options)


def _drawn(model: nn.Module, method: Method, generator: torch.Generator) -> Masks:
    """The masks that a method draws, on a copy that is thrown away."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return {name: mask.cpu() for name, mask in rarefy.sparsify(copy.deepcopy(model), method, seed=seed).masks().items()}
