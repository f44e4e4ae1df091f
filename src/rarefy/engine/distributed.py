"""Keep ranks in step: decisions are made on numbers that every rank shares."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.errors import OptionError


def active() -> bool:
    """Whether this process is one of several in an initialised process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over all ranks (the tensor itself when there is only one)."""
    if not active():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def from_first_rank(tensor: Tensor) -> Tensor:
    """Return rank 0's copy of `tensor`."""
    if not active():
        return tensor
    shared = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
    dist.broadcast(shared, src=0)
    return shared.to(tensor.dtype)


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is True on any rank; every rank must ask."""
    if not active():
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def check_length(name: str, old: int, new: int) -> None:
    """Refuse that a parameter gets another length while ranks train together.

    DistributedDataParallel copies gradients into buckets that it laid out when it wrapped the model.
    """
    if new != old and active():
        raise OptionError(
            f"{name}: the method would keep {new} weights here instead of {old}, and DistributedDataParallel cannot follow a "
            'compressed parameter whose length changes: use storage="masked", or a method whose layers keep their numbers.'
        )
