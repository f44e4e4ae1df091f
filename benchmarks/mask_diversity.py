"""Does the number of masks that a pattern allows tell how accurate its networks are?

    RAREFY_DATA=... python benchmarks/mask_diversity.py [--dataset fashion-mnist] [--seeds 5] [--plot picture.svg]

An MLP 784-128-128-10 learns from the first 8,000 training images for 3 epochs (Adam 1e-3, batch 128), is pruned once by
magnitude to a pattern (the two hidden layers; sparsity the same in both), and learns for 3 more epochs with the mask
frozen. All patterns of a seed start from the same dense network. Accuracy on the 10,000 test images, beside the log10 of
the number of masks per weight, as counted exactly and by the formula of arXiv 2102.08124; the picture shows differences from
the dense network of the same seed, trained as long.
"""

from __future__ import annotations

import argparse
import copy
import math
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rarefy
from rarefy.metrics import mask_diversity, mean, sd

PATTERNS = {
    0.5: ["unstructured", "4:8", "2:4", "1:2", "4:8t", "2:4t", "1:2t", "4x1", "8x1"],
    0.75: ["unstructured", "4:16", "2:8", "1:4", "4:16t", "2:8t", "1:4t", "4x1", "8x1"],
    0.875: ["unstructured", "2:16", "1:8", "2:16t", "1:8t", "4x1", "8x1"],
}
COLORS = {0.5: "#1b6ca8", 0.75: "#c8553d", 0.875: "#3a7d44"}
SHAPES = [(128, 784), (128, 128)]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


def per_weight(pattern: str, sparsity: float) -> tuple[float, float]:
    """log10 of the number of masks over the number of weights: exact, and by the formula."""
    counts = [mask_diversity(pattern, shape, sparsity) for shape in SHAPES]
    weights = sum(math.prod(shape) for shape in SHAPES)
    return (
        sum(math.log10(c.exact) for c in counts) / weights,
        sum(math.log10(c.formula) for c in counts) / weights,
    )


Row = tuple[
    float, str, float, float, float, float
]  # sparsity, pattern, log10 exact, by formula, minus dense, its spread


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def spearman(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def picture(rows: list[Row], title: str) -> str:
    """An SVG of accuracy minus dense against log diversity per weight, a panel for each sparsity; bars: standard deviations."""
    side, height, left, top, gap, bottom = 300, 380, 60, 64, 20, 60
    width = left + len(COLORS) * (side + gap)
    low = math.floor(min(r[4] - r[5] for r in rows))
    high = math.ceil(max(r[4] + r[5] for r in rows))
    far = 1.3 * max(r[2] for r in rows)  # room for the last label

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{left}" y="{height - 12}">log10 of the number of masks, per weight (exact)</text>',
    ]
    for value in range(low, high + 1):
        parts.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:+d}</text>')
    for panel, (sparsity, color) in enumerate(COLORS.items()):
        start = left + panel * (side + gap)
        parts.append(f'<text x="{start}" y="{top - 14}" fill="{color}">{100 * sparsity:g} % zeros</text>')
        for value in range(low, high + 1):
            stroke = "#777" if value == 0 else "#ddd"
            parts.append(f'<path d="M{start} {y(value):.1f}h{side}" stroke="{stroke}"/>')
        for step in range(int(far / 0.1) + 1):
            place = start + step * 0.1 / far * side
            parts.append(
                f'<text x="{place:.1f}" y="{height - bottom + 18}" text-anchor="middle">{step * 0.1:.1f}</text>'
            )
        for _, pattern, exact, _, middle, spread in (r for r in rows if r[0] == sparsity):
            x = start + exact / far * side
            parts.append(f'<path d="M{x:.1f} {y(middle - spread):.1f}V{y(middle + spread):.1f}" stroke="{color}"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y(middle):.1f}" r="3.5" fill="{color}"/>')
            parts.append(f'<text x="{x + 5:.1f}" y="{y(middle) - 5:.1f}" fill="{color}">{escape(pattern)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    data = rarefy.data.load(options.dataset)
    images = torch.cat([data.train_x[:8000], data.test_x]).flatten(1).float() / 255
    images = (images - images[:8000].mean()) / images[:8000].std()
    x, y, test_x, test_y = images[:8000], data.train_y[:8000], images[8000:], data.test_y
    found: dict[tuple[float, str], list[float]] = {(s, p): [] for s, patterns in PATTERNS.items() for p in patterns}
    dense: list[float] = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        start = network()
        learn(start, torch.optim.Adam(start.parameters(), 1e-3), x, y, 3, seed)
        unpruned = copy.deepcopy(start)
        learn(unpruned, torch.optim.Adam(unpruned.parameters(), 1e-3), x, y, 3, 1000 + seed)
        dense.append(accuracy(unpruned, test_x, test_y))
        for sparsity, pattern in found:
            model = copy.deepcopy(start)
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            method = rarefy.methods.make("magnitude", sparsity=sparsity, pattern=pattern, allocation="uniform")
            sparse = rarefy.sparsify(model, method, exclude="4", optimizer=optimizer)
            learn(model, optimizer, x, y, 3, 1000 + seed)
            sparse.finalize()
            found[sparsity, pattern].append(accuracy(model, test_x, test_y))
    print(f"dense: {mean(dense):.2f} +- {sd(dense):.2f} % ({options.seeds} seeds, {options.dataset})\n")
    print(
        "| zeros | pattern | log10 masks per weight | by the formula | accuracy | minus dense |\n|---|---|---|---|---|---|"
    )
    rows: list[Row] = []
    for (sparsity, pattern), values in found.items():
        exact, formula = per_weight(pattern, sparsity)
        paired = [value - whole for value, whole in zip(values, dense, strict=True)]
        rows.append((sparsity, pattern, exact, formula, mean(paired), sd(paired) or 0.0))
        print(
            f"| {100 * sparsity:g} % | {pattern} | {exact:.4f} | {formula:.4f} | {mean(values):.2f} +- {sd(values):.2f} "
            f"| {mean(paired):+.2f} +- {sd(paired):.2f} |"
        )
    print("\nrank correlation with accuracy, exact count / formula:")
    for sparsity in PATTERNS:
        here = [r for r in rows if r[0] == sparsity]
        by_count = [spearman([r[i] for r in here], [r[4] for r in here]) for i in (2, 3)]
        print(f"  {100 * sparsity:g} % zeros: {by_count[0]:.2f} / {by_count[1]:.2f}")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(
            picture(rows, f"{options.dataset}: points above the dense network of the same seed, against mask diversity")
        )


if __name__ == "__main__":
    main()
