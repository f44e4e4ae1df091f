"""Sparse convolution against `torch.nn.functional.conv2d` in float64, over all geometry, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels import conv, spconv2d
from rarefy.kernels.native import native


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    level, threads = native.isa(), torch.get_num_threads()
    yield
    native.set_isa(level)
    torch.set_num_threads(threads)


def sparse(*shape: int, zeros: float = 0.8) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) >= zeros)


def compressed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, crow and col of a weight's nonzeros."""
    flat = weight.flatten(1)
    kept = flat != 0
    return flat[kept], F.pad(kept.sum(1).cumsum(0), (1, 0)), kept.nonzero()[:, 1].int()


def expected(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, *geometry: Any) -> Tensor:
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), *geometry)
    return conv.ACTIVATIONS[act](y if residual is None else y + residual.double())


def close(got: Tensor, want: Tensor) -> None:
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    whole = st.integers

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(whole(low, high)), draw(whole(low, high))

    groups = draw(st.sampled_from([1, 1, 1, 2, 5]))
    out, inside = groups * draw(whole(1, 40 // groups)), draw(whole(1, 24 // groups))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (1, 7), (2, 3)]))
    stride, padding, dilation = pair(1, 4), pair(0, 7), pair(1, 3)
    size = draw(st.sampled_from([(7, 7), (8, 8), (14, 14), (28, 28), (16, 16)])) if draw(st.booleans()) else pair(1, 40)
    if any(s + 2 * p <= d * (k - 1) for s, k, p, d in zip(size, kernel, padding, dilation, strict=True)):
        return
    batch, level = draw(whole(0, 5)), draw(st.sampled_from(native.available_isas()))
    native.set_isa(level)
    torch.set_num_threads(draw(whole(1, 2)))
    torch.manual_seed(draw(whole(0, 99)))
    w = sparse(out, inside, *kernel, zeros=draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])))
    w[draw(whole(0, out - 1))] = 0  # an empty row
    x = torch.randn(batch, inside * groups, *size)
    bias = torch.randn(out) if draw(st.booleans()) else None
    act, geometry = draw(st.sampled_from(list(conv.ACTIVATIONS))), (stride, padding, dilation, groups)
    residual = torch.randn_like(F.conv2d(x, w, None, *geometry)) if draw(st.booleans()) else None
    y = spconv2d(
        x, *compressed(w), bias, residual, weight_shape=w.shape, stride=stride, padding=padding, dilation=dilation,
        groups=groups, act=act,
    )  # fmt: skip
    close(y, expected(x, w, bias, residual, act, *geometry))


@pytest.mark.parametrize("level", native.available_isas())
@pytest.mark.parametrize("zeros", [0.0, 0.9, 0.98])
def test_blocks_of_inputs_and_parts_of_rows(level: str, zeros: float) -> None:
    """Enough inputs for several blocks, which begin within a channel's taps, and enough rows for two threads."""
    native.set_isa(level)
    for batch, size, stride in [(1, 7, 1), (3, 7, 2), (2, 14, 1), (1, 23, 2)]:
        w, x = sparse(97, 70, 3, 3, zeros=zeros), torch.randn(batch, 70, size, size)
        want = F.conv2d(x.double(), w.double(), None, stride, 1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            close(spconv2d(x, *compressed(w), weight_shape=w.shape, stride=(stride,) * 2, padding=(1, 1)), want)


def test_strided_views() -> None:
    w = sparse(6, 4, 3, 3)
    values, crow, col = compressed(w)
    x = torch.randn(3, 9, 11, 5)[1:].permute(0, 3, 1, 2)[:, 1:]  # neither contiguous nor aligned
    y = spconv2d(x, torch.stack([values, values], 1)[:, 0], crow, col, weight_shape=w.shape)
    close(y, F.conv2d(x, w))


def test_values_may_change() -> None:
    w, x = sparse(8, 4, 3, 3), torch.randn(1, 4, 9, 9)
    values, crow, col = compressed(w)
    for _ in range(3):
        close(spconv2d(x, values, crow, col, weight_shape=w.shape), F.conv2d(x, w))
        values *= 2
        w *= 2
    close(spconv2d(x, values * 3, crow, col, weight_shape=w.shape), F.conv2d(x, 3 * w))  # other memory
    with torch.inference_mode():
        close(spconv2d(x, values / 2, crow, col, weight_shape=w.shape), F.conv2d(x, w / 2))
    before = len(conv._packed)
    for _ in range(4):
        spconv2d(x, values.clone(), crow, col, weight_shape=w.shape)
    assert len(conv._packed) == before


def test_a_topology_may_change_in_place() -> None:
    crow, col, x = torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32), torch.randn(1, 1, 4, 4)
    call = lambda: spconv2d(x, torch.ones(1), crow, col, weight_shape=(1, 1, 2, 2))  # noqa: E731
    close(call(), x[:, :, :3, :3])
    col += 3
    close(call(), x[:, :, 1:, 1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_on_the_reference(dtype: torch.dtype) -> None:
    w, x, bias = sparse(5, 3, 3, 3).to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype), torch.randn(5, dtype=dtype)
    y = spconv2d(x, *compressed(w), bias, weight_shape=w.shape, act="relu6")
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.relu6(F.conv2d(x, w, bias)))


