"""How good an untrained sparse network looks: numbers for a random search, taken without changing the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rarefy.engine import Loss
from rarefy.engine.calibration import cross_entropy
from rarefy.errors import OptionError


class Objective(Protocol):
    """A number for a model and masks.

    Attributes:
        maximise: whether larger is better.
        passes: forward passes (of a batch each) that one candidate costs.
        optimizer_steps: weight updates that one candidate costs, made on copies.
    """

    @property
    def maximise(self) -> bool: ...

    @property
    def passes(self) -> int: ...

    @property
    def optimizer_steps(self) -> int: ...

    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> float: ...


@dataclass(frozen=True)
class InitialLoss:
    """Mean loss of the masked, untrained network over a fixed search set; smaller is better. No weight is updated.

    Batch norms use each batch's own statistics, as in a first training step; dropout is off.
    """

    batches: Sequence[Any] = field(repr=False)
    loss: Loss = cross_entropy
    maximise: ClassVar[bool] = False
    optimizer_steps: ClassVar[int] = 0

    @property
    def passes(self) -> int:
        return len(_some(self.batches))

    @torch.no_grad()
    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> float:
        with _measuring(model):
            return _mean_loss(model, _masked(model, masks), self.batches, self.loss)


@dataclass(frozen=True)
class LossAfter:
    """The same loss after t steps of plain gradient descent from the masked network, on copies; smaller is better."""

    batches: Sequence[Any] = field(repr=False)
    steps: int
    lr: float = 0.1
    loss: Loss = cross_entropy
    maximise: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        return len(_some(self.batches)) + self.steps

    @property
    def optimizer_steps(self) -> int:
        return self.steps

    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> float:
        with _measuring(model):
            weights = {n: w.clone().requires_grad_(n in _trained(model)) for n, w in _masked(model, masks).items()}
            names = _trained(model)
            for step in range(self.steps):
                value = _Objective(model, self.loss).at(weights, self.batches[step % len(self.batches)])
                found = torch.autograd.grad(value, [weights[n] for n in names], allow_unused=True)
                with torch.no_grad():
                    for name, gradient in zip(names, found, strict=True):
                        if gradient is not None:
                            kept = gradient * masks[name].to(gradient.device) if name in masks else gradient
                            weights[name] -= self.lr * kept
            with torch.no_grad():
                return _mean_loss(model, weights, self.batches, self.loss)


@dataclass(frozen=True)
class GradientNorm:
    """Norm of the loss's gradient on the kept weights and all other parameters; larger is better (it learns faster)."""

    batches: Sequence[Any] = field(repr=False)
    loss: Loss = cross_entropy
    maximise: ClassVar[bool] = True
    optimizer_steps: ClassVar[int] = 0

    @property
    def passes(self) -> int:
        return len(_some(self.batches))

    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> float:
        names = _trained(model)
        with _measuring(model):
            weights = {n: w.clone().requires_grad_(n in names) for n, w in _masked(model, masks).items()}
            total: dict[str, Tensor] = {}
            for batch in self.batches:
                value = _Objective(model, self.loss).at(weights, batch) * (_size(batch) / sum(map(_size, self.batches)))
                found = torch.autograd.grad(value, [weights[n] for n in names], allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        kept = gradient * masks[name].to(gradient.device) if name in masks else gradient
                        total[name] = total[name] + kept if name in total else kept
        return float(torch.stack([g.double().square().sum() for g in total.values()]).sum().sqrt())


@dataclass(frozen=True)
class SynFlow:
    """Sum of the outputs for ones less that for zeros, every parameter replaced by its absolute value; larger is better.

    Tanaka et al. 2020 (arXiv 2006.05467): it is 0 where no path is left from the inputs; what biases feed in on the way does
    not count, as in the method `synflow`. In float64, batch norms in eval mode.
    """

    input_shape: tuple[int, ...]  # of one sample
    maximise: ClassVar[bool] = True
    passes: ClassVar[int] = 2
    optimizer_steps: ClassVar[int] = 0

    @torch.no_grad()
    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> float:
        state = {n: t.detach().abs().double() if t.is_floating_point() else t for n, t in _tensors(model, masks)}
        device = next(iter(state.values())).device
        with _measuring(model, batch_statistics=False):
            ones = torch.ones((1, *self.input_shape), dtype=torch.float64, device=device)
            flow: Tensor = functional_call(model, state, (ones,)) - functional_call(model, state, (0 * ones,))
        return float(flow.sum())


class _Objective(nn.Module):
    """The loss as a module around the model, so that its parameters and buffers can be swapped."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)

    def at(self, state: Mapping[str, Tensor], batch: Any) -> Tensor:
        value: Tensor = functional_call(self, {f"model.{n}": t for n, t in state.items()}, (batch,))
        return value


def _some(batches: Sequence[Any]) -> Sequence[Any]:
    if len(batches) == 0:
        raise OptionError("the search set is empty: it needs at least one batch.")
    return batches


def _size(batch: Any) -> int:
    first = batch[0] if isinstance(batch, tuple | list) else batch
    return len(first)


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tensors(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield name, value * masks[name].to(value.device) if name in masks else value
    for name, buffer in model.named_buffers():
        yield name, buffer.detach().clone()


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(_tensors(model, masks))


def _mean_loss(model: nn.Module, state: Mapping[str, Tensor], batches: Sequence[Any], loss: Loss) -> float:
    objective, total, seen = _Objective(model, loss), 0.0, 0
    for batch in _some(batches):
        total += float(objective.at(state, batch)) * _size(batch)
        seen += _size(batch)
    return total / seen


@contextmanager
def _measuring(model: nn.Module, batch_statistics: bool = True) -> Iterator[None]:
    """Eval mode, but for batch norms that use the batch's statistics; every mode as before in the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        if batch_statistics:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training
