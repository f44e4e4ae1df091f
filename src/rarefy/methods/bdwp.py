"""BDWP: bidirectional weight pruning, N:M in the forward pass and in the gradient of the input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from rarefy.engine import Family, Sparsifier, Target
from rarefy.errors import OptionError
from rarefy.methods.straight_through import Refined
from rarefy.nn import LargestMask, Reparametrisation, TwoWayMask
from rarefy.patterns import NM, Pattern

MODES = ("both", "ff", "bp_w", "bp_g")


@dataclass(frozen=True, kw_only=True)
class BDWP(Refined):
    """BDWP: prune a dense weight twice, along its inputs for the output and along its outputs for the input's gradient.

    Fang et al. 2023, "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design" (arXiv
    2309.13015). A layer and step has three products: forward (FF), gradient of the input (BP), gradient of the weight (WU).
    An N:M mask along the inputs helps the first alone, for BP sums over the outputs. With prune_a the N largest |w| in every
    M along axis a,

        FF   y  = layer(x; Wf),      Wf = prune_inputs(W),
        BP   dx = layer^T(dy; Wb),   Wb = prune_outputs(W),
        WU   dW = dy x, dense, for all weights,

    both made from the same W in every forward pass. So dx is not the derivative of y in x: it is biased, by design. As in
    `sr-ste`, lambda (1 - Ef) W joins dW when the optimizer steps.

    Multiplications of such a layer beside dense training, with r = N/M: (1 + 2 r)/3 for "both", (2 + r)/3 for the others; and
    at most 3/(1 + 2 r) times as fast. (Training FLOPs in tables are those of kernels that skip zeros in any place: they count
    `ste` and `sr-ste` as "both", and modes without zeros in the forward pass as dense.) Only a machine that uses both packed
    weights gains time (the command "rarefy simulate sat" models one); here it is the method's accuracy that is reproduced.

    Only the abstract of the paper could be read: the rule is as it is told elsewhere, and whether the authors keep the decay
    of pruned weights is not known.

    Linear and Conv2d layers whose inputs and outputs are both multiples of M take part, in all modes but "ff", which needs the
    inputs alone; all others (stem, depthwise convolutions, a classifier of ten) stay dense and are listed with the reason.
    What `include` names must fit.

    Options:
        pattern: any "N:M", along the inputs. Default "2:4"; the paper has 2:8. "N:M@0" exchanges the two dimensions.
        sparsity: 1 - N/M, and nothing else. Default 0.5.
        mode: "both" (default); "ff", which is `sr-ste`; "bp_w" (SDWP), Wb alone; "bp_g" (SDGP), the N largest |dy| of every M
            output channels in BP, weights as they are. The last two leave a dense network.
        refine: lambda, not negative. Default 2e-4 (`sr-ste`).

    Raises OptionError for an unknown mode, for layers of other kinds, and by `step()` where no optimizer is given;
    SelectionError where no layer fits, PatternError where one does not that `include` names.
    """

    name: ClassVar[str] = "bdwp"
    family: ClassVar[Family] = "sparse to sparse"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM,)
    mode: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise OptionError(f"mode={self.mode!r} must be one of {', '.join(MODES)}.")
        if self._there.dim > 1:
            raise OptionError(f"pattern={str(self.pattern)!r}: {self.name} prunes along inputs and outputs only.")

    @property
    def _there(self) -> NM:
        assert isinstance(self.cut, NM)
        return self.cut

    @property
    def _back(self) -> NM:
        return replace(self._there, dim=1 - self._there.dim)

    def must_fit(self) -> tuple[Pattern, ...]:
        return (self._there,) if self.mode == "ff" else (self._there, self._back)

    def leaves(self, target: Target) -> str | None:
        return super().leaves(target) or _other_kind(target.module)

    def check(self, sparse: Sparsifier) -> None:
        for layer in sparse.layers.values():
            if (reason := _other_kind(layer.module)) is not None:
                raise OptionError(f"{layer.name} {list(layer.shape)}: {reason}; exclude this layer.")

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        if self.mode == "ff":
            return LargestMask(self._there, self._there.n)
        if self.mode == "both":
            return TwoWayMask(forward=self._there, backward=self._back)
        if self.mode == "bp_w":
            return TwoWayMask(backward=self._back)
        return TwoWayMask(errors=replace(self._there, dim=1))


def _other_kind(module: nn.Module) -> str | None:
    """Say why a module's gradient of the input cannot be given another weight; None: it can."""
    plain = type(module) in (nn.Linear, nn.Conv2d)
    if plain and getattr(module, "groups", 1) == 1:
        return None
    return f"bdwp knows Linear and Conv2d layers, and this is {'a grouped one' if plain else type(module).__name__}"
