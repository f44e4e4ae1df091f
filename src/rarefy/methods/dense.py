"""The two dense references: the network as it is, and a narrower one with as many parameters as a sparse one keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from rarefy.engine import Method, Sparsifier, check_fraction
from rarefy.errors import OptionError
from rarefy.models.width import small_dense_width


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """The network as it is: every weight kept.

    The upper reference of every comparison. No mask is made and no weight is touched, so training is bit for bit what
    it is without rarefy.
    """

    name: ClassVar[str] = "dense"


@dataclass(frozen=True, kw_only=True)
class SmallDense(Method):
    """A narrower dense network with as many parameters as a sparse one keeps.

    The reference that a sparse network must beat to be worth its trouble (Zhu & Gupta 2017, arXiv 1710.01878:
    "large-sparse against small-dense"; Evci et al. 2020, arXiv 1911.11134). With d = 1 - sparsity and P(f) the number of
    parameters at hidden widths multiplied by f, trains the network of

        f = max { f : P(f) <= d P(1) }.

    Inputs, outputs and depth stay. It has to build the network itself: from `rarefy train` and `rarefy compare`, or

        model = rarefy.methods.SmallDense(sparsity=0.9).model(lambda width: rarefy.models.build("lenet-300-100", width=width))

    Options:
        sparsity: the sparsity to match, in [0, 1). Default 0.9.

    Raises ModelError when even the narrowest network has more parameters than that, and OptionError when it is applied to
    a finished model.
    """

    name: ClassVar[str] = "small-dense"
    sparsity: float = 0.9

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)

    def model(self, build: Callable[[float], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            full = sum(p.numel() for p in build(1.0).parameters())
        model = build(small_dense_width(build, int((1 - self.sparsity) * full + 1e-9)))
        model._rarefy_small_dense = True  # type: ignore[assignment]
        return model

    def check(self, sparse: Sparsifier) -> None:
        if not any(getattr(module, "_rarefy_small_dense", False) for module in sparse.model.modules()):
            raise OptionError(
                "small-dense builds a narrower network, it cannot narrow one that is there. Build it with "
                "rarefy.methods.SmallDense(sparsity=...).model(build), where build(width) makes the network."
            )
