"""What accelerate() decided, layer by layer, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerPlan:
    """One layer with a weight: how it runs, and what was measured. Times are seconds for the example's batch."""

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    choice: str
    seconds: float
    dense_seconds: float
    why: str = ""

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds if self.seconds else 1.0


@dataclass(frozen=True)
class Plan:
    """What `accelerate` chose; `str()` of it is a table. `times`: of the whole network, by way of running it."""

    layers: tuple[LayerPlan, ...]
    times: dict[str, float]
    choice: str
    notes: tuple[str, ...] = ()
    threads: int = 1

    @property
    def seconds(self) -> float:
        """Time of the whole network as it runs now."""
        return self.times[self.choice]

    @property
    def dense_seconds(self) -> float:
        """Time of the fastest dense way."""
        return min(t for way, t in self.times.items() if way != "rarefy")

    @property
    def speedup(self) -> float:
        """How many times faster than the fastest dense way."""
        return self.dense_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "choice": self.choice,
            "threads": self.threads,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "times": dict(self.times),
            "notes": list(self.notes),
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
        }

    def __str__(self) -> str:
        head = ("layer", "kind", "weight", "sparsity", "runs as", "us", "dense us", "gain", "why")
        rows = [head] + [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                f"{layer.sparsity:.1%}",
                layer.choice,
                f"{layer.seconds * 1e6:.0f}",
                f"{layer.dense_seconds * 1e6:.0f}",
                f"{layer.speedup:.2f}x",
                layer.why,
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        whole = ", ".join(f"{way} {t * 1e3:.3f} ms" for way, t in sorted(self.times.items(), key=lambda item: item[1]))
        lines.append(f"whole network on {self.threads} thread(s): {whole}; runs as {self.choice} ({self.speedup:.2f}x)")
        return "\n".join([*lines, *self.notes])
