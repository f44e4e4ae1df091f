"""Layers on a shared array: what they compute, what they train, and what they hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import models
from rarefy.kernels.shared_weight import SIGNS
from rarefy.nn import SharedArray, SharedLinear, SharedModule, share_, unshare_
from rarefy.nn.shared_array import SCALERS
from tests.nn.shared import net, tokens, train


@pytest.mark.parametrize("scope", ["global", "local"])
def test_nothing_shared_is_the_dense_network_bit_for_bit_and_stays_it_under_sgd(scope: str) -> None:
    dense = net()
    shared = copy.deepcopy(dense)
    arrays = share_(shared, 1.0, scope=scope)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in dense.parameters())
    assert len(arrays) == (1 if scope == "global" else 5)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    for a, b in zip(train(dense, **options), train(shared, **options), strict=True):
        assert torch.equal(a, b)
    unshare_(shared)
    for name, weight in dense.state_dict().items():
        if name != "embed.weight":  # weight decay moves the padding row, which no output shows
            assert torch.equal(weight, shared.state_dict()[name]), name


@pytest.mark.parametrize("keep", [0.5, 0.1, 0.013])
@pytest.mark.parametrize(
    "options", [{"mapping": "fold"}, {"mapping": "tile", "tile": 4}, {"mapping": "tile", "tile": 1}]
)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_network_is_its_dense_twin_and_gradients_are_those_of_the_explicit_gather(
    keep: float, options: dict[str, Any], scope: str
) -> None:
    if scope == "local" and (keep < 0.1 or (keep < 0.5 and options.get("tile") == 4)):
        pytest.skip("arrays of no value, or smaller than a tile: refused, see below")
    shared = net(torch.float64)
    arrays = share_(shared, keep, scaler="none", scope=scope, **options)
    total = sum(a.represented for a in arrays)
    assert total == sum(p.numel() for n, p in net().named_parameters() if p.ndim > 1)
    if scope == "global":
        assert arrays[0].size == int(keep * total + 1e-6)
    x, y = tokens()
    plain = unshare_(copy.deepcopy(shared))
    assert not any(isinstance(m, SharedModule | SharedArray) for m in plain.modules())
    out = shared(x)
    assert torch.equal(out, plain(x))
    F.cross_entropy(out, y).backward()
    F.cross_entropy(plain(x), y).backward()
    wanted = {id(a): torch.zeros_like(a.values) for a in arrays}
    for name, module in shared.named_modules():
        if isinstance(module, SharedModule):
            grad = plain.get_parameter(f"{name}.weight").grad
            assert grad is not None
            array = module.array
            slot, enter = array.places[module.index].slots(torch.arange(grad.numel()))
            part = grad.flatten() * array.signs[enter] * array.scales[module.index]
            wanted[id(array)].index_add_(0, slot, part)
    for array in arrays:
        torch.testing.assert_close(array.values.grad, wanted[id(array)], rtol=1e-12, atol=1e-14)


def test_initial_weights_have_the_spread_of_the_layers_own_initialisation() -> None:
    dense = models.build("lenet-300-100")
    shared = copy.deepcopy(dense)
    share_(shared, 0.1)
    for name in ("fc1", "fc2", "fc3"):
        mine = shared.get_submodule(name).weight_now().detach()
        assert float(mine.std()) == pytest.approx(float(dense.get_submodule(name).weight.detach().std()), rel=0.05)
        assert abs(float(mine.mean())) < 0.1 * float(mine.std())


# --- the stable scaler -----------------------------------------------------------------------------------------------


def trajectory(init_std: float, scaler: str) -> list[Tensor]:
    """Outputs of a network that starts with the same weights whatever init_std is."""
    model = net(torch.float64)
    torch.manual_seed(1)  # the array is drawn from here: uniform numbers times init_std
    share_(model, 0.1, init_std=init_std, scaler=scaler)
    return train(model, steps=30, lr=0.02, momentum=0.9)


@pytest.mark.parametrize("scaler", ["v1", "v5"])
def test_with_the_scaler_sgd_does_not_depend_on_the_scale_of_the_array(scaler: str) -> None:
    small, large = trajectory(0.01, scaler), trajectory(1.0, scaler)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(small[0], small[-1], rtol=0.1)  # it did train


def test_without_the_scaler_it_does() -> None:
    small, large = trajectory(0.1, "none"), trajectory(1.0, "none")
    torch.testing.assert_close(small[0], large[0])
    assert not torch.allclose(small[5], large[5], rtol=0.1)


def first_step(init_std: float, scaler: str, optimizer: type[torch.optim.Optimizer]) -> Tensor:
    """Return how far one step moves the hidden layer's weight."""
    model = net(torch.float64)
    torch.manual_seed(1)
    share_(model, 0.1, init_std=init_std, scaler=scaler)
    before = model.hidden.weight_now().detach().clone()
    x, y = tokens()
    F.cross_entropy(model(x), y).backward()
    optimizer(model.parameters(), lr=1e-3).step()
    return model.hidden.weight_now().detach() - before


