"""Allocation rules against closed forms, published numbers and brute force."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.allocation import RULES, SCORED, counts, densities, global_counts
from rarefy.allocation.shares import erk_plus
from rarefy.errors import AllocationError, OptionError, SelectionError
from rarefy.patterns import Unstructured
from rarefy.scores import lamp, magnitude

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}


def resnet20() -> dict[str, tuple[int, ...]]:
    """ResNet-20, width 16, with 1x1 convolutions as shortcuts."""
    shapes: dict[str, tuple[int, ...]] = {"conv": (16, 3, 3, 3)}
    into = 16
    for stage, out in enumerate((16, 32, 64), 1):
        for block in range(3):
            shapes[f"s{stage}.b{block}.conv1"] = (out, into, 3, 3)
            shapes[f"s{stage}.b{block}.conv2"] = (out, out, 3, 3)
            if into != out:
                shapes[f"s{stage}.shortcut"] = (out, into, 1, 1)
            into = out
    shapes["fc"] = (10, 64)
    return shapes


def size(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def dense_layers(found: Mapping[str, float]) -> set[str]:
    return {name for name, d in found.items() if d == 1.0}


def ratio(rule: str, shape: Sequence[int]) -> float:
    return sum(shape) / math.prod(shape) if rule == "erk" else (shape[0] + shape[1]) / (shape[0] * shape[1])


SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=12,
).map(lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)})
SPARSITY = st.floats(0.0, 0.995)


@pytest.mark.parametrize("rule", ["er", "erk"])
@pytest.mark.parametrize(
    ("density", "expected", "eps"),
    [
        (0.1, (0.079568, 0.230189, 1.0), 17.264151),
        (0.05, (0.038484, 0.111334, 0.918507), 8.350063),
        (0.02, (0.015394, 0.044534, 0.367403), None),
    ],
)
def test_lenet_300_100(rule: str, density: float, expected: tuple[float, ...], eps: float | None) -> None:
    found = densities(LENET, 1 - density, rule)
    assert tuple(found.values()) == pytest.approx(expected, abs=6e-7)
    if eps is not None:
        assert found["fc1"] / ratio(rule, LENET["fc1"]) == pytest.approx(eps, abs=1e-6)


def test_resnet20() -> None:
    shapes = resnet20()
    assert size(shapes) == 270_896
    found = densities(shapes, 0.9, "erk")
    assert dense_layers(found) == {"fc", "s2.shortcut"}
    picked = (found["conv"], found["s1.b0.conv1"], found["s3.b2.conv2"], found["s3.shortcut"])
    assert picked == pytest.approx((0.9830, 0.2802, 0.0617, 0.8128), abs=6e-5)
    found = densities(shapes, 0.8, "erk")
    assert dense_layers(found) == {"conv", "fc", "s2.shortcut", "s3.shortcut"}
    assert found["s1.b0.conv1"] / ratio("erk", (16, 16, 3, 3)) == pytest.approx(36.0023, abs=6e-5)
    assert not dense_layers(densities(shapes, 0.95, "erk"))
    found = densities(shapes, 0.9, "er")
    assert not dense_layers(found)
    assert found["fc"] == pytest.approx(0.2599, abs=6e-5)
    assert found["conv"] / ratio("er", (16, 3)) == pytest.approx(2.2475, abs=6e-5)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, sparsity=SPARSITY, rule=st.sampled_from(["uniform", "uniform+", "er", "erk", "erk+"]))
def test_the_budget_is_kept(shapes: dict[str, tuple[int, ...]], sparsity: float, rule: str) -> None:
    try:
        found = densities(shapes, sparsity, rule)
    except AllocationError:
        first, last = (math.prod(list(shapes.values())[i]) for i in (0, -1))
        assert rule in ("uniform+", "erk+")
        least = float(last) if rule == "erk+" else float(first) if len(shapes) == 1 else first + 0.2 * last
        assert (1 - sparsity) * size(shapes) <= least * (1 + 1e-9)
        return
    kept = sum(d * math.prod(shapes[name]) for name, d in found.items())
    assert kept == pytest.approx((1 - sparsity) * size(shapes), rel=1e-6)
    assert all(0 < d <= 1 for d in found.values())
    if rule in ("er", "erk"):
        eps = [d / ratio(rule, shapes[name]) for name, d in found.items() if d < 1]
        assert eps == pytest.approx([eps[0]] * len(eps) if eps else [], rel=1e-9)
        if eps:  # capped layers would all go over 1
            assert all(eps[0] * ratio(rule, shapes[name]) >= 1 - 1e-9 for name in dense_layers(found))
    if rule == "erk+" and sparsity:
        *others, last = shapes
        assert found[last] == 1
        rest = (kept - math.prod(shapes[last])) / size({name: shapes[name] for name in others})
        alone = densities({name: shapes[name] for name in others}, 1 - rest, "erk")
        assert {name: found[name] for name in others} == pytest.approx(alone, rel=1e-6)
    if rule == "uniform+" and sparsity:
        of_first, *between, of_last = found.values()
        assert of_first == 1 and of_last >= 0.2
        assert len({*between}) <= 1
        assert of_last == 0.2 or not between or of_last == between[0]


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, sparsity=SPARSITY, rule=st.sampled_from(["uniform", "uniform+", "er", "erk", "erk+"]))
def test_counts_are_exact(shapes: dict[str, tuple[int, ...]], sparsity: float, rule: str) -> None:
    try:
        kept = counts(shapes, sparsity, rule)
    except AllocationError:
        return
    share = densities(shapes, sparsity, rule)
    for name, shape in shapes.items():
        assert 0 < kept[name] <= math.prod(shape)
        if rule == "uniform":
            assert kept[name] == math.floor((1 - sparsity) * math.prod(shape) + 0.5)
        assert abs(kept[name] - share[name] * math.prod(shape)) < 1 + 1e-6
    if rule != "uniform":
        assert sum(kept.values()) == math.floor((1 - sparsity) * size(shapes) + 0.5)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, sparsity=st.floats(0.01, 0.995), rule=st.sampled_from(["er", "erk"]))
def test_capping_finds_the_one_scale_that_fits(shapes: dict[str, tuple[int, ...]], sparsity: float, rule: str) -> None:
    """d_l = min(1, eps r_l) has one solution for the budget; here by bisection."""
    raw = {name: ratio(rule, shape) for name, shape in shapes.items()}
    low, high = 0.0, 1 / min(raw.values())
    for _ in range(200):
        eps = (low + high) / 2
        total = sum(min(1.0, eps * raw[name]) * math.prod(shape) for name, shape in shapes.items())
        low, high = (eps, high) if total < (1 - sparsity) * size(shapes) else (low, eps)
    expected = {name: min(1.0, high * r) for name, r in raw.items()}
    assert densities(shapes, sparsity, rule) == pytest.approx(expected, rel=1e-6)


def test_erk_plus_says_what_the_classifier_alone_takes() -> None:
    assert densities(LENET, 0.98, "erk+")["fc3"] == 1.0
    with pytest.raises(AllocationError, match=r"fc3 \[10, 100\] at density 1 alone keeps 1000; .* below 0\.9962"):
        densities(LENET, 0.997, "erk+")
    assert erk_plus(LENET, 0.003, last=0.5)["fc3"] == 0.5


def test_layers_with_nearly_equal_ratios_are_capped_one_by_one() -> None:
    found = densities({"a": (10, 100), "b": (10, 101), "c": (1000, 1000)}, 1 - 20_200 / 1_002_010, "erk")
    assert found["a"] == 1.0
    assert found["b"] == pytest.approx(0.9996, abs=1e-4)


@pytest.mark.parametrize("rule", ["uniform+", "er", "erk", "erk+"])
@pytest.mark.parametrize("sparsity", [0.5, 0.61, 0.73, 0.8])
def test_the_largest_remainders_are_rounded_up(rule: str, sparsity: float) -> None:
    shapes = resnet20()
    kept, share = counts(shapes, sparsity, rule), densities(shapes, sparsity, rule)
    exact = {name: share[name] * math.prod(shape) for name, shape in shapes.items() if share[name] < 1}
    up = [x - math.floor(x) for name, x in exact.items() if kept[name] > math.floor(x)]
    down = [x - math.floor(x) for name, x in exact.items() if kept[name] == math.floor(x)]
    assert len(up) + len(down) == len(exact)
    assert min(up, default=1.0) >= max(down, default=0.0)


def test_equal_remainders_go_to_the_earlier_layer() -> None:
    assert counts({"a": (1, 3), "b": (1, 3), "c": (1, 3)}, 0.5, "erk") == {"a": 2, "b": 2, "c": 1}


def test_uniform_plus() -> None:
    shapes = {"conv": (8, 1, 3, 3), "fc1": (64, 72), "fc2": (64, 64), "fc3": (10, 64)}
    found = densities(shapes, 0.9, "uniform+")
    assert (found["conv"], found["fc3"]) == (1.0, 0.2)
    assert found["fc1"] == found["fc2"] == pytest.approx((0.1 * 9416 - 72 - 0.2 * 640) / (4608 + 4096))
    found = densities(shapes, 0.5, "uniform+")  # dense enough: the last layer is one of the others
    assert found["fc1"] == found["fc3"] == pytest.approx((0.5 * 9416 - 72) / (9416 - 72))
    with pytest.raises(AllocationError, match=r"conv \[8, 1, 3, 3\] at density 1 and fc3 .* below 0\.97"):
        densities(shapes, 0.98, "uniform+")
    with pytest.raises(AllocationError, match="use 'erk' or 'uniform'"):
        densities({"only": (4, 4)}, 0.5, "uniform+")


@pytest.mark.parametrize("rule", ["uniform", "uniform+", "er", "erk"])
def test_no_sparsity_keeps_all(rule: str) -> None:
    assert set(densities(LENET, 0.0, rule).values()) == {1.0}
    assert counts(LENET, 0, rule) == {name: math.prod(shape) for name, shape in LENET.items()}


def test_user_given() -> None:
    globs = {"fc3": 0.0, "fc?": 0.9}
    assert densities(LENET, None, globs) == pytest.approx({"fc1": 0.1, "fc2": 0.1, "fc3": 1.0})
    assert counts(LENET, None, globs) == {"fc1": 23520, "fc2": 3000, "fc3": 1000}
    with pytest.raises(SelectionError, match=r"(?s)no glob fits layer fc2 \[100, 300\].*'fc9' fits no layer.*'fc"):
        densities(LENET, None, {"fc1": 0.5, "fc9": 0.5, "fc3": 0.1})
    with pytest.raises(SelectionError, match=r"glob 'fc3' decides nothing.*move it up"):
        densities(LENET, None, {"*": 0.5, "fc3": 0.0})
    with pytest.raises(OptionError, match=r"sparsity of 'fc\*' is 1\.0"):
        densities(LENET, None, {"fc*": 1.0})


def test_a_layer_that_would_be_empty_is_named() -> None:
    shapes = {"tiny": (1, 2), "small": (1, 3), "big": (100, 100)}
    with pytest.raises(AllocationError, match=r"tiny \[1, 2\] \(density 0\.1\), small \[1, 3\]") as caught:
        counts(shapes, 0.9, "uniform")
    assert "big" not in str(caught.value)
    assert counts(shapes, 0.9, "erk")["tiny"] == 2


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, None])
def test_a_sparsity_out_of_range_is_refused(sparsity: float | None) -> None:
    with pytest.raises(OptionError, match=r"\[0, 1\)"):
        densities(LENET, sparsity, "erk")


def test_other_wrong_input() -> None:
    with pytest.raises(OptionError, match=r"unknown allocation 'unifrm' .did you mean 'uniform'"):
        densities(LENET, 0.5, "unifrm")
    with pytest.raises(AllocationError, match="no layers"):
        densities({}, 0.5, "erk")
    with pytest.raises(AllocationError, match=r"empty \[0, 3\]"):
        counts({"empty": (0, 3)}, 0.5, "erk")
    with pytest.raises(AllocationError, match=r"bias \[10\]"):
        densities({"bias": (10,)}, 0.5, "er")
    for rule in SCORED:
        with pytest.raises(OptionError, match="global_counts"):
            densities(LENET, 0.5, rule)
    assert set(RULES) > SCORED


TENSORS = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(values=TENSORS, sparsity=st.floats(0, 0.99))
def test_global_counts_by_brute_force(values: list[list[int]], sparsity: float) -> None:
    scores = {f"l{i}": torch.tensor(v, dtype=torch.float32).abs() for i, v in enumerate(values)}
    total = math.floor((1 - sparsity) * sum(map(len, values)) + 0.5)
    if total == 0:
        with pytest.raises(AllocationError, match="leaves none"):
            global_counts(scores, sparsity)
        return
    ranked = sorted(((-abs(x), layer) for layer, v in enumerate(values) for x in v))  # stable in index order
    expected = [sum(layer == i for _, layer in ranked[:total]) for i in range(len(values))]
    assert list(global_counts(scores, sparsity).values()) == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_global_counts_agree_with_topk(sparsity: float) -> None:
    weights = {name: torch.randn(shape) * (i + 1) for i, (name, shape) in enumerate(LENET.items())}
    scores = {name: magnitude(w) for name, w in weights.items()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    top = torch.topk(flat, math.floor((1 - sparsity) * flat.numel() + 0.5)).indices
    kept = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, top, True)
    found = global_counts(scores, sparsity)
    parts = torch.split(kept, [s.numel() for s in scores.values()])
    assert list(found.values()) == [int(part.sum()) for part in parts]
    for part, (name, s) in zip(parts, scores.items(), strict=True):
        assert torch.equal(Unstructured().project(s, found[name]).flatten(), part)


def test_lamp_spreads_what_global_magnitude_concentrates() -> None:
    """LAMP does not see a layer's scale; global magnitude does."""
    weights = {"a": torch.randn(50, 40), "b": torch.randn(30, 20) * 1e-3}
    by_magnitude = global_counts({name: magnitude(w) for name, w in weights.items()}, 0.9)
    by_lamp = global_counts({name: lamp(w) for name, w in weights.items()}, 0.9)
    assert by_magnitude["b"] == 0 and by_lamp["b"] > 30
    scaled = global_counts({"a": lamp(weights["a"]), "b": lamp(weights["b"] * 1024)}, 0.9)
    assert scaled == by_lamp


def test_nan_scores_name_their_layers() -> None:
    scores = {"good": torch.ones(2), "bad": torch.tensor([[1.0, math.nan]])}
    with pytest.raises(OptionError, match=re.escape("NaN in bad [1, 2];")):
        global_counts(scores, 0.5)


def test_strided_scores_count_in_their_own_order() -> None:
    w = torch.tensor([[5.0, 1.0], [4.0, 2.0]])
    assert global_counts({"a": w.t(), "b": w[:, 0]}, 0.5) == {"a": 2, "b": 1}
