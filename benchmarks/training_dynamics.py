"""How training bends a network's kernels, dense against sparse, on the digits images (Dou & Liang, arXiv 1901.07114).

    python benchmarks/training_dynamics.py [--methods dense static set rigl small-dense] [--sparsity 0.9] [--seeds 3]
        [--hidden 100] [--epochs 60] [--decay 0] [--json FILE]

A two-layer ReLU network, squared loss (1/2n) sum ||y - f||^2 on centred one-hot targets, SGD with momentum 0.9, learning
rate 0.1 with a cosine, batch 100; `set` and `rigl` update every 20 steps; masks by ERK. Nothing is tuned. The kernels are
those of 600 training images: H of the last features, K of the gradients of kept weights. "regression" is the test accuracy
of kernel ridge regression with that kernel, ridge 1e-3 of its mean diagonal, on the same 600 images; "ridgeless" with none.
Means and standard deviations over seeds, which change weights, masks and the order of the data.

`--flow` trains on, on those 600 images alone, with full batches and decay 1e-3, and shows the identities that hold at
stationarity: the network against kernel regression with its own H on test images (D5), the residual in the null spaces (D4).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy import data
from rarefy.analysis import KernelRegression, KernelTrack, kernel_report, kernel_stats, kernels, ridge_fit

PROBE, BATCH, EVERY, RIDGE = 600, 100, 20, 1e-3


def build(method: str, hidden: int, sparsity: float) -> nn.Sequential:
    if method == "small-dense":  # as many parameters as the sparse network keeps
        kept = round((1 - sparsity) * hidden * 74) + hidden + 10
        hidden = (kept - 10) // 75
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bundle = data.load("digits")
    x, new = (t.float().flatten(1) / t.float().max() for t in (bundle.train_x, bundle.test_x))
    return x - x.mean(0), bundle.train_y.long(), new - x.mean(0), bundle.test_y.long()


def targets(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, 10).float() - 0.1


def accuracy(made: Tensor, labels: Tensor) -> float:
    return float((made.argmax(1) == labels).double().mean())


def describe(
    net: nn.Module, masks: dict[str, Tensor] | None, x: Tensor, y: Tensor, new: Tensor, z: Tensor
) -> dict[str, float]:
    """Measure both kernels at 600 training images, and what regression with them makes of the test images."""
    found = kernels(net, torch.cat([x[:PROBE], new]), masks)
    aim = targets(y[:PROBE])
    result: dict[str, float] = {}
    for name, kernel in (("H", found.h), ("K", found.k)):
        own, cross = kernel[:PROBE, :PROBE], kernel[PROBE:, :PROBE]
        stats = kernel_stats(own, aim, ridge=RIDGE / PROBE)
        ridge = RIDGE * float(own.trace()) / PROBE**2
        result |= {
            f"{name} alignment": stats.alignment,
            f"{name} effective rank": stats.effective_rank,
            f"{name} rank": stats.rank,
            f"{name} top 10": stats.top_energy,
            f"{name} unexplained": stats.unexplained,
            f"{name} leave one out": stats.leave_one_out,
            f"{name} regression": accuracy(KernelRegression(own, aim, ridge).predict(cross), z),
            f"{name} ridgeless": accuracy(KernelRegression(own, aim).predict(cross), z),
        }
    return result


def train(method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    x, y, new, z = load()
    torch.manual_seed(seed)
    net = build(method, args.hidden, args.sparsity)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=args.decay)
    steps = args.epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparse = None
    if method not in ("dense", "small-dense"):
        options: dict[str, Any] = {} if method == "static" else {"every": EVERY}
        sparse = rarefy.sparsify(
            net, method, sparsity=args.sparsity, optimizer=optimizer, total_steps=steps, seed=seed, **options
        )

    def masks() -> dict[str, Tensor] | None:
        return sparse.masks() if sparse is not None else None

    track = KernelTrack(x[:PROBE], targets(y[:PROBE]), every=max(1, steps // 6), ridge=RIDGE / PROBE)
    before = describe(net, masks(), x, y, new, z)
    track(net, 0, masks())
    order = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH)[: len(x) // BATCH]:
            optimizer.zero_grad()
            ((targets(y[batch]) - net(x[batch])).square().sum() / (2 * BATCH)).backward()
            optimizer.step()
            schedule.step()
            step += 1
            track(net, step, masks())
    report = kernel_report(net, x[:PROBE], targets(y[:PROBE]), masks())
    last = track.moments[-1]
    result: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "accuracy": accuracy(net(new).detach(), z),
        "before": before,
        "after": describe(net, masks(), x, y, new, z),
        "H drift": last.drift_h,
        "K drift": last.drift_k,
        "gradient norm": report.gradient_norm,
        "projection gap": report.projection_gap,
        "best residual": report.best_residual,
        "energy": [{"step": m.step, "loss": m.loss, **m.energy} for m in track.moments],
        "curve": [{"step": m.step, "H alignment": m.h.alignment, "K alignment": m.k.alignment, "H drift": m.drift_h,
                   "K drift": m.drift_k} for m in track.moments],
    }  # fmt: skip
    if args.flow:
        result["flow"] = flow(net, masks(), x, y, new, args.flow)
    return result


def flow(
    net: nn.Module, masks: dict[str, Tensor] | None, x: Tensor, y: Tensor, new: Tensor, steps: int
) -> dict[str, float]:
    """Full batches in float64 with decay 1e-3 on all but the last bias, on kept weights, until nearly stationary."""
    net, decay = net.double(), 1e-3
    x, aim, new = x[:PROBE].double(), targets(y[:PROBE]).double(), new.double()
    named = dict(net.named_parameters())
    optimizer = torch.optim.Adam(named.values(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-7)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (aim - net(x)).square().sum() / (2 * PROBE)
        loss = loss + decay / 2 * sum(p.square().sum() for n, p in named.items() if n != "2.bias")
        loss.backward()
        for name, mask in (masks or {}).items():
            named[name].grad.mul_(mask)  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    norm = float(torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None]).norm())
    made = net(new).detach()
    fitted = ridge_fit(kernels(net, x, masks), aim, decay, kernels(net, new, masks))
    report = kernel_report(net, x, aim, masks, decay=decay)
    return {
        "gradient norm": norm,
        "D5 on training images": float(report.ridge_gap or 0.0),
        "D5 on test images": float((made - fitted).abs().max()),
        "rank H": report.rank_h,
        "rank K": report.rank_k,
        "residual in null(H)": report.residual_in_null_h,
        "residual in null(K)": report.residual_in_null_k,
    }


def spread(values: list[float], digits: int = 3) -> str:
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def show(runs: list[dict[str, Any]], methods: list[str]) -> None:
    for kernel in ("H", "K"):
        keys = (
            "alignment",
            "effective rank",
            "rank",
            "top 10",
            "unexplained",
            "leave one out",
            "regression",
            "ridgeless",
        )
        print(f"\n| {kernel} | when | {' | '.join(keys)} | drift |\n|---|---|{'---|' * (len(keys) + 1)}")
        for method in methods:
            mine = [run for run in runs if run["method"] == method]
            for when in ("before", "after"):
                cells = [spread([r[when][f"{kernel} {key}"] for r in mine]) for key in keys]
                drift = spread([r[f"{kernel} drift"] for r in mine]) if when == "after" else "0"
                print(f"| {method} | {when} | {' | '.join(cells)} | {drift} |")
    print("\n| method | test accuracy % | gradient norm | projection gap | best residual |\n|---|---|---|---|---|")
    for method in methods:
        mine = [run for run in runs if run["method"] == method]
        cells = [spread([100 * r["accuracy"] for r in mine], 2)]
        cells += [spread([r[key] for r in mine], 4) for key in ("gradient norm", "projection gap", "best residual")]
        print(f"| {method} | {' | '.join(cells)} |")
    if "flow" in runs[0]:
        keys = list(runs[0]["flow"])
        print(f"\n| stationary | {' | '.join(keys)} |\n|---|{'---|' * len(keys)}")
        for run in runs:
            print(
                f"| {run['method']}, seed {run['seed']} | {' | '.join(format(run['flow'][k], '.3g') for k in keys)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dense", "static", "set", "rigl", "small-dense"])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--flow", type=int, default=0, help="steps of full-batch training to stationarity")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, runs = time.process_time(), []
    for method in args.methods:
        runs += [train(method, seed, args) for seed in range(args.seeds)]
    show(runs, args.methods)
    print(f"\n{time.process_time() - start:.0f} s of one thread")
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
