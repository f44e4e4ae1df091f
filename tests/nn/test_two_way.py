"""Layers with another weight for the gradient of the input: all three products by hand, every kind of Linear and Conv2d."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.nn import TwoWayMask, bake_
from rarefy.nn.reparametrisation import install, remove
from rarefy.patterns import NM


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(8, 12), (5, 8)),
    "no bias": (nn.Linear(8, 12, bias=False), (5, 8)),
    "one sample": (nn.Linear(8, 12), (8,)),
    "sequence": (nn.Linear(8, 12), (2, 3, 8)),
    "conv": (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 5)),
    "strided": (nn.Conv2d(8, 12, 3, stride=2, dilation=2, padding=2, bias=False), (2, 8, 9, 8)),
    "same": (nn.Conv2d(8, 12, (3, 2), padding="same"), (2, 8, 6, 5)),
    "valid": (nn.Conv2d(8, 12, 2, padding="valid"), (2, 8, 6, 5)),
    "circular": (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 6, 5)),
    "image": (nn.Conv2d(8, 12, 1), (8, 4, 4)),
}


def grads(module: nn.Module, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx and dL/dW of the plain layer with this weight."""
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.weight.copy_(weight)
    x = x.clone().requires_grad_()
    plain(x).backward(dy)
    assert x.grad is not None and plain.weight.grad is not None
    return x.grad, plain.weight.grad


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", ["both", "bp_w", "bp_g"])
def test_the_three_products_are_those_of_three_layers(kind: str, mode: str) -> None:
    module, shape = LAYERS[kind]
    module = copy.deepcopy(module).double()
    x, w = randn(*shape), module.weight.detach().clone()
    inputs, outputs = NM(2, 4), NM(1, 4, 0)
    wf = w * inputs.project(w.abs(), 2) if mode == "both" else w
    wb = w * outputs.project(w.abs(), 1) if mode != "bp_g" else w
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.weight.copy_(wf)
    expected_y = plain(x)
    dy = randn(*expected_y.shape, seed=1)
    pruned = dy
    if mode == "bp_g":
        channels = -1 if isinstance(module, nn.Linear) else -3
        last = dy.movedim(channels, -1)
        flat = last.reshape(-1, 12)
        pruned = (flat * inputs.project(flat.abs(), 2)).view(last.shape).movedim(-1, channels)
    dx, _ = grads(module, x, wb, pruned)
    _, dw = grads(module, x, wf, dy)

    masks: dict[str, Any] = {
        "both": dict(forward=inputs, backward=outputs),
        "bp_w": dict(backward=outputs),
        "bp_g": dict(errors=inputs),
    }
    install(module, "weight", TwoWayMask(**masks[mode]))
    x = x.requires_grad_()
    y = module(input=x)
    torch.testing.assert_close(y, expected_y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(module.parametrizations.weight.original.grad, dw)
    if mode == "both":
        assert not torch.allclose(x.grad, grads(LAYERS[kind][0].double(), x.detach(), wf, dy)[0]), "BP used Wf"
    if module.bias is not None:
        positions = dy.numel() // 12
        torch.testing.assert_close(
            module.bias.grad, dy.movedim(-1 if isinstance(module, nn.Linear) else -3, -1).reshape(positions, 12).sum(0)
        )


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_n_of_n_is_the_dense_layer(kind: str) -> None:
    module, shape = LAYERS[kind]
    module, plain = copy.deepcopy(module).double(), copy.deepcopy(module).double()
    install(module, "weight", TwoWayMask(NM(4, 4), NM(4, 4, 0), NM(4, 4)))
    x, other = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    module(x).square().sum().backward()
    plain(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.parametrizations.weight.original.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)


def test_groups_run_along_their_own_axes() -> None:
    w = randn(16, 8)
    mask = TwoWayMask(NM(2, 4), NM(2, 4, 0))
    wf = mask(w) != 0
    assert (wf.view(16, 2, 4).sum(2) == 2).all()
    wb = NM(2, 4, 0).project(w.abs(), 2)
    assert (wb.view(4, 4, 8).sum(1) == 2).all() and not torch.equal(wf, wb)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_and_under_autocast(kind: str, autocast: bool) -> None:
    module, shape = copy.deepcopy(LAYERS[kind])
    module = module.float()
    install(module, "weight", TwoWayMask(NM(2, 4), NM(2, 4, 0)))
    results = []
    for f in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        x = randn(*shape).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = f(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.float().square().sum().backward()
        assert x.grad is not None
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())])
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_copies_compute_alike_and_the_module_is_given_back() -> None:
    module = nn.Linear(8, 4).double()
    weight, names = module.weight, [n for n, _ in module.named_parameters()]
    install(module, "weight", TwoWayMask(NM(2, 4), NM(2, 4, 0)))
    twin, plain = copy.deepcopy(module), bake_(copy.deepcopy(module))
    x, y = randn(3, 8).requires_grad_(), randn(3, 8).requires_grad_()
    module(x).sum().backward()
    remove(module, "weight")
    twin(y).sum().backward()
    assert torch.equal(x.grad, y.grad), "the copy has lost its own backward pass"
    assert type(module) is nn.Linear is type(plain) and module.weight is weight
    assert [n for n, _ in module.named_parameters()] == names and type(module).forward is nn.Linear.forward
    assert torch.equal(plain(x), twin(x))


def test_an_overflow_of_the_gradient_is_passed_on() -> None:
    module = nn.Linear(8, 4)
    install(module, "weight", TwoWayMask(errors=NM(2, 4)))
    x = torch.ones(2, 8, requires_grad=True)
    module(x).backward(torch.tensor([[1.0, float("nan"), 2.0, float("inf")], [1.0, 2.0, 3.0, 4.0]]))
    assert x.grad is not None and x.grad[0].isnan().all() and x.grad[1].isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_batch_may_be_empty(kind: str) -> None:
    module, shape = copy.deepcopy(LAYERS[kind])
    module = module.double()
    install(module, "weight", TwoWayMask(NM(2, 4), NM(2, 4, 0), NM(2, 4)))
    x = randn(0, *shape[1:]).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert not module.parametrizations.weight.original.grad.any()


@pytest.mark.parametrize("what", ["frozen weight", "no input gradient", "no grad"])
def test_only_what_is_wanted_is_computed(what: str) -> None:
    module = nn.Conv2d(8, 4, 3)
    install(module, "weight", TwoWayMask(NM(2, 4), NM(2, 4, 0)))
    original = module.parametrizations.weight.original
    x = torch.randn(1, 8, 5, 5, requires_grad=what == "frozen weight")
    if what == "frozen weight":
        module.requires_grad_(False)
    with torch.set_grad_enabled(what != "no grad"):
        y = module(x)
    if what == "no grad":
        assert not y.requires_grad
        return
    y.sum().backward()
    assert (original.grad is None) == (what == "frozen weight") and (x.grad is None) == (what == "no input gradient")
