"""Kernels compute where their inputs are, and in their dtypes, whatever PyTorch's default device and dtype are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rarefy import kernels
from rarefy.kernels import bitpack, n_m, sampling
from rarefy.kernels.sparse_layers import sparse_linear_layer
from rarefy.patterns import NM

WEIGHT = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
MASK = NM(2, 4).project(WEIGHT.abs(), 2)
FLAT = MASK.view(128, 8)  # of a convolution with 8 inputs
CROW, FLAT_CROW = (torch.cat([torch.zeros(1, dtype=torch.int64), m.sum(1).cumsum(0)]) for m in (MASK, FLAT))
COL, FLAT_COL = (m.nonzero()[:, 1].int() for m in (MASK, FLAT))
IMAGE = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2))
K = torch.full((32,), 2)


def trained(run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    given = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*given)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in given if t.grad is not None)]


def by_n_m(transposable: bool) -> list[Tensor]:
    index = n_m.n_m_index(MASK, 4, 4, transposable=transposable)
    found = trained(lambda x, w: n_m.n_m_linear(x, n_m.n_m_gather(w, index), index), X, WEIGHT)
    return [*found, index.index, index.mask(), n_m.n_m_dense(n_m.n_m_gather(WEIGHT, index), index)]


def layer() -> list[Tensor]:
    y = X.new_empty(5, 32)
    sparse_linear_layer(WEIGHT * MASK, None).run([X.numpy()], y.numpy(), 5, 1)
    return [y]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "n_m": lambda: by_n_m(False),
    "n_m transposable": lambda: by_n_m(True),
    "transposable": lambda: [kernels.transposable_nm(WEIGHT, 2, 4, how) for how in ("fast", "exact", "approx")],
    "select": lambda: [kernels.select_k(WEIGHT, 3), kernels.select_k(WEIGHT, K)],
    "bits": lambda: [bits := bitpack.pack_mask(MASK), bitpack.unpack_mask(bits, (32, 32))],
    "sparse linear": lambda: trained(lambda x, v: kernels.sparse_linear(x, v, CROW, COL), X, WEIGHT[MASK]),
    "sparse conv": lambda: trained(
        lambda x, v: kernels.sparse_conv2d(x, v, FLAT_CROW, FLAT_COL, None, (128, 8, 1, 1)), IMAGE, WEIGHT[MASK]
    ),
    "simplex": lambda: [kernels.capped_simplex(WEIGHT.abs(), 0.5, 3)],
    "sample": lambda: [sampling.sample(n, 20, torch.Generator().manual_seed(0)) for n in (30, 3000)],
    "layer": layer,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_defaults_do_not_matter(name: str) -> None:
    wanted = CALLS[name]()
    with torch.device("meta"):
        elsewhere = CALLS[name]()
    torch.set_default_dtype(torch.float64)
    try:
        wide = CALLS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    for want, *others in zip(wanted, elsewhere, wide, strict=True):
        assert all(torch.equal(want, other) and other.dtype == want.dtype for other in others)
