"""The scheduler: it takes the best of all mappings, none gains more than it saves, and bytes are those of the loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.systems.sat import Accelerator, Gemm, Mapping, cycles
from rarefy.systems.sat.memory import ORDERS, Widths, traffic
from rarefy.systems.sat.pregeneration import Weights
from rarefy.systems.sat.schedule import best, mappings
from rarefy.systems.sat.timing import tiles

sizes = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 70), st.integers(1, 3))
arrays = st.builds(
    Accelerator, rows=st.integers(1, 33), columns=st.integers(1, 33), interleave=st.integers(4, 6),
    adder_latency=st.integers(1, 4), pipeline=st.integers(4, 9), window=st.just(16),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(sizes, arrays, st.sampled_from((2, 4, 8, 16)), st.data())
def test_pruning_gains_no_more_than_it_saves(size: Any, array: Accelerator, m: int, data: Any) -> None:
    """For every mapping of the sparse product there is a dense one at most m / n times as slow; so also for the best."""
    n = data.draw(st.integers(1, m - 1))
    p, k, q, groups = size
    sparse, dense = Gemm("FF", p, k * m, q, groups, n, m), Gemm("FF", p, k * m, q, groups)
    fastest = min(cycles(dense, mapping, array) for mapping in mappings(dense, array))
    for mapping in mappings(sparse, array):
        took = cycles(sparse, mapping, array)
        assert fastest * n <= took * m
        assert sparse.macs <= took * array.rows * array.columns
    more = Gemm("FF", p, k * m, q, groups, n + 1, m)
    if n + 1 < m:
        assert all(cycles(sparse, mapping, array) <= cycles(more, mapping, array) for mapping in mappings(more, array))


@settings(max_examples=40, deadline=None)
@given(sizes, arrays, st.floats(0.1, 100), st.sampled_from(((1, 1), (2, 8), (1, 4))), st.sampled_from((1, 8, 1024)))
def test_the_scheduler_takes_the_best_of_all(
    size: Any, array: Accelerator, bandwidth: float, nm: Any, buffer: int
) -> None:
    array = array.changed(bandwidth=bandwidth, row_buffer=buffer, column_buffer=buffer, output_buffer=buffer)
    p, k, q, groups = size
    k *= nm[1]
    gemm = Gemm("FF", p, k, q, groups, *nm, groups * p * k, groups * k * q, groups * p * q)
    chosen = best("x", "linear", gemm, Weights(2.0), 2.0, array)
    assert chosen.mapping is not None and chosen.order is not None
    times = []
    for depth, held, flow in itertools.product(range(1, array.interleave + 1), (1, 2, 4, 8, 16), ("output", "weight")):
        if held > 1 and (flow == "output" or held * nm[1] > 16):
            continue
        mapping = Mapping(flow, depth, held)  # type: ignore[arg-type]
        for order in ORDERS[flow]:
            memory = traffic(gemm, mapping, order, array, Widths()).total / array.bytes_per_cycle
            times.append(max(cycles(gemm, mapping, array), math.ceil(memory)))
    assert chosen.cycles == min(times)
    least = 2.0 * (gemm.left + gemm.right + gemm.out)
    assert chosen.bytes >= least * (1 - 1e-12)
    if buffer == 1024:
        assert chosen.bytes == pytest.approx(least)  # everything fits


@settings(max_examples=60, deadline=None)
@given(sizes, arrays, st.integers(1, 64), st.integers(1, 64), st.sampled_from(("rows", "columns")))
def test_output_stationary_traffic_is_that_of_the_loops(
    size: Any, array: Accelerator, row_kib: int, column_kib: int, order: Any
) -> None:
    """Walk the tiles with two buffers: a block of outer tiles stays, the inner factor goes by, or stays if all of it fits."""
    p, k, q, _ = size
    gemm = Gemm("FF", p, 37 * k, q, 1, 1, 1, p * 37 * k, 37 * k * q, p * q)
    array = array.changed(row_buffer=row_kib, column_buffer=column_kib)
    mapping = Mapping("output", 2)
    cut = tiles(gemm, mapping, array)
    sides = {
        "rows": (2 * gemm.left, cut.rows, row_kib * 512),
        "columns": (2 * gemm.right, cut.columns, column_kib * 512),
    }
    outer, (inner,) = sides[order], (side for name, side in sides.items() if name != order)
    tile, inner_tile = outer[0] / outer[1], inner[0] / inner[1]
    fitting, read, inner_read, i = int(outer[2] // tile), 0.0, 0.0, 0
    while i < outer[1]:
        block = min(max(1, fitting), outer[1] - i)
        read += block * tile * (1 if fitting or inner[1] == 1 else inner[1])
        if i == 0 or inner[0] > inner[2]:
            inner_read += inner_tile * inner[1]
        i += block
    found = traffic(gemm, mapping, order, array, Widths())
    assert (found.left, found.right) == pytest.approx((read, inner_read) if order == "rows" else (inner_read, read))
    assert found.sums == 0


def test_weight_stationary_sums_go_to_memory_only_where_they_must() -> None:
    array = Accelerator(rows=8, columns=8, window=8, output_buffer=1, row_buffer=1)
    gemm = Gemm("FF", 64, 256, 32, 1, 2, 8, 64 * 256, 256 * 32, 64 * 32)
    mapping = Mapping("weight", 4, 1)
    assert tiles(gemm, mapping, array) == (1, 4, 4)
    bad = traffic(gemm, mapping, "columns", array, Widths())
    assert bad.sums == 2 * 4 * 3 * 64 * 32  # three further slices, read and written in FP32
    assert bad.left == 2 * gemm.left * 4 and bad.right == 2 * gemm.right
    enough = traffic(gemm, mapping, "columns", array.changed(output_buffer=2), Widths())
    assert enough.sums == 0  # 64 rows of 8 columns wait: 2 KiB
    wide = array.changed(output_buffer=8, row_buffer=16)
    good = traffic(gemm, mapping, "reduction", wide, Widths())
    assert (good.left, good.sums) == (2 * gemm.left, 0)
    assert traffic(gemm, mapping, "reduction", wide.changed(output_buffer=7), Widths()).sums == bad.sums
