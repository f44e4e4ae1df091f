"""FLOPs of training, from what a run really kept, and the closed forms of the RigL paper (Evci et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rarefy.errors import OptionError, SelectionError, nearest
from rarefy.metrics.flops import FlopsReport


class CostLike(Protocol):
    """Running sums of one layer over a training run."""

    @property
    def steps(self) -> int: ...  # optimizer steps

    @property
    def kept_steps(self) -> int: ...  # sum over optimizer steps of the number of kept weights

    @property
    def dense_gradient_steps(self) -> int: ...  # steps that computed the gradient of every weight, kept or not

    @property
    def further_gradients(self) -> int: ...  # sum over other steps of weights, not kept, whose gradient was computed


class LayerCost(NamedTuple):
    """Running sums of one layer over a training run: steps, kept weights summed over steps, dense-gradient steps, ..."""

    steps: int
    kept_steps: int
    dense_gradient_steps: int = 0
    further_gradients: int = 0


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a whole training run: what the method needed, and what dense training of the same length needs."""

    layers: dict[str, float]
    total: float
    dense: float

    @property
    def ratio(self) -> float:
        """Training FLOPs over those of dense training (1.0 where nothing was computed)."""
        return self.total / self.dense if self.dense else 1.0


def training_flops(
    report: FlopsReport, cost: Mapping[str, CostLike], samples_per_step: float, *, steps: int | None = None
) -> TrainingFlops:
    """Count the FLOPs of a training run from the weights it kept at every step.

    For one sample and one step a layer with `kept` weights, each used at `p` positions, costs
    forward f = 2 * kept * p, gradient of the input f, gradient of the weight f; on a step whose dense gradient was
    needed the last is 2 * size * p (RigL, Evci et al. 2020: backward is twice forward). Layers without an
    entry in `cost` and products without weights (attention) count as dense, 3 f. The weight gradient of the other
    steps uses the mean number of kept weights: exact where that number is constant, or where all or no steps
    needed the dense gradient. Weights that are not kept but whose gradient a step computed (Top-KAST's exploration,
    GSE's samples) add 2 * p each.

    This is the cost of a sparse implementation. A masked dense one spends the dense FLOPs whatever the masks are.
    Optimizer, mask updates and element-wise work are not counted.

    Args:
        report: `flops(model, example_input)`; only its dense counts are used.
        cost: per layer, by the report's names, `steps`, `kept_steps`, `dense_gradient_steps` and `further_gradients`
            (as `Sparsifier.training_cost()` gives them).
        samples_per_step: samples per optimizer step (batch size times accumulated batches).
        steps: optimizer steps; needed only where `cost` is empty (dense training).

    Raises:
        SelectionError: `cost` names a weight that the model of `report` does not have.
        OptionError: sums that cannot be (more kept than there are, unequal steps), or no positive number of samples.

    >>> import torch
    >>> from rarefy.metrics import flops
    >>> report = flops(torch.nn.Linear(10, 10), torch.zeros(1, 10))
    >>> training_flops(report, {"weight": LayerCost(steps=50, kept_steps=50 * 10)}, samples_per_step=1).total
    3000.0
    """
    if samples_per_step <= 0:
        raise OptionError(f"samples_per_step is {samples_per_step}, but it must be positive")
    lengths = {entry.steps for entry in cost.values()} | ({steps} if steps is not None else set())
    if len(lengths) != 1:
        raise OptionError(
            f"one run has one number of steps, got {sorted(lengths)}; without any layer cost, pass steps="
        )
    (length,) = lengths
    layers = {name: 3.0 * layer.dense * length * samples_per_step for name, layer in report.layers.items()}
    dense = sum(layers.values())
    for name, entry in cost.items():
        if name not in report.weights:
            raise SelectionError(f"the FLOPs report has no weight {name!r}{nearest(name, report.weights)}")
        size = report.weights[name]
        most = size * length
        if (
            not 0 <= entry.kept_steps <= most
            or not 0 <= entry.dense_gradient_steps <= length
            or not 0 <= entry.further_gradients <= most - entry.kept_steps
        ):
            raise OptionError(f"layer {name!r} of {size} weights cannot have the sums {entry} over {length} steps")
        mean = entry.kept_steps / length if length else 0.0
        uses = 3 * entry.kept_steps + entry.dense_gradient_steps * (size - mean) + entry.further_gradients
        layers[name] = 2 * uses * report.positions(name) * samples_per_step
    return TrainingFlops(layers, sum(layers.values()), dense)


def dense_training_flops(f_dense: float) -> float:
    """Return the FLOPs per sample and step of dense training, 3 f_D: backward is twice forward (RigL)."""
    return 3 * f_dense


def static_training_flops(f_sparse: float) -> float:
    """Return the FLOPs per sample and step of static, SNIP and SET training, 3 f_S (RigL).

    SET grows at random and so needs no dense gradient. SNIP's one scoring batch is left out, as in the paper.
    """
    return 3 * f_sparse


def snfs_training_flops(f_sparse: float, f_dense: float) -> float:
    """Return the FLOPs per sample and step of SNFS, 2 f_S + f_D: a dense gradient every step (RigL)."""
    return 2 * f_sparse + f_dense


def rigl_training_flops(f_sparse: float, f_dense: float, every: int) -> float:
    """Return RigL's published FLOPs per sample and step, (3 f_S dT + 2 f_S + f_D) / (dT + 1) (RigL).

    The paper's cycle is dT plain steps and one update step, dT + 1 in all; where the update is one of every dT steps,
    as here, the cycle is one shorter: `training_flops` then gives exactly this form with `every - 1`.

    >>> rigl_training_flops(1.0, 10.0, every=100)
    3.089108910891089
    """
    if every < 0:
        raise OptionError(f"every is {every}, but the number of plain steps between updates cannot be negative")
    return (3 * f_sparse * every + 2 * f_sparse + f_dense) / (every + 1)


def gradual_training_flops(f_dense: float, sparsities: Iterable[float]) -> float:
    """Return the FLOPs per sample and step of gradual pruning, 3 f_D E_t[1 - s_t] (RigL; Zhu & Gupta 2017).

    Args:
        f_dense: dense forward FLOPs of one sample.
        sparsities: the sparsity s_t at every step. Weights that the sparsity does not cover must be counted apart.
    """
    kept = [1 - s for s in sparsities]
    if not kept or min(kept) < 0 or max(kept) > 1:
        raise OptionError("sparsities must hold at least one number, all of them in [0, 1]")
    return 3 * f_dense * sum(kept) / len(kept)
