"""Overlap of masks against sets of indices and against sampled random masks."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import OptionError, SelectionError, StateError
from rarefy.metrics import Explored, overlap, overlap_matrix

Masks = dict[str, torch.Tensor]


def draw(seed: int, densities: tuple[float, ...] = (0.1, 0.5)) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for i, (shape, density) in enumerate(zip([(20, 30), (7, 11)], densities, strict=True)):
        mask = torch.zeros(shape, dtype=torch.bool)
        order = torch.randperm(mask.numel(), generator=generator)
        mask.view(-1)[order[: int(density * mask.numel())]] = True
        masks[f"l{i}"] = mask
    return masks


def test_measures_against_sets() -> None:
    a, b = draw(1), draw(2, (0.3, 0.4))
    report = overlap(a, b)
    in_a, in_b, size = set(), set(), 0
    for name in a:
        sa, sb = (set(m[name].flatten().nonzero().flatten().tolist()) for m in (a, b))
        layer = report.layers[name]
        assert layer.jaccard == len(sa & sb) / len(sa | sb)
        assert layer.overlap == len(sa & sb) / min(len(sa), len(sb))
        assert layer.flip_rate == len(sa ^ sb) / a[name].numel()
        in_a |= {(name, i) for i in sa}
        in_b |= {(name, i) for i in sb}
        size += a[name].numel()
    assert report.total.jaccard == len(in_a & in_b) / len(in_a | in_b)
    assert report.total.overlap == len(in_a & in_b) / min(len(in_a), len(in_b))
    assert report.total.flip_rate == len(in_a ^ in_b) / size


def test_expected_overlap_is_the_mean_over_random_masks() -> None:
    reports = [overlap(draw(2 * s), draw(2 * s + 1, (0.3, 0.4))) for s in range(400)]
    total = reports[0].total
    mean = sum(r.total.overlap for r in reports) / len(reports)
    assert mean == pytest.approx(total.expected_overlap, abs=0.005)
    assert sum(r.total.jaccard for r in reports) / len(reports) == pytest.approx(total.expected_jaccard, abs=0.005)
    layer = reports[0].layers["l0"]
    assert layer.expected_overlap == pytest.approx(0.3)


def test_same_disjoint_and_empty_masks() -> None:
    a = draw(1)
    same, apart = overlap(a, a).total, overlap(a, {n: ~m for n, m in a.items()}).total
    assert (same.jaccard, same.overlap, same.flip_rate) == (1.0, 1.0, 0.0)
    assert (apart.jaccard, apart.overlap, apart.flip_rate) == (0.0, 0.0, 1.0)
    none = {n: torch.zeros_like(m) for n, m in a.items()}
    empty = overlap(none, none).total
    assert (empty.jaccard, empty.overlap, empty.flip_rate, empty.expected_jaccard) == (1.0, 1.0, 0.0, 1.0)
    assert overlap(a, none).total.jaccard == 0.0 and overlap({}, {}).total.flip_rate == 0.0


def test_the_matrix_holds_every_pair() -> None:
    runs = [draw(s) for s in range(4)]
    for measure in ("jaccard", "overlap", "flip_rate"):
        matrix = overlap_matrix(runs, measure)
        assert matrix.dtype == torch.float64 and torch.equal(matrix, matrix.T)
        for i in range(4):
            for j in range(4):
                assert matrix[i, j] == getattr(overlap(runs[i], runs[j]).total, measure)
    assert overlap_matrix([]).shape == (0, 0)
    with pytest.raises(OptionError, match="did you mean 'jaccard'"):
        overlap_matrix(runs, "jacard")


def test_masks_of_different_models_are_refused() -> None:
    a = draw(1)
    with pytest.raises(SelectionError, match="'l1' is missing from the second"):
        overlap(a, {"l0": a["l0"]})
    with pytest.raises(SelectionError, match="'x' is missing from the first"):
        overlap(a, {**a, "x": a["l0"]})
    with pytest.raises(OptionError, match=r"'l0' differ in shape"):
        overlap(a, {**a, "l0": a["l0"].T})
    with pytest.raises(OptionError, match="'l0' must be a bool tensor"):
        overlap(a, {**a, "l0": a["l0"].float()})


def test_explored_starts_at_the_density_and_never_falls() -> None:
    first = draw(0)
    seen = Explored(first)
    kept, size = sum(int(m.sum()) for m in first.values()), sum(m.numel() for m in first.values())
    assert seen.share == kept / size
    union = {n: m.clone() for n, m in first.items()}
    first["l0"].fill_(True)  # the caller's masks change in place: what was seen does not
    assert seen.share == kept / size
    before = seen.share
    for step in range(1, 30):
        masks = draw(step)
        seen.update(masks)
        union = {n: union[n] | masks[n] for n in union}
        assert seen.share >= before
        assert seen.share == sum(int(m.sum()) for m in union.values()) / size
        before = seen.share
    assert seen.layers == {n: int(m.sum()) / m.numel() for n, m in union.items()}
    assert repr(seen).startswith("Explored(share=0.")


def test_explored_saves_and_loads() -> None:
    seen, other = Explored(draw(0)), Explored(draw(1))
    state = seen.state_dict()
    seen.update(draw(5))
    other.load_state_dict(state)
    other.update(draw(5))
    assert other.share == seen.share
    with pytest.raises(StateError, match="do not fit"):
        other.load_state_dict({"l0": state["l0"]})
