"""Whole networks in one call: memory plans, order, threads, and what the pool's threads do meanwhile."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import planes
from rarefy.kernels.native import native
from rarefy.kernels.program import Buffer, Program, ProgramBuilder

intervals = st.lists(
    st.tuples(st.integers(0, 100), st.integers(0, 12), st.integers(0, 6)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=25,
)


@given(intervals)
def test_what_lives_together_lies_apart(intervals: list[tuple[int, int, int]]) -> None:
    *at, room = native.place(intervals)
    for i, (n, first, last) in enumerate(intervals):
        assert at[i] % 16 == 0 and at[i] + n <= room
        for j, (m, begin, end) in enumerate(intervals[:i]):
            if n and m and begin <= last and first <= end:
                assert at[i] + n <= at[j] or at[j] + m <= at[i]
    busiest = max((sum(-(-n // 16) * 16 for n, a, b in intervals if a <= t <= b) for t in range(20)), default=0)
    assert busiest <= room <= max(1, sum(-(-n // 16) * 16 for n, _, _ in intervals))


def random_net(seed: int) -> tuple[Program, list[Tensor], list[Tensor]]:
    """A random graph of cheap layers over planes and, behind them, features, with what torch makes of it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    side = rng.choice((6, 6, 96))  # large planes go through a few samples at a time
    build, shape, n, batch = ProgramBuilder(), (4, side, side), 4 * side * side, rng.choice((1, 2, 3, 5))
    values: list[tuple[Buffer, Tensor]] = []
    inputs = [torch.randn(batch, *shape) for _ in range(rng.choice((1, 2)))]
    for x in inputs:
        buffer = build.input(shape)
        values.append((build.add(planes.activation(n, "silu"), buffer), F.silu(x)))
        values.append((buffer, x))
    for _ in range(rng.randint(1, 14)):
        (a, x), (b, y) = rng.choice(values[-4:]), rng.choice(values)
        match rng.choice(("add", "multiply", "act", "depthwise", "pool", "scale", "concat")):
            case "add":
                values.append((build.add(planes.add(n, "relu"), a, b), F.relu(x + y)))
            case "multiply":
                values.append((build.add(planes.multiply(n), a, b), x * y))
            case "act":
                values.append((build.add(planes.activation(n, "hardswish"), a), F.hardswish(x)))
            case "depthwise":
                w = torch.randn(4, 1, 3, 3) / 3
                layer = planes.depthwise(w, None, side, padding=1, residual=True)
                values.append((build.add(layer, a, b), F.conv2d(x, w, None, 1, 1, 1, 4) + y))
            case "pool":
                layer = planes.max_pool(4, side, 3, stride=1, padding=1)
                values.append((build.add(layer, a), F.max_pool2d(x, 3, 1, 1)))
            case "scale":
                pooled = build.add(planes.adaptive_avg_pool(4, side), b, shape=(4, 1, 1))
                means = y.mean((2, 3), keepdim=True)
                values.append((build.add(planes.scale_channels(4, side), a, pooled), x * means))
            case "concat":
                joined = build.add(planes.concat([n, n]), a, b, shape=(8, side, side))
                layer = planes.narrow(2 * n, n // 2, n // 2 + n)
                values.append((build.add(layer, joined, shape=shape), torch.cat([x, y], 1)[:, 2:6]))
    small = []
    for a, x in rng.sample(values, min(len(values), 3)):
        small.append((build.add(planes.adaptive_avg_pool(4, side), a, shape=(4,)), x.mean((2, 3))))
    for _ in range(rng.randint(0, 4)):
        (a, x), (b, y) = rng.choice(small), rng.choice(small)
        small.append((build.add(planes.add(4, "silu"), a, b), F.silu(x + y)))
    values += small
    chosen = rng.sample(values, min(len(values), rng.choice((1, 2, 3))))
    chosen += rng.choices(chosen, k=rng.choice((0, 0, 1)))
    return build.program(*(b for b, _ in chosen)), inputs, [t for _, t in chosen]


@pytest.mark.parametrize("seed", range(60))
def test_random_networks_equal_torch_and_read_nothing_that_is_gone(seed: int) -> None:
    program, inputs, expected = random_net(seed)
    before = [x.clone() for x in inputs]
    for threads in (1, 2):
        got = [torch.empty_like(e) for e in expected]
        arrays = [x.numpy() for x in inputs], [y.numpy() for y in got]
        program.native.run(*arrays, inputs[0].shape[0], threads, poison=True)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5 * float(e.abs().max().clamp(min=1)))
    for x, was in zip(inputs, before, strict=True):
        assert torch.equal(x, was), "an input was changed"


