"""Solvers of transposable N:M masks: native against PyTorch's, on any layout, thread count and instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import OptionError
from rarefy.kernels import native_config, transposable_nm
from rarefy.kernels.native import native
from rarefy.kernels.transposable import solve_in_torch

SIDES = [
    (1, 2),
    (2, 3),
    (1, 4),
    (2, 4),
    (3, 4),
    (2, 5),
    (3, 7),
    (4, 8),
    (2, 8),
    (6, 8),
    (5, 12),
    (8, 16),
    (3, 16),
    (9, 20),
    (16, 32),
]
SOLVERS = ("fast", "exact", "approx")


def scores(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs().to(dtype)


def lines(mask: torch.Tensor, m: int) -> torch.Tensor:
    """How many each row and each column of each tile keeps."""
    tiles = mask.reshape(mask.shape[0] // m, m, mask.shape[1] // m, m, -1)
    return torch.cat([tiles.sum(1).flatten(), tiles.sum(3).flatten()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), SIDES)
def test_native_finds_what_pytorch_finds(n: int, m: int, dtype: torch.dtype) -> None:
    x = scores(2 * m, 3 * m, 3, seed=n, dtype=dtype)
    for solver in SOLVERS:
        found, expected = transposable_nm(x, n, m, solver), solve_in_torch(x, n, m, solver)
        assert (lines(found, m) == n).all() and (lines(expected, m) == n).all()
        kept, best = x.double()[found].sum(), x.double()[expected].sum()
        if dtype in (torch.float32, torch.float64):  # no two masks are equally good
            assert torch.equal(found, expected), solver
        elif solver != "approx":
            assert float(kept) == pytest.approx(float(best), rel=1e-12)


@pytest.mark.parametrize("isa", native_config()["available"])
@pytest.mark.parametrize(("n", "m"), SIDES)
def test_every_instruction_set_and_thread_count_finds_the_same(isa: str, n: int, m: int) -> None:
    before = native.isa()
    wide = max(2, 96 // m) * m
    x = torch.cat([scores(2 * m, wide, seed=m), scores(m, wide).round(decimals=1), torch.zeros(m, wide)])
    masks = {}
    try:
        for name in (isa, before):
            native.set_isa(name)
            for count in (1, 3):
                for solver in SOLVERS:
                    mask = torch.empty(*x.shape, 1, dtype=torch.uint8)
                    assert native.transposable(x[..., None].numpy(), n, m, solver, mask.numpy(), count)
                    masks.setdefault(solver, []).append(mask)
    finally:
        native.set_isa(before)
    for found in masks.values():
        assert all(torch.equal(mask, found[0]) for mask in found)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_line_is_full_and_nothing_beats_the_optimum(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 12))
    n = data.draw(st.integers(1, m - 1))
    scale = st.sampled_from([0, 0, 0, -145, -20, 100])
    numbers = st.builds(lambda k, e: k * 2.0**e, st.integers(-9, 9) | st.integers(-1000, 1000), scale)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=m * m, max_size=m * m)), dtype=torch.float32).reshape(m, m)
    total = {}
    for solver in SOLVERS:
        mask = transposable_nm(x, n, m, solver)
        assert (lines(mask, m) == n).all()
        total[solver] = math.fsum(x.double()[mask].tolist())
    largest = float(x.abs().max())
    assert total["exact"] >= total["approx"] - 1e-12 * largest
    assert total["exact"] - total["fast"] <= n * m * 2.0**-22 * largest
    assert total["exact"] == pytest.approx(float(x.double()[solve_in_torch(x, n, m)].sum()), abs=1e-12 * largest)


@pytest.mark.parametrize("solver", SOLVERS)
def test_layout_does_not_matter(solver: str) -> None:
    x = scores(16, 24, 9)
    expected = transposable_nm(x, 4, 8, solver)
    for p in range(9):
        assert torch.equal(transposable_nm(x[:, :, p], 4, 8, solver), expected[:, :, p])
    other = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(transposable_nm(other, 4, 8, solver), expected)
    assert expected.is_contiguous()


@pytest.mark.parametrize("solver", ["fast", "exact"])
def test_permuted_tiles_have_permuted_masks_and_scale_does_not_matter(solver: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for n, m in ((2, 4), (4, 8), (8, 16)):
        x = scores(m, m, seed=m)
        rows, columns = torch.randperm(m, generator=generator), torch.randperm(m, generator=generator)
        mask = transposable_nm(x, n, m, solver)
        assert torch.equal(transposable_nm(x[rows][:, columns], n, m, solver), mask[rows][:, columns])
        assert torch.equal(transposable_nm(x.T, n, m, solver), mask.T)
        for scale in (2.0**-100, 3.7, 1e30):
            assert torch.equal(transposable_nm(x * scale, n, m, solver), mask)
        offset = torch.randn(m, 1, generator=generator)  # the same in all of a row: every mask gains as much
        assert torch.equal(transposable_nm(x + offset, n, m, solver), mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32)])
def test_prune_cover_prunes_at_most_twice_the_least(n: int, m: int) -> None:
    for x in (scores(m, 30 * m), scores(m, 30 * m) ** 4, (scores(m, 30 * m) < 0.5).float()):
        for tile in x.split(m, dim=1):
            least = tile.double()[~transposable_nm(tile, n, m, "exact")].sum()
            q = tile.flatten()
            kept, rows, columns = torch.ones(m * m, dtype=torch.bool), [m] * m, [m] * m
            for place in q.argsort(stable=True).tolist():  # the cover itself, before it is filled up again
                i, j = divmod(place, m)
                if rows[i] > n or columns[j] > n:
                    kept[place], rows[i], columns[j] = False, rows[i] - 1, columns[j] - 1
            assert float(q[~kept].double().sum()) <= 2 * float(least) + 1e-9
            assert float(tile.double()[~transposable_nm(tile, n, m, "approx")].sum()) <= 2 * float(least) + 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
def test_minus_infinity_is_kept_only_where_it_must_be(solver: str) -> None:
    for n, m in ((2, 4), (4, 8), (8, 16)):
        allowed = transposable_nm(scores(m, m, seed=1), n + 1, m, "exact")
        x = scores(m, m, seed=2).masked_fill(~allowed, -math.inf)
        mask = transposable_nm(x, n, m, solver)
        assert (lines(mask, m) == n).all()
        if solver != "approx":
            assert not (mask & ~allowed).any()
            assert torch.equal(mask, solve_in_torch(x, n, m))
    row = torch.zeros(4, 4)
    row[2] = -math.inf  # a row that has no choice
    assert (lines(transposable_nm(row, 2, 4, solver), 4) == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_numbers_there_are_count_like_others(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest step of all
    for n, m in ((2, 4), (4, 8), (3, 16), (8, 32)):
        whole = torch.randint(1000, (m, 3 * m), generator=torch.Generator().manual_seed(m)).to(dtype)
        for solver in SOLVERS:
            mask = transposable_nm(whole * tiny, n, m, solver)
            assert float(whole[mask].sum()) == float(whole[transposable_nm(whole, n, m, solver)].sum())


def test_a_tile_in_pytorch_does_not_depend_on_its_neighbours() -> None:
    """Minus infinity takes bits from its own tile alone."""
    fine = 1 + 2.0**-44 * scores(8, 8, dtype=torch.float64)
    forbidden = scores(8, 8, seed=1, dtype=torch.float64)
    forbidden[0, 0] = -math.inf
    both = solve_in_torch(torch.cat([fine, forbidden]), 4, 8)
    assert torch.equal(both, torch.cat([solve_in_torch(tile, 4, 8) for tile in (fine, forbidden)]))
    assert torch.equal(both, transposable_nm(torch.cat([fine, forbidden]), 4, 8, "exact"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 8)])
def test_what_is_no_number_is_named(n: int, m: int, bad: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        for place in (0, 70, 127):
            x = scores(8, 16, dtype=dtype)
            x.view(-1)[place] = bad
            for solver in SOLVERS:
                with pytest.raises(OptionError, match=f"position {place} of 128"):
                    transposable_nm(x, n, m, solver)


def test_wrong_calls_are_refused() -> None:
    for call in (
        lambda: transposable_nm(torch.zeros(8, 8), 2, 4, "best"),
        lambda: transposable_nm(torch.zeros(8, 8), 5, 4),
        lambda: transposable_nm(torch.zeros(66, 66), 4, 33),
        lambda: transposable_nm(torch.zeros(8, 6), 2, 4),
        lambda: transposable_nm(torch.zeros(8), 2, 4),
        lambda: transposable_nm(torch.zeros(8, 8, dtype=torch.int64), 2, 4),
    ):
        with pytest.raises(OptionError):
            call()
    assert transposable_nm(torch.zeros(0, 8), 2, 4).shape == (0, 8)
    assert not transposable_nm(torch.ones(8, 8), 0, 4).any() and transposable_nm(torch.ones(8, 8), 4, 4).all()
