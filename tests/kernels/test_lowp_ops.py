"""The low precision operators: what they compute, that they are traced, and that a changed weight is packed again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rarefy.errors import OptionError
from rarefy.kernels.lowp_ops import sparse_linear_bfloat16, sparse_linear_int8


def compressed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = weight != 0
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return weight[kept], crow, kept.nonzero()[:, 1].to(torch.int32)


def sparse(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) < 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(5,), (2, 70), (0,)])
def test_bfloat16(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    weight, x, bias = sparse(33, 50), torch.randn(*lead, 50).to(dtype), torch.randn(33)
    y = sparse_linear_bfloat16(x, *compressed(weight), bias)
    assert y.dtype == dtype and y.shape == (*lead, 33)
    expected = F.linear(x.bfloat16().double(), weight.bfloat16().double(), bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_int8_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (7, 40), generator=g, dtype=torch.int8) * (torch.rand(7, 40, generator=g) < 0.4)
    x = torch.randint(0, 256, (2, 3, 40), generator=g, dtype=torch.uint8)
    values, crow, col = compressed(weight)
    y = sparse_linear_int8(x, 1.0, 9, values, crow, col, torch.ones(7))
    assert torch.equal(y, ((x.long() - 9) @ weight.long().T).float())
    scale, bias = torch.rand(7, generator=g), torch.randn(7, generator=g)
    y = sparse_linear_int8(x, 0.25, 9, values, crow, col, scale, bias)
    torch.testing.assert_close(y, 0.25 * scale * ((x.long() - 9) @ weight.long().T).float() + bias)


def test_what_changed_is_packed_again() -> None:
    weight, x = sparse(9, 20), torch.randn(4, 20)
    values, crow, col = compressed(weight)
    before = sparse_linear_bfloat16(x, values, crow, col)
    assert torch.equal(before, sparse_linear_bfloat16(x, values, crow, col))
    values.mul_(2)
    torch.testing.assert_close(sparse_linear_bfloat16(x, values, crow, col), 2 * before)
    bias = torch.ones(9)
    torch.testing.assert_close(sparse_linear_bfloat16(x, values, crow, col, bias), 2 * before + 1)
    bias.zero_()
    torch.testing.assert_close(sparse_linear_bfloat16(x, values, crow, col, bias), 2 * before)
    whole, other = torch.tensor([3], dtype=torch.int8), (torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32))
    ones = torch.ones(1, 2, dtype=torch.uint8)
    assert sparse_linear_int8(ones, 1.0, 0, whole, *other, torch.ones(1)).item() == 3
    whole.fill_(-5)
    assert sparse_linear_int8(ones, 1.0, 0, whole, *other, torch.ones(1)).item() == -5


def test_they_are_traced() -> None:
    values, crow, col = compressed(sparse(8, 16))
    x, eight = torch.randn(3, 16), torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    q, scale = values.mul(20).round().clamp(-127, 127).to(torch.int8), torch.rand(8)
    torch.library.opcheck(torch.ops.rarefy.sparse_linear_bfloat16, (x, values, crow, col, torch.ones(8)))
    torch.library.opcheck(torch.ops.rarefy.sparse_linear_int8, (eight, 0.5, 3, q, crow, col, scale, None))
    both = torch.compile(
        lambda a, b: (
            sparse_linear_bfloat16(a, values, crow, col) + 1,
            sparse_linear_int8(b, 0.5, 3, q, crow, col, scale),
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        found = both(x, eight)
    assert torch.equal(found[0], sparse_linear_bfloat16(x, values, crow, col) + 1)
    assert torch.equal(found[1], sparse_linear_int8(eight, 0.5, 3, q, crow, col, scale))


def test_the_references_agree() -> None:
    from rarefy.kernels import lowp_ops

    values, crow, col = compressed(sparse(8, 16))
    x, bias = torch.randn(3, 16), torch.randn(8)
    torch.testing.assert_close(
        lowp_ops._bfloat16_reference(x, values, crow, col, bias),
        sparse_linear_bfloat16(x, values, crow, col, bias),
        rtol=1e-4,
        atol=1e-4,
    )
    q, eight = values.mul(20).to(torch.int8), torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    scale = torch.rand(8)
    torch.testing.assert_close(
        lowp_ops._int8_reference(eight, 0.1, 7, q, crow, col, scale, bias),
        sparse_linear_int8(eight, 0.1, 7, q, crow, col, scale, bias),
    )


def test_what_does_not_fit_is_refused() -> None:
    values, crow, col = compressed(sparse(8, 16))
    x = torch.randn(3, 16)
    with pytest.raises(OptionError, match=r"no gradient; call it under torch.no_grad"):
        sparse_linear_bfloat16(x.requires_grad_(), values, crow, col)
    x = x.detach()
    with pytest.raises(OptionError, match=r"x is torch.float64"):
        sparse_linear_bfloat16(x.double(), values, crow, col)
    with pytest.raises(OptionError, match=r"the bias must be \[8\]; it is \[7\]"):
        sparse_linear_bfloat16(x, values, crow, col, torch.ones(7))
    with pytest.raises(OptionError, match=r"values \[nnz\]"):
        sparse_linear_bfloat16(x, values[1:], crow, col)
    with pytest.raises(OptionError, match="column"):
        sparse_linear_bfloat16(x[:, :3], values, crow, col)
    q, eight = values.to(torch.int8), torch.zeros(3, 16, dtype=torch.uint8)
    with pytest.raises(OptionError, match=r"scale must be float32 \[8\]"):
        sparse_linear_int8(eight, 1.0, 0, q, crow, col, torch.ones(7))
    with pytest.raises(OptionError, match="zero point 256"):
        sparse_linear_int8(eight, 1.0, 256, q, crow, col, torch.ones(8))
    with pytest.raises(OptionError, match=r"must be one of torch.uint8"):
        sparse_linear_int8(eight.float(), 1.0, 0, q, crow, col, torch.ones(8))
