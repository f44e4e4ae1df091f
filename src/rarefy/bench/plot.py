"""The kernel table as a picture: an SVG of its own, no plotting library needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rarefy.bench.table import Row

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 60, 40, 220, 50
COLORS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#c99700", "#3c8d93", "#9a3b5b", "#555555")


def speedups_svg(rows: Sequence[Row], title: str) -> str:
    """Return an SVG of the speed-up over the best dense by sparsity, a line for each product."""
    sparsities = sorted({r.sparsity for r in rows})
    steps = {s: i / max(1, len(sparsities) - 1) for i, s in enumerate(sparsities)}
    logs = [math.log2(r.speedup) for r in rows] or [0.0]
    low, high = min(-1, math.floor(min(logs))), max(1, math.ceil(max(logs)))

    def x(sparsity: float) -> float:
        return LEFT + steps[sparsity] * (WIDTH - LEFT - RIGHT)

    def y(log: float) -> float:
        return TOP + (high - log) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for log in range(low, high + 1):
        color = "#333" if log == 0 else "#ddd"
        parts.append(f'<path d="M{LEFT} {y(log):.1f}H{WIDTH - RIGHT}" stroke="{color}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(log) + 4:.1f}" text-anchor="end">{2.0**log:g}x</text>')
    for s in sparsities:
        parts.append(f'<text x="{x(s):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{100 * s:g} %</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">sparsity; times faster than the best dense</text>')
    for i, product in enumerate(dict.fromkeys(r.product for r in rows)):
        color = COLORS[i % len(COLORS)]
        mine = sorted((r for r in rows if r.product == product), key=lambda r: r.sparsity)
        line = " ".join(f"{x(r.sparsity):.1f},{y(math.log2(r.speedup)):.1f}" for r in mine)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 14}" y="{TOP + 18 * i + 10}" fill="{color}">{escape(product)}</text>')
    return "\n".join([*parts, "</svg>\n"])
