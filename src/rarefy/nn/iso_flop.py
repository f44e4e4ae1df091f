"""Larger layers that cost, once they are sparse, what one dense layer costs: Sparse-IFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rarefy.allocation import densities
from rarefy.errors import AllocationError, ModelError, OptionError, nearest
from rarefy.metrics.flops import FlopsReport, flops
from rarefy.nn.dataflow import Flow, follow
from rarefy.nn.iso_flop_layers import branches_for, doped, factorized, parallel
from rarefy.nn.rewriting import replaceable, swap, unchanged_on_failure
from rarefy.nn.widen import widen_

KINDS = ("wide", "parallel", "factorized", "doped")
NONLINEARITIES = ("relu", "none")
_LAYERS = (nn.Linear, nn.Conv2d)
_WIDE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class IsoFlop:
    """A network that costs, with these sparsities, what the dense one before it cost.

    Attributes:
        kind, sparsity: as asked for.
        sparsities: parameter name -> sparsity, of every weight that is to be sparse. All others stay dense.
        flops: forward FLOPs of one sample with these sparsities; `flops_dense`: of the dense network.
    """

    kind: str
    sparsity: float
    sparsities: Mapping[str, float]
    flops: float
    flops_dense: float


def iso_flop_(
    model: nn.Module,
    kind: str,
    sparsity: float,
    example: Any,
    *,
    allocation: str = "uniform",
    nonlinearity: str = "relu",
    dense_stem: bool = True,
    match_flops: bool = True,
) -> IsoFlop:
    """Replace the layers of a network, in place, by larger ones that are to be sparse, at equal FLOPs.

    Layers that make the network's output stay as they are (and dense), and so do those that read its input unless
    `dense_stem` is False; "wide" widens them with the rest. With x = 1 / (1 - sparsity), a layer with D_in inputs
    (k k f_in of a convolution) and D_out outputs becomes

        wide:        sqrt(x) times as many inputs and outputs (`widen_`),
        parallel:    B = round(x) layers like it (`Parallel`),
        factorized:  D_in -> r -> D_out, r = ceil(D_in D_out / ((1 - sparsity) (D_in + D_out))), the second 1x1,
        doped:       itself, sparse, and a dense D_in -> r -> D_out, r = floor(sparsity D_in D_out / (D_in + D_out))
                     (`Doped`).

    A batch norm that alone reads the layer's output moves into the branches of "parallel", one each; "factorized" gets one
    of the same kind between its two. Only a fresh network should be rewritten: new weights are drawn so that outputs
    have the variance that they had, given that sparse weights are scaled up by sqrt(fan-in / kept fan-in), as
    `static`, `set` and `rigl` do. A replaced layer's own hooks go with it. No mask is made: hand the sparsities on, or
    train with the method `sparse-ift`, to which the network tells them.

    Args:
        model: is changed; before the optimizer is made.
        kind: "wide", "parallel", "factorized" or "doped".
        sparsity: nominal, in [0, 1). At 0 "wide", "parallel" and "doped" change nothing.
        example: an input of the network, as `rarefy.metrics.flops` takes it.
        allocation: "uniform", "er" or "erk": how the sparse layers share it.
        nonlinearity: "relu" or "none": g of "parallel" and what follows the first factor of "factorized".
        dense_stem: False for networks whose first layer holds most of the weights, such as a perceptron on images: it is
            transformed as the others are.
        match_flops: find the sparsity at which the network has the dense one's FLOPs, all layers counted. False: take
            the nominal one, from which rounding and widened dense layers move the FLOPs.

    Raises:
        OptionError: an unknown name, a number out of its range, or a sparsity too low for two branches.
        ModelError: nothing to rewrite, a network that does not run on the example or cannot be widened, or dense
            layers that alone cost more than the dense network. The network is then as it was.

    Source: Thangarasa et al. 2024, arXiv 2303.11525.

    Example:
        >>> import torch, rarefy
        >>> net = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 40), nn.ReLU(), nn.Linear(40, 10))
        >>> made = iso_flop_(net, "doped", 0.75, torch.zeros(1, 64))
        >>> net[2]
        Doped(
          (sparse): Linear(in_features=80, out_features=40, bias=True)
          (down): Linear(in_features=80, out_features=20, bias=False)
          (up): Linear(in_features=20, out_features=40, bias=False)
        )
        >>> made.sparsities
        {'2.sparse.weight': 0.75}
        >>> sparse = rarefy.sparsify(net, "rigl", include=[*made.sparsities], allocation=made.sparsities)
        >>> rarefy.metrics.flops(net, torch.zeros(1, 64), sparse.masks()).sparse == made.flops_dense
        True
    """
    check_options(kind, sparsity, allocation, nonlinearity)
    budget = flops(model, example).dense
    flow = follow(model, example)
    with unchanged_on_failure(model):
        if kind == "wide":
            widen_(model, (1 - sparsity) ** -0.5, example)
            names = sparse_weights(model, flow, dense_stem)
        else:
            names = _replace(model, flow.called - ends(flow, dense_stem), flow, kind, sparsity, nonlinearity)
        made = plan(model, names, kind, sparsity, example, budget, allocation, match_flops)
        model._rarefy_iso_flop = made  # type: ignore[assignment]
        return made


def check_options(kind: str, sparsity: float, allocation: str, nonlinearity: str) -> None:
    """Raise OptionError for options of `iso_flop_` that are unknown or out of their range."""
    if kind not in KINDS:
        raise OptionError(f"kind={kind!r} is not known{nearest(str(kind), KINDS)}; it is one of {', '.join(KINDS)}.")
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise OptionError(f"sparsity={sparsity!r} must be a number in [0, 1).")
    if kind == "parallel" and sparsity > 0 and branches_for(sparsity) < 2:
        raise OptionError(f"sparsity={sparsity!r} pays for less than two parallel layers: take at least 1/3, or 0.")
    if allocation not in ("uniform", "er", "erk"):
        raise OptionError(f"allocation={allocation!r} must be 'uniform', 'er' or 'erk'.")
    if nonlinearity not in NONLINEARITIES:
        raise OptionError(f"nonlinearity={nonlinearity!r} must be one of {', '.join(NONLINEARITIES)}.")


# --- which weights are sparse, and how sparse --------------------------------------------------------------------------


def ends(flow: Flow, dense_stem: bool) -> set[str]:
    """Return the layers that stay dense."""
    return flow.head | flow.stem if dense_stem else flow.head


def sparse_weights(model: nn.Module, flow: Flow, dense_stem: bool) -> list[str]:
    """Return the weights of the linear and convolutional layers that do not stay dense."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, _WIDE) and "weight" in module._parameters and name in flow.called - ends(flow, dense_stem)
    ]


