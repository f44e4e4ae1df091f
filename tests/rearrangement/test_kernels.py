"""Groups of filters on the packed kernels: right results at every geometry, no dense weights kept, fewer loads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rarefy.kernels import sparse_layers
from rarefy.patterns import FilterGroup


@pytest.mark.parametrize("rows", [32, 37])  # 37: a short last group
@pytest.mark.parametrize(
    ("kernel", "stride", "taps"), [(1, 1, False), (3, 1, False), (3, 2, False), (3, 1, True), (3, 2, True)]
)
def test_packed_kernel_is_the_masked_dense_one(rows: int, kernel: int, stride: int, taps: bool) -> None:
    g = torch.Generator().manual_seed(rows)
    w = torch.randn(rows, 24, kernel, kernel, generator=g)
    pattern = FilterGroup(16, taps)
    w[~pattern.project(w.square(), pattern.keep(w.shape, 0.7))] = 0
    x, bias = torch.randn(2, 24, 9, 9, generator=g), torch.randn(rows, generator=g)
    expected = F.relu(F.conv2d(x, w, bias, stride, kernel // 2))
    layer = sparse_layers.sparse_conv_layer(
        w, bias, (9, 9), stride=stride, padding=kernel // 2, act="relu", batch=2, threads=1
    )
    got = torch.empty_like(expected)
    layer.run([x.numpy()], got.numpy(), 2, 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_kept_weights_only_and_one_index_for_each_four() -> None:
    """A kept weight takes its value, its place among the values, and a quarter of an index; a dense weight none of it."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(128, 512, generator=g)
    pattern, sizes = FilterGroup(16), {}
    for density in (0.1, 0.3, 0.7):
        keep = pattern.keep(w.shape, density)
        masked = w * pattern.project(w.square(), keep)
        kept = keep * 128
        sizes[density] = sparse_layers.sparse_pointwise_layer(masked, None, (14, 14), threads=1).bytes
        assert sizes[density] <= kept * (4 + 4 + 2 / 4) + 64 * 128
    assert sizes[0.1] < 0.2 * sizes[0.7]


def test_rows_that_share_their_inputs_are_packed_together_in_any_order() -> None:
    g = torch.Generator().manual_seed(0)
    support = (torch.rand(32, 96, generator=g) < 0.5).float().repeat_interleave(4, 0)
    support[:, 0] = 1  # groups differ in size, none is empty
    w = support * (torch.rand(support.shape, generator=g) + 0.5)
    shuffled = w[torch.randperm(128, generator=g)]

    def packed(w: torch.Tensor) -> int:
        return sparse_layers.sparse_pointwise_layer(w, None, (8, 8), threads=1).bytes

    assert packed(shuffled) == packed(w)
    apart = torch.cat([w[i::4] for i in range(4)])  # the same rows, every four of them of four groups
    assert packed(apart) == packed(w)
    noise = w * (torch.rand(w.shape, generator=g) < 0.5) + 0.0
    assert packed(noise) > packed(w) / 2  # half the weights, but more than half the bytes: less is shared
