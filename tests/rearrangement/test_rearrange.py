"""`rarefy.rearrange` raises what a pattern keeps, changes no output, adds no operation, and takes everything along."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy import models
from rarefy.errors import ModelError, OptionError, PatternError, SelectionError, StateError
from rarefy.patterns import parse_pattern
from rarefy.rearrangement import Rearrangement


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic its own values, and filters of very different sizes."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                noise = torch.randn(t.shape, generator=g) / max(1, t[0].numel() if t.ndim else 1) ** 0.5
                if t.ndim > 1:
                    noise *= torch.rand(t.shape[0], *[1] * (t.ndim - 1), generator=g) + 0.5
                t.copy_(noise.abs() + 0.5 if "running_var" in name else noise)
    return model.eval()


def kept(model: nn.Module, done: Rearrangement, sparsity: float | None, names: list[str]) -> float:
    """What the pattern keeps, from the pattern's own projection."""
    pattern, total = done.pattern, 0.0
    for name in names:
        w = model.get_parameter(name).detach()
        score = w.abs() if sparsity is None else w.square()
        keep = pattern.keep(w.shape, None if sparsity is None else 1 - sparsity)
        total += float(score[pattern.project(score, keep)].double().sum())
    return total


NETS: list[tuple[str, dict[str, Any], int]] = [
    ("resnet-20", {}, 16),
    ("resnet-50", {"width": 0.25}, 32),
    ("mobilenet-v1", {"width": 0.5}, 32),
    ("mobilenet-v2", {"width": 0.5}, 32),
    ("efficientnet-b0", {"width": 0.5}, 32),
    ("vgg-19-bn", {"width": 0.25}, 32),
    ("lenet-5", {}, 28),
]


@pytest.mark.parametrize(("name", "options", "size"), NETS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("group8", 0.5), ("group4-tap", 0.3)])
def test_reference_networks(name: str, options: dict[str, Any], size: int, pattern: str, sparsity: float) -> None:
    model = randomise(models.build(name, num_classes=7, **options))
    x = torch.randn(2, 1 if name == "lenet-5" else 3, size, size)
    with torch.no_grad():
        before = model(x)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    graph = [type(m) for m in model.modules()]
    done = rarefy.rearrange(model, pattern, sparsity, example_input=x, tries=20)
    with torch.no_grad():
        after = model(x)
    assert float(before.abs().max()) > 0
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert done.after > done.before and all(m.after >= m.before for m in done.moved)
    # the same parameters and modules as before: nothing was added that runs
    assert {n: p.shape for n, p in model.named_parameters()} == shapes and [type(m) for m in model.modules()] == graph
    weights = [n for n, p in model.named_parameters() if p.ndim > 1 and p.shape[1] > 1]
    tapped = (
        [n for n, p in model.named_parameters() if p.ndim > 1 and p[0].numel() > 1] if "tap" in pattern else weights
    )
    assert done.after == pytest.approx(kept(model, done, sparsity, tapped), rel=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "2:4t"])
def test_n_m_raises_the_kept_magnitude(pattern: str) -> None:
    model = randomise(models.build("resnet-20", num_classes=4))
    x = torch.randn(2, 3, 16, 16)
    before = model(x).detach()
    done = rarefy.rearrange(model, pattern, example_input=x, exclude=["conv1", "fc"])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert done.after > 1.002 * done.before and all(m.after >= m.before for m in done.moved)
    names = [n for n, p in model.named_parameters() if p.ndim > 1 and n not in ("conv1.weight", "fc.weight")]
    assert done.after == pytest.approx(kept(model, done, None, names), rel=1e-5)


def test_n_m_inside_grouped_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    x = torch.randn(1, 3, 6, 6)
    before = model(x).detach()
    done = rarefy.rearrange(model, "2:4", example_input=x, exclude="0")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert sum(m.after > m.before for m in done.moved) >= 3