def plan(
    model: nn.Module,
    names: list[str],
    kind: str,
    sparsity: float,
    example: Any,
    budget: float,
    rule: str,
    match_flops: bool,
) -> IsoFlop:
    """Share a sparsity out over these weights of a rewritten network, so that it costs `budget` FLOPs a sample."""
    report = flops(model, example)
    if not names:
        if sparsity > 0:
            raise ModelError(
                f"{type(model).__name__} has no layer that {kind!r} can make sparse: none of its Linear and Conv2d layers "
                "stands between those that read its input and those that make its output."
            )
        return IsoFlop(kind, sparsity, {}, report.dense, budget)
    if lost := [name for name in names if not report.positions(name)]:
        raise ModelError(f"the FLOPs of {', '.join(lost)} cannot be counted on the example input.")
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    level = _level(report, shapes, budget, rule) if match_flops else sparsity
    kept = densities(shapes, level, rule)
    sparsities = {name: max(0.0, round(1 - density, 12)) for name, density in kept.items()}
    reached = report.dense - sum(sparsities[name] * report.layers[name].dense for name in names)
    return IsoFlop(kind, sparsity, sparsities, reached, budget)


def _level(report: FlopsReport, shapes: Mapping[str, tuple[int, ...]], budget: float, rule: str) -> float:
    """Return the sparsity over all these weights at which the network costs `budget`; bisection."""
    costs = {name: report.layers[name].dense for name in shapes}
    fixed = report.dense - sum(costs.values())
    if fixed >= budget:
        raise ModelError(
            f"the layers that stay dense cost {fixed:,.0f} FLOPs alone, the dense network {budget:,.0f}: lower the "
            "sparsity, or set dense_stem=False."
        )
    if report.dense <= budget:
        return 0.0

    def cost(level: float) -> float:
        try:
            return sum(d * costs[name] for name, d in densities(shapes, level, rule).items())
        except AllocationError:  # the rule cannot be that sparse
            return 0.0

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fixed + cost(middle) > budget else (low, middle)
    return low


# --- replacing layers --------------------------------------------------------------------------------------------------


def _replace(
    model: nn.Module, chosen: set[str], flow: Flow, kind: str, sparsity: float, nonlinearity: str
) -> list[str]:
    """Replace the chosen layers; returns the names of the weights that are to be sparse."""
    if sparsity == 0 and kind != "factorized":
        return []
    names: list[str] = []
    for name, layer in replaceable(model, _LAYERS)[0].items():
        if name not in chosen:
            continue
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and kind != "parallel":
            continue
        norm = model.get_submodule(flow.norms[name]) if name in flow.norms else None
        if kind == "parallel":
            new, parts = parallel(layer, norm, sparsity, nonlinearity)
            if norm is not None:
                swap(model, norm, nn.Identity())
        elif kind == "factorized":
            new, parts = factorized(layer, norm, sparsity, nonlinearity)
        else:
            new, parts = doped(layer, sparsity)
        swap(model, layer, new.train(layer.training))
        names += [f"{name}.{part}.weight" for part in parts]
    return names
