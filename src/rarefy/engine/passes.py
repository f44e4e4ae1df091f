"""What the backward passes of one optimizer step bring to one weight, taken in as `.grad` takes their gradients in."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Part = TypeVar("Part")


class Passes(Generic[Part]):
    """Collects parts of the passes that are accumulated into `.grad`.

    A part is seen while its pass runs and is taken in once the pass has been accumulated, so that `torch.autograd.grad`
    leaves no trace. The collection begins anew when `.grad` was dropped or zeroed.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.open = False
        self._seen: list[Part] = []
        self._task = -1
        self._anew = False
        self._left_zero = False

    def begin(self) -> None:
        """Begin a new collection."""
        self.parts, self._seen, self._left_zero, self.open = [], [], False, True

    def close(self) -> None:
        """Take in nothing more."""
        self._seen, self.open = [], False

    def see(self, part: Part, grad: Tensor | None) -> None:
        """See a part of the pass that runs now; `grad` is what was accumulated before it."""
        if not self.open:
            return
        task = torch._C._current_graph_task_id()
        if not self._seen or task != self._task:  # a new pass; what an earlier one left was not accumulated
            self._seen, self._task = [], task
            self._anew = grad is None or (not self._left_zero and not bool(grad.any()))
        self._seen.append(part)

    def commit(self, grad: Tensor | None) -> None:
        """Take in the pass that was seen last, now that it is part of `grad`."""
        if self._seen:
            self.parts = self._seen if self._anew else self.parts + self._seen
            self._seen = []
        if self.open:
            self._left_zero = grad is not None and not bool(grad.any())


class GradientSum:
    """The dense gradient of one optimizer step, summed over its backward passes as `.grad` itself is.

    A tensor hook sees each pass's own gradient before it is accumulated (and masked); the sum takes it in once the pass
    has been accumulated. A step can go on from what earlier ones gathered: see `watch`.
    """

    def __init__(self) -> None:
        self.past: Tensor | None = None  # of earlier steps, already multiplied
        self._step: Tensor | None = None
        self._handle: RemovableHandle | None = None
        self._pass: tuple[Tensor, bool] | None = None
        self._left_zero = False

    @property
    def total(self) -> Tensor | None:
        """The sum so far; None where nothing was gathered."""
        if self._step is None or self.past is None:
            return self.past if self._step is None else self._step
        return self.past + self._step

    @property
    def finite(self) -> bool:
        """Whether this step's own gradient is, as far as it was seen."""
        return self._step is None or bool(torch.isfinite(self._step).all())

    def watch(self, parameter: nn.Parameter | None, carry: float | None = 0.0) -> None:
        """Begin a step's sum for this parameter; None: forget it.

        What was gathered before goes in `carry` times; with None this step begins anew, and that stays as it is.
        """
        self.close()
        if parameter is None or carry == 0:
            self.past = None
        elif carry is not None:
            gathered = self.total if self.finite else self.past
            self.past = None if gathered is None else gathered * carry
        self._step, self._left_zero = None, False
        if parameter is not None and parameter.requires_grad:
            weak = weakref.ref(parameter)
            self._handle = parameter.register_hook(lambda gradient: self._see(gradient, weak()))

    def close(self) -> None:
        """Take in nothing more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._pass = None, None

    def _see(self, gradient: Tensor, parameter: Tensor | None) -> None:
        old = None if parameter is None else parameter.grad
        self._pass = (gradient.detach(), old is None or (not self._left_zero and not bool(old.any())))

    def commit(self) -> None:
        """Take in the pass that was seen last."""
        if self._pass is not None:
            gradient, anew = self._pass
            self._step = gradient.clone() if anew or self._step is None else self._step.add_(gradient)
            self._pass = None

    def leave(self, grad: Tensor) -> None:
        """Remember whether the masked sum is zero by itself, and not because it was zeroed."""
        if self._handle is not None:
            self._left_zero = not bool(grad.any())
