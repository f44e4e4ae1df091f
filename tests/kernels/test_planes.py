"""Dense layers of native networks against torch, on every instruction set, with one thread and two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import planes
from rarefy.kernels.native import native
from rarefy.kernels.planes import Layer

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}


@pytest.fixture(params=native.available_isas(), autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def unaligned(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 8, with nothing behind them."""
    room = torch.empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def run(layer: Layer, *inputs: Tensor, shape: tuple[int, ...], threads: int = 1) -> Tensor:
    out = torch.full((inputs[0].shape[0], *shape), float("nan"))
    guarded = torch.full((out.numel() + 64,), 7.5)
    view = guarded[33 : 33 + out.numel()].view(out.shape)
    layer.run([unaligned(x).numpy() for x in inputs], view.numpy(), inputs[0].shape[0], threads)
    assert (guarded[:33] == 7.5).all() and (guarded[33 + out.numel() :] == 7.5).all(), "written outside the output"
    return view


def check(layer: Layer, expected: Tensor, *inputs: Tensor) -> None:
    for threads in (1, 2):
        got = run(layer, *inputs, shape=tuple(expected.shape[1:]), threads=threads)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [*itertools.product((1, 3, 5, 7), (1, 2, 3), (1,)), (3, 1, 2), (3, 2, 3)]
)
def test_depthwise(kernel: int, stride: int, dilation: int) -> None:
    for (h, w), c, b in [((7, 7), 5, 2), ((14, 15), 3, 1), ((31, 33), 2, 1), ((1, 70), 1, 1), ((57, 16), 3, 1)]:
        pad = (kernel // 2) * dilation
        x, weight, bias = torch.randn(b, c, h, w), torch.randn(c, 1, kernel, kernel) / kernel, torch.randn(c)
        expected = F.conv2d(x, weight, bias, stride, pad, dilation, c)
        layer = planes.depthwise(weight, bias, (h, w), stride=stride, padding=pad, dilation=dilation)
        check(layer, expected, x)


def test_depthwise_in_many_tiles() -> None:
    x, weight = torch.randn(1, 2, 150, 230), torch.randn(2, 1, 3, 3)
    for stride in (1, 2):
        expected = F.conv2d(x, weight, None, stride, 1, 1, 2)
        check(planes.depthwise(weight, None, (150, 230), stride=stride, padding=1), expected, x)


@pytest.mark.parametrize("act", ACTS)
def test_depthwise_adds_then_activates(act: str) -> None:
    x, weight, bias = torch.randn(2, 4, 9, 19), torch.randn(4, 1, 3, 3), torch.randn(4)
    summed = F.conv2d(x, weight, bias, 1, 1, 1, 4)
    residual = torch.randn_like(summed)
    layer = planes.depthwise(weight, bias, (9, 19), padding=1, act=act, residual=True)
    check(layer, ACTS[act](summed + residual), x, residual)
    assert layer.in_place(1) and not layer.in_place(0)
    expected = run(layer, x, residual, shape=(4, 9, 19)).clone()
    layer.run([x.numpy(), residual.numpy()], residual.numpy(), 2, 1)
    assert torch.equal(residual, expected)


def test_depthwise_with_several_filters_a_channel_and_oblong_windows() -> None:
    x, weight, bias = torch.randn(2, 3, 12, 21), torch.randn(6, 1, 3, 5), torch.randn(6)
    expected = F.conv2d(x, weight, bias, (2, 1), (0, 2), (1, 2), 3)
    layer = planes.depthwise(weight, bias, (12, 21), channels=3, stride=(2, 1), padding=(0, 2), dilation=(1, 2))
    check(layer, expected, x)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (3, 1, 1), (7, 2, 1), (1, 1, 1), (4, 4, 1), (3, 1, 2)]
)
def test_dense_convolution(kernel: int, stride: int, dilation: int) -> None:
    for (h, w), c, out, b in [((7, 9), 3, 5, 2), ((30, 33), 1, 8, 1), ((19, 150), 4, 3, 1)]:
        pad = (kernel // 2) * dilation
        x, weight, bias = (
            torch.randn(b, c, h, w),
            torch.randn(out, c, kernel, kernel) / kernel / c**0.5,
            torch.randn(out),
        )
        y = F.conv2d(x, weight, bias, stride, pad, dilation)
        r = torch.randn_like(y)
        layer = planes.dense_conv(
            weight, bias, (h, w), stride=stride, padding=pad, dilation=dilation, act="hardswish", residual=True
        )
        for threads in (1, 2):
            got = run(layer, x, r, shape=tuple(y.shape[1:]), threads=threads)
            torch.testing.assert_close(got, F.hardswish(y + r), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "s", "p"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), (2, 1, 0)])
@pytest.mark.parametrize("ceil", [False, True])
def test_pools(k: int, s: int, p: int, ceil: bool) -> None:
    for h, w in [(7, 9), (14, 14), (33, 40)]:
        x = torch.randn(2, 3, h, w) - 3
        layer = planes.max_pool(3, (h, w), k, stride=s, padding=p, ceil_mode=ceil)
        check(layer, F.max_pool2d(x, k, s, p, 1, ceil), x)
        for counted in (True, False):
            layer = planes.avg_pool(3, (h, w), k, stride=s, padding=p, ceil_mode=ceil, count_include_pad=counted)
            check(layer, F.avg_pool2d(x, k, s, p, ceil, counted), x)


