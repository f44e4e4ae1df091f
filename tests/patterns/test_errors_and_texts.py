"""Counts, texts and the messages of wrong input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.errors import OptionError, PatternError
from rarefy.patterns import NM, PATTERNS, Block, FanIn, FilterGroup, Pattern, Slice, Unstructured, parse_pattern

ALL: list[Pattern] = [
    Unstructured(),
    NM(2, 4),
    Block(2, 2),
    Slice(0),
    Slice(1),
    FanIn(),
    FilterGroup(4),
    FilterGroup(2, taps=True),
]


@given(out=st.integers(1, 40), into=st.integers(1, 40), density=st.floats(0, 1))
def test_keep_follows_the_counting_rule(out: int, into: int, density: float) -> None:
    shape = [out, into]
    assert Unstructured().keep(shape, density) == math.floor(density * out * into + 0.5)
    assert FanIn().keep(shape, density) == math.floor(density * into + 0.5)
    assert Slice(0).keep(shape, density) == math.floor(density * out + 0.5)
    assert Block(1, 1).keep(shape, density) == math.floor(density * out * into + 0.5)


def test_keep_at_the_ends_and_halves() -> None:
    assert [Unstructured().keep([5, 1], d) for d in (0.0, 0.09, 0.1, 0.5, 1.0)] == [0, 0, 1, 3, 5]


def test_nm_has_one_sparsity() -> None:
    assert NM(2, 4).fixed_sparsity == 0.5 and NM(1, 4).fixed_sparsity == 0.75
    assert all(p.fixed_sparsity is None for p in ALL if not isinstance(p, NM))
    assert NM(1, 3).keep([2, 6]) == NM(1, 3).keep([2, 6], 1 - 2 / 3) == 1
    with pytest.raises(OptionError, match=r"2:4 keeps 0\.5 .* density 0\.1 .* sparsity 0\.5"):
        NM(2, 4).keep([4, 4], 0.1)


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(OptionError, match="density"):
        Unstructured().keep([3, 3], density)


def test_a_free_pattern_needs_a_density() -> None:
    with pytest.raises(OptionError, match="fan-in has no density of its own"):
        FanIn().keep([3, 3])


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (NM(2, 4), (10, 301), r"fc\.weight \[10, 301\]: 2:4 needs dimension 1 \(301\) to be a multiple of 4; pad"),
        (NM(2, 4), (8, 3, 3, 3), r"\[8, 3, 3, 3\].* use '2:4@0'"),
        (NM(2, 4, dim=2), (8, 4), r"dimension 2, which this weight lacks; use '2:4'"),
        (Block(4, 3), (6, 7), r"dimension 0 \(6\) .*4 and dimension 1 \(7\) .*3; use '2x1'"),
        (NM(2, 4), (8,), r"fc\.weight \[8\]: 2:4 needs 2 dimensions or more; exclude"),
        (Block(1, 1), (8,), "2 dimensions"),
        (Slice(0), (8,), "2 dimensions"),
        (FanIn(), (8,), "2 dimensions"),
        (Unstructured(), (0, 4), "empty"),
        (Unstructured(), (), r"fc\.weight \[\]: unstructured needs 1"),
        (FanIn(), (4, 0), "empty"),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_names_layer_shape_and_mend(
    pattern: Pattern, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(PatternError, match=message):
        pattern.check(shape, "fc.weight")
    with pytest.raises(PatternError, match=message):
        pattern.project(torch.zeros(shape), 1, name="fc.weight")
    for call in (pattern.units, pattern.unit_size, lambda s: pattern.pool(torch.zeros(s))):
        with pytest.raises(PatternError):
            call(shape)
    with pytest.raises(PatternError):
        pattern.obeys(torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    "build", [lambda: NM(4, 2), lambda: NM(0, 4), lambda: NM(1, 4, -1), lambda: Block(0, 2), lambda: Slice(2)]
)
def test_impossible_patterns_cannot_be_made(build: object) -> None:
    with pytest.raises(PatternError):
        build()  # type: ignore[operator]


def test_impossible_counts_are_refused() -> None:
    w = torch.randn(2, 4)
    for keep in (-1, 9, torch.tensor([9])):
        with pytest.raises(OptionError, match=r"fc\.weight \[2, 4\]: cannot keep (-1|9) of the 8 units"):
            Unstructured().project(w, keep, name="fc.weight")
    with pytest.raises(OptionError, match=r"2 groups here"):
        NM(2, 4).project(w, torch.tensor([1, 2, 1]))
    with pytest.raises(PatternError, match="keeping 3 in a group does not obey 2:4; keep 2"):
        NM(2, 4).project(w, 3)
    with pytest.raises(PatternError, match="one number for all rows"):
        FanIn().project(w, torch.tensor([1, 2]))


def test_nan_scores_name_the_layer() -> None:
    with pytest.raises(OptionError, match=r"fc\.weight \[2, 2\]: .*NaN"):
        Unstructured().project(torch.tensor([[0.0, math.nan], [1.0, 2.0]]), 2, name="fc.weight")


def test_a_mask_is_bool() -> None:
    with pytest.raises(PatternError, match=r"torch\.float32, not bool; pass mask != 0"):
        Unstructured().obeys(torch.ones(2, 2))


def test_expand_wants_one_value_per_unit() -> None:
    with pytest.raises(PatternError, match=r"units \[1, 3\], not \[3\]"):
        Slice(0).expand(torch.ones(3), [3, 4])


@given(
    st.one_of(
        st.sampled_from(ALL),
        st.builds(
            lambda n, extra, dim: NM(n, n + extra, dim), st.integers(1, 16), st.integers(0, 16), st.integers(0, 4)
        ),
        st.builds(Block, st.integers(1, 64), st.integers(1, 64)),
    )
)
def test_texts_round_trip(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(f" {str(pattern).upper()} ") == pattern
    assert parse_pattern(pattern) is pattern
    assert len({pattern, parse_pattern(str(pattern))}) == 1


def test_names_of_the_table_are_read() -> None:
    for text, pattern in PATTERNS.items():
        assert parse_pattern(text) == pattern
    assert parse_pattern("filter") == parse_pattern("channel") == parse_pattern("row") == Slice(0)


@pytest.mark.parametrize(("text", "guess"), [("colum", "column"), ("fanin", "fan-in"), ("unstructerd", "unstructured")])
def test_an_unknown_text_gets_the_nearest_one(text: str, guess: str) -> None:
    with pytest.raises(OptionError, match=f"unknown pattern '{text}' .did you mean '{guess}'"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["", "2:", "2:4@", "2x", "banana", "2:4:6", "-1:4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="unknown pattern"):
        parse_pattern(text)


def test_impossible_texts_are_refused() -> None:
    with pytest.raises(PatternError, match="N <= M"):
        parse_pattern("4:2")
    with pytest.raises(OptionError, match="not 24"):
        parse_pattern(24)  # type: ignore[arg-type]
