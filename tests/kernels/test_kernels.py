"""Every kernel against its naive reference: sizes, dtypes, ties, odd numbers, layouts, threads, instruction sets."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy import kernels
from rarefy.errors import OptionError
from rarefy.kernels import reference
from rarefy.kernels.native import native
from rarefy.kernels.select import _select_torch

LEVELS = native.available_isas()
SIZES = [0, 1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 1000, 4097, 65535, 65536, 100003]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test at every instruction set of this machine."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@functools.cache
def scores_of_every_kind(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Return float32 scores that stress ordering: ties, mass points, signed zeros, infinities, denormals."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g)
    few = torch.randint(-2, 3, (n,), generator=g).float()
    signed_zeros = torch.where(normal > 0.5, 0.0, -0.0)
    mostly_zero = torch.where(torch.rand(n, generator=g) < 0.9, 0.0, normal.abs())
    infinite = torch.where(normal > 1, float("inf"), torch.where(normal < -1, float("-inf"), normal))
    return {
        "normal": normal,
        "magnitudes": normal.abs(),
        "few values": few,
        "all equal": torch.full((n,), 0.25),
        "signed zeros": signed_zeros,
        "mostly zero": mostly_zero,
        "infinite": infinite,
        "denormal": normal * 1e-41,
        "sorted": normal.sort().values,
    }


def counts_to_try(n: int) -> list[int]:
    return sorted({0, min(1, n), n // 10, n // 2, max(n - 1, 0), n})


@functools.cache
def truth(n: int, kind: str, k: int) -> Tensor:
    """Return the reference's mask, worked out once for all instruction sets and threads."""
    return reference.select_k(scores_of_every_kind(n)[kind], k)


# bit masks


@pytest.mark.parametrize("n", [*SIZES, 600_001])
def test_pack_and_unpack_agree_with_the_reference(n: int, level: str, threads: int) -> None:
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.3
    bits = kernels.pack_mask(mask)
    assert torch.equal(bits, reference.pack_mask(mask))
    assert torch.equal(kernels.unpack_mask(bits, (n,)), mask)
    assert torch.equal(reference.unpack_mask(bits, (n,)), mask)


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_uniform_masks_pack(make: type, level: str) -> None:
    mask = make(1001, dtype=torch.bool)
    assert torch.equal(kernels.pack_mask(mask), reference.pack_mask(mask))


def test_pack_takes_odd_layouts(level: str) -> None:
    mask = torch.rand(40, 30) < 0.5
    for view in (mask.t(), mask[:, 1:], mask.view(-1)[3:], mask[::2], mask.expand(2, 40, 30)):
        bits = kernels.pack_mask(view)
        assert torch.equal(bits, reference.pack_mask(view))
        assert torch.equal(kernels.unpack_mask(bits, view.shape), view)


def test_any_non_zero_byte_is_true(level: str) -> None:
    mask = torch.arange(256).to(torch.uint8).view(torch.bool)
    assert kernels.unpack_mask(kernels.pack_mask(mask), (256,)).sum() == 255


def test_unpack_reads_bits_at_an_odd_address(level: str) -> None:
    bits = torch.randint(0, 256, (101,), dtype=torch.uint8)[1:]
    assert torch.equal(kernels.unpack_mask(bits, (800,)), reference.unpack_mask(bits, (800,)))


def test_pack_refuses_what_is_no_mask() -> None:
    with pytest.raises(OptionError, match="bool"):
        kernels.pack_mask(torch.ones(3))
    with pytest.raises(OptionError, match=r"\[2\]"):
        kernels.unpack_mask(torch.zeros(1, dtype=torch.uint8), (3, 3))
    with pytest.raises(OptionError, match="uint8"):
        kernels.unpack_mask(torch.zeros(2), (3, 3))


@given(st.lists(st.booleans(), max_size=300))
def test_packing_round_trips(entries: list[bool]) -> None:
    mask = torch.tensor(entries, dtype=torch.bool)
    bits = kernels.pack_mask(mask)
    assert torch.equal(kernels.unpack_mask(bits, mask.shape), mask)
    assert sum(int(byte).bit_count() for byte in bits) == sum(entries)


# selection


@pytest.mark.parametrize("n", SIZES)
def test_select_agrees_with_the_reference(n: int, level: str) -> None:
    for kind, scores in scores_of_every_kind(n).items():
        for k in counts_to_try(n):
            mask = kernels.select_k(scores, k)
            assert mask.dtype == torch.bool
            assert mask.sum() == k, (kind, k)
            assert torch.equal(mask, truth(n, kind, k)), (kind, k)


def test_select_does_not_depend_on_threads(level: str, threads: int) -> None:
    for kind, scores in scores_of_every_kind(400_001).items():
        for k in (1, 40_000, 300_000):
            assert torch.equal(kernels.select_k(scores, k), truth(400_001, kind, k)), (kind, k)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [65, 70_003])