@pytest.mark.parametrize("out", [(1, 1), (2, 3), (7, 7), (3, 1)])
def test_adaptive_average(out: tuple[int, int]) -> None:
    for size in [(7, 7), (14, 11), (1, 1), (40, 37)]:
        x = torch.randn(2, 3, *size)
        check(planes.adaptive_avg_pool(3, size, out), F.adaptive_avg_pool2d(x, out), x)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("n", [1, 15, 16, 100, 40_001])
def test_elementwise(act: str, n: int) -> None:
    a, b = 6 * torch.randn(2, n), torch.randn(2, n)
    f = ACTS[act]
    check(planes.activation(n, act), f(a), a)
    check(planes.add(n, act), f(a + b), a, b)
    check(planes.multiply(n, act), f(a * b), a, b)
    layer = planes.add(n, act)
    expected = f(a + b)
    layer.run([a.numpy(), b.numpy()], a.numpy(), 2, 1)
    torch.testing.assert_close(a, expected, rtol=2e-6, atol=2e-6)


def test_activations_over_the_whole_range() -> None:
    x = torch.cat([torch.linspace(-87, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e30])])[None]
    for act in ("silu", "sigmoid"):
        got = run(planes.activation(x.numel(), act), x, shape=(x.numel(),))
        torch.testing.assert_close(got, ACTS[act](x.double()).float(), rtol=2e-6, atol=1e-37)
        far = run(planes.activation(3, act), torch.tensor([[-90.0, -1e30, -3e38]]), shape=(3,))
        assert (far.abs() < 1e-35).all()


@pytest.mark.parametrize("act", ACTS)
def test_not_a_number_passes(act: str) -> None:
    x = torch.full((1, 19), float("nan"))
    assert run(planes.activation(19, act), x, shape=(19,)).isnan().all()


def test_scale_and_affine() -> None:
    for size in [(1, 1), (5, 7), (20, 30)]:
        x, s, t = torch.randn(2, 6, *size), torch.rand(2, 6), torch.randn(6)
        check(planes.scale_channels(6, size, "relu"), F.relu(x * s[:, :, None, None]), x, s)
        expected = F.hardswish(x * s[0][:, None, None] + t[:, None, None])
        check(planes.affine(s[0], t, size, "hardswish"), expected, x)


def test_softmax() -> None:
    for n in (1, 10, 1000):
        x = 20 * torch.randn(3, n)
        check(planes.softmax(n), x.softmax(1), x)


def test_joins_and_cuts() -> None:
    a, b, c = torch.randn(3, 2, 5, 7), torch.randn(3, 1, 5, 7), torch.randn(3, 4, 5, 7)
    check(planes.concat([70, 35, 140]), torch.cat([a, b, c], 1), a, b, c)
    check(planes.narrow(140, 35, 105), c[:, 1:3], c)
    check(planes.narrow(140, 35, 35), c[:, 1:1].reshape(3, 0), c)


@pytest.mark.parametrize("out", [(10, 14), (15, 9), (5, 7), (3, 20)])
def test_upsample(out: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 5, 7)
    check(planes.upsample_nearest(3, (5, 7), out), F.interpolate(x, out, mode="nearest"), x)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (8, 32), (33, 7), (64, 128), (130, 65), (1000, 40)])
def test_dense_linear(m: int, k: int) -> None:
    weight, bias = torch.randn(m, k) / k**0.5, torch.randn(m)
    for batch in (1, 3, 4, 9):
        x = torch.randn(batch, k)
        check(planes.dense_linear(weight, bias, "silu"), F.silu(F.linear(x, weight, bias)), x)
        check(planes.dense_linear(weight, None), F.linear(x, weight), x)


def test_wrong_sizes_are_told() -> None:
    with pytest.raises(OptionError, match="depthwise: the kernel is larger"):
        planes.depthwise(torch.zeros(3, 1, 5, 5), None, (2, 2))
    with pytest.raises(OptionError, match="one bias per filter"):
        planes.depthwise(torch.zeros(3, 1, 1, 1), torch.zeros(4), (2, 2))
    with pytest.raises(OptionError, match="too wide"):
        planes.dense_conv(torch.zeros(1, 1, 1, 17), None, (2, 20))
    with pytest.raises(OptionError, match="no such activation: 'gelu'"):
        planes.activation(4, "gelu")
    with pytest.raises(OptionError, match="a slice must lie"):
        planes.narrow(4, 2, 5)
    layer = planes.softmax(4)
    with pytest.raises(ValueError, match="batch \\* input_sizes"):
        layer.run([torch.zeros(7).numpy()], torch.zeros(8).numpy(), 2, 1)
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="in place"):
        planes.narrow(4, 0, 4).run([x.numpy()], x.numpy(), 2, 1)