def test_planted_groups_of_a_network_are_recovered() -> None:
    """Filters that agree on their inputs, shuffled through two layers: the mask then loses nothing at all."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 48, 1), nn.ReLU(), nn.Conv2d(48, 32, 3), nn.Conv2d(32, 2, 1)
    )
    with torch.no_grad():
        for layer in (model[2], model[4]):
            rows, cols = layer.weight.shape[:2]
            w = torch.zeros_like(layer.weight)
            for i in range(0, rows, 16):
                w[i : i + 16, torch.randperm(cols, generator=g)[: cols // 2]] = 1.0
            layer.weight.copy_((w * (torch.rand(w.shape, generator=g) + 0.5))[torch.randperm(rows, generator=g)])
    x = torch.randn(1, 3, 8, 8, generator=g)
    before = model(x).detach()
    done = rarefy.rearrange(model, "group16", 0.5, example_input=x, include=["2", "4"])
    assert done.before < 0.8 * done.total and done.after == pytest.approx(done.total, rel=1e-6)
    sparse = rarefy.sparsify(
        model, "magnitude", sparsity=0.5, allocation="uniform", pattern="group16", include=["2", "4"]
    )
    assert sparse.sparsity == 0.5
    sparse.finalize()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_zeros_that_are_there_are_gathered() -> None:
    model = randomise(models.build("vgg-19-bn", num_classes=3, width=0.25))
    rarefy.sparsify(model, "magnitude", sparsity=0.8, allocation="uniform").finalize()
    x = torch.randn(1, 3, 32, 32)
    before = model(x).detach()
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    done = rarefy.rearrange(model, "unstructured", example_input=x)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert sum(int((p == 0).sum()) for p in model.parameters()) == zeros
    assert done.before < done.after < 0 and "loads for each kept weight" in str(done)


def test_own_scores_decide() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    scores = {"0.weight": torch.rand(32, 6)}
    done = rarefy.rearrange(model, "group8", 0.5, example_input=torch.randn(2, 6), include="0", scores=scores)
    moved = scores["0.weight"][done.moved[0].order]
    pattern = parse_pattern("group8")
    assert done.after == pytest.approx(float(moved[pattern.project(moved, 3)].sum()), rel=1e-5)


def test_the_order_helps_every_layer_that_shares_it() -> None:
    """Residual and depthwise together: one order for several weights, none left behind."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
            self.dw, self.bn, self.fc = nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.BatchNorm2d(32), nn.Linear(32 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x + self.b(F.relu(x))
            return self.fc((x + self.c(self.bn(self.dw(x)))).flatten(1))

    model = randomise(Net())
    x = torch.randn(2, 3, 4, 4)
    before = model(x).detach()
    done = rarefy.rearrange(model, "group8", 0.5, example_input=x, exclude=["a", "fc"])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    (moved,) = done.moved
    assert {m.name for m in moved.group.members} >= {
        "a.weight",
        "b.weight",
        "c.weight",
        "dw.weight",
        "bn.running_mean",
        "fc.weight",
    }
    assert moved.after > 1.02 * moved.before


# --- what goes along ---------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(8, 3, 8, 8, generator=g).to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9),
        lambda p: torch.optim.Rprop(p, 0.01),
        lambda p: torch.optim.Adagrad(p, 0.05),
    ],
)
def test_training_goes_on_as_if_nothing_had_moved(make: Any) -> None:
    still, moved = small().double(), small().double()
    optimizers = make(still.parameters()), make(moved.parameters())
    for model, optimizer in zip((still, moved), optimizers, strict=True):
        train(model, optimizer, 3)
        model(torch.ones(2, 3, 8, 8).double()).sum().backward()  # a gradient that is waiting
    done = rarefy.rearrange(
        moved, "group8", 0.5, example_input=torch.randn(1, 3, 8, 8).double(), optimizer=optimizers[1]
    )
    assert any(m.after > m.before for m in done.moved)
    for model, optimizer in zip((still, moved), optimizers, strict=True):
        train(model, optimizer, 4, seed=1)
        model.eval()
    x = torch.randn(4, 3, 8, 8).double()
    torch.testing.assert_close(moved(x), still(x), rtol=1e-7, atol=1e-9)
    there = done.apply(still.state_dict())
    for name, tensor in moved.state_dict().items():
        torch.testing.assert_close(tensor, there[name], rtol=1e-6, atol=1e-9)


def test_masks_of_a_sparsifier_go_along() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.7, optimizer=optimizer, total_steps=100)
    train(model, optimizer, 5)
    before = sparse.masks()
    done = rarefy.rearrange(
        model, "unstructured", example_input=torch.randn(1, 3, 8, 8), optimizer=optimizer, sparsifier=sparse
    )
    assert any(m.after > m.before for m in done.moved)
    for name, mask in done.apply(before).items():
        assert torch.equal(sparse.layers[name].mask(), mask)
        assert not bool((model.get_parameter(name) != 0)[~mask].any())
    train(model, optimizer, 3)
    for name, layer in sparse.layers.items():
        assert not bool((model.get_parameter(name) != 0)[~layer.mask()].any())