def test_select_is_exact_in_every_float_type(dtype: torch.dtype, n: int, level: str) -> None:
    for kind, scores in scores_of_every_kind(n, seed=1).items():
        cast = scores.to(dtype)
        for k in counts_to_try(n):
            assert torch.equal(kernels.select_k(cast, k), reference.select_k(cast, k)), (kind, k)


def test_select_tells_doubles_apart_that_are_one_float(level: str) -> None:
    for n in (50, 1000, 80_000):
        scores = 1.0 + torch.randperm(n, generator=torch.Generator().manual_seed(0)).double() * 1e-15
        assert torch.equal(kernels.select_k(scores, n // 3), scores >= scores.sort(descending=True).values[n // 3 - 1])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 4),
        (33, 4),
        (5000, 4),
        (40_001, 4),
        (100, 7),
        (65, 8),
        (70, 16),
        (70, 17),
        (5, 64),
        (9, 65),
        (300, 576),
        (3, 70_000),
    ],
)
def test_rows_are_selected_one_by_one(shape: tuple[int, int], level: str, threads: int) -> None:
    rows, n = shape
    g = torch.Generator().manual_seed(rows)
    per_row = torch.randint(0, n + 1, (rows,), generator=g)
    for scores in (torch.randn(shape, generator=g), torch.randint(0, 3, shape, generator=g).float()):
        assert torch.equal(kernels.select_k(scores, n // 2), reference.select_k(scores, n // 2))
        assert torch.equal(kernels.select_k(scores, per_row), reference.select_k(scores, per_row))
    double = torch.randint(0, 3, shape, generator=g).double()
    assert torch.equal(kernels.select_k(double, per_row), reference.select_k(double, per_row))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_rows_without_entries(shape: tuple[int, int]) -> None:
    assert kernels.select_k(torch.zeros(shape), 0).shape == shape


def test_select_takes_odd_layouts(level: str) -> None:
    base = torch.randn(301, 402)
    for view in (base.t(), base[:, 1:], base[::2], base[:, :4], base.view(-1)[1:], base[0].expand(5, 402)):
        k = view.shape[-1] // 3
        assert torch.equal(kernels.select_k(view, k), reference.select_k(view, k))


def test_select_reads_floats_at_an_odd_address(level: str) -> None:
    scores = torch.randn(70_000)
    raw = bytearray(b"x" + scores.numpy().tobytes())
    shifted = torch.frombuffer(raw, dtype=torch.float32, offset=1)
    assert shifted.data_ptr() % 4 != 0
    for n in (50, 1000, 70_000):
        assert torch.equal(kernels.select_k(shifted[:n], n // 3), reference.select_k(scores[:n], n // 3))


def test_select_ignores_autograd() -> None:
    scores = torch.randn(10, requires_grad=True)
    assert not kernels.select_k(scores, 3).requires_grad


@pytest.mark.parametrize("n", [3, 64, 100, 70_000])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_reported_with_its_place(n: int, k: int, dtype: torch.dtype, level: str) -> None:
    for bad in (float("nan"), -float("nan")):
        scores = torch.rand(n).to(dtype)
        scores[n // 2] = bad
        with pytest.raises(OptionError, match=f"NaN .*position {n // 2} of {n}"):
            kernels.select_k(scores, k)
    with pytest.raises(OptionError, match="NaN"):
        kernels.select_k(scores.view(1, n).expand(3, n), k)


@pytest.mark.parametrize(
    ("scores", "k", "says"),
    [
        (torch.zeros(3), 4, r"k = 4 lies outside \[0, 3\]"),
        (torch.zeros(3), -1, r"k = -1 lies outside \[0, 3\]"),
        (torch.zeros(2, 3), torch.tensor([1, 4]), "k = 4"),
        (torch.zeros(2, 3), torch.tensor([1, 1, 1]), "one per row"),
        (torch.zeros(2, 3), torch.tensor([1.0, 1.0]), "whole number"),
        (torch.zeros(3), 0.5, "whole number"),
        (torch.zeros(2, 2, 2), 1, r"\[2, 2, 2\]"),
        (torch.zeros(3, dtype=torch.int64), 1, "int64"),
    ],
)
def test_select_refuses(scores: Tensor, k: int | Tensor, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        kernels.select_k(scores, k)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_select_properties(data: st.DataObject) -> None:
    numbers = st.floats(allow_nan=False, width=32) | st.sampled_from([0.0, -0.0, 1.0, float("inf"), float("-inf")])
    scores = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=150)), dtype=torch.float32)
    k = data.draw(st.integers(0, scores.numel()))
    mask = kernels.select_k(scores, k)
    assert torch.equal(mask, reference.select_k(scores, k))
    assert torch.equal(kernels.select_k(scores.double(), k), mask)
    if 0 < k < scores.numel():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("shape", [(100,), (7, 33), (40, 4), (0, 3), (3, 0)])
def test_the_torch_path_of_other_devices_agrees(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    for scores in (torch.randn(shape, generator=g), torch.randint(-1, 2, shape, generator=g).float() * 0.0):
        rows = scores if scores.dim() == 2 else scores[None]
        k = torch.randint(0, rows.shape[1] + 1, (rows.shape[0],), generator=g)
        assert torch.equal(_select_torch(rows, k), kernels.select_k(rows, k))


@pytest.mark.gpu
def test_cuda_selects_and_packs_the_same() -> None:
    for scores in scores_of_every_kind(10_000).values():
        assert torch.equal(kernels.select_k(scores.cuda(), 3000).cpu(), kernels.select_k(scores, 3000))
    mask = torch.rand(1001) < 0.5
    bits = kernels.pack_mask(mask.cuda())
    assert torch.equal(bits.cpu(), kernels.pack_mask(mask))
    assert torch.equal(kernels.unpack_mask(bits, (1001,)).cpu(), mask)
    weight = torch.randn(1001)
    assert torch.equal(kernels.apply_mask_(weight.cuda(), mask.cuda()).cpu(), kernels.apply_mask_(weight, mask))


def test_a_sample_that_misleads_does_not_change_the_result(level: str, threads: int) -> None:
    """Scores that are huge exactly where the fixed sample looks: the long-row kernel must fall back to counting."""
    n, size = 1 << 17, 1 << 13
    scores = torch.rand(n, generator=torch.Generator().manual_seed(0))
    state, step = 0x9E3779B97F4A7C15, n // size
    for i in range(size):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        scores[i * step + ((state >> 32) * step >> 32)] += 10.0
    for k in (100, size, size + 1, n // 2, n - 100):
        assert torch.equal(kernels.select_k(scores, k), reference.select_k(scores, k)), k


def test_clustered_scores_do_not_overflow_the_result(level: str) -> None:
    """All the candidates lie in one piece of the range, as where layers of different scale are ranked together."""
    scores = torch.cat([torch.rand(400_000) * 1e-3, 1 + torch.rand(40_000), torch.rand(400_000) * 1e-3])
    for k in (10_000, 40_000, 40_001, 300_000):
        assert torch.equal(kernels.select_k(scores, k), reference.select_k(scores, k)), k


def test_denormals_keep_their_order_when_the_cpu_flushes_them(level: str) -> None:
    scores = torch.arange(1, 1001).to(torch.int32).view(torch.float32)  # the smallest denormals, ascending
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        mask = kernels.select_k(scores, 10)
    finally:
        torch.set_flush_denormal(False)
    assert mask.nonzero().view(-1).tolist() == list(range(990, 1000))


# zeroing


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [*SIZES, 300_001])
def test_apply_mask_agrees_with_the_reference(n: int, dtype: torch.dtype, level: str) -> None:
    g = torch.Generator().manual_seed(n)
    mask = torch.rand(n, generator=g) < 0.2
    weight = torch.randn(n, generator=g).to(dtype)
    expected = reference.apply_mask_(weight.clone(), mask)
    out = kernels.apply_mask_(weight, mask)
    assert out is weight
    assert torch.equal(weight, expected)
    assert not torch.signbit(weight[~mask]).any()
    assert torch.equal(kernels.apply_mask_(weight, mask), expected)


def test_apply_mask_drops_nan_and_negative_zero(level: str) -> None:
    weight = torch.tensor([float("nan"), -0.0, float("inf"), -1.0] * 100)
    kernels.apply_mask_(weight, torch.zeros(400, dtype=torch.bool))
    assert weight.view(torch.int32).count_nonzero() == 0


def test_apply_mask_takes_odd_layouts_and_parameters(level: str) -> None:
    mask = torch.rand(30, 20) < 0.5
    weight = torch.nn.Parameter(torch.randn(30, 20))
    expected = weight.detach() * mask
    assert torch.equal(kernels.apply_mask_(weight, mask), expected)
    assert weight.requires_grad
    strided = torch.randn(20, 30).t()
    expected = strided * mask
    assert torch.equal(kernels.apply_mask_(strided, mask), expected)
    last = torch.randn(2, 20, 5, 6).to(memory_format=torch.channels_last)
    keep = torch.rand(2, 20, 5, 6) < 0.5
    expected = last * keep
    assert torch.equal(kernels.apply_mask_(last, keep.to(memory_format=torch.channels_last)), expected)


def test_apply_mask_refuses_a_mask_that_does_not_fit() -> None:
    weight = torch.ones(3)
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(OptionError, match=r"\[3\]"):
            kernels.apply_mask_(weight, mask)
    assert torch.equal(weight, torch.ones(3))
