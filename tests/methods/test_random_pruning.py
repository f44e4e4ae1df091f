"""Random pruning: exact counts, blind positions, borrowed densities, and what it cuts off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy import models
from rarefy.engine import dead_units
from rarefy.errors import AllocationError, OptionError
from rarefy.methods.random_pruning import meeting_all
from tests.engine.common import backward, batch, mlp

STORAGES = ("masked", "compressed")
RULES = ("erk", "er", "erk+", "uniform", "uniform+", "snip", "grasp", "synflow")


def prune(model: nn.Module, **options: Any) -> rarefy.Sparsifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that units are cut off is asked for elsewhere
        return rarefy.sparsify(model, "random-pruning", calibration=[batch(0)], **options)


def small_conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12), nn.Flatten(), nn.Linear(192, 5)
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rule", RULES)
def test_the_budget_the_weights_and_the_mask_stay(rule: str, storage: str) -> None:
    model, dense = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    sparse = prune(model, sparsity=0.6, allocation=rule, optimizer=optimizer, storage=storage)
    assert sparse.nnz == pytest.approx(0.4 * sparse.numel, abs=1.5 if rule == "uniform" else 0.5)
    for name, layer in sparse.layers.items():
        assert torch.equal(layer.weight(), dense.get_parameter(name).detach() * layer.mask())  # the dense net's weights
    masks = sparse.masks()
    for step in range(5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert all(not layer.weight()[~masks[name]].any() for name, layer in sparse.layers.items())
    assert all(torch.equal(masks[name], mask) for name, mask in sparse.masks().items())
    other = "compressed" if storage == "masked" else "masked"
    again = prune(mlp(), sparsity=0.6, allocation=rule, storage=other).masks()
    assert all(torch.equal(masks[name], again[name]) for name in masks)


@pytest.mark.parametrize("rule", ["snip", "grasp", "synflow"])
def test_borrowed_ratios_are_the_criterions_and_the_positions_are_not(rule: str) -> None:
    def wide() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, 200), nn.ReLU(), nn.Linear(200, 80), nn.ReLU(), nn.Linear(80, 5))

    asked = rarefy.sparsify(wide(), rule, sparsity=0.7, calibration=[batch(0)])
    model = wide()
    weights = {name: p.detach().abs().clone() for name, p in model.named_parameters()}
    drawn = prune(model, sparsity=0.7, allocation=rule)
    assert [layer.nnz for layer in drawn.layers.values()] == [layer.nnz for layer in asked.layers.values()]
    mask, score = drawn.layers["2.weight"].mask(), asked.layers["2.weight"].mask()
    for other in (weights["2.weight"], score):
        correlation = torch.corrcoef(torch.stack([mask.flatten().float(), other.flatten().float()]))[0, 1]
        assert abs(float(correlation)) < 4 / mask.numel() ** 0.5
    assert len(drawn.events) == 3


def test_only_borrowed_ratios_look_at_data() -> None:
    assert not rarefy.methods.RandomPruning().needs_calibration
    assert not rarefy.methods.RandomPruning(allocation={"*": 0.5}).needs_calibration
    for rule in ("snip", "grasp", "synflow"):
        assert rarefy.methods.RandomPruning(allocation=rule).needs_calibration
        with pytest.raises(OptionError, match="looks at data before training"):
            rarefy.sparsify(mlp(), "random-pruning", allocation=rule)
    with pytest.raises(OptionError, match="did you mean 'synflow'"):
        rarefy.methods.RandomPruning(allocation="sinflow")
    with pytest.raises(OptionError, match="allocation='snip' is not known"):
        rarefy.methods.Static(allocation="snip")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("make", [mlp, small_conv])
def test_connected_masks_meet_every_output_and_input(make: Callable[[], nn.Module], storage: str) -> None:
    for seed in range(5):
        options: dict[str, Any] = dict(sparsity=0.8, allocation="uniform", seed=seed, storage=storage)
        sparse = rarefy.sparsify(make(), "random-pruning", connected=True, **options)
        assert not dead_units(sparse.layers.values())
        assert [x.nnz for x in sparse.layers.values()] == [x.nnz for x in prune(make(), **options).layers.values()]


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    taps=st.integers(1, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_meeting_all_takes_the_fewest_positions(rows: int, columns: int, taps: int, groups: int, seed: int) -> None:
    shape = (groups * rows, columns, taps)
    drawn = meeting_all(shape, groups, torch.Generator().manual_seed(seed))
    assert len(drawn.unique()) == len(drawn) == groups * max(rows, columns)
    met = torch.zeros(shape, dtype=torch.bool)
    met.view(-1)[drawn] = True
    met = met.view(groups, rows, columns, taps).any(3)
    assert met.any(1).all() and met.any(2).all()


def test_connected_positions_are_still_random() -> None:
    """Every weight of a square layer is as likely to be kept as any other."""
    hits = torch.zeros(6, 6)
    for seed in range(3000):
        sparse = rarefy.sparsify(
            nn.Linear(6, 6, bias=False), "random-pruning", sparsity=2 / 3, connected=True, seed=seed
        )
        hits += sparse.layers["weight"].mask()
    assert (hits / 3000 - 1 / 3).abs().max() < 5 * (2 / 9 / 3000) ** 0.5


def test_too_few_weights_to_be_connected() -> None:
    with pytest.raises(AllocationError, match=r"0.weight \[16, 12\] is to keep 10 .* needs 16"):
        rarefy.sparsify(mlp(), "random-pruning", sparsity=0.95, allocation="uniform", connected=True)
    with pytest.raises(OptionError, match="choose one"):
        rarefy.methods.RandomPruning(connected=True, draw="bernoulli")
    with pytest.raises(OptionError, match="did you mean 'bernoulli'"):
        rarefy.methods.RandomPruning(draw="bernouli")


def test_bernoulli_keeps_each_weight_by_itself() -> None:
    kept, hits = [], torch.zeros(20, 10)
    for seed in range(800):
        sparse = prune(nn.Linear(10, 20, bias=False), sparsity=0.7, draw="bernoulli", seed=seed)
        kept.append(sparse.nnz)
        hits += sparse.layers["weight"].mask()
    counts = torch.tensor(kept, dtype=torch.float64)
    variance = 200 * 0.3 * 0.7
    assert float(counts.mean()) == pytest.approx(60, abs=5 * (variance / 800) ** 0.5)
    assert float(counts.var()) == pytest.approx(variance, rel=5 * (2 / 800) ** 0.5)
    assert (hits / 800 - 0.3).abs().max() < 5 * (0.21 / 800) ** 0.5
    with pytest.raises(OptionError, match="prescribes how many weights each of its groups keeps"):
        prune(nn.Linear(10, 20), sparsity=0.7, draw="bernoulli", pattern="fan-in")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("make", [mlp, small_conv])
def test_dead_units_by_brute_force(make: Callable[[], nn.Module], storage: str) -> None:
    sparse = prune(make(), sparsity=0.9, allocation="uniform", storage=storage)
    found = {dead.layer: dead for dead in dead_units(sparse.layers.values())}
    for name, mask in sparse.masks().items():
        layer = sparse.layers[name]
        groups = getattr(layer.module, "groups", 1)
        rows = [int(row.sum()) for row in mask]
        per_group = mask.view(groups, -1, *mask.shape[1:])
        columns = [int(per_group[g, :, i].sum()) for g in range(groups) for i in range(mask.shape[1])]
        assert layer.kept_per_output().tolist() == rows
        assert layer.kept_per_input().tolist() == columns
        dead = (rows.count(0), len(rows), columns.count(0), len(columns))
        assert tuple(found[name][1:]) == dead if rows.count(0) or columns.count(0) else name not in found
    assert found


def test_what_is_cut_off_is_said() -> None:
    with pytest.warns(UserWarning, match=r"Random pruning cut units off: 0.weight: \d+ of 16 outputs .*connected=True"):
        rarefy.sparsify(mlp(), "random-pruning", sparsity=0.95, allocation="uniform")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rarefy.sparsify(mlp(), "random-pruning", sparsity=0.5)
        rarefy.sparsify(mlp(), "random-pruning", sparsity=0.5, pattern="channel", allocation="uniform")  # as asked
    table = nn.Sequential(nn.Embedding(40, 6), nn.Flatten(), nn.Linear(18, 4))
    sparse = prune(table, sparsity=0.95, allocation="uniform")
    dead = {d.layer: d for d in dead_units(sparse.layers.values())}
    assert (dead["0.weight"].of_inputs, dead["0.weight"].of_outputs) == (40, 6)


@pytest.mark.parametrize("storage", STORAGES)
def test_positions_can_be_chosen_by_hand(storage: str) -> None:
    layer = prune(nn.Linear(12, 16), sparsity=0.0, storage=storage).layers["weight"]
    positions = torch.tensor([191, 3, 40, 3, 0])
    chosen = layer.at(positions)
    assert int(layer.counts(chosen)) == 4
    layer.rewire(chosen)
    assert layer.mask().flatten().nonzero().flatten().tolist() == [0, 3, 40, 191]
    blocks = prune(nn.Linear(12, 16), sparsity=0.0, pattern="4x1").layers["weight"]
    assert blocks.rewire(blocks.at(torch.tensor([0, 12, 191]))).dropped == 192 - 8  # rows 0-3 and 12-15 of a column


def test_random_pruning_of_a_residual_network_by_every_rule() -> None:
    for rule in ("erk+", "uniform+", "snip", "synflow"):
        model = models.build("resnet-20", width=0.25)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sparse = rarefy.sparsify(
                model,
                "random-pruning",
                sparsity=0.8,
                allocation=rule,
                calibration=[(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))],
            )
        assert sparse.nnz == math.floor(0.2 * sparse.numel + 0.5)
        layers = list(sparse.layers.values())
        assert rule != "erk+" or layers[-1].density == 1.0
        assert rule != "uniform+" or (layers[0].density == 1.0 and layers[-1].density >= 0.2)


def test_fan_in_init_scales_as_static_does() -> None:
    def weights(method: str, **options: Any) -> list[Tensor]:
        model = mlp()
        rarefy.sparsify(model, method, sparsity=0.7, **options)
        x, y = batch(1)
        F.cross_entropy(model(x), y)
        return [p.detach() for p in model.parameters()]

    assert all(
        torch.equal(a, b) for a, b in zip(weights("static"), weights("random-pruning", init="fan-in"), strict=True)
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4@0"])
@pytest.mark.parametrize("seed", range(5))
def test_connected_units_fit_n_of_m(pattern: str, seed: int) -> None:
    """Each run of M holds N at most, also of the weights that meet every unit: drawn anywhere, they often did not fit."""
    model = nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 100), nn.Linear(100, 8), nn.Conv2d(8, 12, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no unit is cut off
        sparse = rarefy.sparsify(model, "random-pruning", pattern=pattern, connected=True, seed=seed)
    for layer in sparse.layers.values():
        assert layer.pattern.obeys(layer.mask())
        assert layer.kept_per_output().all() and layer.kept_per_input().all()
