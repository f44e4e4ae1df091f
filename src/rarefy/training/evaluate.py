"""Loss, accuracy and calibration of a network on held-out batches."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.metrics import ece
from rarefy.metrics.untouched import evaluating


@torch.no_grad()
def evaluate(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, float]:
    """Return mean cross entropy, accuracy in 0..1 and expected calibration error (15 bins) over all positions.

    Draws no random numbers, so that evaluating more or less often changes nothing else.
    """
    outputs, labels = [], []
    with evaluating(net), autocast if autocast is not None else nullcontext():
        for x, y in batches:
            out = net(x.to(device))
            outputs.append(out.flatten(0, -2).float().cpu())
            labels.append(y.flatten().cpu())
    logits, truth = torch.cat(outputs), torch.cat(labels)
    loss = nn.functional.cross_entropy(logits.double(), truth)
    right = (logits.argmax(-1) == truth).double().mean()
    calibration = ece(logits, truth, logits=True) if bool(logits.isfinite().all()) else float("nan")
    return {"loss": float(loss), "accuracy": float(right), "ece": calibration}
