"""Both solvers bring outputs back on a fixed mask: the exact one to the minimum, AdaPrune downhill from what it absorbs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy.errors import OptionError
from rarefy.patterns import NM, TransposableNM
from rarefy.reconstruction import AdaPrune, LeastSquares
from rarefy.reconstruction.moments import LinearLayer, Moments, patches
from rarefy.reconstruction.solvers import absorb, parse_solver

LAYERS: list[tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = [
    (nn.Linear, (8, 6), {}, (50, 8)),
    (nn.Linear, (8, 6), {"bias": False}, (7, 9, 8)),
    (nn.Conv1d, (4, 6, 3), {"padding": 2, "dilation": 2}, (9, 4, 11)),
    (nn.Conv2d, (4, 8, 3), {"padding": 1}, (6, 4, 7, 6)),
    (nn.Conv2d, (4, 8, (3, 2)), {"stride": (2, 1), "padding": "valid", "bias": False}, (9, 4, 9, 7)),
    (nn.Conv2d, (8, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (9, 8, 9, 9)),
    (nn.Conv2d, (4, 4, 3), {"padding": "same", "padding_mode": "circular"}, (6, 4, 6, 6)),
    (nn.Conv3d, (4, 4, 2), {"stride": (1, 2, 1)}, (6, 4, 4, 5, 4)),
]


def build(case: int) -> tuple[LinearLayer, Tensor, Tensor]:
    torch.manual_seed(case)
    kind, args, options, shape = LAYERS[case]
    layer = kind(*args, **options).double()
    x = torch.randn(shape, dtype=torch.float64) + 0.3
    return layer, x, layer(x).detach()  # type: ignore[return-value]


def gathered(layer: LinearLayer, x: Tensor, y: Tensor) -> Moments:
    moments = Moments(layer)
    for part, wanted in zip(x.split(3), y.split(3), strict=True):
        moments.see(part)
        moments.add(wanted)
    return moments


def mse(layer: LinearLayer, moments: Moments, joined: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What the layer itself does with these weights."""
    moments.write(layer, joined)
    return (layer(x) - y).square().mean()


@pytest.mark.parametrize("case", range(len(LAYERS)))
def test_patches_times_weight_are_the_layer(case: int) -> None:
    layer, x, y = build(case)
    moments = gathered(layer, x, y)
    read = patches(layer, x.reshape(-1, x.shape[-1]) if isinstance(layer, nn.Linear) else x)
    weight = layer.weight.reshape(moments.groups, -1, moments.inputs)
    out = (read @ weight.mT).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        out = out + layer.bias
    wanted = y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(out, wanted)
    assert moments.count == len(wanted)


@pytest.mark.parametrize("case", range(len(LAYERS)))
def test_the_error_from_the_moments_is_that_of_the_layer(case: int) -> None:
    layer, x, y = build(case)
    moments = gathered(layer, x, y)
    other = moments.joined() + torch.randn_like(moments.joined())
    said = moments.mean(moments.errors(other))
    assert said == pytest.approx(mse(layer, moments, other, x, y).item(), rel=1e-10)
    assert moments.mean(moments.power) == pytest.approx(float(y.square().mean()), rel=1e-12)


@pytest.mark.parametrize("case", range(len(LAYERS)))
def test_least_squares_is_the_minimum_on_the_support(case: int) -> None:
    layer, x, y = build(case)
    moments, pattern = gathered(layer, x, y), NM(2, 4)
    mask = pattern.project(layer.weight.detach().abs(), 2)
    solved = LeastSquares(damping=0.0).solve(moments, mask, 4)
    free = moments.free(mask)
    assert not solved[~free].any()
    # each row is torch's own least squares on the columns that it keeps
    read = patches(layer, x.reshape(-1, x.shape[-1]) if isinstance(layer, nn.Linear) else x)
    if layer.bias is not None:
        read = nn.functional.pad(read, (0, 1), value=1.0)
    wanted = y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, -2)
    wanted = wanted.unflatten(1, (moments.groups, -1))
    for g in range(moments.groups):
        for row in range(free.shape[1]):
            columns = free[g, row]
            best = torch.linalg.lstsq(read[g][:, columns], wanted[:, g, row : row + 1]).solution[:, 0]
            torch.testing.assert_close(solved[g, row, columns], best, rtol=1e-7, atol=1e-9)
    # and autograd finds no way down from there
    loss = mse(layer, moments, solved, x, y)
    loss.backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad[mask].abs().max()) < 1e-10
    if layer.bias is not None:
        assert layer.bias.grad is not None and float(layer.bias.grad.abs().max()) < 1e-10


def test_damping_is_the_minimum_of_error_and_change() -> None:
    layer, x, y = build(3)
    moments = gathered(layer, x, y)
    mask = NM(1, 4).project(layer.weight.detach().abs(), 1)
    before = layer.weight.detach() * mask
    ridge = 0.3 * float(moments.gram[0].diagonal()[: moments.inputs].mean())
    moments.write(layer, LeastSquares(damping=0.3).solve(moments, mask, 4))
    loss = (layer(x) - y).square().sum() + ridge * (layer.weight - before)[mask].square().sum()
    loss.backward()
    assert layer.weight.grad is not None and layer.bias is not None and layer.bias.grad is not None
    assert float(layer.weight.grad[mask].abs().max()) < 1e-8 and float(layer.bias.grad.abs().max()) < 1e-8


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 4, 0), TransposableNM(2, 4), TransposableNM(1, 2)])
@pytest.mark.parametrize("solver", [LeastSquares(), LeastSquares(damping=10.0), AdaPrune(steps=600)])
def test_never_worse_than_masks_alone(pattern: NM | TransposableNM, solver: LeastSquares | AdaPrune) -> None:
    layer, x, y = build(3)
    moments = gathered(layer, x, y)
    mask = pattern.project(layer.weight.detach().abs(), pattern.keep(layer.weight.shape))
    masked = moments.joined() * moments.free(mask)
    solved = solver.solve(moments, mask, pattern.m)
    assert moments.errors(solved).sum() < moments.errors(masked).sum()
    assert not solved[~moments.free(mask)].any()


