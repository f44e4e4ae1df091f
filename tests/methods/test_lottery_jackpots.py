"""Lottery jackpots: nothing but scores is trained, and swaps are as many as the restriction says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import OptionError
from rarefy.methods.lottery_jackpots import swap
from tests.engine.common import backward, batch, mlp


def search(
    total: int = 20, optimizer: str = "SGD", **options: object
) -> tuple[nn.Sequential, torch.optim.Optimizer, rarefy.Sparsifier]:
    model = mlp()
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=1.0, weight_decay=5e-4)
    options = {"sparsity": 0.8, "exclude": "5", **options}
    return model, made, rarefy.sparsify(model, "lottery-jackpots", optimizer=made, total_steps=total, **options)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_weights_biases_and_norms_are_bit_for_bit_what_they_were(optimizer: str) -> None:
    model, made, sparse = search(optimizer=optimizer)
    masks = sparse.masks()
    start = sparse.layers["0.weight"].extras["scores"].detach().clone()
    for step in range(20):
        backward(model, step)
        made.step()
        made.zero_grad(set_to_none=step % 2 == 0)
    for name, layer in sparse.layers.items():
        assert torch.equal(layer.trained(), mlp().get_parameter(name))
        assert not torch.equal(layer.mask(), masks[name]) and layer.nnz == int(masks[name].sum())
    for name, parameter in mlp().named_parameters():
        if name not in sparse.layers:
            assert torch.equal(model.get_parameter(name), parameter), name
    assert not torch.equal(sparse.layers["0.weight"].extras["scores"], start)
    assert model[1].running_mean.any(), "statistics of batch norm follow the data"
    final = sparse.masks()
    sparse.finalize()
    for name, mask in final.items():
        assert torch.equal(model.get_parameter(name), mlp().get_parameter(name).masked_fill(~mask, 0))
    assert all(p.requires_grad for p in model.parameters())


def test_it_begins_as_one_shot_magnitude_pruning() -> None:
    model, _, sparse = search()
    pruned = mlp()
    other = rarefy.sparsify(pruned, "magnitude", sparsity=0.8, exclude="5")
    model.eval(), pruned.eval()
    assert torch.equal(model(batch(0)[0]), pruned(batch(0)[0]))
    for name, layer in sparse.layers.items():
        mask = other.masks()[name]
        assert torch.equal(layer.mask(), mask)
        assert torch.equal(layer.extras["scores"], torch.where(mask, 1.0, 0.99))
    assert sparse.nnz == int(0.2 * sparse.numel + 0.5)


def test_the_gradient_of_a_score_is_weight_times_gradient() -> None:
    model, _, sparse = search()
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    twin = mlp()
    with torch.no_grad():
        for name, mask in sparse.masks().items():
            twin.get_parameter(name).mul_(mask)
    F.cross_entropy(twin(x), y).backward()
    for name, layer in sparse.layers.items():
        gradient = layer.extras["scores"].grad
        torch.testing.assert_close(gradient, mlp().get_parameter(name) * twin.get_parameter(name).grad)
        assert gradient[~layer.mask()].any(), "dropped weights are asked too"
        assert layer.target.parameter.grad is None


def by_hand(scores: Tensor, mask: Tensor, rho: float) -> Tensor:
    """The sheet's algorithm in so many words, for one layer whose scores are distinct."""
    zeros = int((~mask).sum())
    tau = scores.flatten().sort().values[zeros - 1]
    wake = [i for i in range(scores.numel()) if not mask.flatten()[i] and scores.flatten()[i] > tau]
    sleep = [i for i in range(scores.numel()) if mask.flatten()[i] and scores.flatten()[i] <= tau]
    assert len(wake) == len(sleep)
    n = min(len(wake), max(1, math.ceil(rho * len(wake))))
    new = mask.flatten().clone()
    for i in sorted(wake, key=lambda i: -scores.flatten()[i])[:n]:
        new[i] = True
    for i in sorted(sleep, key=lambda i: scores.flatten()[i])[:n]:
        new[i] = False
    return new.view_as(mask)


