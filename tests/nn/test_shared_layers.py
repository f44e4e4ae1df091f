"""Layers on a shared array: what they compute, what they train, what they hold, and what can be done to them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import models
from rarefy.kernels.shared_weight import SIGNS
from rarefy.nn import SharedArray, SharedConv2d, SharedEmbedding, SharedLinear, SharedModule, share_, unshare_
from rarefy.nn.shared_array import SCALERS


class Net(nn.Module):
    """An embedding, convolutions of every kind, and linear layers; x int [batch, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, padding_idx=0)
        self.conv = nn.Conv2d(1, 8, 3, padding="same", padding_mode="circular")
        self.strided = nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=2, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8 * 64, 20)
        self.head = nn.Linear(20, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.strided(F.relu(self.conv(self.embed(x)[:, None]))))
        return self.head(F.relu(self.hidden(y.flatten(1))))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, (6, 16), generator=generator), torch.randint(5, (6,), generator=generator)


def train(model: nn.Module, steps: int = 5, lr: float = 0.05, **options: Any) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    outputs = []
    for step in range(steps):
        x, y = tokens(step)
        out = model(x)
        outputs.append(out.detach().clone())
        F.cross_entropy(out, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


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


# --- what Python and PyTorch do to a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"mapping": "tile", "tile": 4}])
def test_copies_pickles_and_states(options: dict[str, Any]) -> None:
    model = net()
    (array,) = share_(model, 0.1, **options)
    train(model)
    x, _ = tokens(9)
    model.eval()
    expected = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(twin(x), expected)
        own = [m for m in twin.modules() if isinstance(m, SharedArray)]
        assert len(own) == 1 and own[0] is not array
        assert all(m.array is own[0] for m in twin.modules() if isinstance(m, SharedModule))
        with torch.no_grad():
            own[0].values.zero_()
    assert torch.equal(model(x), expected)
    state = model.state_dict()
    assert [k for k in state if "shared" in k] == [
        "embed.shared.values", "embed.shared.scales", "embed.shared.layout"
    ]  # fmt: skip
    torch.manual_seed(5)
    other = Net()
    share_(other, 0.1, **options)
    assert not torch.equal(other.embed.array.scales, array.scales)
    other.load_state_dict(state)
    other.eval()
    assert torch.equal(other(x), expected)
    assert torch.equal(other.embed.array.gain, array.gain)  # follows the loaded scales
    wrong = net()
    share_(wrong, 0.1, seed=1, **options)
    with pytest.raises(RuntimeError, match="another mapping, seed"):
        wrong.load_state_dict(state)


def test_moving_to_another_dtype_moves_the_one_array() -> None:
    model = net()
    (array,) = share_(model, 0.1)
    model.double()
    assert array.values.dtype == torch.float64 == model.head.weight_now().dtype
    assert len([p for p in model.parameters() if p.numel() == array.size]) == 1
    train(model)


@pytest.mark.parametrize("options", [{}, {"mapping": "tile", "tile": 4}])
def test_compile_and_export(options: dict[str, Any]) -> None:
    model = net()
    (array,) = share_(model, 0.1, **options)
    x, y = tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    found = array.values.grad
    array.values.grad = None
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(found, array.values.grad)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_autocast_and_frozen_arrays() -> None:
    model = net()
    (array,) = share_(model, 0.1)
    x, y = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    F.cross_entropy(out.float(), y).backward()
    assert array.values.grad is not None and array.values.grad.dtype == torch.float32
    array.values.requires_grad_(False)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert array.values.grad is None and model.hidden.bias.grad is not None


def test_sparse_gradients_reach_only_the_rows_that_were_looked_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8, padding_idx=3), nn.Linear(8, 4))
    dense = copy.deepcopy(model)
    share_(model, 1.0)
    assert isinstance(model[0], SharedEmbedding)
    x = torch.tensor([[1, 3, 1], [7, 2, 3]])
    assert torch.equal(model(x), dense(x))
    model(x).sum().backward()
    dense(x).sum().backward()
    array = model[0].array
    slot, enter = array.places[0].slots(torch.arange(400))
    grad = (array.values.grad[slot] * array.signs[enter] * array.scales[0]).view(50, 8)
    torch.testing.assert_close(grad, dense[0].weight.grad)


def test_tied_weights_stand_in_the_array_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30, bias=False))
    model[2].weight = model[0].weight
    dense = copy.deepcopy(model)
    (array,) = share_(model, 1.0)
    assert array.represented == 30 * 8 + 64
    x = torch.arange(10)
    assert torch.equal(model(x), dense(x))


def test_hooks_and_references_stay_valid() -> None:
    model = net()
    head, seen = model.head, []
    head.register_forward_hook(lambda *args: seen.append(1))
    share_(model, 0.1)
    model(tokens()[0])
    assert head is model.head and isinstance(head, SharedLinear) and isinstance(model.conv, SharedConv2d) and seen


def test_flops_are_the_dense_ones_under_the_layers_names_and_parameters_are_the_arrays() -> None:
    x, _ = tokens()
    model = net()
    dense = rarefy.metrics.flops(model, x)
    before = rarefy.metrics.parameters(model).total
    (array,) = share_(model, 1 / 16)
    shared = rarefy.metrics.flops(model, x)
    assert shared.dense == dense.dense == shared.sparse
    assert {k: v for k, v in shared.layers.items() if v.dense} == {k: v for k, v in dense.layers.items() if v.dense}
    assert not shared.not_counted
    assert all(shared.positions(name) == dense.positions(name) for name in shared.layers)
    count = rarefy.metrics.parameters(model)
    assert count.kept == count.total == before - array.represented + array.size


def test_other_layers_stay_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8), nn.Conv1d(3, 3, 1),
    )  # fmt: skip
    nn.utils.parametrizations.weight_norm(model[1])
    model.append(nn.Linear(8, 4))
    model.append(nn.Linear(4, 2))
    share_(model, 0.5, smallest=9)
    assert [type(m) for m in model.modules() if isinstance(m, SharedModule)] == [SharedLinear]
    assert isinstance(model[3], SharedLinear)
    model[0](torch.randn(1, 3, 8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"keep": 1e-6}, "leaves none"),
        ({"keep": 0.5, "mapping": "folt"}, "did you mean 'fold'"),
        ({"keep": 0.5, "scaler": "v9"}, "scaler"),
        ({"keep": 0.5, "scope": "all"}, "scope"),
        ({"keep": 0.5, "init_std": 0}, "init_std"),
        ({"keep": 0.5, "tile": 0}, "tile"),
        ({"keep": 0.5, "smallest": 10**9}, "to share"),
        ({"keep": 0.01, "mapping": "tile"}, "not larger than a tile"),
    ],
)
def test_a_refused_model_is_left_as_it_was(options: dict[str, Any], match: str) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(rarefy.RarefyError, match=match):
        share_(model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, SharedModule) for m in model.modules())


def test_layers_that_cannot_share_are_named() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    with pytest.raises(rarefy.RarefyError, match=r"0: an Embedding with max_norm"):
        share_(model, 0.5)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(rarefy.RarefyError, match=r"1 \[3, 4\]: all its weights are 0"):
        share_(model, 0.5)
