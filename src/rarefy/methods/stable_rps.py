"""Randomised parameter sharing: all weights are read from one small array by a hash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rarefy.engine import Family, Method, Sparsifier, check_fraction
from rarefy.errors import OptionError
from rarefy.nn import SharedArray, share_
from rarefy.nn.share import check_options


@dataclass(frozen=True, kw_only=True)
class StableRPS(Method):
    """Parameter sharing: read all weights from one small array by a fixed hash, at full compute and a fraction of the memory.

    Desai & Shrivastava 2024, "In defense of parameter sharing for model-compression" (arXiv 2310.11611), on the ROAST
    hashing of Desai et al. 2023 (arXiv 2207.10702). The n weights of all Linear, Conv2d and Embedding layers become the
    array psi of m = floor((1 - sparsity) n) trainable values. Weight j of layer l is

        W_l[j] = lambda_l G_l[j] psi[h(l, j)],

    with h a fixed hash, G a fixed random sign, and lambda_l such that W_l starts with the standard deviation that the
    layer's own initialisation has: psi ~ U(-C, C), lambda_l = sqrt(3) std(W_l) / C. Biases and norms stay as they are.

        h, "fold" (RANDOMFOLD): with t = j + all weights before layer l, chunk = t div m,
            h = (H(chunk) + t mod m) mod m,   H(x) = ((a x + b x^2 + c) mod P) mod m.
        h, "tile" (ROAST): each tile of the weight's matrix [outputs, inputs] is contiguous in psi from
            H(all weights before layer l + the tile's number) on, with m - tile^2 in the place of m.

    The stable scaler divides the gradient of slot i by v_i. With c_i weights in the slot,

        v_i = (sum lambda)^2 / c_i   ("v1"),

    so that an SGD step changes a weight by the mean of its sharers' gradients, whatever C is. Momentum and weight decay
    follow; Adam scales gradients itself, and there the scaler is moot. The division is exact, without the 1e-3 and
    1e-6 of the reference code, and one hash serves the whole network (the reference seeds it for each module, so that its
    chunks overlap; and its hash of tiles is linear, which leaves them in lines: see `rarefy.kernels.shared_weight`).
    So at sparsity 0 nothing is shared and the dense network comes back: the same outputs bit for bit, also after SGD
    steps.

    No weight is zero: FLOPs are the dense network's, forward and backward, and `sparsity` in results stays 0. Parameters,
    gradients and optimizer state have psi's size; a layer's weight exists while it is being used. The network
    is built with

        model = rarefy.methods.StableRPS(sparsity=0.99).model(lambda width: build())

    or a given one changed in place by `rarefy.nn.share_(model, keep=0.01)`; `rarefy.nn.unshare_(model)` makes it plain
    and dense again.

    Options:
        sparsity: share of the weights' memory that is saved, in [0, 1): 0.984375 is 64 times less. Default 0.9.
        mapping: "fold" (default) or "tile".
        tile: side of a tile, 32 by default (ROAST); an embedding's tiles are one row high. 1 hashes every weight for
            itself (HashedNets).
        scope: "global" (default): one array for the network; "local": each layer shares within itself only.
        init_std: C. Default 0.04 (reference code).
        scaler: "v1" (default), "v2" sum lambda, "v3" mean lambda, "v4" sqrt(sum lambda^2), "v5" sum lambda^2, or "none".
        smallest: layers with fewer weights keep their own. Default 0.
        hash_seed: of h and G. Default 0.

    Raises OptionError where psi would be empty, or not larger than a tile, and when it is applied to a network whose
    weights are not shared; ModelError for an embedding with max_norm, scale_grad_by_freq or sparse, and for a layer whose
    weights are all equal, which has no scale.
    """

    name: ClassVar[str] = "stable-rps"
    family: ClassVar[Family] = "parameter sharing"
    prunes: ClassVar[bool] = False
    sparsity: float = 0.9
    mapping: str = "fold"
    tile: int = 32
    scope: str = "global"
    init_std: float = 0.04
    scaler: str = "v1"
    smallest: int = 0
    hash_seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity)
        if isinstance(self.hash_seed, bool) or not isinstance(self.hash_seed, int):
            raise OptionError(f"hash_seed={self.hash_seed!r} must be a whole number.")
        check_options(1 - self.sparsity, self.mapping, self.tile, self.scope, self.init_std, self.scaler, self.smallest)

    def model(self, build: Callable[[float], nn.Module], example: Any = None) -> nn.Module:
        model = build(1.0)
        share_(
            model,
            1 - self.sparsity,
            mapping=self.mapping,
            tile=self.tile,
            scope=self.scope,
            init_std=self.init_std,
            scaler=self.scaler,
            smallest=self.smallest,
            seed=self.hash_seed,
        )
        return model

    def check(self, sparse: Sparsifier) -> None:
        if not any(isinstance(module, SharedArray) for module in sparse.model.modules()):
            raise OptionError(
                "stable-rps trains a network whose weights are shared, and this one has its own: call "
                "rarefy.nn.share_(model, keep=...) before the optimizer is made, or build the network with "
                "rarefy.methods.StableRPS(sparsity=...).model(build)."
            )
