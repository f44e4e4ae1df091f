"""Transposable N:M masks: both directions, the optimum by brute force and by linear programming, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import rarefy
from rarefy.errors import OptionError, PatternError
from rarefy.metrics import compliance
from rarefy.patterns import NM, TransposableNM, parse_pattern, transposable_mask

SOLVERS = ("fast", "exact", "approx")
BEST = ("fast", "exact")
EXACT = settings(max_examples=40, deadline=None)


def tiles_of(scores: torch.Tensor, m: int) -> torch.Tensor:
    """[tiles, m, m] by slicing, position by position."""
    flat = scores.reshape(*scores.shape[:2], -1)
    return torch.stack(
        [
            flat[i : i + m, j : j + m, p]
            for i in range(0, flat.shape[0], m)
            for j in range(0, flat.shape[1], m)
            for p in range(flat.shape[2])
        ]
    )


def all_tiles(n: int, m: int) -> torch.Tensor:
    """Every m x m mask with n in each row and column, bool [count, m, m], in the order of their rows."""
    rows = [torch.tensor([c in kept for c in range(m)]) for kept in itertools.combinations(range(m), n)]
    found = [torch.zeros(0, m, dtype=torch.bool)]
    for _ in range(m):
        longer = [torch.cat([mask, row[None]]) for mask in found for row in rows]
        found = [mask for mask in longer if (mask.sum(0) <= n).all()]
    return torch.stack(found)


def optimum(tile: torch.Tensor, n: int) -> float:
    """The linear program of a tile: its corners are masks, since rows and columns make a bipartite graph."""
    m = len(tile)
    sums = np.zeros((2 * m, m, m))
    for i in range(m):
        sums[i, i, :] = sums[m + i, :, i] = 1
    solved = linprog(
        -tile.double().flatten().numpy(), A_eq=sums.reshape(2 * m, -1), b_eq=np.full(2 * m, n), bounds=(0, 1)
    )
    assert solved.status == 0
    return -float(solved.fun)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (4, 8, 3), (8, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_row_and_column_of_every_tile_keeps_n(solver: str, shape: tuple[int, ...], n: int) -> None:
    mask = transposable_mask(torch.randn(shape).abs(), n, 4, solver)
    assert mask.shape == shape and mask.dtype == torch.bool and mask.is_contiguous()
    tiles = tiles_of(mask, 4)
    assert (tiles.sum(1) == n).all() and (tiles.sum(2) == n).all()
    assert NM(n, 4).obeys(mask) and NM(n, 4, 0).obeys(mask) and TransposableNM(n, 4).obeys(mask)
    assert TransposableNM(n, 4).obeys(mask.transpose(0, 1))


def test_there_are_90_masks_of_2_4_and_the_best_is_chosen() -> None:
    masks = all_tiles(2, 4)
    assert len(masks) == 90
    scores = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tiles = tiles_of(scores, 4)
    best = (tiles.flatten(1) @ masks.flatten(1).double().T).argmax(1)
    for solver in BEST:
        assert torch.equal(tiles_of(transposable_mask(scores, 2, 4, solver), 4), masks[best])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (2, 5)])
def test_the_optimum_by_brute_force(n: int, m: int) -> None:
    masks = all_tiles(n, m)
    scores = torch.randn(m, 30 * m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    tiles = tiles_of(scores, m)
    best = (tiles.flatten(1) @ masks.flatten(1).double().T).argmax(1)
    for solver in BEST:
        assert torch.equal(tiles_of(transposable_mask(scores, n, m, solver), m), masks[best])


@pytest.mark.parametrize(("n", "m"), [(2, 6), (4, 8), (2, 8), (7, 8), (5, 12), (8, 16), (3, 16), (16, 32), (3, 31)])
def test_the_optimum_by_linear_programming(n: int, m: int) -> None:
    scores = torch.randn(m, 3 * m, generator=torch.Generator().manual_seed(n)).abs()
    for solver in BEST:
        mask = transposable_mask(scores, n, m, solver)
        for tile, kept in zip(tiles_of(scores, m), tiles_of(mask, m), strict=True):
            assert float(tile.double()[kept].sum()) == pytest.approx(optimum(tile, n), rel=1e-6)


@EXACT
@given(data=st.data())
def test_ties_and_signs_of_any_kind_still_give_an_optimum(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 9))
    n = data.draw(st.integers(1, m))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=m * m, max_size=m * m))
    tile = torch.tensor(values, dtype=torch.float32).reshape(m, m)
    for solver in BEST:
        mask = transposable_mask(tile, n, m, solver)
        assert (mask.sum(0) == n).all() and (mask.sum(1) == n).all()
        assert float(tile[mask].sum()) == pytest.approx(optimum(tile, n), abs=1e-6)


@pytest.mark.parametrize("text", ["4:8t", "4:8t-exact", "2:4t-approx", " 16:32T "])
def test_texts(text: str) -> None:
    pattern = parse_pattern(text)
    assert isinstance(pattern, TransposableNM) and parse_pattern(str(pattern)) == pattern
    assert pattern.fixed_sparsity == 0.5


def test_impossible_patterns_are_refused() -> None:
    for n, m in ((5, 4), (0, 4), (1, 33)):
        with pytest.raises(PatternError):
            TransposableNM(n, m)
    with pytest.raises(OptionError, match="did you mean 'exact'"):
        parse_pattern("4:8t-exactly")
    assert transposable_mask(torch.zeros(4, 4), 4, 4).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (8, 12),
            r"fc\.weight \[8, 12\]: 4:8t needs dimension 1 \(12\) .* multiple of 8; use '4:8@0' .*pad it or exclude",
        ),
        ((12, 8, 3, 3), r"dimension 0 \(12\) .* use '4:8' along one dimension"),
        ((3, 5), r"dimension 0 \(3\) and dimension 1 \(5\) to be a multiple of 8; pad it or exclude"),
        ((8,), "2 dimensions"),
        ((0, 8), "empty"),
    ],
)
def test_a_shape_that_does_not_fit_names_layer_shape_and_mend(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(PatternError, match=message):
        TransposableNM(4, 8).project(torch.zeros(shape), 32, "fc.weight")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_name_the_layer(solver: str, bad: float) -> None:
    scores = torch.zeros(8, 16)
    scores[3, 9] = bad
    with pytest.raises(OptionError, match=r"fc\.weight \[8, 16\]: scores hold .* position 57 of 128"):
        TransposableNM(4, 8, solver).project(scores, 32, "fc.weight")


def test_counts_that_no_mask_has_are_refused() -> None:
    with pytest.raises(PatternError, match="keeping 33 in a tile does not obey 4:8t; keep 32"):
        TransposableNM(4, 8).project(torch.zeros(8, 8), 33)
    with pytest.raises(PatternError, match="keeping from 24 to 32 in a tile does not obey 4:8t; keep 32"):
        TransposableNM(4, 8).project(torch.zeros(8, 16), torch.tensor([32, 24]))
    with pytest.raises(OptionError, match=r"keeps 0\.5 of a weight, density 0\.1"):
        TransposableNM(4, 8).keep([8, 8], 0.1)


def test_compliance_looks_at_rows_and_columns() -> None:
    mask = NM(2, 4).project(torch.tensor([[4.0, 3, 2, 1]] * 4), 2)
    assert not TransposableNM(2, 4).obeys(mask)
    assert compliance(mask, "2:4t").obeyed == 0.75  # all rows, and two columns of four


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 36, 24),
        torch.nn.Linear(24, 10),
    )


def test_magnitude_from_end_to_end() -> None:
    net = model()
    dense = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    sparse = rarefy.sparsify(net, "magnitude", pattern="4:8t", exclude="4", optimizer=optimizer)
    for _ in range(3):
        net(torch.randn(4, 8, 8, 8)).square().mean().backward()
        optimizer.step()
    sparse.finalize()
    for name in ("0.weight", "3.weight"):
        weight = net.get_parameter(name)
        expected = transposable_mask(dense[name].abs(), 4, 8)
        assert torch.equal(weight != 0, expected) and not torch.equal(weight, dense[name] * expected)
    assert (net[4].weight != 0).all()


def test_gradual_stages_lie_within_each_other() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    sparse = rarefy.sparsify(
        net,
        "gradual",
        pattern="4:8t",
        exclude="4",
        optimizer=optimizer,
        every=1,
        start=0,
        stop=6,
        total_steps=6,
        curve="linear",
    )
    before, seen = {}, set()
    for _ in range(6):
        net(torch.randn(4, 8, 8, 8)).square().mean().backward()
        optimizer.step()
        for name, layer in sparse.layers.items():
            mask = layer.mask()
            sums = TransposableNM(8, 8).lines(TransposableNM(8, 8).pool(mask))
            assert len(sums.unique()) == 1  # the same number in every row and column of every tile
            seen.add(int(sums[0, 0]))
            assert not (mask & ~before.get(name, mask)).any()
            before[name] = mask
    assert {7, 6, 5, 4} <= seen and all(TransposableNM(4, 8).obeys(mask) for mask in before.values())


def test_random_masks_of_a_single_tile() -> None:
    net = torch.nn.Linear(8, 8)
    sparse = rarefy.sparsify(net, "static", pattern="4:8t", allocation="uniform", sparsity=0.5)
    (layer,) = sparse.layers.values()
    assert TransposableNM(4, 8).obeys(layer.mask()) and layer.nnz == 32


@pytest.mark.parametrize("method", ["set", "rigl", "itop", "lottery-jackpots"])
def test_methods_that_move_single_weights_are_refused(method: str) -> None:
    with pytest.raises(PatternError, match=r"4:8t chooses whole groups at once: .* one by one; use a method"):
        rarefy.methods.make(method, pattern="4:8t")


def test_shapes_that_do_not_fit_leave_the_model_as_it_was() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(PatternError, match=r"4\.weight \[10, 24\]"):
        rarefy.sparsify(net, "magnitude", pattern="4:8t")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