@pytest.mark.parametrize("storage", ["masked", "compressed"])
@pytest.mark.parametrize("rho", [1.0, 0.5, 0.13, 0.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_swap_is_the_papers(seed: int, rho: float, storage: str) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(9, 7)
    layer = rarefy.sparsify(model, "static", sparsity=0.7, init="dense", storage=storage).layers["weight"]
    scores, mask = torch.randn(7, 9), layer.mask()
    swap(layer, scores, rho)
    assert torch.equal(layer.mask(), by_hand(scores, mask, rho))
    if rho == 1:
        top = scores.flatten().topk(int(mask.sum())).indices
        assert set(layer.mask().flatten().nonzero().flatten().tolist()) == set(top.tolist())
    swap(layer, layer.mask().float(), rho)  # nothing to swap
    assert layer.nnz == int(mask.sum())


def test_swaps_in_groups_are_counted_for_each() -> None:
    layer = rarefy.sparsify(nn.Linear(8, 6), "static", pattern="2:4", init="dense").layers["weight"]
    scores, before = torch.randn(6, 8), layer.mask()
    swap(layer, scores, 0.0)
    assert layer.pattern.obeys(layer.mask())
    for old, new, s in zip(before.view(-1, 4), layer.mask().view(-1, 4), scores.view(-1, 4), strict=True):
        late = not torch.equal(old, torch.zeros(4).scatter(0, s.topk(2).indices, 1).bool())
        assert int((old ^ new).sum()) == (2 if late else 0)


@pytest.mark.parametrize("storage", ["masked", "compressed"])
def test_swaps_keep_the_fan_in_of_every_row(storage: str) -> None:
    sparse = rarefy.sparsify(nn.Linear(9, 7), "static", sparsity=0.6, pattern="fan-in", init="dense", storage=storage)
    layer = sparse.layers["weight"]
    scores, mask = torch.randn(7, 9), layer.mask()
    swap(layer, scores, 0.4)
    for row in range(7):
        assert torch.equal(layer.mask()[row], by_hand(scores[row], mask[row], 0.4))


def test_ties_do_not_swap_what_is_as_good() -> None:
    layer = rarefy.sparsify(nn.Linear(10, 10), "static", sparsity=0.5, init="dense").layers["weight"]
    mask = layer.mask()
    swap(layer, mask.float() * 0.01 + 0.99, 1.0)
    assert torch.equal(layer.mask(), mask)


@pytest.mark.parametrize(("restriction", "rho"), [("power", lambda p: (1 - p) ** 4), ("constant", lambda p: 1.0)])
def test_the_restriction_falls_over_the_search(restriction: str, rho: object) -> None:
    model, optimizer, sparse = search(restriction=restriction, exclude=None)
    for step in range(1, 21):
        before = sparse.masks()
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in sparse.layers.items():
            scores = layer.extras["scores"].detach()
            assert torch.equal(layer.mask(), by_hand(scores, before[name], rho(step / 20)))  # type: ignore[operator]


def test_after_the_search_the_mask_is_fixed_and_the_weights_are_trained() -> None:
    model, optimizer, sparse = search(stop=0.5)
    for step in range(1, 21):
        before, weights = sparse.masks(), {n: p.detach().clone() for n, p in model.named_parameters()}
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in sparse.layers.items():
            changed = layer.trained() != weights[f"{name.removesuffix('weight')}parametrizations.weight.original"]
            if step <= 10:
                assert not changed.any()
            else:
                assert torch.equal(layer.mask(), before[name]) and changed[layer.mask()].any()
        assert torch.equal(model[5].bias, weights["5.bias"]) == (step <= 10)
    frozen_by_user = mlp()
    frozen_by_user[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(frozen_by_user.parameters(), lr=0.1)
    again = rarefy.sparsify(frozen_by_user, "lottery-jackpots", optimizer=optimizer, total_steps=5)
    assert not any(p.requires_grad for n, p in frozen_by_user.named_parameters() if "scores" not in n)
    again.finalize()
    assert [n for n, p in frozen_by_user.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_options_are_checked() -> None:
    for options in (dict(initial=1.0), dict(restriction="quartic"), dict(sparsity=1.0), dict(stop=1.5)):
        with pytest.raises(OptionError):
            rarefy.methods.LotteryJackpots(**options)