def test_rows_that_keep_different_numbers() -> None:
    layer, x, y = build(0)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    for row in range(6):
        mask[row, : row + 1] = True
    mask[0] = False  # the bias alone
    moments = gathered(layer, x, y)
    solved = LeastSquares(damping=0.0).solve(moments, mask, 4)[0]
    assert float(solved[0, 8]) == pytest.approx(float(y[:, 0].mean()))
    assert solved.count_nonzero(1).tolist() == [1, 3, 4, 5, 6, 7]


def test_one_step_from_a_bad_start_gives_the_masked_weights_back() -> None:
    layer, x, y = build(3)
    moments = gathered(layer, x, y)
    mask = NM(1, 4).project(layer.weight.detach().abs(), 1)
    masked = moments.joined() * moments.free(mask)
    assert torch.equal(AdaPrune(steps=1).solve(moments, mask, 4), masked)


def test_more_steps_of_adaprune_bring_the_error_down_to_the_minimum() -> None:
    layer, x, y = build(0)
    moments = gathered(layer, x, y)
    mask = NM(2, 4).project(layer.weight.detach().abs(), 2)
    masked = float(moments.errors(moments.joined() * moments.free(mask)).sum())
    least = float(moments.errors(LeastSquares(damping=0.0).solve(moments, mask, 4)).sum())
    found = [float(moments.errors(AdaPrune(steps=n).solve(moments, mask, 4)).sum()) for n in (1, 100, 300, 1000, 3000)]
    assert masked >= found[0] >= found[1] > found[2] > found[3] >= found[4] >= least * (1 - 1e-9)
    assert found[4] == pytest.approx(least, rel=1e-3)


def test_adaprune_starts_from_what_it_absorbs() -> None:
    """Inputs that are all alike are served exactly by sums: no step can be needed."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).double()
    x = torch.randn(30, 1, dtype=torch.float64).expand(30, 8)
    moments = gathered(layer, x, layer(x).detach())
    mask = NM(1, 4).project(layer.weight.detach().abs(), 1)
    solved = AdaPrune(steps=1, lr=1e-12, lr_bias=1e-12).solve(moments, mask, 4)
    assert float(moments.errors(solved).sum()) < 1e-9 * float(moments.power.sum())


@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.sampled_from([(), (2,), (2, 3)]), st.integers(0, 10**6)
)
def test_absorption_preserves_the_sum_of_every_run(
    out: int, runs: int, m: int, space: tuple[int, ...], seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, runs * m, *space, generator=g, dtype=torch.float64)
    n = int(torch.randint(1, m + 1, (), generator=g))
    mask = NM(n, m).project(weight.abs(), n)
    moved = absorb(weight, mask, m)
    assert moved.shape == weight.shape and not moved[~mask].any()
    sums = [t.unflatten(1, (runs, m)).sum(2) for t in (weight, moved)]
    torch.testing.assert_close(sums[0], sums[1])
    added = (moved - weight)[mask]  # every kept weight of a run takes the same share
    shares = (moved - weight).masked_fill(~mask, torch.nan).unflatten(1, (runs, m)).movedim(2, -1)
    least = shares.nan_to_num(torch.inf).amin(-1)
    most = shares.nan_to_num(-torch.inf).amax(-1)
    torch.testing.assert_close(least, most)
    assert torch.isfinite(added).all()


def test_absorption_where_runs_do_not_fill_the_inputs_or_keep_nothing() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    mask = torch.tensor([[False, True, False, False, True, False]])
    assert absorb(weight, mask, 4).tolist() == [[0.0, 10.0, 0.0, 0.0, 11.0, 0.0]]
    assert absorb(weight, mask, 3).tolist() == [[0.0, 6.0, 0.0, 0.0, 15.0, 0.0]]
    assert absorb(weight, torch.zeros_like(mask), 3).tolist() == [[0.0] * 6]


def test_inputs_that_are_never_other_than_zero_leave_weights_as_they_are() -> None:
    layer = nn.Linear(8, 6)
    x = torch.randn(40, 8)
    x[:, :4] = 0
    moments = gathered(layer, x, layer(x).detach())
    mask = NM(2, 4).project(layer.weight.detach().abs(), 2)
    solved = LeastSquares().solve(moments, mask, 4)[0, :, :4]
    torch.testing.assert_close(solved.float(), (layer.weight * mask)[:, :4].detach())
    dead = gathered(layer, torch.zeros(5, 8), torch.zeros(5, 6))
    torch.testing.assert_close(LeastSquares().solve(dead, mask, 4)[0, :, :8].float(), (layer.weight * mask).detach())


def test_bad_options_and_too_little_data() -> None:
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="damping"):
            LeastSquares(damping=wrong)
    with pytest.raises(OptionError, match="steps"):
        AdaPrune(steps=0)
    with pytest.raises(OptionError, match="lr_bias"):
        AdaPrune(lr_bias=0.0)
    with pytest.raises(OptionError, match="'least-squares'"):
        parse_solver("least-square")
    layer, x, y = build(0)
    mask = torch.ones(6, 8, dtype=torch.bool)
    with pytest.raises(OptionError, match=r"damping=0.*more calibration data"):
        LeastSquares(damping=0.0).solve(gathered(layer, x[:3], y[:3]), mask, 4)
