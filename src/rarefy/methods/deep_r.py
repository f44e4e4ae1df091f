"""Deep rewiring: a connection whose weight changes its sign dies, and another one is born, at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.engine import Family, Layer, Sparsifier
from rarefy.engine.distributed import from_first_rank
from rarefy.engine.options import check_positive
from rarefy.methods.dynamic import Rewiring
from rarefy.methods.static import RandomStart


@dataclass(frozen=True, kw_only=True)
class DeepR(Rewiring, RandomStart):
    """DEEP R: every connection has a sign; one whose weight crosses zero is dropped, and a random one grows.

    Bellec et al. 2018, "Deep Rewiring: Training Very Sparse Deep Networks" (arXiv 1711.05136, algorithm 1). A connection k
    with the sign s_k has the weight w_k = s_k theta_k, theta_k >= 0. With the learning rate eta, after the optimizer's step

        theta_k <- theta_k - eta alpha + sqrt(2 eta T) nu_k,   nu_k ~ N(0, 1);
        drop every connection with theta_k < 0;
        grow as many in the same layer, uniformly at random, at theta = 0 with a random sign.

    The drift -eta alpha is an L1 penalty; with the noise, training is a random walk over networks and their weights.
    The number of connections of each layer never changes. Only the signs are remembered: of a weight that is not zero the
    sign is its own, and of one that is exactly zero any sign is as likely, so it is drawn anew. A connection that was
    just dropped does not grow again at once; where a layer has too few others, so many crossed ones stay, with new signs.

    Every step may change every layer: the event log grows by one line a layer and step.

    Options (beside those of `static`, without `pattern`: single weights only):
        l1: alpha. Default 1e-4 (usual in implementations; it must fit the task).
        temperature: T. Default None: eta alpha^2 / 18, so that the noise is a third of the drift.
        every: steps between updates. Default 1: every step. In between, what has crossed zero waits, and is not moved on.
        start, stop: as `set`, but by default updates go on to the end of training. Drift and noise begin and end with them.

    Raises as `static` does, and OptionError for a negative l1 or temperature.
    """

    name: ClassVar[str] = "deep-r"
    family: ClassVar[Family] = "sparse to sparse"
    every: int = 1
    l1: float = 1e-4
    temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("l1", self.l1, zero=True)
        if self.temperature is not None:
            check_positive("temperature", self.temperature, zero=True)

    def initialise(self, sparse: Sparsifier) -> None:
        super().initialise(sparse)
        for layer in sparse.layers.values():
            self._remember(sparse, layer)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        first, last = sparse.clock.first, sparse.clock.last
        if step < first or (last is not None and step > last):
            return
        for layer in sparse.layers.values():
            if step == first:
                self._remember(sparse, layer)  # here it begins: what crossed before does not count
            else:
                self._drift(sparse, layer, self.due(sparse, step))
        super().after_step(sparse, step)

    def update(self, sparse: Sparsifier, step: int) -> None:
        for layer in sparse.layers.values():
            signs = sparse.memory[f"signs {layer.name}"].to(layer.values())
            stays = layer.values() * signs >= 0
            crossed = (~stays).nonzero().squeeze(1)[: layer.numel - layer.nnz]
            if crossed.numel():
                stays = torch.ones_like(stays).index_fill_(0, crossed, False)
                count = torch.tensor([crossed.numel()])
                layer.rewire(layer.kept(stays), layer.random(count, sparse.generator, besides=layer.kept()))
            self._remember(sparse, layer)

    def _drift(self, sparse: Sparsifier, layer: Layer, due: bool) -> None:
        rate, values = layer.learning_rate, layer.values()
        heat = rate * self.l1**2 / 18 if self.temperature is None else self.temperature
        signs = sparse.memory[f"signs {layer.name}"].to(values)
        noise = torch.randn(values.shape, generator=sparse.generator).to(values)
        move = signs * (noise * math.sqrt(2 * rate * heat) - rate * self.l1)
        if not due:  # what has crossed waits to be dropped: further on the drift would make it larger
            move = move.masked_fill(values * signs < 0, 0)
        layer.write(values + move)

    def _remember(self, sparse: Sparsifier, layer: Layer) -> None:
        """Note every kept weight's sign, int8 [nnz]; a weight that is zero gets a random one."""
        values = from_first_rank(layer.values())  # ranks may begin with different weights, until they are shared
        drawn = torch.randint(2, values.shape, generator=sparse.generator).to(values) * 2 - 1
        signs: Tensor = torch.where(values == 0, drawn, values.sign())
        sparse.memory[f"signs {layer.name}"] = signs.to(torch.int8).cpu()
