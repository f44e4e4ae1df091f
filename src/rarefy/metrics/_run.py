"""Run somebody's model on an example, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: of one tensor, a tuple or list of arguments, or a mapping of keywords."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)) and not isinstance(example, PackedSequence):
        return tuple(example), {}
    return (example,), {}


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode; put back training flags, buffers, random state and the attention fast path."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with random_state_kept(model), torch.compiler.set_stance("force_eager"):
        try:
            for module, _ in flags:
                module.training = False
            torch.backends.mha.set_fastpath_enabled(False)  # it would hide the projections in one fused operation
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, training in flags:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    if not buffer.is_meta and not torch.equal(buffer, value):
                        buffer.copy_(value)  # not what has not changed: expanded buffers cannot be written to
                    module._buffers[name] = buffer


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Leave the random state of the CPU and of the model's devices as it was before the block."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
