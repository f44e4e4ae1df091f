"""Look at a network without leaving a trace: its modes, buffers, gradients and random state are as before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from rarefy.errors import OptionError

Loss = Callable[[nn.Module, Any], Tensor]


@contextmanager
def evaluating(net: nn.Module) -> Iterator[nn.Module]:
    """Put a network in eval mode for a block, and each of its parts back as it was."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield net
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def looking(net: nn.Module) -> Iterator[Callable[[Loss, Any], Tensor]]:
    """Give a function (loss, batch) -> loss(net, batch), with its graph, that works on copies of the buffers, for a block.

    Take derivatives with `torch.autograd.grad`, which leaves `.grad` alone. The random state is forked, so that two looks
    draw the same. Compiled networks run uncompiled.
    """
    buffers = {f"net.{name}": buffer.clone() for name, buffer in net.named_buffers()}

    def value(loss: Loss, batch: Any) -> Tensor:
        return functional_call(_Objective(net, loss), buffers, (batch,))

    with torch.random.fork_rng(), torch.enable_grad(), uncompiled():
        yield value


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled networks as they were written, for a block: for a few batches, and for second derivatives."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to ask takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def cross_entropy(net: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of `net(x)` and the labels y of a batch (x, y)."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise OptionError(
            f"A batch must be a pair (x, y), not {type(batch).__name__}; for anything else pass loss=lambda model, batch: ..."
        )
    x, y = batch
    loss: Tensor = F.cross_entropy(net(x), y)
    return loss


class _Objective(nn.Module):
    """The loss as a module around the network, so that its buffers can be swapped for copies."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.net, batch)
