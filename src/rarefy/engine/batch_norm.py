"""Batch-norm statistics that fit the weights: after averaging, pruning or swapping weights the old ones do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import OptionError


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate all running statistics of batch norms anew, in place, as plain averages over the batches; return the model.

    Only batch norms run in training mode (dropout stays off, as where the statistics are used), no gradient is taken, and
    every mode is as before in the end. Every batch counts alike: after one batch the statistics are its mean and unbiased
    variance. A model without running statistics is returned as it is.

    Args:
        batches: inputs, or pairs whose first part is the input; those of the training data.

    Raises:
        OptionError: there is no batch. The statistics are then as they were.
    """
    norms = _norms(model)
    if not norms:
        return model
    assert norms[0].running_mean is not None
    device = norms[0].running_mean.device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # cumulative average
        for batch in batches:
            if seen == 0:
                for norm in norms:
                    norm.reset_running_stats()
            x = batch[0] if isinstance(batch, tuple | list) else batch
            model(x.to(device) if isinstance(x, Tensor) else x)
            seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    if seen == 0:
        raise OptionError("Recalibrating batch norms needs at least one batch of training data.")
    return model


def has_statistics(model: nn.Module) -> bool:
    """Whether the model holds batch norms with running statistics."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
