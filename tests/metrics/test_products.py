"""The work of a pass: sizes that give torch's own FLOP counts, forward and backward, and what is read, written, missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rarefy import models
from rarefy.errors import ModelError
from rarefy.metrics import flops, work


class Mixed(nn.Module):
    """Strides, groups, depthwise, dilation, a transposed convolution, attention written by hand, a weight used twice."""

    def __init__(self, grouped: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2 if grouped else 1, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(16, 16, 5, 3, groups=16 if grouped else 1)
        self.up = nn.ConvTranspose2d(16, 6, 3, 2, groups=2 if grouped else 1)
        self.qkv = nn.Linear(6, 18, bias=False)
        self.same = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(F.relu(self.grouped(self.stem(x)))))
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        x = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.same(self.same(x)).sum()


def both_ways(model: nn.Module, x: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        model(x).backward()
    return counter.get_total_flops() // 2


def test_products_add_up_to_torchs_count_forward_and_backward() -> None:
    x = torch.randn(2, 3, 32, 32)
    done = work(Mixed(), x)
    assert sum(p.macs for p in done.products) == flops(Mixed(), x).dense  # two samples, two FLOPs
    model = Mixed(grouped=False)  # torch counts a grouped weight's gradient as if it were not
    done = work(model, x)
    backward = sum(p.macs * (p.input_gradient + p.weight_gradient) for p in done.products)
    assert sum(p.macs for p in done.products) + backward == both_ways(model, x)
    assert not done.not_counted
    assert [p.name for p in done.products] == [
        "stem.weight", "grouped.weight", "depthwise.weight", "up.weight", "qkv.weight", "model:matmul",
        "model:matmul #2", "same.weight", "same.weight #2",
    ]  # fmt: skip
    assert [p.input_gradient for p in done.products] == [False] + [True] * 8


def test_sizes_of_each_kind() -> None:
    stem, grouped, depthwise, up, qkv, scores, mixed, *_ = work(Mixed(), torch.zeros(2, 3, 32, 32)).products
    assert (stem.rows, stem.inputs, stem.positions, stem.columns, stem.read, stem.written) == (512, 3, 9, 8, 6144, 4096)
    assert (grouped.groups, grouped.inputs, grouped.columns, grouped.rows) == (2, 4, 8, 512)
    assert (depthwise.groups, depthwise.inputs, depthwise.columns, depthwise.rows) == (16, 1, 1, 2 * 16)
    assert (up.kind, up.groups, up.rows, up.inputs, up.columns) == ("transposed convolution", 2, 2 * 16, 8, 3)
    assert (up.read, up.written, up.right) == (2 * 16 * 16, 2 * 6 * 81, 16 * 3 * 9)
    assert (qkv.rows, qkv.reduction, qkv.columns) == (2 * 81, 6, 18)
    assert (scores.groups, scores.rows, scores.reduction, scores.columns, scores.weight) == (2, 81, 6, 81, None)
    assert (mixed.reduction, mixed.columns, mixed.right) == (81, 6, 2 * 81 * 6)


def test_attention_by_torchs_function_is_two_products_and_a_softmax() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, value=q)

    done = work(Attend(), torch.zeros(3, 5, 8))
    _, scores, mixed = done.products
    assert (scores.groups, scores.rows, scores.reduction, scores.columns, scores.written) == (6, 5, 4, 5, 150)
    assert (mixed.groups, mixed.rows, mixed.reduction, mixed.columns, mixed.read) == (6, 5, 5, 4, 150)
    assert [(p.operation, p.read) for p in done.passes] == [("softmax", 150)]
    assert scores.input_gradient and mixed.weight_gradient


def test_a_weight_on_the_left_stands_on_the_right() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x

    p = work(Left(), torch.zeros(7, 3)).products[0]
    assert (p.weight, p.rows, p.reduction, p.columns) == ("w", 3, 7, 5)
    assert not p.input_gradient and p.weight_gradient


def test_frozen_parts_need_no_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)
    found = [(p.input_gradient, p.weight_gradient) for p in work(model, torch.zeros(2, 4)).products]
    assert found == [(False, False), (False, False), (False, True)]


def test_passes_are_what_computes_and_not_views() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout()
    )
    found = [(p.module, p.operation, p.read, p.gradient) for p in work(model, torch.zeros(3, 2, 4, 4)).passes]
    assert found == [
        ("1", "native_batch_norm", 192, True), ("2", "relu_", 192, True), ("3", "max_pool2d_with_indices", 192, True)
    ]  # fmt: skip


def test_meta_gives_the_same_and_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model = models.build("resnet-9", width=0.25).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    real = work(model, torch.randn(2, 3, 32, 32))
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.device("meta"):
        assert work(models.build("resnet-9", width=0.25), torch.empty(2, 3, 32, 32)) == real


@pytest.mark.parametrize(("cell", "says"), [(nn.LSTM, "recurrent"), (nn.GRU, "recurrent")])
def test_what_is_not_read_is_named(cell: Any, says: str) -> None:
    done = work(nn.Sequential(cell(4, 6, batch_first=True)), torch.zeros(2, 3, 4))
    assert len(done.not_counted) == 1 and done.not_counted[0].startswith("0: ") and says in done.not_counted[0]


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(ModelError, match="does not run on the example input"):
        work(nn.Linear(4, 2), torch.zeros(2, 5))
