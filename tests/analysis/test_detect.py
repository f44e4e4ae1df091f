"""Patterns are found where they are, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.analysis import detect
from rarefy.errors import OptionError
from rarefy.patterns import NM, Block, FanIn, Pattern, Slice, parse_pattern


def drawn(pattern: Pattern | str, shape: tuple[int, ...], density: float, seed: int = 0) -> torch.Tensor:
    pattern = parse_pattern(pattern)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=generator)
    return pattern.project(scores, pattern.keep(shape, None if isinstance(pattern, NM) else density))


@pytest.mark.parametrize("shape", [(48, 64), (32, 48, 3, 3), (48, 32, 5)])
@pytest.mark.parametrize(
    "pattern",
    [
        "2:4",
        "1:2",
        "1:4",
        "3:8",
        "2:4@0",
        "1:16",
        "5:6@0",
        "4x1",
        "1x4",
        "8x2",
        "row",
        "column",
        "fan-in",
        "unstructured",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_of_a_pattern_is_recognised(pattern: str, shape: tuple[int, ...], seed: int) -> None:
    wanted = parse_pattern(pattern)
    if isinstance(wanted, NM) and shape[wanted.dim] % wanted.m:
        pytest.skip("does not divide")
    mask = drawn(pattern, shape, 0.3, seed)
    found = detect(mask * (torch.rand(shape) + 0.5))  # zeros of a weight as of a mask
    assert found.pattern == str(wanted)
    assert found.bits <= found.unstructured_bits + 1e-6


@settings(max_examples=60, deadline=None)
@given(density=st.floats(0.001, 0.999), rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 9999))
def test_random_zeros_are_unstructured(density: float, rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    kept = int(mask.sum())
    expected = "empty" if kept == 0 else "dense" if kept == mask.numel() else "unstructured"
    assert detect(mask).pattern == expected


def test_uneven_rows_are_no_fan_in_and_uneven_layers_no_nm() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(64, 64, generator=generator) < torch.linspace(0.05, 0.6, 64)[:, None]
    assert detect(mask).pattern == "unstructured"
    sparse = torch.rand(512, 512, generator=generator) < 0.004  # hardly ever two in a group of four
    assert detect(sparse).pattern == "unstructured"


def test_kept_weights_that_are_zero_by_themselves_do_not_hide_a_pattern() -> None:
    for pattern in ("2:4", "fan-in"):
        mask = drawn(pattern, (64, 128), 0.25)
        places = mask.nonzero()
        mask[tuple(places[::2000].T)] = False
        assert detect(mask).pattern == pattern


def test_fan_in_with_dead_rows_and_transposed() -> None:
    mask = drawn(FanIn(), (64, 100), 0.2)
    mask[::4] = False
    found = detect(mask)
    assert (found.pattern, found.zero_rows) == ("fan-in", 16)
    assert detect(mask.T).pattern == "fan-out"


def test_transposable_nm_is_both() -> None:
    tiles = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()
    generator = torch.Generator().manual_seed(0)

    def tile() -> torch.Tensor:
        return tiles[torch.randperm(4, generator=generator)][:, torch.randperm(4, generator=generator)]

    rows = [torch.cat([tile() for _ in range(8)], 1) for _ in range(8)]
    found = detect(torch.cat(rows))
    assert {found.pattern, *found.also} == {"2:4", "2:4@0"}


def test_rows_and_columns_and_kernels() -> None:
    mask = torch.ones(32, 48, 3, 3, dtype=torch.bool)
    mask[torch.randperm(32)[:9]] = False
    mask[:, torch.randperm(48)[:20]] = False
    found = detect(mask)
    assert (found.pattern, found.zero_rows, found.zero_columns) == ("row+column", 9, 20)
    kernels = (torch.rand(32, 48, 1, 1, generator=torch.Generator().manual_seed(1)) < 0.3).expand(32, 48, 3, 3)
    assert detect(kernels).pattern == "kernel"


def test_bits_are_the_number_of_masks() -> None:
    mask = drawn(NM(2, 4), (16, 32), 0.5)
    assert detect(mask).bits == pytest.approx(128 * math.log2(6), abs=1e-6)
    assert detect(drawn(Slice(0), (40, 8), 0.5)).bits == pytest.approx(math.log2(math.comb(40, 20)), abs=1e-6)
    assert detect(drawn(Block(4, 2), (40, 8), 0.5)).bits == pytest.approx(math.log2(math.comb(40, 20)), abs=1e-6)


def test_tiny_weights_and_no_weights() -> None:
    assert detect(torch.tensor([[True, False], [False, True]])).pattern == "unstructured"  # no proof in four entries
    assert detect(torch.tensor([[-0.0, 0.0]])).pattern == "empty"
    assert detect(torch.full((2, 2), math.nan)).pattern == "dense"
    for wrong in (torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(OptionError, match="no pattern"):
            detect(wrong)
