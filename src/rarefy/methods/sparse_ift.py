"""Sparse-IFT: spend sparsity on larger layers at equal FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from glob import escape
from typing import Any, ClassVar

from torch import nn

from rarefy.engine import Family, Method, Sparsifier
from rarefy.engine.options import check_flag
from rarefy.engine.selection import named_modules
from rarefy.errors import ModelError, OptionError
from rarefy.metrics import flops
from rarefy.nn import IsoFlop, iso_flop_
from rarefy.nn.dataflow import follow
from rarefy.nn.iso_flop import check_options, plan, sparse_weights
from rarefy.patterns import Pattern
from rarefy.schedules import Clock


@dataclass(frozen=True, kw_only=True)
class SparseIFT(Method):
    """Sparse iso-FLOP transformations: replace dense layers by larger sparse ones that cost as many FLOPs.

    Thangarasa et al. 2024, "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency"
    (arXiv 2303.11525). With x = 1 / (1 - sparsity), a layer of D_in inputs (k k f_in for a convolution) and D_out
    outputs becomes

        wide:        sqrt(x) times as many inputs and outputs, through the whole network,
        parallel:    y = sum_b g(norm_b(W_b x)) over B = round(x) sparse layers, each with its own norm,
        factorized:  y = V g(norm(U x)) with U [r, D_in] and V [D_out, r] sparse and r expanded,
                     r = ceil(D_in D_out / ((1 - sparsity) (D_in + D_out))),
        doped:       y = S x + V U x with S sparse and a dense low rank, r = floor(sparsity D_in D_out / (D_in + D_out)).

    All Linear and Conv2d layers are transformed but those that read the network's input and those that make its output;
    these stay dense. They are told by running the network on an example, not by names or shapes. The masks come
    from another method, RigL unless said otherwise, and the hyperparameters of dense training stay as they are.

    For every kind the sparsity is solved so that the network has the FLOPs of the dense one, with all layers, roundings
    and dense ends counted; the nominal sparsity only sets how much larger the layers become. (The reference solves
    "wide" alone, and masks U and V of "doped" too, which leaves 74 %, 44 % and 19 % of the FLOPs at 0.5, 0.75 and 0.9.)

    The network is built, or rewritten in place, before the optimizer is made:

        method = rarefy.methods.SparseIFT(kind="wide", sparsity=0.75)
        model = method.model(build, example)      # build(width) makes the network; example is an input of it
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparse = rarefy.sparsify(model, method, optimizer=optimizer, total_steps=1000)

    `rarefy.nn.iso_flop_(model, kind, sparsity, example)` rewrites a network that is there. "wide" builds with the hidden
    widths multiplied (rounded as the network does it), so it works for any network that can be built at a width.
    With masked weights the time of a step is that of the larger network: equal FLOPs are not equal seconds.

    Options:
        kind: "wide" (default), "parallel", "factorized" or "doped".
        sparsity: nominal, in [0, 1); the paper: 0.5, 0.75, 0.9. Default 0.9. At 0 nothing but "factorized" changes.
        masks: the method that chooses the masks: "rigl" (default), "set", "static", or any other with the options
            `sparsity` and `allocation` that works by masks alone.
        mask_options: its other options, such as {"every": 100, "drop_fraction": 0.3, "stop": 0.75} (the paper's RigL,
            and the defaults here).
        allocation: "uniform" (default), "er" or "erk": how the sparse layers share the sparsity.
        nonlinearity: "relu" (default): g in "parallel" and "factorized", as in the paper; "none": the identity, and no
            norm between the factors.
        dense_stem: whether layers that read the network's input stay dense (default, the paper's). False transforms them
            too: for networks whose first layer holds most of the weights, such as a perceptron on images.
        match_flops: solve the sparsity (default); False: take the nominal one.

    Raises OptionError for a network that was not transformed or transformed otherwise, and for masks that need more;
    ModelError as `iso_flop_` does, and where `build` does not widen.
    """

    name: ClassVar[str] = "sparse-ift"
    family: ClassVar[Family] = "sparse to sparse"
    kind: str = "wide"
    sparsity: float = 0.9
    masks: str = "rigl"
    mask_options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"
    nonlinearity: str = "relu"
    dense_stem: bool = True
    match_flops: bool = True

    def __post_init__(self) -> None:
        check_options(self.kind, self.sparsity, self.allocation, self.nonlinearity)
        check_flag("dense_stem", self.dense_stem)
        check_flag("match_flops", self.match_flops)
        if not isinstance(self.mask_options, Mapping):
            raise OptionError(f"mask_options={self.mask_options!r} must be a mapping, such as {{'every': 100}}.")
        if clash := [key for key in ("sparsity", "allocation") if key in self.mask_options]:
            raise OptionError(f"mask_options may not hold {', '.join(clash)}: the transformation decides it.")
        _check_masks(self._inner())

    def _inner(self, allocation: Mapping[str, float] | str = "uniform") -> Method:
        from rarefy.methods import make  # all methods are known only once they are all imported

        return make(self.masks, sparsity=self.sparsity, allocation=allocation, **self.mask_options)

    # --- the network ------------------------------------------------------------------------------------------------

    def model(self, build: Callable[[float], nn.Module], example: Any = None) -> nn.Module:
        if example is None:
            raise OptionError("sparse-ift must see the network run: SparseIFT(...).model(build, example).")
        if self.kind != "wide":
            model = build(1.0)
            iso_flop_(
                model,
                self.kind,
                self.sparsity,
                example,
                allocation=self.allocation,
                nonlinearity=self.nonlinearity,
                dense_stem=self.dense_stem,
                match_flops=self.match_flops,
            )
        else:
            dense = build(1.0)
            size, budget = sum(p.numel() for p in dense.parameters()), flops(dense, example).dense
            model = build((1 - self.sparsity) ** -0.5)
            if self.sparsity > 0 and sum(p.numel() for p in model.parameters()) <= size:
                raise ModelError(
                    f"build({(1 - self.sparsity) ** -0.5:.4g}) is no wider than build(1): it ignores the width."
                )
            names = sparse_weights(model, follow(model, example), self.dense_stem)
            made = plan(model, names, self.kind, self.sparsity, example, budget, self.allocation, self.match_flops)
            model._rarefy_iso_flop = made  # type: ignore[assignment]
        return model

    # --- the masks: the inner method's, at the sparsities that were solved ---------------------------------------------

    @property
    def pattern(self) -> str | Pattern:
        return getattr(self._inner(), "pattern", "unstructured")

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return self._inner().needs_calibration

    def clock(self, total_steps: int | None) -> Clock:
        return self._inner().clock(total_steps)

    def check(self, sparse: Sparsifier) -> None:
        found = dict(_transformed(sparse.model))
        for made in found.values():
            if (made.kind, made.sparsity) != (self.kind, self.sparsity):
                raise OptionError(
                    f"the network was transformed with kind={made.kind!r}, sparsity={made.sparsity:g}; this method has "
                    f"kind={self.kind!r}, sparsity={self.sparsity:g}. Use the same."
                )
        if not found:
            raise OptionError(
                "sparse-ift trains a network that was transformed, and this one was not: build it with "
                "rarefy.methods.SparseIFT(...).model(build, example), or rewrite it with rarefy.nn.iso_flop_ before the "
                "optimizer is made."
            )
        self._inner().check(sparse)

    def choose(self, sparse: Sparsifier) -> None:
        levels = {
            f"{prefix}.{name}".removeprefix("."): level
            for prefix, made in _transformed(sparse.model)
            for name, level in made.sparsities.items()
        }
        sparse.memory["allocation"] = {escape(name): levels.get(name, 0.0) for name in sparse.layers}
        self._now(sparse).choose(sparse)

    def initialise(self, sparse: Sparsifier) -> None:
        self._now(sparse).initialise(sparse)

    def wants_gradient(self, sparse: Sparsifier, step: int) -> bool:
        return self._now(sparse).wants_gradient(sparse, step)

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        self._now(sparse).after_step(sparse, step)

    def _now(self, sparse: Sparsifier) -> Method:
        return self._inner(sparse.memory["allocation"])


def _transformed(model: nn.Module) -> list[tuple[str, IsoFlop]]:
    """Return every part of the model that was transformed as a whole, by its name."""
    marked = [(name, getattr(module, "_rarefy_iso_flop", None)) for name, module in named_modules(model)]
    return [(name, made) for name, made in marked if isinstance(made, IsoFlop)]


def _check_masks(method: Method) -> None:
    """Refuse a method whose masks cannot be had at given sparsities, or that does more than is handed on to it."""
    options = {option.name for option in dataclasses.fields(method)}
    if lacking := {"sparsity", "allocation"} - options:
        raise OptionError(
            f"masks={method.name!r} has no option {' and '.join(sorted(lacking))}: take rigl, set or static."
        )
    moments = {n for n in dir(Method) if not n.startswith("_") and callable(getattr(Method, n))} - {"make", "options"}
    more = sorted(n for n in moments if getattr(type(method), n) is not getattr(Method, n) and n not in vars(SparseIFT))
    if more or not method.prunes:
        raise OptionError(
            f"masks={method.name!r} does more than choose masks ({', '.join(more) or 'it makes none'}): take rigl, set or "
            "static."
        )
