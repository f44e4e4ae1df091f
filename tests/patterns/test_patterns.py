"""Every pattern against brute force: the definitions written out, over all masks of small weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.patterns import NM, Block, FanIn, FilterGroup, Pattern, Slice, Unstructured

EXACT = settings(max_examples=30, deadline=None)

# At most 12 weights each, so that all 2**12 masks can be looked at.
SMALL: list[tuple[Pattern, tuple[int, ...]]] = [
    (Unstructured(), (7,)),
    (Unstructured(), (3, 4)),
    (Unstructured(), (2, 3, 2)),
    (NM(2, 4), (3, 4)),
    (NM(1, 2), (2, 4)),
    (NM(1, 3), (2, 6)),
    (NM(2, 3, dim=0), (6, 2)),
    (NM(1, 2, dim=0), (4, 3)),
    (NM(1, 2), (2, 2, 3)),
    (NM(1, 2), (1, 4, 1, 2)),
    (NM(2, 3, dim=2), (2, 2, 3)),
    (NM(3, 3), (2, 3)),
    (Block(2, 1), (4, 3)),
    (Block(2, 2), (2, 6)),
    (Block(1, 2), (2, 2, 3)),
    (Block(2, 1), (2, 2, 1, 3)),
    (Block(1, 1), (3, 4)),
    (Slice(0), (4, 3)),
    (Slice(1), (3, 4)),
    (Slice(0), (3, 2, 2)),
    (Slice(1), (2, 3, 1, 2)),
    (FanIn(), (3, 4)),
    (FanIn(), (2, 3, 2)),
    (FilterGroup(2), (4, 3)),
    (FilterGroup(3), (3, 4)),
    (FilterGroup(2), (2, 3, 2)),
    (FilterGroup(2, taps=True), (4, 1, 3)),
    (FilterGroup(8), (2, 4)),
]
LARGER: list[tuple[Pattern, tuple[int, ...]]] = [
    (Unstructured(), (5, 7, 3, 3)),
    (NM(2, 4), (6, 8)),
    (NM(2, 4), (5, 8, 3)),
    (NM(2, 4, dim=0), (8, 3, 3, 3)),
    (NM(1, 4), (2, 4, 2, 3, 2)),
    (Block(2, 3), (4, 6)),
    (Block(2, 4), (4, 8, 3, 3)),
    (Slice(0), (5, 4, 3, 3)),
    (Slice(1), (5, 4, 2, 3, 2)),
    (FanIn(), (5, 4, 3)),
    (FilterGroup(4), (8, 6)),
    (FilterGroup(4), (8, 3, 3, 3)),
    (FilterGroup(2, taps=True), (6, 4, 2, 3)),
]


def label(case: object) -> str:
    return str(case)


def all_masks(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    for bits in itertools.product((False, True), repeat=math.prod(shape)):
        yield torch.tensor(bits).reshape(shape)


def obeys_by_definition(pattern: Pattern, mask: torch.Tensor) -> bool:
    """What each pattern allows, in loops over positions."""
    match pattern:
        case Unstructured():
            return True
        case NM(n, m, dim):
            lines = mask.movedim(dim, -1).reshape(-1, mask.shape[dim]).tolist()
            return all(sum(line[i : i + m]) <= n for line in lines for i in range(0, len(line), m))
        case Block(rows, cols):
            flat = mask.reshape(*mask.shape[:2], -1)
            blocks = [
                flat[i : i + rows, j : j + cols, p].flatten().tolist()
                for i in range(0, flat.shape[0], rows)
                for j in range(0, flat.shape[1], cols)
                for p in range(flat.shape[2])
            ]
            return all(len(set(block)) == 1 for block in blocks)
        case Slice(dim):
            return all(len(set(part.flatten().tolist())) == 1 for part in mask.unbind(dim))
        case FilterGroup(size, taps):
            flat = mask.reshape(*mask.shape[:2], -1)
            kept = []
            for i in range(0, flat.shape[0], size):
                part = flat[i : i + size]
                units = [part[:, c, t] for c in range(part.shape[1]) for t in range(part.shape[2])]
                if not taps:
                    units = [part[:, c] for c in range(part.shape[1])]
                if any(len(set(unit.flatten().tolist())) > 1 for unit in units):
                    return False
                kept.append(sum(bool(unit.any()) for unit in units))
            return len(set(kept)) == 1
        case FanIn():
            return len({sum(row.flatten().tolist()) for row in mask}) == 1
    raise AssertionError(pattern)


def group_labels(pattern: Pattern, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The group and the unit number of every weight."""
    groups, units = pattern.units(shape)
    group = pattern.expand(torch.arange(groups)[:, None].expand(groups, units), shape)
    unit = pattern.expand(torch.arange(units)[None, :].expand(groups, units), shape)
    return group, unit