def test_torch_knows_it() -> None:
    w, x, bias = sparse(6, 2, 3, 3), torch.randn(2, 4, 9, 8), torch.randn(6)
    values, crow, col = compressed(w)
    residual = torch.randn(2, 6, 5, 4)
    args = (x, values, crow, col, bias, residual, list(w.shape), [2, 2], [1, 1], [1, 1], 2, "relu")
    torch.library.opcheck(torch.ops.rarefy.spconv2d, args, test_utils=("test_schema", "test_faketensor"))

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spconv2d(x, values, crow, col, bias, weight_shape=w.shape, groups=2) + 1

    with torch.no_grad():
        exported = torch.export.export(Net(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        x = torch.randn(5, 4, 9, 8)
        close(exported.module()(x), F.conv2d(x, w, bias, groups=2) + 1)
        close(torch.compile(Net(), fullgraph=True, backend="eager")(x), F.conv2d(x, w, bias, groups=2) + 1)


def test_errors() -> None:
    w, x = sparse(4, 2, 3, 3), torch.randn(1, 2, 8, 8)
    parts, shape = compressed(w), w.shape
    wrong: list[tuple[str, Any]] = [
        ("does not fit a weight", lambda: spconv2d(x[:, :1], *parts, weight_shape=shape)),
        ("must be \\[batch, in", lambda: spconv2d(x[0], *parts, weight_shape=shape)),
        ("does not fit a weight", lambda: spconv2d(x, *parts, weight_shape=(4, 2, 3))),
        ("one more", lambda: spconv2d(x, *parts, weight_shape=(5, 2, 3, 3))),
        ("does not fit images", lambda: spconv2d(x, *parts, weight_shape=shape, dilation=(4, 1))),
        ("must be pairs", lambda: spconv2d(x, *parts, weight_shape=shape, stride=(0, 1))),
        ("must be pairs", lambda: spconv2d(x, *parts, weight_shape=shape, padding=(1,))),
        ("no such activation", lambda: spconv2d(x, *parts, weight_shape=shape, act="gelu")),
        ("residual must be", lambda: spconv2d(x, *parts, residual=x, weight_shape=shape)),
        ("the bias must be", lambda: spconv2d(x, *parts, torch.zeros(3), weight_shape=shape)),
        ("no gradient", lambda: spconv2d(x, parts[0].clone().requires_grad_(), *parts[1:], weight_shape=shape)),
    ]
    for message, call in wrong:
        with pytest.raises(OptionError, match=message):
            call()
    with pytest.raises(ValueError, match="columns of a row"):
        spconv2d(x, *parts[:2], parts[2] + 18, weight_shape=shape)
