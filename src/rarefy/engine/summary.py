"""A table of what is sparse, what is not, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rarefy.engine.layer import Layer
from rarefy.engine.selection import LeftOut, list_weights


@dataclass(frozen=True)
class Row:
    """One sparse layer: kept weights of all, and forward FLOPs of one sample where an example input was given."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    kept: int
    numel: int
    flops: float | None = None
    flops_dense: float | None = None

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.numel


@dataclass(frozen=True)
class Summary:
    """What `Sparsifier.summary()` returns; `str()` of it is a table."""

    title: str
    rows: list[Row]
    left_out: list[LeftOut]
    flops: tuple[float, float] | None = None  # whole model: kept, dense

    @property
    def kept(self) -> int:
        return sum(row.kept for row in self.rows)

    @property
    def numel(self) -> int:
        return sum(row.numel for row in self.rows)

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.numel if self.numel else 0.0

    def __str__(self) -> str:
        head = ["layer", "shape", "pattern", "kept", "of", "sparsity"]
        table = [
            [r.name, "x".join(map(str, r.shape)), r.pattern, f"{r.kept:,}", f"{r.numel:,}", f"{r.sparsity:.2%}"]
            for r in self.rows
        ]
        table.append(["all of these", "", "", f"{self.kept:,}", f"{self.numel:,}", f"{self.sparsity:.2%}"])
        if self.flops is not None:
            head.append("FLOPs of dense")
            for cells, row in zip(table, self.rows, strict=False):
                cells.append(f"{row.flops / row.flops_dense:.2%}" if row.flops is not None and row.flops_dense else "-")
            table[-1].append(f"{self.flops[0] / self.flops[1]:.2%} (whole model)")
        widths = [max(len(line[i]) for line in [head, *table]) for i in range(len(head))]
        lines = [self.title, _line(head, widths), "  ".join("-" * w for w in widths)]
        lines += [_line(cells, widths) for cells in table]
        return "\n".join(lines + self._left_out_lines())

    def _left_out_lines(self) -> list[str]:
        reasons: dict[str, list[LeftOut]] = {}
        for item in self.left_out:
            reasons.setdefault(item.reason, []).append(item)
        lines = ["left dense:"] if reasons else []
        for reason, items in reasons.items():
            names = ", ".join(i.name for i in items[:6]) + (f", ... ({len(items)} in all)" if len(items) > 6 else "")
            lines.append(f"  {reason}: {names}")
        return lines


def added_since(model: nn.Module, layers: Mapping[str, Layer], left_out: list[LeftOut]) -> list[LeftOut]:
    """List what the model has now that was neither made sparse nor left out when it was looked through."""
    known = {item.name for item in left_out} | set(layers)
    targets, left = list_weights(model)
    new = [LeftOut(t.name, t.shape, "added after sparsify()") for t in targets if t.name not in known]
    new += [
        LeftOut(t.name, t.shape, "its module was replaced after sparsify()")
        for t in targets
        if t.name in layers and layers[t.name].module is not t.module
    ]
    mine = tuple(layer.target.inside for layer in layers.values())
    return new + [
        item
        for item in left
        if item.name not in known and not item.name.startswith(mine) and not item.reason.startswith("tied")
    ]


def _line(cells: list[str], widths: list[int]) -> str:
    left = 3  # names are aligned left, numbers right
    parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(parts).rstrip()
