"""Soft shrinkage against its rivals: x2 super-resolution of 8x8 digits with a small EDSR at 95 % sparsity.

    python benchmarks/soft_shrinkage.py [--seeds 0 1] [--stage1 1500] [--stage2 700] [--batch 16]

Digits of 8x8 pixels from their 4x4 averages; 3 residual blocks of 32 channels, no batch normalisation, the 7 layers of the
body sparse, L1 loss, Adam 2e-3. All methods train for both stages together. The flips are weights that enter
or leave a layer's low set in one step, as a share, over the first and the last 100 steps of stage 1. PSNR on 500 test digits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.metrics import psnr

CHANNELS, BODY = 32, ["body.*"]


class Block(nn.Module):
    """Two convolutions and what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu(self.first(x)))
        return x + out


class SmallEDSR(nn.Module):
    """Head, body, twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.body = nn.Sequential(*(Block() for _ in range(3)), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        self.tail = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x)
        out: Tensor = self.tail(features + self.body(features))
        return out


def digits() -> tuple[Tensor, Tensor]:
    """Return training and test digits in [0, 1]."""
    bundle = rarefy.data.load("digits")
    return tuple(x.float() / x.max() for x in (bundle.train_x, bundle.test_x))  # type: ignore[return-value]


def low_sets(model: SmallEDSR, sparsity: float) -> list[Tensor]:
    """Return the smallest weights of each body layer."""
    weights = [p.detach().abs().flatten() for n, p in model.named_parameters() if n.startswith("body") and p.ndim == 4]
    return [~rarefy.kernels.select_k(w, int((1 - sparsity) * w.numel())) for w in weights]


def run(
    train: Tensor, method: str, options: dict[str, Any], seed: int, stages: tuple[int, int], batch: int
) -> tuple[Any, ...]:
    """Train; return the model and the flip rates of the first and the last 100 steps of stage 1."""
    torch.manual_seed(seed)
    model = SmallEDSR()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    sparse = rarefy.sparsify(
        model, method, include=BODY, optimizer=optimizer, seed=seed, total_steps=sum(stages), **options
    )
    generator = torch.Generator().manual_seed(seed)
    flips: dict[str, list[float]] = {"first": [], "last": []}
    before: list[Tensor] = []
    for step in range(sum(stages)):
        target = train[torch.randint(len(train), (batch,), generator=generator)]
        optimizer.zero_grad()
        F.l1_loss(model(F.avg_pool2d(target, 2)), target).backward()
        optimizer.step()
        when = "first" if step <= 100 else "last" if stages[0] - 100 <= step < stages[0] - 1 else ""
        if when:
            now = low_sets(model, 0.95)
            if before:
                changed = sum(int((a ^ b).sum()) for a, b in zip(now, before, strict=True))
                flips[when].append(changed / sum(a.numel() for a in now))
            before = now
        else:
            before = []
    sparse.finalize()
    return model, *(statistics.mean(values) for values in flips.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--stage1", type=int, default=1500)
    parser.add_argument("--stage2", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    train, test = digits()
    small, first = F.avg_pool2d(test, 2), args.stage1
    bilinear = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    print(f"bilinear: {psnr(bilinear, test):.2f} dB\n\n| method | PSNR | zeros in the body | flips first | last | s |")
    print("|---|---|---|---|---|---|")
    plans: list[tuple[str, str, dict[str, Any]]] = [
        ("dense", "dense", {}),
        ("from scratch, random mask", "static", {"sparsity": 0.95, "allocation": "uniform"}),
        ("dense, one-shot, fine-tuned", "magnitude", {"sparsity": 0.95, "allocation": "uniform", "start": first}),
        ("IHT (beta 0)", "issp", {"sparsity": 0.95, "beta": 0.0, "stop": first}),
        *((f"ISS-P beta {b:g}", "issp", {"sparsity": 0.95, "beta": b, "stop": first}) for b in (0.95, 0.99, 0.998)),
        ("ISS-R delta 2e-5", "iss-r", {"sparsity": 0.95, "delta": 2e-5, "stop": first}),
        ("GReg growth 1e-2", "greg", {"sparsity": 0.95, "growth": 1e-2, "stop": first}),
    ]
    for label, method, options in plans:
        start, found = time.perf_counter(), []
        for seed in args.seeds:
            model, early, late = run(train, method, options, seed, (args.stage1, args.stage2), args.batch)
            with torch.no_grad():
                weights = [p for n, p in model.named_parameters() if n.startswith("body") and p.ndim == 4]
                zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
                found.append((psnr(model(small).clamp(0, 1), test), zeros, early, late))
        values = [found_one[0] for found_one in found]
        zeros, early, late = (statistics.mean(column) for column in list(zip(*found, strict=True))[1:])
        print(
            f"| {label} | {statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f}) | {zeros:.4f} | {early:.1e} "
            f"| {late:.1e} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
