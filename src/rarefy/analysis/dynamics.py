"""Diagnostics of training as the learning of a kernel: what moves the loss, what the features can express, how they adapt.

Dou & Liang 2019, "Training Neural Networks as Learning Data-adaptive Kernels" (arXiv 1901.07114), on networks at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.analysis.kernels import (
    RANK_TOLERANCE,
    KernelRegression,
    Kernels,
    KernelStats,
    as_columns,
    double_copy,
    kernel_stats,
    kernels,
    rank,
    to_double,
)
from rarefy.errors import OptionError
from rarefy.metrics._masks import Masks, fit


@dataclass(frozen=True)
class KernelReport:
    """Where training stands. The projection and ridge identities hold where `gradient_norm` is small, and for squared loss.

    With D = y - f, L = ||D||^2 / (2n):

    Attributes:
        n, outputs, features: points, outputs, last features.
        loss, gradient_norm: L, and the norm of its gradient over kept weights (without decay).
        energy: parameter -> its part of -dL/dt under gradient flow, D^T (J J^T) D / n^2, the squared norm of its gradient.
        projection_gap: ||f - P y|| / ||y||, P the projection onto the features' span (and the constant, with a bias).
        best_residual: ||y - P y|| / ||y||, what no last layer on these features can explain.
        rank_h, rank_k: ranks of the two kernels.
        residual_in_null_h, residual_in_null_k: shares of ||D||^2 that the kernels do not see: 1 at stationarity.
        ridge_gap: largest |f - f_ridge| on the points, where f_ridge is ridge regression with the learned H; None
            without decay.
        h, k: how the kernels stand to the target.
    """

    n: int
    outputs: int
    features: int
    loss: float
    gradient_norm: float
    energy: dict[str, float]
    projection_gap: float
    best_residual: float
    rank_h: int
    rank_k: int
    residual_in_null_h: float
    residual_in_null_k: float
    ridge_gap: float | None
    h: KernelStats
    k: KernelStats


def kernel_report(
    model: nn.Module, x: Tensor, y: Tensor, masks: Masks | None = None, *, decay: float = 0.0, ridge: float = 1e-3
) -> KernelReport:
    """Measure a network that is trained on squared loss (1/2n) sum (y - f)^2 at the points x with targets y.

    Args:
        model, x, masks: as for `kernels`.
        y: [n] or [n, C]; class numbers become one column per class.
        decay: lambda of the loss's decay term lambda/2 ||w||^2. A mean-squared loss, without the half, trained with
            weight_decay=wd has lambda = wd / 2.
        ridge: of the statistics `h` and `k`.

    Raises as `kernels`, and OptionError where y does not fit the outputs.
    """
    found = kernels(model, x, masks)
    target = _fitting(as_columns(y), found.outputs)
    residual = target - found.outputs
    n, norm = len(target), float(target.norm())
    loss, energy = loss_and_energy(model, x, y, masks)
    projected = torch.stack([_project(found, c, target[:, c]) for c in range(target.shape[1])], 1)
    h_values, h_vectors = torch.linalg.eigh(found.h)
    k_values, k_vectors = torch.linalg.eigh(found.k)
    gap = None
    if decay > 0:
        gap = float((found.outputs - ridge_fit(found, target, decay, found)).abs().max())
    return KernelReport(
        n=n,
        outputs=target.shape[1],
        features=found.features.shape[1],
        loss=loss,
        gradient_norm=sum(energy.values()) ** 0.5,
        energy=energy,
        projection_gap=float((found.outputs - projected).norm()) / norm,
        best_residual=float((target - projected).norm()) / norm,
        rank_h=rank(h_values),
        rank_k=rank(k_values),
        residual_in_null_h=_share_in_null(h_values, h_vectors, residual),
        residual_in_null_k=_share_in_null(k_values, k_vectors, residual),
        ridge_gap=gap,
        h=kernel_stats(found.h, target, ridge=ridge),
        k=kernel_stats(found.k, target, ridge=ridge),
    )


def loss_and_energy(
    model: nn.Module, x: Tensor, y: Tensor, masks: Masks | None = None, *, loss: str = "squared"
) -> tuple[float, dict[str, float]]:
    """Return the loss and, for every parameter, how fast gradient flow would lower it: its squared gradient over kept entries.

    `loss` is "squared", (1/2n) sum (y - f)^2, or "cross-entropy" of class numbers; for both the sum of the energies is
    D^T K D / n^2 with the residual D (y - f, or one-hot minus softmax) and the kernel of all outputs.
    """
    if loss not in ("squared", "cross-entropy"):
        raise OptionError(f"loss={loss!r} must be 'squared' or 'cross-entropy'")
    net = double_copy(model)
    kept = {name: mask.cpu() for name, mask in fit(net, masks).masks.items()}
    outputs = net(to_double(x))
    if loss == "squared":
        columns = outputs[:, None] if outputs.dim() == 1 else outputs
        target = _fitting(as_columns(y), columns)
        value = (target - columns).square().sum() / (2 * len(target))
    else:
        value = F.cross_entropy(outputs, y.cpu())
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    energy = {}
    for name, gradient in zip(named, gradients, strict=True):
        gradient = torch.zeros(()) if gradient is None else gradient * kept.get(name, 1)
        energy[name] = float(gradient.square().sum())
    return float(value.detach()), energy


def ridge_fit(train: Kernels, y: Tensor, decay: float, test: Kernels) -> Tensor:
    """Predict at the points of `test` by ridge regression with the kernel H that the network has learned; float64 [m, C].

        f(x) = H(x, X) (H(X, X) + n lambda I)^+ y,

    each output with the features that it hears; centred where the last layer has a bias (which is not decayed). The
    network equals it, also away from the training points, at stationarity of the loss with decay lambda. decay=0 is the
    ridgeless limit. `train` and `test` are `kernels(model, X)` and `kernels(model, x)` of one model.
    """
    target = _fitting(as_columns(y), train.outputs)
    columns = []
    for c in range(target.shape[1]):
        seen = train.features * train.heard[c]
        fitted = KernelRegression(seen @ seen.T, target[:, c], decay, centre=train.bias)
        columns.append(fitted.predict(test.features @ seen.T))
    return torch.stack(columns, 1)


def balance(incoming: Tensor, outgoing: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return per hidden unit ||outgoing weights||^2 - ||incoming weights||^2 (- bias^2): constant under gradient flow.

    For a ReLU layer between `incoming` [units, ...] and `outgoing` [outputs, units], trained without decay; masks do not
    change that. Its drift measures the error of finite steps. Float64 [units].
    """
    if outgoing.dim() != 2 or outgoing.shape[1] != incoming.shape[0]:
        raise OptionError(
            f"outgoing {list(outgoing.shape)} must be [outputs, {incoming.shape[0]}], after incoming {list(incoming.shape)}"
        )
    out = outgoing.detach().double().square().sum(0) - incoming.detach().double().flatten(1).square().sum(1)
    return out if bias is None else out - bias.detach().double().square()