def chain(length: int) -> Program:
    build = ProgramBuilder()
    x = build.input((8, 16, 16))
    for _ in range(length):
        x = build.add(planes.depthwise(torch.ones(8, 1, 3, 3) / 9, None, 16, padding=1), x)
    return build.program(x)


def test_a_chain_needs_two_buffers_however_long() -> None:
    assert chain(12).arena_bytes(3) == 2 * 3 * 8 * 16 * 16 * 4


def test_large_planes_go_through_a_few_samples_at_a_time() -> None:
    build = ProgramBuilder()
    x = build.input((8, 128, 128))
    for _ in range(3):
        x = build.add(planes.max_pool(8, 128, 1), x)
    program = build.program(build.add(planes.adaptive_avg_pool(8, 128), x, shape=(8,)))
    one = 2 * 8 * 128 * 128 * 4
    torch.set_num_threads(1)
    assert program.arena_bytes(1) == program.arena_bytes(7) == one
    torch.set_num_threads(2)
    assert program.arena_bytes(7) == 2 * one
    torch.set_num_threads(1)


def test_in_place_layers_need_no_room_of_their_own() -> None:
    build = ProgramBuilder()
    x = build.add(planes.max_pool(8, 16, 1), build.input((8, 16, 16)))
    for _ in range(5):
        x = build.add(planes.activation(2048, "relu"), x)
    program = build.program(build.add(planes.max_pool(8, 16, 1), x))
    assert program.arena_bytes(1) == 2048 * 4


def test_any_batch_size_from_several_callers() -> None:
    program = chain(4)
    xs = [torch.randn(b, 8, 16, 16) for b in (1, 5, 2, 0, 7)]
    alone = [program(x)[0] for x in xs]
    results: dict[int, list[Tensor]] = {}

    def call(me: int) -> None:
        results[me] = [program(x)[0] for x in xs * 3]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for c in callers:
        c.start()
    for c in callers:
        c.join(60)
    for got in results.values():
        assert len(results) == 4 and all(torch.equal(g, a) for g, a in zip(got, alone * 3, strict=True))


def test_profile_names_every_step() -> None:
    profile = chain(3).profile(torch.randn(1, 8, 16, 16), repeats=3)
    assert [name for name, _ in profile] == ["Depthwise"] * 3 and all(t > 0 for _, t in profile)


def test_wrong_programs_are_told() -> None:
    build = ProgramBuilder()
    x = build.input((4, 2, 2))
    with pytest.raises(OptionError, match="input 0 has shape"):
        build.add(planes.activation(5, "relu"), x, shape=(5,))
    with pytest.raises(OptionError, match="not shape"):
        build.add(planes.activation(16, "relu"), x, shape=(5,))
    with pytest.raises(OptionError, match="cannot be reshaped"):
        build.reshape(x, (3,))
    y = build.add(planes.activation(16, "relu"), build.reshape(x, (16,)))
    program = build.program(y)
    with pytest.raises(OptionError, match="takes 1 inputs, not 2"):
        program(torch.zeros(1, 4, 2, 2), torch.zeros(1))
    with pytest.raises(OptionError, match="of shape \\[batch, 4, 2, 2\\]"):
        program(torch.zeros(1, 4, 2, 3))
    with pytest.raises(OptionError, match="of shape \\[batch"):
        program(torch.zeros(1, 4, 2, 2, dtype=torch.float64))
    layer = planes.activation(16, "relu")
    for steps, inputs, outputs, message in [
        ([(layer, [1], 2)], [0], [2], "without gaps"),
        ([(layer, [1], 1)], [0], [1], "before it is written"),
        ([(layer, [0], 0)], [0], [0], "already written"),
        ([(layer, [0, 0], 1)], [0], [1], "another number of inputs"),
        ([(layer, [0], 1)], [0], [2], "an output is never written"),
        ([(layer, [0], 2)], [0, 1], [2], "an input is never read"),
        ([(layer, [0], 1), (planes.softmax(3), [1], 2)], [0], [2], "step 1: input 0 has 16 floats"),
    ]:
        with pytest.raises(ValueError, match=message):
            native.Program(steps, inputs, outputs)


def test_idle_workers_sleep() -> None:
    build = ProgramBuilder()
    x = build.input((64, 56, 56))
    program = build.program(build.add(planes.activation(64 * 56 * 56, "silu"), x))
    out = torch.empty(1, 64, 56, 56)
    for _ in range(3):
        program.native.run([out.numpy()], [out.numpy()], 1, 2)
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05, "somebody spins while there is nothing to do"
