"""ASP is magnitude pruning on N:M groups, N:M RigL is RigL on them; all leave what does not fit. T-mask and BDWP by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import OptionError, PatternError
from rarefy.methods import make
from rarefy.metrics import flops, training_flops
from rarefy.models import build
from rarefy.patterns import NM, parse_pattern
from tests.engine.common import assert_sparse, backward, mlp


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("named", "plain"), [("asp", "magnitude"), ("nm-rigl", "rigl")])
def test_they_are_the_methods_that_they_say(named: str, plain: str) -> None:
    states = []
    for method in (named, plain):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"start": 5} if plain == "magnitude" else {"every": 3}
        sparse = rarefy.sparsify(model, method, pattern="1:4", optimizer=optimizer, total_steps=20, **options)
        train(model, optimizer, range(12))
        assert_sparse(sparse, 0.75)
        assert all(layer.pattern.obeys(layer.mask()) for layer in sparse.layers.values())
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_asp_is_dense_until_it_prunes_and_then_holds_the_mask() -> None:
    model, dense = mlp(), mlp()
    pairs = [(m, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)) for m in (model, dense)]
    sparse = rarefy.sparsify(model, "asp", optimizer=pairs[0][1], total_steps=12, start=0.5)
    for m, optimizer in pairs:
        train(m, optimizer, range(6))
    for layer in sparse.layers.values():
        weight = dense.get_parameter(layer.name).detach()
        assert torch.equal(layer.mask(), layer.pattern.project(weight.abs(), 2))
        assert torch.equal(layer.weight(), weight * layer.mask())
    masks = sparse.masks()
    train(model, pairs[0][1], range(6, 12))
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks().items())


@pytest.mark.parametrize("refine", [0.0, 0.3])
def test_t_mask_is_straight_through_with_one_mask_for_k_steps(refine: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False)).double()
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    cut = parse_pattern("2:4t")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    sparse = rarefy.sparsify(model, "t-mask", pattern="2:4t", every=3, refine=refine, optimizer=optimizer)
    seen = set()
    for step in range(12):
        if step % 3 == 0:
            masks = [cut.project(w.abs(), 8) for w in weights]
            seen.add(tuple(masks[0].flatten().tolist()))
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(step)).double()
        forward = [(w * s).requires_grad_() for w, s in zip(weights, masks, strict=True)]
        loss = (torch.tanh(x @ forward[0].T) @ forward[1].T - 1).square().sum()
        gradients = torch.autograd.grad(loss, forward)  # dx goes through the masked weights too
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        for i, name in enumerate(("0.weight", "2.weight")):
            assert torch.equal(sparse.layers[name].mask(), masks[i])
            tiles = masks[i].view(masks[i].shape[0] // 4, 4, masks[i].shape[1] // 4, 4)
            assert (tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all(), "N in every row and column"
        optimizer.step()
        weights = [w - 0.02 * (g + refine * w * ~s) for w, g, s in zip(weights, gradients, masks, strict=True)]
        for i, name in enumerate(("0.weight", "2.weight")):
            torch.testing.assert_close(sparse.layers[name].trained(), weights[i], rtol=1e-10, atol=1e-12)
    assert len(seen) > 1
    with pytest.raises(OptionError, match="kind TransposableNM"):
        make("t-mask", pattern="2:4")


@pytest.mark.parametrize("method", ["ste", "t-mask", "bdwp", "pgf"])
def test_a_layer_with_a_forward_pass_of_its_own_keeps_it(method: str) -> None:
    class Twice(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Twice(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    sparse = rarefy.sparsify(model, method, pattern="2:4t" if method == "t-mask" else "2:4", total_steps=9)
    assert ("0.weight" in sparse.layers) == (method != "bdwp")  # which cannot give it another weight, and leaves it
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), 2 * F.linear(F.linear(x, model[0].weight), model[1].weight))


@pytest.mark.parametrize("method", ["asp", "nm-rigl", "bdwp"])
def test_a_stem_stays_dense_unless_it_is_named(method: str) -> None:
    model = build("resnet-20", width=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, method, pattern="2:8", optimizer=optimizer)
    left = {item.name: item.reason for item in sparse.left_out}
    assert left["conv1.weight"].startswith("2:8 needs dimension 1 (3)")
    assert ("fc.weight" in left) == (method == "bdwp")
    assert len(sparse.layers) == 18 + (method != "bdwp") and sparse.sparsity == 0.75
    with pytest.raises(PatternError, match=r"conv1\.weight \[8, 3, 3, 3\]"):
        rarefy.sparsify(build("resnet-20", width=0.5), method, pattern="2:8", include=[nn.Conv2d])


def test_bdwp_knows_its_layers() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 8), nn.RNNCell(8, 8))
    sparse = rarefy.sparsify(model, "bdwp")
    assert [*sparse.layers] == ["2.weight"]
    left = {item.name: item.reason for item in sparse.left_out}
    assert "a grouped one" in left["0.weight"] and "RNNCell" in left["3.weight_ih"]
    attention = nn.MultiheadAttention(8, 2)  # it reads out_proj's weight and never calls it
    with pytest.raises(rarefy.RarefyError, match="out_proj"):
        rarefy.sparsify(attention, "bdwp")
    with pytest.raises(OptionError, match="knows Linear"):
        rarefy.sparsify(nn.RNNCell(8, 8), "bdwp", include="*ih")
    with pytest.raises(OptionError, match="mode"):
        make("bdwp", mode="bp")
    with pytest.raises(OptionError, match="inputs and outputs only"):
        make("bdwp", pattern="2:4@2")


@pytest.mark.parametrize("pattern", ["2:4", "2:4@0"])
@pytest.mark.parametrize("mode", ["both", "ff", "bp_w", "bp_g"])
def test_bdwp_leaves_what_does_not_fit_in_every_mode(mode: str, pattern: str) -> None:
    """Either side may be odd; what is taken trains, and what is left is listed with the side that does not fit."""
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in ((6, 8), (8, 8), (8, 6), (6, 4), (4, 8))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparse = rarefy.sparsify(model, "bdwp", pattern=pattern, mode=mode, optimizer=optimizer)
    odd = {"0.weight": "dimension 1 (6)", "2.weight": "dimension 0 (6)", "3.weight": "dimension 1 (6)"}
    if mode == "ff":
        odd = {name: why for name, why in odd.items() if ("1 (6)" in why) == (pattern == "2:4")}
    reasons = {item.name: item.reason for item in sparse.left_out if item.name.endswith("weight")}
    assert reasons.keys() == odd.keys() and all(why in reasons[name] for name, why in odd.items())
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()


def test_bdwp_ff_is_sr_ste() -> None:
    states = []
    for method, options in (("bdwp", {"mode": "ff"}), ("sr-ste", {})):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        sparse = rarefy.sparsify(model, method, optimizer=optimizer, refine=0.1, **options)
        train(model, optimizer, range(8))
        sparse.finalize()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("mode", ["both", "bp_w", "bp_g"])
def test_bdwp_trains_by_its_three_products(mode: str) -> None:
    """Two layers by hand: the error that reaches the first has gone through the second's backward weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False)).double()
    w1, w2 = (model[i].weight.detach().clone() for i in (0, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "bdwp", pattern="1:4", mode=mode, refine=0.2, optimizer=optimizer)

    def prune(t: torch.Tensor, dim: int) -> torch.Tensor:
        return NM(1, 4, dim).project(t.abs(), 1)

    for step in range(4):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        (0.5 * (model(x) - 1).square()).sum().backward()
        optimizer.step()
        f1, f2 = (prune(w, 1) if mode == "both" else torch.ones_like(w, dtype=torch.bool) for w in (w1, w2))
        h = torch.tanh(x @ (w1 * f1).T)
        e = h @ (w2 * f2).T - 1
        through = w2 if mode == "bp_g" else w2 * prune(w2, 0)
        back = (e * prune(e, 1) if mode == "bp_g" else e) @ through * (1 - h**2)
        w1, w2 = (w - 0.1 * (g + 0.2 * w * ~f) for w, g, f in ((w1, back.T @ x, f1), (w2, e.T @ h, f2)))
        torch.testing.assert_close(sparse.layers["0.weight"].trained(), w1, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(sparse.layers["2.weight"].trained(), w2, rtol=1e-10, atol=1e-12)
    assert sparse.sparsity == (0.75 if mode == "both" else 0)


@pytest.mark.parametrize("method", ["ste", "sr-ste", "t-mask", "bdwp", "pgf"])
def test_the_summary_counts_the_same_flops_while_it_trains(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    options: dict[str, Any] = {"pgf": dict(start=0, stop=0), "t-mask": dict(pattern="1:4t")}.get(method, {})
    sparse = rarefy.sparsify(model, method, total_steps=9, **{"pattern": "1:4", **options})
    during = sparse.summary(torch.zeros(2, 8, 4, 4))
    sparse.finalize()
    after = sparse.summary(torch.zeros(2, 8, 4, 4))
    assert [(row.name, row.flops, row.flops_dense) for row in during.rows] == [
        (row.name, row.flops, row.flops_dense) for row in after.rows
    ]
    assert during.flops == after.flops and 4 * after.flops[0] == after.flops[1]


def test_bdwp_multiplies_one_and_two_n_over_m_thirds() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = rarefy.sparsify(model, "bdwp", pattern="2:8", optimizer=optimizer)
    for _ in range(3):
        F.mse_loss(model(torch.randn(4, 16)), torch.ones(4, 16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    counted = training_flops(flops(plain, torch.zeros(1, 16)), sparse.training_cost(), samples_per_step=4)
    assert counted.ratio == pytest.approx((1 + 2 * 0.25) / 3)


NETS = {
    "vit": (dict(image_size=16, in_channels=1, patch=4, dim=32, depth=1, heads=2), torch.randn(2, 1, 16, 16)),
    "gpt": (dict(dim=32, depth=1, heads=2, context=16), torch.randint(256, (2, 16))),
}
FF = ["blocks.0.fc1.weight", "blocks.0.fc2.weight"]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("method", "pattern"),
    [("sr-ste", "1:8"), ("pgf", "1:32"), ("bdwp", "2:8"), ("t-mask", "4:8t"), ("asp", "2:4"), ("nm-rigl", "2:4")],
)
def test_transformers_train_under_autocast_and_compile(net: str, method: str, pattern: str) -> None:
    options, x = NETS[net]
    torch.manual_seed(0)
    model = build(net, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    everywhere = rarefy.sparsify(copy.deepcopy(model), method, pattern=pattern, total_steps=4)
    assert {*FF} < {*everywhere.layers} and not {"token.weight", "patch.weight"} & {*everywhere.layers}
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    sparse = rarefy.sparsify(
        run, method, pattern=pattern, optimizer=optimizer, total_steps=4, include=["*.fc1", "*.fc2"]
    )
    assert [*sparse.layers] == FF
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sparse.finalize()
    for layer in sparse.layers.values():
        assert layer.pattern.obeys(model.get_parameter(layer.name) != 0)
        assert layer.sparsity == parse_pattern(pattern).fixed_sparsity
