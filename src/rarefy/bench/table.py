"""The kernel table: sparse products beside dense ones over shapes and sparsities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rarefy.bench.machine import Ceilings
from rarefy.deploy.measure import race
from rarefy.kernels import sparse_layers
from rarefy.kernels.native import threads


@dataclass(frozen=True)
class Product:
    """A weight [rows, cols] times `columns` activations: pixels of planes ("planes") or samples of features ("linear")."""

    rows: int
    cols: int
    columns: int
    form: str = "planes"

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols} {self.form} {self.columns}"


PRODUCTS = (
    Product(64, 32, 12544),
    Product(256, 256, 784),
    Product(512, 512, 196),
    Product(1024, 1024, 128),
    Product(2048, 512, 128, "linear"),
    Product(512, 2048, 128, "linear"),
    Product(1024, 1024, 16, "linear"),
    Product(1024, 1024, 1, "linear"),
)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Row:
    """One measurement. Times are medians in seconds; the best dense of torch's default and oneDNN with a packed weight.

    `gflops` counts kept weights only, `share_of_peak` is that over the machine's multiply-adds, and `share_of_dram` the bytes
    that cannot be avoided (kept values and their columns, activations in and out) over the measured bandwidth of memory.
    """

    product: str
    sparsity: float
    threads: int
    seconds: float
    dense_seconds: float
    dense: str
    gflops: float
    share_of_peak: float
    share_of_dram: float

    @property
    def speedup(self) -> float:
        """Return how many times faster than the best dense."""
        return self.dense_seconds / self.seconds


def measure(
    machine: Ceilings,
    products: Iterable[Product] = PRODUCTS,
    sparsities: Sequence[float] = SPARSITIES,
    seconds: float = 0.03,
) -> Iterator[Row]:
    """Yield a row for each product and sparsity, with random zeros and torch's current number of threads."""
    for product in products:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(product.rows, product.cols, generator=generator)
        order = torch.rand(weight.numel(), generator=generator).argsort()
        x, dense = _dense(product, weight, generator)
        for sparsity in sparsities:
            kept = weight.flatten().index_fill(0, order[: round(sparsity * weight.numel())], 0).view_as(weight)
            nnz = int(kept.count_nonzero())
            times = race({"sparse": _sparse(product, kept, x), **dense}, seconds)
            own = times.pop("sparse")
            best = min(times, key=times.__getitem__)
            flops = 2 * nnz * product.columns
            moved = 8 * nnz + 4 * product.columns * (product.rows + product.cols)
            yield Row(
                str(product), sparsity, threads(), own, times[best], best, flops / own / 1e9,
                flops / own / 1e9 / machine.gflops, moved / own / 1e9 / machine.bandwidth["DRAM"],
            )  # fmt: skip


def break_even(rows: Iterable[Row]) -> dict[str, float]:
    """Return for each product the sparsity from which sparse is faster.

    Between two measured ones it interpolates the logarithm of the speed-up. Below the first measured sparsity, that one is
    given; a product that never wins is left out.
    """
    found: dict[str, float] = {}
    last: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: r.sparsity):
        if row.product not in found and row.speedup >= 1:
            before = last.get(row.product)
            found[row.product] = row.sparsity
            if before is not None:
                low, high = math.log(before.speedup), math.log(row.speedup)
                found[row.product] -= (row.sparsity - before.sparsity) * high / (high - low) if high > low else 0
        last[row.product] = row
    return found


def as_json(machines: Sequence[Ceilings], rows: Sequence[Row]) -> dict[str, object]:
    """Return everything as plain data for JSON."""
    return {
        "machine": [asdict(m) for m in machines],
        "rows": [asdict(r) | {"speedup": r.speedup} for r in rows],
        "break_even": {str(m.threads): break_even([r for r in rows if r.threads == m.threads]) for m in machines},
    }


def _sparse(product: Product, weight: Tensor, x: Tensor) -> Callable[[], object]:
    if product.form == "linear":
        layer, batch = sparse_layers.sparse_linear_layer(weight, None, batch=product.columns), product.columns
    else:
        layer, batch = sparse_layers.sparse_pointwise_layer(weight, None, (1, product.columns)), 1
    out = torch.empty(product.columns * product.rows)
    arrays = [x.numpy()], out.numpy()
    return lambda: layer.run(*arrays, batch, threads())


def _dense(
    product: Product, weight: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Callable[[], object]]]:
    """Return the activations, and the dense ways."""
    features = product.form == "linear"
    x = torch.randn(product.columns, product.cols, generator=generator)
    if not features:
        x = x.T.contiguous()
    ways: dict[str, Callable[[], object]] = {
        "torch": (lambda: torch.nn.functional.linear(x, weight)) if features else (lambda: weight @ x)
    }
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, product.columns)
        samples = x if features else x.T.contiguous()
        ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(samples, packed, None, "none", [], "")
    return x, ways