def test_a_step_without_the_scaler_grows_with_the_inverse_square_of_the_arrays_scale() -> None:
    small, large = (first_step(c, "none", torch.optim.SGD) for c in (0.01, 0.1))
    torch.testing.assert_close(small, 100 * large, rtol=1e-9, atol=0)
    small, large = (first_step(c, "v1", torch.optim.SGD) for c in (0.01, 0.1))
    torch.testing.assert_close(small, large, rtol=1e-9, atol=0)


def test_adam_scales_gradients_itself_and_is_not_invariant() -> None:
    small, large = (first_step(c, "v1", torch.optim.Adam) for c in (0.01, 0.1))
    assert float(small.abs().mean()) == pytest.approx(10 * float(large.abs().mean()), rel=0.05)


def test_an_sgd_step_is_the_mean_of_the_sharers_gradients() -> None:
    """In a single layer all scales are equal: each weight moves by lr times its sharers' mean signed gradient."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(40, 30, bias=False)).double()
    (array,) = share_(layer, 0.1)
    module = layer[0]
    assert isinstance(module, SharedLinear)
    before = module.weight_now().detach().clone().requires_grad_()
    x = torch.randn(7, 40, dtype=torch.float64)
    (grad,) = torch.autograd.grad((x @ before.T).square().sum(), before)
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    slot, enter = array.places[0].slots(torch.arange(1200))
    signed = grad.flatten() * array.signs[enter]
    mean = torch.zeros(array.size, dtype=torch.float64).index_add_(0, slot, signed) / slot.bincount()
    moved = (before - module.weight_now()).flatten()
    torch.testing.assert_close(moved, 0.01 * mean[slot] * array.signs[enter])


def test_the_scalers_are_their_formulas() -> None:
    model = net(torch.float64)
    found = {}
    for scaler in SCALERS:
        (array,) = share_(copy.deepcopy(model), 0.05, scaler=scaler)
        found[scaler] = array.slot_scales()
    scales = [[] for _ in range(array.size)]
    for place, scale in zip(array.places, array.scales.tolist(), strict=True):
        for slot in place.slots(torch.arange(place.rows * place.cols))[0].tolist():
            scales[slot].append(scale)
    formulas = {
        "v1": lambda s: sum(s) ** 2 / len(s),
        "v2": sum,
        "v3": lambda s: sum(s) / len(s),
        "v4": lambda s: sum(x * x for x in s) ** 0.5,
        "v5": lambda s: sum(x * x for x in s),
        "none": lambda s: 1.0,
    }
    for scaler, formula in formulas.items():
        wanted = torch.tensor([formula(s) for s in scales], dtype=torch.float64)
        torch.testing.assert_close(found[scaler], wanted)
    assert (found["v1"] <= found["v5"] * (1 + 1e-12)).all()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_network_holds_no_weight_while_it_waits_for_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 777), nn.ReLU(), nn.Linear(777, 5))
    share_(model, 0.02)
    kept = int(0.02 * (64 * 777 + 777 * 5))
    assert sum(p.numel() for p in model.parameters()) == kept + 777 + 5
    assert sum(b.numel() for b in model.buffers()) < SIGNS + 400  # the sign table, and a few numbers a chunk
    gathered: list[Tensor] = []
    original = SharedModule.weight_now

    def recorded(self: SharedModule) -> Tensor:
        gathered.append(original(self))
        return gathered[-1]

    monkeypatch.setattr(SharedModule, "weight_now", recorded)
    loss = model(torch.randn(3, 64)).square().sum()
    fresh, used = (torch.zeros(777 * 64, requires_grad=True).clone().view(777, 64) for _ in range(2))
    held = F.linear(torch.randn(3, 64, requires_grad=True), used)
    assert references(gathered[0]) == references(gathered[1]) == references(fresh) < references(used)
    assert held.grad_fn is not None
    loss.backward()
    assert len(gathered) == 3  # the second layer's again, for the gradient of its input; the first has no such
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    assert sum(v.numel() for s in optimizer.state.values() for v in s.values()) < 2 * (kept + 777 + 5) + 10


def references(tensor: Tensor) -> int:
    """Return how many tensors hold this one's memory: one that is saved for a backward pass counts."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def test_backward_after_a_step_is_refused() -> None:
    model = net()
    share_(model, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = tokens()
    F.cross_entropy(model(x), y).backward()
    late = F.cross_entropy(model(x), y)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed in place"):
        late.backward()