@dataclass(frozen=True)
class KernelMoment:
    """One moment of a run: loss and energies (`loss_and_energy`), the kernels against the target, and how far they have come.

    `drift_h` and `drift_k` are ||H_t - H_0||_F / ||H_0||_F, and the same for K, since the first record.
    """

    step: int
    loss: float
    energy: dict[str, float]
    h: KernelStats
    k: KernelStats
    drift_h: float
    drift_k: float


class KernelTrack:
    """Follow the kernels of a network along its training, on fixed probe points.

    Call it after optimizer steps; it looks at step 0 and at every `every`-th step.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> x = torch.randn(20, 4)
    >>> track = KernelTrack(x, x[:, 0].sign(), every=10)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> track(net, 0)
    >>> for step in range(1, 21):
    ...     loss = (net(x)[:, 0] - x[:, 0].sign()).square().mean()
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step(); track(net, step)
    >>> [moment.step for moment in track.moments], track.moments[2].loss < track.moments[0].loss
    ([0, 10, 20], True)
    """

    def __init__(self, x: Tensor, y: Tensor, *, every: int = 1, loss: str = "squared", ridge: float = 1e-3) -> None:
        if every < 1:
            raise OptionError(f"every={every} must be at least 1")
        self.x, self.y, self.every, self.loss, self.ridge = x, y, every, loss, ridge
        self.moments: list[KernelMoment] = []
        self._first: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: nn.Module, step: int, masks: Masks | None = None) -> None:
        """Record the model at this step, where it is due; `masks` are those of now."""
        if step % self.every:
            return
        found = kernels(model, self.x, masks)
        target = _fitting(as_columns(self.y), found.outputs)
        h, k = found.h, found.k
        self._first = self._first or (h, k)
        value, energy = loss_and_energy(model, self.x, self.y, masks, loss=self.loss)
        drift_h, drift_k = (float((a - b).norm() / b.norm()) for a, b in zip((h, k), self._first, strict=True))
        of_h, of_k = (kernel_stats(kernel, target, ridge=self.ridge) for kernel in (h, k))
        self.moments.append(KernelMoment(step, value, energy, of_h, of_k, drift_h, drift_k))


def _project(found: Kernels, output: int, y: Tensor) -> Tensor:
    """Project y onto what the last layer of this output can express."""
    columns = found.features * found.heard[output]
    if found.bias:
        columns = torch.cat([columns, torch.ones(len(y), 1, dtype=torch.float64)], 1)
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = u[:, s > s.max() * RANK_TOLERANCE**0.5] if float(s.max()) > 0 else u[:, :0]
    return basis @ (basis.T @ y)


def _share_in_null(values: Tensor, vectors: Tensor, residual: Tensor) -> float:
    """Share of ||residual||^2 in the null space, as far as numbers tell."""
    norm = float(residual.square().sum())
    null = vectors[:, values <= RANK_TOLERANCE * values.max()]
    return float((null.T @ residual).square().sum()) / norm if norm else 1.0


def _fitting(target: Tensor, outputs: Tensor) -> Tensor:
    if target.shape != outputs.shape:
        raise OptionError(
            f"the targets are {list(target.shape)}, the model's outputs {list(outputs.shape)}: make them alike"
        )
    return target
