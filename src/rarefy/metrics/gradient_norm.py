"""How much gradient reaches a network's weights: the gradient's norm, at initialisation or at any time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rarefy.errors import OptionError
from rarefy.metrics._masks import Masks, fit
from rarefy.metrics.untouched import Loss, cross_entropy, looking


def gradient_norm(
    model: nn.Module, batches: Iterable[Any], loss: Loss = cross_entropy, masks: Masks | None = None
) -> float:
    """Return the Euclidean norm of the gradient of the mean loss over the batches, in all parameters that are trained.

    Its square is the gradient flow g^T g, the rate at which the loss falls along the gradient (Wang et al. 2020,
    arXiv 2002.07376, eq. 5; reported at initialisation by Liu et al. 2022, arXiv 2202.02643).

    Args:
        model: run in the modes that it is in. Weights, buffers, `.grad` and the random state stay as they were.
        batches: what `loss` takes; each counts the same.
        loss: (model, batch) -> scalar; default: cross-entropy of (x, y).
        masks: parameter name -> bool mask (True = kept), of masked layers: a pruned weight has a gradient too, which does not
            count. (`Sparsifier.masks()` of masked storage; with compressed storage there are kept values only.)

    Raises:
        OptionError: no batches, no trained parameters, or masks that do not fit.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> gradient_norm(net, [torch.ones(1, 1)], lambda model, x: 3 * model(x).sum())
    3.0
    """
    kept = fit(model, masks).masks
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise OptionError("gradient_norm: no parameter of this model requires a gradient")
    total = {name: torch.zeros_like(p, dtype=torch.float64, device="cpu") for name, p in trained.items()}
    seen = 0
    with looking(model) as value:
        for batch in batches:
            found = torch.autograd.grad(value(loss, batch), list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.to("cpu", torch.float64)
            seen += 1
    if not seen:
        raise OptionError("gradient_norm: there are no batches to measure on")
    squares = [g.mul(kept[n].to("cpu")) if n in kept else g for n, g in total.items()]
    return math.sqrt(math.fsum(float(g.square().sum()) for g in squares)) / seen
