"""`rarefy.convert` on models of many kinds: bare, wrapped inside, with attention, in half precision, on odd batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.errors import ModelError, SelectionError
from rarefy.patterns import NM
from rarefy.reconstruction import Conversion


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *between, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def names(report: Conversion) -> list[str]:
    return [layer.name for layer in report.layers]


def check(net: nn.Module, report: Conversion, pattern: str = "2:4") -> None:
    for layer in report.layers:
        weight = net.get_parameter(layer.name)
        assert rarefy.patterns.parse_pattern(pattern).obeys(weight != 0)
        assert layer.solved < layer.masked < layer.power


def test_a_bare_layer() -> None:
    torch.manual_seed(0)
    net = nn.Linear(16, 16)
    report = rarefy.convert(net, "2:4", [torch.randn(64, 16)], include="weight")
    assert names(report) == ["weight"]
    check(net, report)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("permute", [False, True])
def test_a_part_that_is_compiled(permute: bool) -> None:
    """torch.compile puts a wrapper into the model's names; ours are without it."""
    plain, net = mlp(), mlp()
    net[2] = torch.compile(net[2], backend="eager")
    batches = [torch.randn(64, 8)]
    wanted, report = (rarefy.convert(model, "2:4", batches, permute=permute) for model in (plain, net))
    assert names(report) == names(wanted) == ["2.weight"]
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert net(batches[0]).shape == (64, 4)


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_transformer(permute: bool, train: bool) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
    net = nn.TransformerEncoder(block, 3, enable_nested_tensor=False).double().train(train)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    old, x = copy.deepcopy(net).eval(), torch.randn(16, 5, 16, dtype=torch.float64)
    report = rarefy.convert(net, "2:4", [x], permute=permute)
    assert names(report) == [
        "layers.0.linear2.weight",
        "layers.1.linear1.weight",
        "layers.1.linear2.weight",
        "layers.2.linear1.weight",
    ]
    check(net, report)
    left = {item.name: item.reason for item in report.dense}
    assert "MultiheadAttention" in left["layers.1.self_attn.out_proj.weight"]
    assert "first layer" in left["layers.0.linear1.weight"] and "last layer" in left["layers.2.linear2.weight"]
    if report.rearrangement is not None:
        assert report.rearrangement.gain > 0
        moved = copy.deepcopy(old)
        moved.load_state_dict(report.rearrangement.apply(old.state_dict()))
        torch.testing.assert_close(moved(x), old(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(
        SelectionError, match=r"out_proj.weight .* cannot be converted: nn.MultiheadAttention reads it itself"
    ):
        rarefy.convert(old, "2:4", [x], include="layers.0.self_attn.out_proj")


class Listed(nn.Module):
    """Takes one argument, which is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, pair: list[Tensor]) -> Tensor:
        return self.body(pair[0] + pair[1])


@pytest.mark.parametrize("permute", [False, True])
def test_an_input_that_is_a_list(permute: bool) -> None:
    net = Listed()
    batch = ([torch.randn(64, 8), torch.randn(64, 8)], torch.zeros(64))
    report = rarefy.convert(net, "2:4", [batch], permute=permute)
    assert names(report) == ["body.2.weight"]
    check(net, report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reported_errors_are_those_of_the_weights_as_they_are_stored(dtype: torch.dtype) -> None:
    net, x = mlp().to(dtype), torch.randn(256, 8).to(dtype)
    read = net[:2](x)
    wanted = net[2](read).detach().double()
    (layer,) = rarefy.convert(net, "1:4", [x]).layers
    found = read.double() @ net[2].weight.double().T + net[2].bias.double()
    assert layer.solved == pytest.approx(float((found - wanted).detach().square().mean()), rel=1e-4)


def test_batches_do_not_count_as_trained_on() -> None:
    net = mlp(nn.BatchNorm1d(16, momentum=None))
    for _ in range(20):
        net(torch.randn(9, 8))
    before = net[1].running_mean.clone()
    rarefy.convert(net.eval(), "2:4", [torch.randn(64, 8)])
    assert int(net[1].num_batches_tracked) == 20
    torch.testing.assert_close(net[1].running_mean, before)  # the first layer is as it was


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class SamePadded(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(nn.functional.pad(x, (1, 1)), weight, bias)


class Renamed(nn.Linear):
    """Computes as it did."""


def patched() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight * 2, layer.bias)  # type: ignore[method-assign]
    return layer


def on_kernels() -> nn.Linear:
    layer = nn.Linear(16, 16)
    return rarefy.nn.NMLinear.from_dense(
        layer, NM(2, 8).project(layer.weight.detach().abs(), 2), 2, 8, transposable=False
    )


@pytest.mark.parametrize("make", [lambda: Standardised(16, 16), lambda: SamePadded(16, 16, 3), patched, on_kernels])
def test_layers_that_compute_otherwise_stay_dense(make: Any) -> None:
    """What is solved for x w^T would be wrong for them."""
    torch.manual_seed(0)
    other = make()
    shape = (3, 16, 16) if isinstance(other, nn.Conv1d) else (64, 16)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), other, Renamed(16, 16), nn.Linear(16, 4))
    report = rarefy.convert(net, "2:4", [torch.randn(shape)])
    assert names(report) == ["1.weight", "3.weight"]
    assert "forward pass of its own" in {item.name: item.reason for item in report.dense}["2.weight"]
    with pytest.raises(SelectionError, match="forward pass of its own"):
        rarefy.convert(net, "2:4", [torch.randn(shape)], include="2")


class Counting(nn.Module):
    """Counts its calls, and holds a buffer that cannot be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.BatchNorm1d(16))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("wide", torch.ones(4).expand(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


def test_only_what_is_converted_is_written_to() -> None:
    net = Counting()
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    versions = {name: tensor._version for name, tensor in tensors.items()}
    report = rarefy.convert(net, "2:4", [torch.randn(64, 8)])
    assert names(report) == ["body.3.weight"] and int(net.calls) == 0
    changed = {name for name, tensor in tensors.items() if tensor._version != versions[name] and name != "calls"}
    assert changed == {"body.3.weight", "body.3.bias"}


def test_a_batch_of_one_where_statistics_need_two_is_an_error_that_says_so() -> None:
    net = mlp(nn.BatchNorm1d(16))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelError, match="two values or more for each channel"):
        rarefy.convert(net, "2:4", [torch.randn(64, 8), torch.randn(1, 8)])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(module.training for module in net.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_model_on_a_gpu(permute: bool, where: str) -> None:
    net: Any = mlp(nn.BatchNorm1d(16)).cuda()
    report = rarefy.convert(net, "2:4", [torch.randn(64, 8, device=where)], permute=permute)
    assert NM(2, 4).obeys(net[3].weight != 0) and report.layers[0].solved < report.layers[0].masked
