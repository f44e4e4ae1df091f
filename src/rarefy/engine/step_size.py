"""How far an optimizer goes along a constant gradient in one step: the step size that a proximal operator belongs to.

With dL/dw = g for ever, the update settles at -D g. A proximal step with the same D after each update stops exactly where
-g is in the penalty's subdifferential: at a stationary point of loss plus penalty. With the bare learning rate it would not:
momentum 0.9 makes D ten times that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
Rule = Callable[[Group, dict[str, Any]], float | Tensor]


def _sgd(group: Group, state: dict[str, Any]) -> float:
    momentum = float(group["momentum"])
    return float(group["lr"]) * (1 - float(group["dampening"]) if momentum else 1.0) / (1 - momentum)


def _adam(group: Group, state: dict[str, Any]) -> Tensor:
    square = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    corrected = square / (1 - float(group["betas"][1]) ** float(state["step"]))
    return float(group["lr"]) / (corrected.sqrt() + group["eps"])


def _radam(group: Group, state: dict[str, Any]) -> float | Tensor:
    beta, t = float(group["betas"][1]), float(state["step"])
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * t * beta**t / (1 - beta**t)
    if length <= 5:  # too short a memory to divide by
        return float(group["lr"])
    rise = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return _adam(group, state) * math.sqrt(rise)


def _adamax(group: Group, state: dict[str, Any]) -> Tensor:
    return float(group["lr"]) / state["exp_inf"]


def _rmsprop(group: Group, state: dict[str, Any]) -> Tensor:
    square = state["square_avg"]
    if group["centered"]:
        square = (square - state["grad_avg"].square()).clamp(min=0)
    return float(group["lr"]) / (square.sqrt() + group["eps"]) / (1 - float(group["momentum"]))


def _adagrad(group: Group, state: dict[str, Any]) -> Tensor:
    rate = float(group["lr"]) / (1 + (float(state["step"]) - 1) * float(group["lr_decay"]))
    return rate / (state["sum"].sqrt() + group["eps"])


RULES: tuple[tuple[type[Optimizer], Rule], ...] = (
    (torch.optim.SGD, _sgd),
    (torch.optim.RAdam, _radam),
    (torch.optim.NAdam, _adam),
    (torch.optim.Adam, _adam),
    (torch.optim.AdamW, _adam),
    (torch.optim.Adamax, _adamax),
    (torch.optim.RMSprop, _rmsprop),
    (torch.optim.Adagrad, _adagrad),
)


def is_known(optimizer: Optimizer) -> bool:
    """Whether the step size of this optimizer is known, and not only its learning rate."""
    return any(isinstance(optimizer, kind) for kind, _ in RULES)


def step_size(optimizer: Optimizer, group: Group, state: dict[str, Any]) -> float | Tensor:
    """Return D: a number, or a tensor of the parameter's shape; after a step. The learning rate where D is not known."""
    rule = next((rule for kind, rule in RULES if isinstance(optimizer, kind)), None)
    return float(group["lr"]) if rule is None else rule(group, state)
