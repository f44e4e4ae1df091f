"""Effective weights and path counts against enumeration, gradients of a positive network, and by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.analysis import effective, path_count
from rarefy.errors import ModelError, OptionError, SelectionError
from rarefy.models import build


def draw(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters() if p.dim() > 1
    }


def enumerate_paths(masks: list[Tensor]) -> tuple[int, list[Tensor]]:
    """Walk every path of a chain of linear layers; count them and note which weights they use."""
    used = [torch.zeros_like(mask) for mask in masks]
    sizes = [masks[0].shape[1], *(mask.shape[0] for mask in masks)]
    count = 0
    for nodes in itertools.product(*(range(size) for size in sizes)):
        steps = [(nodes[i + 1], nodes[i]) for i in range(len(masks))]
        if all(bool(mask[step]) for mask, step in zip(masks, steps, strict=True)):
            count += 1
            for mask, step in zip(used, steps, strict=True):
                mask[step] = True
    return count, used


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    density=st.floats(0.05, 1.0),
    seed=st.integers(0, 10_000),
)
def test_a_chain_is_what_enumeration_finds(sizes: list[int], density: float, seed: int) -> None:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    masks = draw(net, density, seed)
    count, used = enumerate_paths(list(masks.values()))
    found = effective(net, torch.randn(5, sizes[0]), masks)
    assert path_count(net, torch.randn(5, sizes[0]), masks) == count
    for mask, name in zip(used, masks, strict=True):
        assert torch.equal(found.masks[name], mask)
        dead = [row for row in range(mask.shape[0]) if not mask[row].any()]
        assert found.layers[name].dead == tuple(dead)
    assert found.effective == sum(int(mask.sum()) for mask in used)
    assert found.effective_sparsity >= found.sparsity


class Residual(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.a = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.b = nn.Conv2d(6, 4, 3, padding=1)
        self.skip = nn.Conv2d(4, 4, 1, stride=2)
        self.head = nn.Linear(4 * 4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.b(torch.relu(self.a(x)))
        if self.inplace:
            y.add_(self.skip(x))
        else:
            y = y + self.skip(x)
        y = F.avg_pool2d(F.relu(y, inplace=self.inplace), 2, stride=1)
        return self.head(F.adaptive_avg_pool2d(y, 2).flatten(1))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_residual_net_is_what_gradients_of_positive_weights_say(seed: int, inplace: bool) -> None:
    """With positive weights and inputs and no biases the real network is linear: a gradient is positive on paths only."""
    torch.manual_seed(seed)
    net = Residual(inplace).eval()
    masks = draw(net, 0.06, seed)
    found = effective(net, torch.zeros(3, 2, 8, 8), masks)
    real = copy.deepcopy(net).double()
    with torch.no_grad():
        for name, p in real.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5) if p.dim() > 1 else p.fill_(1.0 if name == "norm.weight" else 0.0)
            if name in masks:
                p.mul_(masks[name])
    real(torch.rand(1, 2, 8, 8, dtype=torch.float64) + 0.5).sum().backward()
    for name, mask in masks.items():
        weight = real.get_parameter(name)
        assert torch.equal(found.masks[name], mask & (weight.grad > 0)), name
    assert 0 < found.effective < found.kept


def test_removing_what_is_not_effective_changes_nothing() -> None:
    torch.manual_seed(0)
    net = build("resnet-20", width=0.25).eval()
    masks = draw(net, 0.03, 1)
    x = torch.randn(2, 3, 16, 16)
    found = effective(net, x, masks)
    assert 0 < found.effective < found.kept

    def jacobian(kept: dict[str, Tensor]) -> Tensor:
        pruned = copy.deepcopy(net)
        with torch.no_grad():
            for name, mask in kept.items():
                pruned.get_parameter(name).mul_(mask)
        entry = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(pruned(entry).sum(), entry)
        return grad

    assert torch.equal(jacobian(masks), jacobian(found.masks))


def test_a_residual_stack_of_linear_layers_counts_as_a_product() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    net = Blocks()
    masks = draw(net, 0.3, 3)
    product = torch.eye(5, dtype=torch.float64)
    for mask in masks.values():
        product = (torch.eye(5, dtype=torch.float64) + mask.double()) @ product
    assert path_count(net, torch.zeros(1, 5), masks) == float(product.sum())


def test_collapse_is_told_and_a_skip_saves_the_rest() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    masks["2.weight"][:] = False
    found = effective(net, torch.zeros(1, 4), masks)
    assert found.effective == 0 and path_count(net, torch.zeros(1, 4), masks) == 0.0
    assert found.collapsed == ("0.weight", "2.weight", "4.weight")
    assert found.dead == 6 + 6 + 2
    assert "collapsed, nothing passes: 0.weight" in str(found)

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)))

    skip = Skip()
    masks = {"a.weight": torch.zeros(4, 4, dtype=torch.bool)}
    found = effective(skip, torch.zeros(1, 4), masks)
    assert found.collapsed == ("a.weight", "b.weight")
    assert path_count(skip, torch.zeros(1, 4), masks) == 4.0


def test_kernels_that_only_meet_padding_are_not_effective() -> None:
    net = nn.Conv2d(1, 1, 3, padding=1)
    assert effective(net, torch.zeros(1, 1, 1, 1)).masks["weight"].nonzero().tolist() == [[0, 0, 1, 1]]
    assert effective(net, torch.zeros(1, 1, 2, 2)).effective == 9


@pytest.mark.parametrize("options", [
    dict(kernel_size=3, stride=2, padding=1), dict(kernel_size=2), dict(kernel_size=3, stride=2, ceil_mode=True),
    dict(kernel_size=2, stride=3, padding=1, ceil_mode=True), dict(kernel_size=3, stride=1, padding=1, dilation=2),
])  # fmt: skip
def test_max_pooling_connects_its_whole_window(options: dict[str, int]) -> None:
    pool = nn.MaxPool2d(**options)  # type: ignore[arg-type]
    net = nn.Sequential(nn.Conv2d(1, 1, 1), pool)
    size = 7
    count = 0
    for place in range(size * size):  # an output hears an entry where that entry, made largest, is the maximum
        x = torch.zeros(1, 1, size, size)
        x.view(-1)[place] = 1.0
        count += int(pool(x).sum())
    assert path_count(net, torch.zeros(1, 1, size, size)) == count


@pytest.mark.parametrize("name", ["gpt", "vit", "mobilenet-v1", "efficientnet-b0", "vgg-19-bn", "lenet-5"])
def test_dense_reference_networks_are_all_effective(name: str) -> None:
    net = build(name, width=0.25)
    x = torch.zeros(1, 16, dtype=torch.long) if name == "gpt" else torch.zeros(1, 1 if name == "lenet-5" else 3, 32, 32)
    if name == "lenet-5":
        x = x[..., :28, :28]
    found = effective(net, x)
    assert found.sparsity < 0.01
    if name not in (
        "efficientnet-b0",
        "mobilenet-v1",
        "vgg-19-bn",
    ):  # small images leave rims of kernels in the padding
        assert found.effective == found.kept
    assert found.left_out == (("position.weight",) if name == "gpt" else ())
    assert found.collapsed == ()


def test_what_joins_and_moves_counts_its_paths() -> None:
    """Each joins two linear layers that read one input of 3 entries; paths and effective weights counted by hand."""
    cases: list[tuple[Callable[[Tensor, Tensor], Tensor], int, int]] = [
        (lambda a, b: torch.cat([a, b], -1), 2 * 12, 24),
        (lambda a, b: torch.hstack([a, b]), 2 * 12, 24),
        (lambda a, b: torch.stack([a, b]).sum(0), 2 * 12, 24),
        (lambda a, b: torch.cat([a, torch.ones(1, 4)], -1), 12, 12),  # a constant has no path
        (lambda a, b: a + 3 - 2 * b, 2 * 12, 24),
        (lambda a, b: a * torch.tensor([1.0, 0.0, 2.0, 0.0]), 6, 6),
        (lambda a, b: a * torch.sigmoid(b), 2 * 12, 24),  # a gate: either
        (lambda a, b: torch.where(a > 0, a, b), 2 * 12, 24),
        (lambda a, b: torch.maximum(a, b), 2 * 12, 24),
        (lambda a, b: torch.softmax(a, -1), 4 * 12, 12),
        (lambda a, b: a.max(-1).values, 12, 12),
        (lambda a, b: a.mean(-1), 12, 12),
        (lambda a, b: a[:, :2], 6, 6),
        (lambda a, b: F.pad(a, (1, 1), value=5.0), 12, 12),
        (lambda a, b: a.view(2, 2).mT.reshape(1, 4), 12, 12),
        (lambda a, b: a.view(2, 2) @ b.view(2, 2), 2 * 2 * 12, 24),  # each result hears a row and a column
        (lambda a, b: F.layer_norm(a, (4,)).clamp(0, 6).exp(), 12, 12),
        (lambda a, b: 0 * a + b, 12, 12),
    ]

    class Two(nn.Module):
        def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
            self.join = join

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.a(x), self.b(x))

    for number, (join, count, used) in enumerate(cases):
        assert path_count(Two(join), torch.zeros(1, 3)) == count, number
        assert effective(Two(join), torch.zeros(1, 3)).effective == used, number


def test_a_clone_is_another_tensor_and_an_alias_is_not() -> None:
    class Copies(nn.Module):
        def __init__(self, clone: bool) -> None:
            super().__init__()
            self.fc, self.clone = nn.Linear(2, 2), clone

        def forward(self, x: Tensor) -> Tensor:
            y = x.clone() if self.clone else x
            y += self.fc(x)
            return x

    assert path_count(Copies(True), torch.zeros(1, 2)) == 2
    assert path_count(Copies(False), torch.zeros(1, 2)) == 2 + 4


def test_a_cut_in_attention_is_found() -> None:
    net = build("gpt", width=0.25, depth=2)
    masks = {"blocks.0.fc1.weight": torch.zeros_like(net.get_parameter("blocks.0.fc1.weight"), dtype=torch.bool)}
    found = effective(net, torch.zeros(1, 8, dtype=torch.long), masks)
    assert found.collapsed == ("blocks.0.fc1.weight", "blocks.0.fc2.weight")


def test_the_model_is_left_as_it_was() -> None:
    net = Residual(True).train()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    effective(net, torch.zeros(2, 2, 8, 8))
    with pytest.raises(ModelError, match="does not run"):
        effective(net, torch.zeros(2, 7, 8, 8))
    assert net.training and net.norm.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_zero_weights_are_the_masks_where_none_are_given() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    sparse = rarefy.sparsify(net, "static", sparsity=0.8, seed=3)
    assert effective(net, torch.zeros(1, 8)).layers == effective(net, torch.zeros(1, 8), sparse.masks()).layers


def test_what_cannot_be_followed_is_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.fc(x), -1)

    with pytest.raises(ModelError, match="cumsum"):
        effective(Odd(), torch.zeros(1, 3))
    with pytest.raises(ModelError, match="lstm"):
        effective(nn.LSTM(3, 4), torch.zeros(1, 5, 3))
    net = nn.Linear(3, 3)
    with pytest.raises(SelectionError, match="did you mean 'weight'"):
        effective(net, torch.zeros(1, 3), {"weigt": torch.ones(3, 3).bool()})
    with pytest.raises(OptionError, match="bool"):
        effective(net, torch.zeros(1, 3), {"weight": torch.ones(3, 3)})
    model = nn.Sequential(nn.Linear(8, 8))
    rarefy.sparsify(model, "static", sparsity=0.5, storage="compressed")
    with pytest.raises(ModelError, match="finalize"):
        effective(model, torch.zeros(1, 8))