@pytest.mark.parametrize(("pattern", "shape"), SMALL, ids=label)
def test_obeys_agrees_with_the_definition_on_every_mask(pattern: Pattern, shape: tuple[int, ...]) -> None:
    masks: Iterator[torch.Tensor] = all_masks(shape)
    if math.prod(shape) > 8:
        masks = (torch.rand(shape) < p for p in (0.2, 0.5, 0.9) for _ in range(100))
    for mask in masks:
        assert pattern.obeys(mask) == obeys_by_definition(pattern, mask), mask
    assert pattern.obeys(torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize(("pattern", "shape"), SMALL, ids=label)
def test_project_is_the_best_of_all_masks_that_obey(pattern: Pattern, shape: tuple[int, ...]) -> None:
    groups, units = pattern.units(shape)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    group, _ = group_labels(pattern, shape)
    per_group = pattern.unit_size(shape)
    bits = torch.tensor(list(itertools.product((0, 1), repeat=math.prod(shape))), dtype=torch.float64)
    counts = torch.stack([bits[:, (group == g).flatten()].sum(1) for g in range(groups)], dim=1)
    sums = bits @ scores.flatten()
    for keep in range((pattern.n if isinstance(pattern, NM) else units) + 1):
        mask = pattern.project(scores, keep)
        assert mask.dtype == torch.bool and mask.shape == scores.shape
        assert obeys_by_definition(pattern, mask)
        candidates = sums.masked_fill((counts != keep * per_group).any(1), -math.inf)
        for best in candidates.argsort(descending=True).tolist():
            if obeys_by_definition(pattern, bits[best].bool().reshape(shape)):
                break
        assert scores[mask].sum().item() == pytest.approx(candidates[best].item(), abs=1e-12)
        assert torch.equal(pattern.pool(mask).sum(1), torch.full((groups,), keep * per_group))


@EXACT
@given(case=st.sampled_from(SMALL + LARGER), data=st.data())
def test_ties_go_to_the_lowest_unit(case: tuple[Pattern, tuple[int, ...]], data: st.DataObject) -> None:
    pattern, shape = case
    size = math.prod(shape)
    values = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    scores = torch.tensor(values, dtype=torch.float32).reshape(shape)
    _, units = pattern.units(shape)
    keep = data.draw(st.integers(0, pattern.n if isinstance(pattern, NM) else units))
    chosen = pattern.pool(pattern.project(scores, keep)) > 0
    for row, kept in zip(pattern.pool(scores).tolist(), chosen.tolist(), strict=True):
        expected = set(sorted(range(units), key=lambda u: (-row[u], u))[:keep])
        assert {u for u in range(units) if kept[u]} == expected


@pytest.mark.parametrize(("pattern", "shape"), SMALL + LARGER, ids=label)
def test_pool_and_expand_are_adjoint_and_inverse(pattern: Pattern, shape: tuple[int, ...]) -> None:
    groups, units = pattern.units(shape)
    assert groups * units * pattern.unit_size(shape) == math.prod(shape)
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randn(groups, units, dtype=torch.float64)
    assert torch.dot(pattern.pool(x).flatten(), y.flatten()).item() == pytest.approx(
        torch.dot(x.flatten(), pattern.expand(y, shape).flatten()).item()
    )
    torch.testing.assert_close(pattern.pool(pattern.expand(y, shape)), y * pattern.unit_size(shape))
    assert torch.equal(pattern.pool(x.flatten(), shape), pattern.pool(x))
    if pattern.unit_size(shape) == 1:
        assert torch.equal(pattern.expand(pattern.pool(x), shape), x)


@pytest.mark.parametrize(("pattern", "shape"), SMALL + LARGER, ids=label)
def test_groups_and_units_are_numbered_row_major(pattern: Pattern, shape: tuple[int, ...]) -> None:
    """Read the weight in its own order: the first weights of the groups, and of a group's units, come in order."""
    group, unit = (t.flatten().tolist() for t in group_labels(pattern, shape))
    assert list(dict.fromkeys(group)) == list(range(pattern.units(shape)[0]))
    for g in set(group):
        assert list(dict.fromkeys(u for u, h in zip(unit, group, strict=True) if h == g)) == list(
            range(pattern.units(shape)[1])
        )


@pytest.mark.parametrize(("pattern", "shape"), SMALL + LARGER, ids=label)
def test_strides_do_not_matter(pattern: Pattern, shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape)
    reversed_axes = tuple(reversed(range(len(shape))))
    strided = scores.permute(reversed_axes).contiguous().permute(reversed_axes)
    wide = torch.randn(*shape[:-1], shape[-1] * 2)
    wide[..., ::2] = scores
    keep = pattern.n if isinstance(pattern, NM) else max(1, pattern.units(shape)[1] // 2)
    expected = pattern.project(scores, keep)
    for other in (strided, wide[..., ::2]):
        assert torch.equal(pattern.pool(other), pattern.pool(scores))
        mask = pattern.project(other, keep)
        assert torch.equal(mask, expected) and mask.is_contiguous()
        assert pattern.obeys(expected.permute(reversed_axes).contiguous().permute(reversed_axes))


def test_pool_of_single_weights_is_a_view() -> None:
    w = torch.randn(6, 8)
    for pattern in (Unstructured(), NM(2, 4), FanIn()):
        assert pattern.pool(w).data_ptr() == w.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pooled_sums_do_not_overflow_or_depend_on_order(dtype: torch.dtype) -> None:
    w = torch.full((2, 4), 60000.0).to(dtype)
    pooled = Slice(0).pool(w)
    assert pooled.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    assert torch.equal(pooled[0].double(), w.double().sum(1))
    # The same numbers in another order must tie, so that the lower row is kept.
    numbers = torch.rand(1000)
    rows = torch.stack([numbers.flip(0), numbers])
    assert Slice(0).project(rows, 1)[0].all()


def test_pool_counts_bools() -> None:
    assert Block(2, 2).pool(torch.ones(2, 4, dtype=torch.bool)).tolist() == [[4, 4]]


def test_expand_does_not_share_a_unit_between_its_weights() -> None:
    mask = Slice(0).project(torch.randn(3, 4), 2)
    mask[0, 0] = ~mask[0, 0]
    assert mask[0, 0] != mask[0, 1]


def test_number_kept_per_group_can_differ() -> None:
    scores = torch.arange(8.0).reshape(2, 4)
    mask = NM(2, 4).project(scores, torch.tensor([0, 2]))
    assert mask.tolist() == [[False] * 4, [False, False, True, True]]


def test_grouped_and_depthwise_convolutions() -> None:
    depthwise = torch.randn(8, 1, 3, 3)
    assert Slice(0).units(depthwise.shape) == (1, 8)
    assert NM(2, 4, dim=0).project(depthwise, 2).sum() == 36
    assert FanIn().project(depthwise, 3).sum() == 24


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 1), (7, 3, 2), (18, 5, 3, 3)])
def test_a_short_last_group_keeps_as_many_units_as_the_others(taps: bool, shape: tuple[int, ...]) -> None:
    pattern = FilterGroup(4, taps)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups, units = pattern.units(shape)
    assert (groups, units) == (math.ceil(shape[0] / 4), math.prod(shape[1:]) if taps else shape[1])
    for keep in range(units + 1):
        mask = pattern.project(scores, keep)
        assert obeys_by_definition(pattern, mask) and pattern.obeys(mask)
        for i in range(0, shape[0], 4):  # each group by itself, the short one too
            part, kept = scores[i : i + 4].flatten(2), mask[i : i + 4].flatten(2)
            best = (part.sum(0) if taps else part.sum((0, 2))).flatten().topk(keep).values.sum()
            assert part[kept].sum().item() == pytest.approx(best.item())
    uneven = pattern.project(scores, 1)
    uneven[-1] = True
    assert not pattern.obeys(uneven)