def test_what_cannot_go_along_is_refused_and_nothing_changes() -> None:
    x = torch.randn(1, 3, 8, 8)

    def refused(model: nn.Module, error: type[Exception], match: str, **options: Any) -> None:
        before = copy.deepcopy(model.state_dict())
        given = {"pattern": "group8", "sparsity": 0.5, "example_input": x, **options}
        with pytest.raises(error, match=match):
            rarefy.rearrange(model, **given)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])

    model = small()
    rows = torch.optim.Adafactor(model.parameters())
    train(model, rows, 1)
    refused(model, StateError, "Adafactor remembers", optimizer=rows)
    history = torch.optim.LBFGS(model.parameters(), max_iter=3)
    history.step(lambda: model(x).square().mean())
    loss = lambda: (history.zero_grad(), (v := model(x).square().mean()).backward(), v)[2]  # noqa: E731
    history.step(loss)
    refused(model, StateError, "LBFGS remembers", optimizer=history)

    sparse = rarefy.sparsify(model, "static", sparsity=0.5)
    refused(model, SelectionError, "pass it as sparsifier=")
    sparse.finalize()
    sparse = rarefy.sparsify(model, "magnitude", sparsity=0.5, pattern="2:4", exclude="0")
    refused(model, PatternError, "would no longer obey 2:4", pattern="group8", sparsifier=sparse)
    sparse.finalize()
    sparse = rarefy.sparsify(model, "static", sparsity=0.5, storage="compressed")
    refused(model, SelectionError, "kept values only", sparsifier=sparse)
    sparse.finalize()

    refused(model, ModelError, "does not run on the example", example_input=torch.zeros(1, 4, 8, 8))
    refused(model, PatternError, "the order of channels changes nothing", pattern="row")
    refused(model, OptionError, "pass sparsity", sparsity=None)
    refused(model, OptionError, "leave sparsity out", pattern="unstructured")
    refused(model, OptionError, "contradicts", pattern="2:4", sparsity=0.3)
    refused(model, PatternError, "multiple of 4", pattern="2:4", sparsity=None)
    refused(model, OptionError, "tries", tries=0)
    refused(model, SelectionError, "matches no layer", exclude="nothing")
    refused(model, OptionError, "hold nothing for", scores={})
    refused(model, OptionError, "its scores have shape", scores={n: torch.ones(2) for n, _ in model.named_parameters()})
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.nan
    refused_nan = {"pattern": "group8", "sparsity": 0.5, "example_input": x}
    with pytest.raises(OptionError, match="finite"):
        rarefy.rearrange(model, **refused_nan)


def test_a_network_that_hides_its_channels_is_refused() -> None:
    """A tensor that is neither parameter nor buffer scales each channel: outputs would change, and the try shows it."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(self.a(x)) * self.calls

    model = Hidden()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="gives other outputs"):
        rarefy.rearrange(model, "group8", 0.5, example_input=torch.randn(1, 3, 4, 4))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_report_and_seed() -> None:
    one, two = randomise(models.build("lenet-5")), randomise(models.build("lenet-5"))
    x = torch.randn(1, 1, 28, 28)
    first = rarefy.rearrange(one, "group16", 0.5, example_input=x)
    second = rarefy.rearrange(two, "group16", 0.5, example_input=x)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert str(first) == str(second) and "conv2.weight" in str(first) and "fixed: fc2.weight dim 0" in str(first)
    assert first.gain == pytest.approx((first.after - first.before) / first.total)
    assert [m.group.units for m in first.moved] == [50, 500]  # conv1 has one input: nothing to choose
    again = rarefy.rearrange(one, "group16", 0.5, example_input=x)
    assert again.before == pytest.approx(first.after, rel=1e-5)


def test_bfloat16_and_modes_are_kept() -> None:
    model = randomise(models.build("lenet-5")).bfloat16().train()
    done = rarefy.rearrange(model, "group16", 0.5, example_input=torch.randn(1, 1, 28, 28).bfloat16())
    assert model.training and done.after > done.before and all(p.dtype == torch.bfloat16 for p in model.parameters())
