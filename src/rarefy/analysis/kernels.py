"""The kernels of a network as it is: of its last features (H) and of its gradients (K), and regression with them.

Dou & Liang 2019, "Training Neural Networks as Learning Data-adaptive Kernels" (arXiv 1901.07114): a network that trains
learns a kernel, and its fit is the projection of the target onto what that kernel can express. All in float64, exact, for
small networks and up to a few thousand points: these are the kernels of the network at hand, no infinite-width limits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from rarefy.errors import ModelError, OptionError
from rarefy.metrics._masks import Masks, fit
from rarefy.nn import SparseModule

CUTOFF = 1e-10  # eigenvalues below this share of the largest are taken for zero when a system is solved
RANK_TOLERANCE = 1e-8  # and when a rank is counted


@dataclass(frozen=True)
class Kernels:
    """A network on n points, C outputs, M last features; float64, on the CPU.

    Attributes:
        outputs: [n, C].
        features: [n, M], what the last linear layer reads.
        heard: [C, M], 1 where an output's weight of a feature is kept.
        bias: whether the last layer has one.
        layers: parameter name -> its part of K, [n, n]: J J^T over its kept entries, mean over the outputs.
    """

    outputs: Tensor
    features: Tensor
    heard: Tensor
    bias: bool
    layers: dict[str, Tensor]

    @property
    def h(self) -> Tensor:
        """H, the kernel of the features, [n, n]: sum over features of phi(x) phi(x'), mean over outputs where masks differ."""
        return (self.features * self.heard.mean(0)) @ self.features.T

    @property
    def k(self) -> Tensor:
        """K, the kernel of the gradients (tangent kernel), [n, n], mean over outputs; K - H is positive semi-definite."""
        return torch.stack(list(self.layers.values())).sum(0)


def kernels(model: nn.Module, x: Tensor, masks: Masks | None = None, *, chunk: int | None = None) -> Kernels:
    """Compute H and K of a network at the points `x`.

    With f_c the c-th output, phi the input of the last linear layer and w every parameter that trains,

        H(x, x') = phi(x) . phi(x'),    K(x, x') = 1/C sum_c sum_w df_c(x)/dw df_c(x')/dw;

    for one output these are the paper's. Weights that masks drop are no parameters: they are left out of both.
    The model is copied to float64 and eval mode, and left as it was.

    Args:
        model: a module that maps [n, ...] to [n] or [n, C] and ends in a Linear layer.
        x: the points, [n, ...].
        masks: bool masks by parameter name (`Sparsifier.masks()`); weights without one train whole.
        chunk: samples whose gradients are taken at once, to bound memory; default all.

    Raises:
        ModelError: the model does not end in a Linear layer on vectors, or holds compressed layers.
        SelectionError, OptionError: a mask does not fit the model.

    >>> net = nn.Linear(3, 1, bias=False)
    >>> x = torch.randn(5, 3)
    >>> found = kernels(net, x)
    >>> torch.allclose(found.h, (x @ x.T).double()) and torch.allclose(found.k, found.h)  # linear: both are X X^T
    True
    """
    net = double_copy(model)
    kept = {name: mask.cpu() for name, mask in fit(net, masks).masks.items()}
    points = to_double(x)
    outputs, features, head = run(net, points)
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in net.named_parameters() if not p.requires_grad}
    layers = {name: torch.zeros(len(points), len(points), dtype=torch.float64) for name in parameters}

    def output(values: Mapping[str, Tensor], sample: Tensor, which: int) -> Tensor:
        made: Tensor = functional_call(net, {**fixed, **values}, (sample[None],))
        return made.reshape(-1)[which]

    count = outputs.shape[1]
    for which in range(count):
        found = vmap(grad(output), in_dims=(None, 0, None), chunk_size=chunk)(parameters, points, which)
        for name, gradient in found.items():
            rows = gradient.flatten(1)
            if name in kept:
                rows = rows[:, kept[name].flatten()]
            layers[name] += (rows @ rows.T).cpu() / count
    heard = torch.ones_like(head.weight, dtype=torch.float64)
    name = next((n for n, p in net.named_parameters() if p is head.weight), "")
    if name in kept:
        heard = kept[name].double()
    return Kernels(outputs.cpu(), features.cpu(), heard.cpu(), head.bias is not None, layers)


@dataclass(frozen=True)
class KernelStats:
    """How a kernel stands to a target (section D6 of the method's sheet: adaptivity).

    Attributes:
        alignment: y^T K y / (||y||^2 ||K||_F), 1 where K is y y^T.
        effective_rank: (tr K)^2 / ||K||_F^2.
        rank: number of eigenvalues above 1e-8 of the largest.
        top_energy: share of ||y||^2 in the span of the `top` largest eigenvectors.
        unexplained: share of ||y||^2 that ridge regression with K leaves on these points.
        leave_one_out: sum of squared leave-one-out errors of that regression, over ||y||^2.
    """

    alignment: float
    effective_rank: float
    rank: int
    top_energy: float
    unexplained: float
    leave_one_out: float


