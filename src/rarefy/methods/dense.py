"""The two dense references: the network as it is, and a narrower one with as many parameters as a sparse one keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from rarefy.engine import Family, Method, Sparsifier, check_fraction, find_targets
from rarefy.errors import OptionError
from rarefy.models.width import small_dense_width


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """The network as it is: every weight kept.

    The upper reference of every comparison. No mask is made and no weight is touched, so training is bit for bit what
    it is without rarefy.
    """

    name: ClassVar[str] = "dense"
    family: ClassVar[Family] = "baseline"


@dataclass(frozen=True, kw_only=True)
class SmallDense(Method):
    """A narrower dense network with as many parameters as a sparse one keeps.

    The reference that a sparse network must beat to be worth its trouble (Zhu & Gupta 2017, arXiv 1710.01878:
    "large-sparse against small-dense"; Evci et al. 2020, arXiv 1911.11134). P(f) is the number of parameters at hidden
    widths multiplied by f, and W the number of weights that a sparse method would prune. Trains the network of

        f = max { f : P(f) <= P(1) - sparsity W },

    so both have the same parameters to spend, biases and norms included. Inputs, outputs and depth stay. It has to build
    the network itself: from `rarefy train` and `rarefy compare`, or

        model = rarefy.methods.SmallDense(sparsity=0.9).model(lambda width: rarefy.models.build("lenet-300-100", width=width))

    Options:
        sparsity: the sparsity to match, in [0, 1). Default 0.9.

    Raises ModelError when even the narrowest network has more parameters than that, and OptionError when it is applied to
    a finished model.
    """

    name: ClassVar[str] = "small-dense"
    family: ClassVar[Family] = "baseline"
    sparsity: float = 0.9

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)

    def model(self, build: Callable[[float], nn.Module], example: Any = None) -> nn.Module:
        with torch.device("meta"):
            full = build(1.0)
        weights = sum(target.parameter.numel() for target in find_targets(full)[0])
        budget = sum(p.numel() for p in full.parameters()) - math.ceil(self.sparsity * weights - 1e-6)
        model = build(small_dense_width(build, budget))
        model._rarefy_small_dense = True  # type: ignore[assignment]
        return model

    def check(self, sparse: Sparsifier) -> None:
        if not any(getattr(module, "_rarefy_small_dense", False) for module in sparse.model.modules()):
            raise OptionError(
                "small-dense builds a narrower network, it cannot narrow one that is there. Build it with "
                "rarefy.methods.SmallDense(sparsity=...).model(build), where build(width) makes the network."
            )
