"""A Linear or Conv2d whose gradient of the input goes through another weight than its output did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.nn.reparametrisation import Reparametrisation
from rarefy.nn.straight_through import straight
from rarefy.patterns import NM
from rarefy.patterns.largest import largest


def _prune(t: Tensor, pattern: NM | None) -> Tensor:
    if pattern is None or not t.numel():  # a batch may be empty, and a pattern takes no such weight
        return t
    # A gradient may have overflowed, which is for GradScaler to see: 0 times NaN is NaN.
    return t * largest(t.nan_to_num(), pattern, pattern.n)


class _TwoWayLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, there: Tensor, back: Tensor, bias: Tensor | None, errors: NM | None) -> Tensor:
        return F.linear(x, there, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, back, _, ctx.errors = inputs
        ctx.save_for_backward(x, back)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, back = ctx.saved_tensors
        wants, rows = ctx.needs_input_grad, dy.reshape(-1, dy.shape[-1])
        dx = (_prune(rows, ctx.errors) @ back).view(x.shape) if wants[0] else None
        dw = rows.T @ x.reshape(-1, x.shape[-1]) if wants[1] else None
        return dx, dw, None, rows.sum(0) if wants[3] else None, None


class _TwoWayConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, there: Tensor, back: Tensor, bias: Tensor | None, errors: NM | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        return F.conv2d(x, there, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, back, _, ctx.errors, ctx.geometry = inputs
        ctx.save_for_backward(x, back)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, back = ctx.saved_tensors
        wants = ctx.needs_input_grad
        outputs = [dy.shape[1]]

        def gradients(errors: Tensor, *wanted: bool) -> Any:
            stride, padding, dilation = (list(size) for size in ctx.geometry)
            how = (outputs, stride, padding, dilation, False, [0, 0], 1)
            return torch.ops.aten.convolution_backward(errors, x, back, *how, list(wanted))

        dx = gradients(_prune(dy, ctx.errors), True, False, False)[0] if wants[0] else None
        _, dw, db = gradients(dy, False, wants[1], wants[3]) if wants[1] or wants[3] else (None, None, None)
        return dx, dw, None, db, None, None


class TwoWayMask(Reparametrisation):
    """One dense weight W, pruned twice: along the inputs for the output, along the outputs for the input's gradient.

        y = layer(x; Wf),   dL/dx = layer^T(prune_e(dL/dy); Wb),   dL/dW = dL/dy x (dense, kept or not),

    with Wf = prune_f(W) and Wb = prune_b(W), each the N largest |w| of every M along its own axis and found in every forward
    pass. dL/dx is not the derivative of y in x: it is biased, by design. For nn.Linear, and nn.Conv2d of one group.

    Args:
        forward: pattern of Wf (along dimension 1), or None: W itself.
        backward: pattern of Wb (along dimension 0), or None: W itself.
        errors: pattern of dL/dy along its channels where dL/dx is computed, or None: dL/dy itself.
    """

    follows = True

    def __init__(self, forward: NM | None = None, backward: NM | None = None, errors: NM | None = None) -> None:
        super().__init__()
        self.there, self.back, self.errors = forward, backward, errors

    def forward(self, weight: Tensor) -> Tensor:
        return weight.view_as(weight) if self.there is None else straight(weight, self.kept(weight))

    def kept(self, weight: Tensor) -> Tensor:
        if self.there is None:
            return torch.ones_like(weight, dtype=torch.bool)
        return largest(weight, self.there, self.there.n)

    def computes_output(self, module: nn.Module) -> bool:
        return True

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        weight = module.parametrizations.weight.original  # type: ignore[union-attr]
        assert isinstance(weight, Tensor) and isinstance(module, nn.Linear | nn.Conv2d)
        x, there, back, bias = _autocast(x, module.weight, _prune(weight.detach(), self.back), module.bias)
        if isinstance(module, nn.Linear):
            return _TwoWayLinear.apply(x, there, back, bias, self.errors)
        padding: Any = module.padding
        if module.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
        batched = x if x.dim() == 4 else x[None]
        geometry = (module.stride, padding, module.dilation)
        y = _TwoWayConv2d.apply(batched, there, back, bias, self.errors, geometry)
        return y if x.dim() == 4 else y[0]

    def extra_repr(self) -> str:
        return f"forward={self.there}, backward={self.back}, errors={self.errors}"


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast casts the operands of a product."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))
