"""Accuracy under attack: FGSM and PGD in the largest-change norm; the network is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.errors import OptionError
from rarefy.metrics.untouched import evaluating

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network, inputs, labels) -> inputs that it should get wrong."""

Bound = float | Tensor
"""A number, or a tensor that broadcasts to the inputs."""


class Box(NamedTuple):
    """How far an attack may go, in the units of the network's inputs: `eps` from each input, and never out of [low, high]."""

    eps: Bound
    low: Bound = 0.0
    high: Bound = 1.0


def pixel_box(
    eps: float, mean: Sequence[float] = (), std: Sequence[float] = (), device: torch.device | str = "cpu"
) -> Box:
    """Return the box of an `eps` in pixel values (0..1) for images [N, C, H, W] normalised as (pixel - mean) / std.

    >>> box = pixel_box(0.1, mean=[0.5], std=[0.25])
    >>> float(box.eps), float(box.low), float(box.high)
    (0.4000000059604645, -2.0, 2.0)
    """
    m, s = (torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean or (0.0,), std or (1.0,)))
    return Box(eps / s, -m / s, (1 - m) / s)


def fgsm(net: nn.Module, x: Tensor, y: Tensor, box: Box) -> Tensor:
    """Return inputs one step of `eps` up the loss: clip(x + eps sign(dL/dx)), the fast gradient sign method.

    Args:
        net: gives logits [N, classes]; run as it is (put it in eval mode, or call `adversarial_accuracy`).
        x: inputs [N, ...], floating, inside the box.
        y: labels, int64 [N].

    Source: Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572.

    Raises:
        OptionError: x lies outside [low, high], or its gradient is not finite.
    """
    _check(x, box)
    return _clip(x + box.eps * _slope(net, x, y).sign(), box.low, box.high)


def pgd(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    box: Box,
    *,
    steps: int = 10,
    step_size: Bound | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return inputs after several such steps, each projected back into the box: projected gradient descent.

        x_0 = clip(x + u),  x_{k+1} = clip(x + clip(x_k + a sign(dL/dx_k) - x, -eps, eps)).

    Args:
        net, x, y: as in `fgsm`.
        steps: how many. Default 10.
        step_size: a. Default 2.5 eps / steps (the paper's rule).
        generator: a CPU generator that draws u uniformly from [-eps, eps]; None: u = 0.

    Source: Madry, Makelov, Schmidt, Tsipras & Vladu 2018, arXiv 1706.06083.

    Raises:
        OptionError: as `fgsm`, and for fewer than one step.
    """
    if steps < 1:
        raise OptionError(f"pgd: steps is {steps}; at least one is needed")
    _check(x, box)
    a = 2.5 * box.eps / steps if step_size is None else step_size
    moved = x
    if generator is not None:
        draw = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        moved = _clip(x + box.eps * (2 * draw - 1), box.low, box.high)
    for _ in range(steps):
        moved = moved + a * _slope(net, moved, y).sign()
        moved = _clip(_clip(moved, x - box.eps, x + box.eps), box.low, box.high)
    return moved


def adversarial_accuracy(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attack: Attack) -> float:
    """Return the share of samples that the network, in eval mode, still gets right once each was attacked.

    Weights, buffers, `.grad`, `requires_grad` and the modes of all modules stay as they were; no random number is drawn
    but by the attack.

    >>> from functools import partial
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.eye_(net.weight)
    >>> batches = [(torch.tensor([[0.6, 0.5], [0.9, 0.1]]), torch.tensor([0, 0]))]
    >>> adversarial_accuracy(net, batches, partial(fgsm, box=Box(0.2)))
    0.5
    """
    right = total = 0
    with evaluating(net):
        for x, y in batches:
            attacked = attack(net, x, y)
            with torch.no_grad():
                right += int((net(attacked).argmax(-1) == y).sum())
            total += y.numel()
    if not total:
        raise OptionError("adversarial_accuracy: there are no samples to measure on")
    return right / total


def _slope(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return dL/dx, and nothing but that: no other gradient is computed."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
    if not bool(gradient.isfinite().all()):
        raise OptionError("the loss has no finite gradient in the inputs: the network's output is broken")
    return gradient


def _clip(x: Tensor, low: Bound, high: Bound) -> Tensor:
    return torch.maximum(torch.minimum(x, torch.as_tensor(high).to(x)), torch.as_tensor(low).to(x))


def _check(x: Tensor, box: Box) -> None:
    slack = 1e-4 * float(torch.as_tensor(box.high).sub(box.low).max())
    if bool((x < torch.as_tensor(box.low).to(x) - slack).any()) or bool(
        (x > torch.as_tensor(box.high).to(x) + slack).any()
    ):
        raise OptionError(
            f"the inputs reach from {float(x.min()):g} to {float(x.max()):g}, out of the box in which an attack must stay: "
            "give its bounds in the units the inputs are normalised to (pixel_box(eps, mean, std))"
        )
