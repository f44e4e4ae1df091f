"""Batch-norm statistics that fit the weights: after averaging, pruning or swapping weights the old ones do not."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import ModelError, OptionError
from rarefy.metrics._run import left_as_it_was

_ROUNDING = 1e-6  # what is left of the variance of a channel that does not vary, as a share


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate all running statistics of batch norms anew, in place, as plain averages over the batches; return the model.

    Only batch norms run in training mode (dropout stays off, as where the statistics are used), no gradient is taken, and
    every mode and every other buffer is as before in the end. Every batch counts alike: after one batch the statistics are its
    mean and unbiased variance. A model without running statistics is returned as it is.

    Args:
        batches: of the training data, as `feed` takes them.

    Raises:
        OptionError: there is no batch. ModelError: the model does not run on one. The statistics are then as they were.
    """
    norms = _norms(model)
    if not norms:
        return model
    assert norms[0].running_mean is not None
    device = norms[0].running_mean.device
    momenta, seen = [norm.momentum for norm in norms], 0
    with left_as_it_was(model):
        try:
            for norm in norms:
                norm.training, norm.momentum = True, None  # cumulative average
                norm.reset_running_stats()
            for batch in batches:
                try:
                    feed(model, batch, device)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    raise ModelError(
                        f"{type(model).__name__} does not run on batch {seen} with its batch norms in training mode, which "
                        f"need two values or more for each channel: {error}"
                    ) from error
                seen += 1
            found = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if seen == 0:
        raise OptionError("Recalibrating batch norms needs at least one batch of training data.")
    for norm, statistics in zip(norms, found, strict=True):
        for buffer, value in zip(norm.buffers(), statistics, strict=True):
            buffer.copy_(value)
    return model


@torch.no_grad()
def follow_change(model: nn.Module, before: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """Let running statistics change as much as the batches say that the weights have changed them, in place; return the model.

    With (mu, v) what `recalibrate` finds in the model, and (mu', v') what it finds in a copy of `before`, the same network with
    its old weights: mean <- mean + mu - mu', variance <- variance * v / v'. What the batches get wrong about both (they are
    few, or not augmented as in training) drops out: unchanged weights keep their statistics exactly. A channel that does not
    vary on the batches, before or now, keeps its variance. The batches do not count as trained on (`num_batches_tracked`).

    Args:
        model: the network with its new weights, and the statistics that fitted the old ones.
        before: the network as it was; left as it is.
        batches: as for `recalibrate`; they are read twice.
    """
    then = _norms(recalibrate(copy.deepcopy(before), batches))
    old = [[buffer.clone() for buffer in norm.buffers()] for norm in _norms(before)]
    for (mean, variance, tracked), norm, past in zip(old, _norms(recalibrate(model, batches)), then, strict=True):
        now, was = norm.running_var, past.running_var
        assert norm.running_mean is not None and past.running_mean is not None and now is not None and was is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.copy_(tracked)
        norm.running_mean.sub_(past.running_mean).add_(mean)
        varies = (now > _ROUNDING * was) & (was > _ROUNDING * now)
        now.copy_(torch.where(varies, variance * now / was, variance))
    return model


def feed(model: nn.Module, batch: Any, device: torch.device | None = None) -> Any:
    """Run the model on a batch: an input, a pair whose first part is the input, or a mapping of keyword arguments."""
    args, kwargs = arguments_of(batch, device)
    return model(*args, **kwargs)


def arguments_of(batch: Any, device: torch.device | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `feed` calls the model with: arguments and keyword arguments, on the device."""

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {key: there(value) for key, value in batch.items()}
    return (there(batch[0] if isinstance(batch, tuple | list) else batch),), {}


def has_statistics(model: nn.Module) -> bool:
    """Whether the model holds batch norms with running statistics."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
