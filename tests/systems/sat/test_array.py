"""The array run register by register: right results, the formula's cycles, and hazards where the schedule is too fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rarefy.errors import OptionError, PatternError
from rarefy.patterns import NM
from rarefy.systems.sat import Accelerator, Gemm, Mapping, bytes_per_weight, cycles, pack, run_array
from rarefy.systems.sat.array import Hazard
from rarefy.systems.sat.pregeneration import bp_matrix, ff_matrix, update_weights
from rarefy.systems.sat.timing import beat, tiles


def one_by_one(left: Any, right: Any) -> Any:
    """FP16 products, added in FP32 along the reduction, one after the other; zeros included."""
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        total += left[:, k : k + 1].astype(np.float32) * right[k : k + 1].astype(np.float32)
    return total


def half(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float16)


@st.composite
def cases(draw: Any) -> tuple[Any, Any, Any, Gemm, Mapping, Accelerator]:
    latency = draw(st.integers(1, 5))
    array = Accelerator(
        rows=draw(st.integers(1, 8)), columns=draw(st.integers(1, 8)), interleave=4, adder_latency=latency,
        pipeline=latency - 1 + draw(st.integers(0, 4)), window=16,
    )  # fmt: skip
    m = draw(st.sampled_from((1, 2, 4, 8)))
    n = draw(st.integers(1, m))
    p, k, q = draw(st.integers(1, 18)), m * draw(st.integers(1, 24 // m)), draw(st.integers(1, 12))
    flow = draw(st.sampled_from(("output", "weight")))
    mapping = Mapping(flow, draw(st.integers(1, 4)), draw(st.integers(1, 2)) if flow == "weight" else 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    left, packed = half(rng, p, k), pack(half(rng, k, q), n, m)
    return left, packed, packed.unpack(), Gemm("FF", p, k, q, n=n, m=m), mapping, array


@settings(max_examples=60, deadline=None)
@given(cases())
def test_results_are_numpys_and_cycles_the_formulas(case: tuple[Any, Any, Any, Gemm, Mapping, Accelerator]) -> None:
    left, packed, masked, gemm, mapping, array = case
    done = run_array(left, packed, mapping, array)
    assert done.cycles == cycles(gemm, mapping, array)
    expected = left.astype(np.float64) @ masked.astype(np.float64)
    np.testing.assert_allclose(done.result, expected, atol=2e-4, rtol=1e-5)
    if tiles(gemm, mapping, array).reduction == 1:  # else slices are added up in another order
        assert np.array_equal(done.result, one_by_one(left, masked))
    if gemm.n == gemm.m and mapping.held == 1 and mapping.dataflow == "output":
        dense = run_array(left, masked, mapping, array)
        assert np.array_equal(dense.result, done.result) and dense.cycles == done.cycles


@pytest.mark.parametrize(("rows", "columns", "reduction"), [(1, 1, 1), (4, 4, 4), (8, 3, 17), (2, 8, 5), (8, 8, 8)])
def test_one_tile_takes_the_textbooks_cycles(rows: int, columns: int, reduction: int) -> None:
    """SCALE-Sim's 2 R + C + K - 2, by formula and by running it."""
    array = Accelerator(rows=rows, columns=columns, interleave=1, adder_latency=1, pipeline=0)
    rng = np.random.default_rng(0)
    left, right = half(rng, rows, reduction), half(rng, reduction, columns)
    done = run_array(left, right, Mapping("output"), array)
    assert done.cycles == 2 * rows + columns + reduction - 2
    assert cycles(Gemm("FF", rows, reduction, columns), Mapping("output"), array) == done.cycles


