"""Turn what the other benchmarks wrote with --json into the tables of docs/performance.md.

python benchmarks/tables.py spmm FILE ... | networks FILE ... | step FILE ... | patterns FILE ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DENSE = ("torch", "onednn linear", "onednn conv")


def rows_of(paths: Iterable[str]) -> list[dict[str, Any]]:
    """Read JSON lists, or one object a line."""
    rows = []
    for path in paths:
        text = Path(path).read_text()
        rows += json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    return rows


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
    head = list(head)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def spmm(rows: list[dict[str, Any]]) -> None:
    """Per shape: ours in real GFLOP/s, times over the best dense and over the best peer."""
    for threads in sorted({r["threads"] for r in rows}):
        mine = [r for r in rows if r["threads"] == threads]
        sparsities = sorted({r["sparsity"] for r in mine})
        print(f"\n{threads} thread(s):\n")
        lines: dict[str, list[str]] = {}
        for r in mine:
            rate = r["gflops"]
            dense = max(rate[d] for d in DENSE if d in rate)
            peer = max(v for k, v in rate.items() if k not in (*DENSE, "rarefy"))
            line = lines.setdefault(f"{r['m']}x{r['k']}, {r['n']}", [f"{dense:.0f}"])
            real = rate["rarefy"] * (1 - r["sparsity"])
            line.append(f"{real:.0f}: {rate['rarefy'] / dense:.1f}x / {rate['rarefy'] / peer:.1f}x")
        table(["MxK, N", "best dense", *(f"{s:.0%}" for s in sparsities)], ([k, *v] for k, v in lines.items()))


def networks(rows: list[dict[str, Any]]) -> None:
    """Per network: milliseconds by way and the gains."""
    lines = []
    for r in rows:
        ms = r["ms"]
        dense = min((t, way) for way, t in ms.items() if way not in ("rarefy", "deepsparse"))
        sparsity = f"{r['sparsity']:.0%}{' ERK' if r.get('erk') else ''}" if "sparsity" in r else "as published"
        peer = f"{ms['deepsparse']:.3g} ({ms['rarefy'] / ms['deepsparse']:.2f})" if "deepsparse" in ms else "-"
        lines.append(
            [
                r["net"],
                sparsity,
                str(r["batch"]),
                str(r["threads"]),
                f"{ms['rarefy']:.3g}",
                f"{dense[0]:.3g} ({dense[1]})",
                f"{dense[0] / ms['rarefy']:.2f}x",
                peer,
                f"{ms['torch']:.3g}",
            ]
        )
    head = (
        "network",
        "sparsity",
        "batch",
        "threads",
        "rarefy, ms",
        "best dense",
        "gain",
        "deepsparse (ours of it)",
        "torch",
    )
    table(head, lines)


def step(rows: list[dict[str, Any]]) -> None:
    """Per shape and sparsity: the training step."""
    lines = []
    for r in rows:
        ms = r["ms"]
        other = f"{ms['sparseprop']:.2f} ({ms['sparseprop'] / ms['rarefy']:.1f}x)" if "sparseprop" in ms else "-"
        lines.append(
            [
                f"{r['m']}x{r['k']}, {r['n']}",
                f"{r['sparsity']:.0%}",
                str(r["threads"]),
                f"{ms['rarefy']:.2f}",
                f"{ms['oneDNN']:.2f} ({ms['oneDNN'] / ms['rarefy']:.1f}x)",
                other,
                f"{ms['CSR']:.2f} ({ms['CSR'] / ms['rarefy']:.1f}x)",
                f"{ms['rarefy, autograd']:.2f}",
                f"{ms['torch, autograd']:.2f} ({ms['torch, autograd'] / ms['rarefy, autograd']:.1f}x)",
            ]
        )
    head = (
        "MxK, N",
        "sparsity",
        "threads",
        "kernels, ms",
        "dense at oneDNN speed",
        "sparseprop",
        "torch CSR",
        "autograd",
        "nn.Linear",
    )
    table(head, lines)


def patterns(rows: list[dict[str, Any]]) -> None:
    """Per shape and sparsity: dense-equivalent GFLOP/s of every way."""
    for key in dict.fromkeys((r["threads"], r["m"], r["k"], r["n"]) for r in rows):
        mine = [r for r in rows if (r["threads"], r["m"], r["k"], r["n"]) == key]
        found = {(r["sparsity"], r["way"]): r["gflops"] for r in mine}
        sparsities = sorted({s for s, _ in found})
        print(f"\n{key[1]}x{key[2]}, {key[3]} samples, {key[0]} thread(s):\n")
        ways = dict.fromkeys(r["way"] for r in mine)
        cells = ([f"{found[s, way]:.0f}" if (s, way) in found else "" for s in sparsities] for way in ways)
        table(["", *(f"{s:.0%}" for s in sparsities)], ([way, *c] for way, c in zip(ways, cells, strict=True)))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("spmm", "networks", "step", "patterns"):
        raise SystemExit(__doc__)
    globals()[sys.argv[1]](rows_of(sys.argv[2:]))