def kernel_stats(kernel: Tensor, y: Tensor, *, top: int = 10, ridge: float = 1e-3) -> KernelStats:
    """Measure a kernel [n, n] against targets y, [n] or [n, C]; several outputs are summed.

    `ridge` times the kernel's trace is added to its diagonal, so that nothing here depends on the kernel's scale (default
    1e-3, not tuned). Raises OptionError for shapes that do not fit, a target that is all zero, or a ridge that is not positive.
    """
    target = as_columns(y)
    n = len(target)
    if tuple(kernel.shape) != (n, n):
        raise OptionError(f"the kernel is {list(kernel.shape)}, but there are {n} targets; it must be [{n}, {n}]")
    norm = float(target.square().sum())
    if norm == 0:
        raise OptionError("the target is all zero: nothing can be aligned with it")
    if not ridge > 0:
        raise OptionError(f"ridge={ridge} must be positive: leave-one-out errors of an interpolation do not exist")
    values, vectors = torch.linalg.eigh(kernel.double())
    size = float(values.square().sum()) ** 0.5
    coefficients = vectors.T @ target
    if not size:
        raise OptionError("the kernel is all zero: the network's last features, or its gradients, are dead")
    added = ridge * float(values.sum())
    shrunk = 1 / (values.clamp(min=0) + added)
    residual = vectors @ (added * shrunk[:, None] * coefficients)
    inverse = (vectors.square() * shrunk).sum(1, keepdim=True)  # diagonal of (K + added I)^-1
    out = vectors @ (shrunk[:, None] * coefficients) / inverse
    return KernelStats(
        alignment=float((values[:, None] * coefficients.square()).sum()) / (norm * size),
        effective_rank=float(values.sum()) ** 2 / size**2,
        rank=rank(values),
        top_energy=float(coefficients[-top:].square().sum()) / norm,
        unexplained=float(residual.square().sum()) / norm,
        leave_one_out=float(out.square().sum()) / norm,
    )


class KernelRegression:
    """Kernel ridge regression, ridgeless with ridge=0: f(x) = K(x, X) (K(X, X) + n ridge I)^+ y.

    Args:
        kernel: K(X, X), [n, n], symmetric and positive semi-definite.
        y: targets, [n] or [n, C].
        ridge: lambda.
        centre: subtract means of features and targets, for a network whose last layer has a bias that is not decayed.

    Eigenvalues below 1e-10 of the largest are taken for zero: with ridge=0 the solution of smallest norm.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> round(float(KernelRegression(x @ x.T, 2 * x[:, 0]).predict(torch.tensor([[4.0]]) @ x.T)), 6)
    8.0
    """

    def __init__(self, kernel: Tensor, y: Tensor, ridge: float = 0.0, *, centre: bool = False) -> None:
        target = as_columns(y)
        n = len(target)
        if tuple(kernel.shape) != (n, n):
            raise OptionError(f"the kernel is {list(kernel.shape)}, but there are {n} targets; it must be [{n}, {n}]")
        if ridge < 0:
            raise OptionError(f"ridge={ridge} must be 0 or more")
        whole = kernel.double()
        self._flat = y.dim() == 1
        self._rows = whole.mean(0, keepdim=True) if centre else torch.zeros(1, n, dtype=torch.float64)
        self._mean = target.mean(0, keepdim=True) if centre else torch.zeros(1, target.shape[1], dtype=torch.float64)
        self._grand = whole.mean() if centre else torch.zeros((), dtype=torch.float64)
        self._centre = centre
        values, vectors = torch.linalg.eigh(self._centred(whole))
        kept = values > CUTOFF * values[-1].clamp(min=0)
        shrunk = torch.where(kept, 1 / (values + n * ridge).where(kept, torch.ones(())), 0.0)
        self.coefficients = vectors @ (shrunk[:, None] * (vectors.T @ (target - self._mean)))

    def predict(self, kernel: Tensor) -> Tensor:
        """Return the fit at new points from K(x, X), [m, n]: [m] or [m, C], as the targets were."""
        made = self._mean + self._centred(kernel.double()) @ self.coefficients
        return made[:, 0] if self._flat else made

    def _centred(self, kernel: Tensor) -> Tensor:
        if not self._centre:
            return kernel
        return kernel - kernel.mean(1, keepdim=True) - self._rows + self._grand


def rank(values: Tensor) -> int:
    """Number of eigenvalues above 1e-8 of the largest."""
    largest = float(values.max())
    return int((values > RANK_TOLERANCE * largest).sum()) if largest > 0 else 0


def double_copy(model: nn.Module) -> nn.Module:
    """Return a float64 copy in eval mode, on the CPU."""
    model = getattr(model, "_orig_mod", model)
    if any(isinstance(module, SparseModule) for module in model.modules()):
        raise ModelError("the model holds compressed layers, which have no dense weights; call finalize() first.")
    return copy.deepcopy(model).cpu().double().eval()


def to_double(x: Tensor) -> Tensor:
    """Return points on the CPU, floats in float64; tokens stay integers."""
    x = x.detach().cpu()
    return x.double() if x.is_floating_point() else x


def as_columns(y: Tensor) -> Tensor:
    """Return targets as float64 [n, C]; class numbers (integers [n]) become one column per class, 1 at the class."""
    y = y.detach().cpu()
    if y.dim() == 1 and not y.is_floating_point():
        y = torch.nn.functional.one_hot(y.long())
    return (y[:, None] if y.dim() == 1 else y).double()


def run(net: nn.Module, points: Tensor) -> tuple[Tensor, Tensor, nn.Linear]:
    """Return outputs [n, C], the last linear layer's inputs [n, M], and that layer."""
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen.append((module, args[0].detach(), out.detach()))

    handles = [module.register_forward_hook(note) for module in net.modules() if isinstance(module, nn.Linear)]
    try:
        with torch.no_grad():
            outputs = net(points)
    finally:
        for handle in handles:
            handle.remove()
    columns = outputs[:, None] if outputs.dim() == 1 else outputs
    head, features, made = seen[-1] if seen else (None, columns, columns)
    same = made.numel() == columns.numel() and torch.equal(made.reshape(columns.shape), columns)
    if head is None or columns.dim() != 2 or features.dim() != 2 or not same:
        raise ModelError(
            f"{type(net).__name__} does not end in a Linear layer whose output is the model's: it has no last features here."
        )
    return columns, features, head