def test_the_method_sheets_output_stationary_formula() -> None:
    """ceil(P/(R I)) ceil(Q/C) I ceil(K/M) g a + (R + C - 2) + L + R, where a tile is no shorter than R."""
    for depth, latency in ((1, 4), (2, 4), (4, 4), (4, 2)):
        array = Accelerator(rows=8, columns=4, interleave=4, adder_latency=latency, pipeline=9)
        stall = max(1, latency / depth)
        for n, m in ((2, 8), (8, 8), (1, 4)):
            gemm = Gemm("FF", 100, 128, 30, n=n, m=m)
            expected = -(-100 // (8 * depth)) * 8 * depth * (128 // m) * n * stall + (8 + 4 - 2) + 9 + 8
            assert cycles(gemm, Mapping("output", depth), array) == expected


def test_without_interleaving_sums_wait_for_themselves() -> None:
    array = Accelerator()
    gemm = Gemm("FF", 4096, 512, 512, n=2, m=8)
    slow, fast = (cycles(gemm, Mapping("output", depth), array) for depth in (1, 4))
    assert slow / fast == pytest.approx(4, rel=0.01)
    single = Gemm("FF", 4096, 512, 512, n=1, m=8)  # a held weight for each sum: nothing waits
    assert cycles(single, Mapping("weight", 1), array) == cycles(single, Mapping("weight", 4), array)


@pytest.mark.parametrize("flow", ["output", "weight"])
def test_a_schedule_that_does_not_wait_for_the_adder_is_a_hazard(flow: Any) -> None:
    array = Accelerator(rows=2, columns=2, interleave=2, adder_latency=4, pipeline=4)
    rng = np.random.default_rng(1)
    left, right, mapping = half(rng, 4, 8), pack(half(rng, 8, 2), 2, 4), Mapping(flow, 2, 1)
    gemm = Gemm("FF", 4, 8, 2, n=2, m=4)
    good = beat(gemm, mapping, array)
    assert run_array(left, right, mapping, array, good).cycles == cycles(gemm, mapping, array)
    hasty = good._replace(step=2, tile=good.tile // 2)
    with pytest.raises(Hazard, match="before its last sum is there"):
        run_array(left, right, mapping, array, hasty)


def test_other_hazards_are_seen() -> None:
    rng = np.random.default_rng(2)
    array = Accelerator(rows=4, columns=2, interleave=1, adder_latency=1, pipeline=0)
    left, right = half(rng, 8, 2), half(rng, 2, 2)  # tiles of 2 cycles, results need 4 to leave
    gemm = Gemm("FF", 8, 2, 2)
    good = beat(gemm, Mapping("output"), array)
    assert (good.tile, good.spacing) == (2, 4)
    with pytest.raises(Hazard, match="drain register"):
        run_array(left, right, Mapping("output"), array, good._replace(spacing=2))
    with pytest.raises(Hazard, match="different times"):
        run_array(left, right, Mapping("output"), array, good._replace(skew=2))
    array = Accelerator(rows=2, columns=2, interleave=1, adder_latency=3, pipeline=3)
    left, right, gemm = half(rng, 3, 8), half(rng, 8, 2), Gemm("FF", 3, 8, 2)
    good = beat(gemm, Mapping("weight"), array)
    with pytest.raises(Hazard, match="has not finished"):
        run_array(left, right, Mapping("weight"), array, good._replace(skew=2))
    with pytest.raises(Hazard, match="does not hold its weights"):
        run_array(left, right, Mapping("weight"), array, good._replace(spacing=good.tile))


def test_what_the_array_cannot_do_is_refused() -> None:
    array, ones = Accelerator(rows=2, columns=2, window=4), np.ones((2, 8), np.float16)
    with pytest.raises(OptionError, match="left has 8 columns, right 4 rows"):
        run_array(ones, np.ones((4, 2), np.float16), Mapping("output"), array)
    with pytest.raises(OptionError, match="4 accumulators"):
        run_array(ones, ones.T, Mapping("output", 5), array)
    with pytest.raises(OptionError, match="window 4"):
        run_array(ones, pack(ones.T, 2, 8), Mapping("output"), array)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from((2, 4, 8, 16)), st.integers(1, 5), st.data())
def test_packing_loses_nothing_but_the_smallest(groups: int, m: int, columns: int, data: Any) -> None:
    n = data.draw(st.integers(1, m))
    matrix = half(np.random.default_rng(data.draw(st.integers(0, 2**32))), groups * m, columns)
    packed = pack(matrix, n, m)
    mask = NM(n, m, dim=0).project(torch.from_numpy(matrix.astype(np.float32)).abs(), keep=n).numpy()
    assert np.array_equal(packed.unpack(), np.where(mask, matrix, np.float16(0)))
    assert packed.values.shape == (groups, n, columns) == packed.places.shape
    assert (np.diff(packed.places.astype(int), axis=1) > 0).all()
    exact = bytes_per_weight(n, m) * matrix.size if n < m else None
    if exact is not None:
        assert exact <= packed.bytes < exact + 1  # whole bytes


def test_packed_bytes_of_the_method_sheet() -> None:
    assert bytes_per_weight(2, 8) == pytest.approx(0.594, abs=5e-4)
    assert bytes_per_weight(2, 4) == 1.125
    assert bytes_per_weight(4, 4) == 2.0
    with pytest.raises(PatternError, match="does not fit 6 rows"):
        pack(np.ones((6, 2), np.float16), 2, 4)


def test_a_training_step_of_a_convolution_through_the_array() -> None:
    """FF with Wf, BP with Wb, WU dense, update and new copies, against torch; Wf and Wb are pruned apart."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((8, 4, 3, 3)).astype(np.float16).astype(np.float32)
    x, dy = half(rng, 2, 4, 5, 5), half(rng, 2, 8, 5, 5)
    forward, backward = pack(ff_matrix(weight), 2, 4), pack(bp_matrix(weight), 2, 4)
    w = torch.from_numpy(weight)
    wf = w * NM(2, 4, dim=1).project(w.abs(), keep=2)
    wb = w * NM(2, 4, dim=0).project(w.abs(), keep=2)
    assert not torch.equal(wf, wb)
    assert np.array_equal(forward.unpack(), ff_matrix(wf.numpy())) and np.array_equal(
        backward.unpack(), bp_matrix(wb.numpy())
    )

    def patches(t: Any, flip: bool = False) -> Any:  # [pixels, kernel * channels]
        unfolded = functional.unfold(torch.from_numpy(t.astype(np.float32)), 3, padding=1)
        cut = unfolded.unflatten(1, (t.shape[1], 9)).permute(0, 3, 2, 1)
        return (cut.flip(2) if flip else cut).reshape(-1, 9 * t.shape[1]).numpy().astype(np.float16)

    def pixels(t: Any) -> Any:
        return np.moveaxis(t, 1, -1).reshape(-1, t.shape[1])

    array = Accelerator(rows=8, columns=8, interleave=4, adder_latency=4)
    xt, dyt = (torch.from_numpy(t.astype(np.float32)) for t in (x, dy))
    y = run_array(patches(x), forward, Mapping("output", 4), array)
    np.testing.assert_allclose(y.result, pixels(functional.conv2d(xt, wf, padding=1).numpy()), atol=1e-4)
    dx = run_array(patches(dy, flip=True), backward, Mapping("weight", 4, 2), array)
    np.testing.assert_allclose(dx.result, pixels(functional.conv_transpose2d(dyt, wb, padding=1).numpy()), atol=1e-4)
    dw = run_array(np.ascontiguousarray(patches(x).T), pixels(dy), Mapping("output", 4), array)
    expected = torch.nn.grad.conv2d_weight(xt, (8, 4, 3, 3), dyt, padding=1)
    np.testing.assert_allclose(dw.result, ff_matrix(expected.numpy()), atol=2e-4)

    p = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=1e-2)
    master, momentum = weight, np.zeros_like(weight)
    for _ in range(3):
        p.grad = expected.clone()
        optimizer.step()
        done = update_weights(master, momentum, expected.numpy(), lr=0.1, mu=0.9, decay=1e-2, n=2, m=4)
        master, momentum = done.weight, done.momentum
    np.testing.assert_allclose(master, p.detach().numpy(), rtol=3e-7, atol=1e-6)
    new = torch.from_numpy(master.astype(np.float16).astype(np.float32))
    assert np.array_equal(done.forward.unpack(), ff_matrix((new * NM(2, 4).project(new.abs(), keep=2)).numpy()))
    assert np.array_equal(done.backward.unpack(), bp_matrix((new * NM(2, 4, 0).project(new.abs(), keep=2)).numpy()))
