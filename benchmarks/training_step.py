"""One linear layer's training step on kept values: forward + dX + dW, float32, beside dense and other sparse kernels.

    python benchmarks/training_step.py [--threads 1 2] [--json FILE]

"oneDNN" is three dense products at the speed of PyTorch's oneDNN linear layer with packed weights, measured here; "torch" is
F.linear and its autograd; "CSR" is torch.sparse's own. `sparseprop` (IST-DASLab), where installed, runs its raw kernels on
activations that are feature-major already; set OMP_NUM_THREADS for it. Medians in turns, milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from rarefy import kernels
from rarefy.kernels.native import native

SHAPES = [(512, 512), (512, 2048), (1024, 1024), (2048, 512)]


def medians(ways: dict[str, Callable[[], object]], seconds: float = 0.04) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    end = time.perf_counter() + seconds * len(ways)
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 7:
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in samples.items()}


def sparseprop_step(
    crow: torch.Tensor, col: torch.Tensor, values: torch.Tensor, x: torch.Tensor, dy: torch.Tensor
) -> Callable[[], object] | None:
    """Return sparseprop's raw forward and backward, or None where its extension module is not installed."""
    try:
        import backend
    except ImportError:
        return None
    xt, dyt = x.t().contiguous().numpy(), dy.t().contiguous().numpy()
    rows, cols, v = crow.int().numpy(), col.numpy(), values.numpy()
    y, dx, dv = torch.zeros(dyt.shape).numpy(), torch.zeros(xt.shape).numpy(), torch.zeros(values.shape).numpy()

    def run() -> None:
        for out in (y, dx, dv):  # its kernels add
            out.fill(0)
        backend.sparse_linear_vectorized_forward(xt, rows, cols, v, y)
        backend.sparse_linear_vectorized_backward(xt, rows, cols, v, dyt, dx, dv)

    return run


def step(m: int, k: int, n: int, sparsity: float, threads: int) -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(m, k, generator=g) >= sparsity
    weight, x, dy = (
        torch.randn(m, k, generator=g) * mask,
        torch.randn(n, k, generator=g),
        torch.randn(n, m, generator=g),
    )
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    col, values = mask.nonzero()[:, 1].int(), weight[mask]
    plan = native.linear_training(crow.numpy(), col.numpy(), k, n, threads)
    y, dx, dv = torch.empty(n, m), torch.empty(n, k), torch.empty(values.numel())
    arrays = {name: t.numpy() for name, t in dict(v=values, x=x, dy=dy, y=y, dx=dx, dv=dv).items()}

    def ours() -> None:
        plan.forward(arrays["v"], arrays["x"], None, arrays["y"], threads)
        plan.input_gradient(arrays["v"], arrays["dy"], arrays["dx"], threads)
        plan.values_gradient(arrays["x"], arrays["dy"], arrays["dv"], threads)

    ours()
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dx, dy @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dv, (dy.t() @ x)[mask], rtol=1e-4, atol=1e-3)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, n)
    csr, csr_t = weight.to_sparse_csr(), weight.t().contiguous().to_sparse_csr()
    pattern = torch.sparse_csr_tensor(csr.crow_indices(), csr.col_indices(), torch.zeros(values.numel()), size=(m, k))
    xt, dyt = x.t().contiguous(), dy.t().contiguous()
    leaves = [x.clone().requires_grad_(), values.clone().requires_grad_(), weight.clone().requires_grad_()]

    def module() -> None:
        kernels.sparse_linear(leaves[0], leaves[1], crow, col).backward(dy)

    def dense_module() -> None:
        F.linear(leaves[0], leaves[2]).backward(dy)

    def torch_csr() -> None:
        csr @ xt, csr_t @ dyt, torch.sparse.sampled_addmm(pattern, dyt, x, beta=0.0)

    ways: dict[str, Callable[[], object]] = {
        "rarefy": ours,
        "rarefy, autograd": module,
        "oneDNN / 3": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "torch, autograd": dense_module,
        "CSR": torch_csr,
    }
    peer = sparseprop_step(crow, col, values, x, dy)
    if peer is not None:
        ways["sparseprop"] = peer
    found = medians(ways)
    found["oneDNN"] = 3 * found.pop("oneDNN / 3")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for m, k in SHAPES:
            for n in (128, 784):
                for sparsity in (0.9, 0.95, 0.99):
                    found = step(m, k, n, sparsity, threads)
                    rows.append({"threads": threads, "m": m, "k": k, "n": n, "sparsity": sparsity, "ms": found})
                    said = ", ".join(f"{name} {ms:.2f}" for name, ms in found.items())
                    gain = found["oneDNN"] / found["rarefy"]
                    print(f"{threads} thread(s) {m}x{k}, {n}, {sparsity:.0%}: {said}; {gain:.1f}x oneDNN", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
