"""From a network to its training step's matrix products: FF (outputs), BP (input gradients), WU (weight gradients)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from rarefy.errors import ModelError, OptionError, SelectionError, nearest
from rarefy.metrics import Product
from rarefy.patterns import NM, Pattern, parse_pattern

Stage = Literal["FF", "BP", "WU"]
STAGES: tuple[Stage, ...] = ("FF", "BP")  # those whose weight BDWP prunes
FORWARD: tuple[Stage, ...] = ("FF",)  # SR-STE


@dataclass(frozen=True)
class Gemm:
    """`groups` times [rows, reduction] by [reduction, columns]; of every m along the reduction n are kept (1:1 is dense).

    `left`, `right`, `out` are the entries of the tensors behind the factors and the result, of all groups.
    """

    stage: Stage
    rows: int
    reduction: int
    columns: int
    groups: int = 1
    n: int = 1
    m: int = 1
    left: int = 0
    right: int = 0
    out: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.reduction, self.columns, self.groups) < 1:
            raise OptionError(
                f"a product of size zero: {self.groups} x {self.rows} x {self.reduction} x {self.columns}"
            )
        if not 1 <= self.n <= self.m or self.reduction % self.m:
            raise OptionError(f"{self.n}:{self.m} does not fit a reduction of length {self.reduction}")

    @property
    def sparse(self) -> bool:
        return self.n < self.m

    @property
    def dense_macs(self) -> int:
        return self.groups * self.rows * self.reduction * self.columns

    @property
    def macs(self) -> int:
        """Multiply-adds with kept weights."""
        return self.dense_macs * self.n // self.m


@dataclass(frozen=True)
class Layer:
    """One product of the network and its GEMMs; `dense_because` says why it is not pruned (None: it is).

    `updates` are the weights that the optimizer moves with this layer's gradient: 0 for products without a weight, and
    for the second use of a shared one.
    """

    product: Product
    gemms: tuple[Gemm, ...]
    dense_because: str | None
    updates: int

    @property
    def name(self) -> str:
        return self.product.name


def read_pattern(pattern: str | Pattern) -> NM:
    """Return N:M; OptionError for other patterns, and for one that names its dimension (BDWP prunes along both)."""
    found = parse_pattern(pattern)
    if not isinstance(found, NM) or found.dim != 1:
        raise OptionError(f"the accelerator runs N:M along each product's own reduction, such as 2:8, not {pattern}")
    return found


def layers(
    products: Sequence[Product],
    pattern: NM,
    stages: Collection[Stage] = STAGES,
    dense: Iterable[str] = (),
    ends: bool = True,
) -> tuple[Layer, ...]:
    """Return each product's GEMMs, with the weights of `stages` pruned to `pattern` where the layer allows it.

    FF sums over input channels, BP over output channels; so both must be multiples of M. `ends` keeps the layers that
    read the network's input and that give its output dense, as BDWP does; `dense` are further names (globs).

    Raises:
        SelectionError: a name in `dense` fits no layer.
        OptionError: an unknown stage.
        ModelError: there is no product, or one of size zero.
    """
    if not products:
        raise ModelError("the model has no matrix product: there is nothing to simulate")
    names = [p.name for p in products]
    for glob in (dense := list(dense)):
        if not any(fnmatchcase(name, glob) for name in names):
            raise SelectionError(f"dense={glob!r} fits no layer{nearest(glob, names)}")
    for stage in stages:
        if stage not in STAGES:
            raise OptionError(f"stage {stage!r} cannot be pruned; expected some of {', '.join(STAGES)}")
    last = max((i for i, p in enumerate(products) if p.weight), default=-1)
    found, moved = [], set()
    for i, p in enumerate(products):
        if not p.read or not p.written or not p.right:
            raise ModelError(f"{p.name} multiplies nothing: one of its sizes is zero; give an example with samples")
        why = _dense_because(p, pattern, dense, (not p.input_gradient, i == last) if ends else (False, False))
        first_use = p.weight is not None and p.weight not in moved and p.weight_gradient
        if first_use:
            moved.add(p.weight)
        pruned: Collection[Stage] = () if why else stages
        found.append(Layer(p, _gemms(p, pattern, pruned), why, p.right if first_use else 0))
    return tuple(found)


def _dense_because(p: Product, pattern: NM, dense: Iterable[str], ends: tuple[bool, bool]) -> str | None:
    if p.weight is None:
        return "both factors are activations"
    if any(fnmatchcase(p.name, glob) for glob in dense):
        return "asked to stay dense"
    if ends[0]:
        return "first layer: no gradient goes on to its input"
    if ends[1]:
        return "last layer"
    if p.groups > 1 and p.inputs == 1:
        return "depthwise: no sum over channels"
    sides = (("inputs", p.inputs), ("outputs", p.columns))
    odd = [f"{size} {side}" for side, size in sides if size % pattern.m]
    return f"{' and '.join(odd)}{' of a group' if p.groups > 1 else ''} are no multiple of {pattern.m}" if odd else None


def _gemms(p: Product, pattern: NM, pruned: Collection[Stage]) -> tuple[Gemm, ...]:
    def kept(stage: Stage) -> tuple[int, int]:  # N = M keeps everything: nothing to select, no indices
        return (pattern.n, pattern.m) if stage in pruned and pattern.n < pattern.m else (1, 1)

    read = min(p.read, p.groups * p.rows * p.reduction)  # a stride beyond the kernel leaves pixels out
    found = [Gemm("FF", p.rows, p.reduction, p.columns, p.groups, *kept("FF"), read, p.right, p.written)]
    if p.input_gradient:
        # Rows are the output pixels at any stride s: zeros between them would be multiplied for nothing. It is done as
        # s x s products, one for each place of an input pixel modulo the stride; their reductions add up to this one.
        back = p.columns * p.positions
        found.append(Gemm("BP", p.rows, back, p.inputs, p.groups, *kept("BP"), p.written, p.right, read))
    if p.weight_gradient:
        found.append(Gemm("WU", p.reduction, p.rows, p.columns, p.groups, 1, 1, read, p.written, p.right))
    return tuple(found)
