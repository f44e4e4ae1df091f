"""N:M where the field's names are those of other methods on N:M groups: ASP and N:M RigL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rarefy.engine import Family, Method, Target
from rarefy.engine.options import check_pattern, check_sparsity
from rarefy.errors import OptionError, PatternError
from rarefy.methods.dynamic import RigL
from rarefy.methods.magnitude import Magnitude
from rarefy.patterns import NM, Pattern, parse_pattern


@dataclass(frozen=True, kw_only=True)
class Fitting(Method):
    """What the methods of N:M training share: the pattern, and the layers that stay dense because it does not fit them."""

    sparsity: float = 0.5
    pattern: str | Pattern = "2:4"

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        check_sparsity(self.sparsity, self.pattern)
        if not isinstance(self.cut, self.patterns):
            kinds = " or ".join(kind.__name__ for kind in self.patterns)
            raise OptionError(f"pattern={str(self.pattern)!r}: {self.name} takes patterns of the kind {kinds} only.")
        super().__post_init__()

    @property
    def cut(self) -> Pattern:
        """The pattern itself, whatever text stands for it."""
        return parse_pattern(self.pattern)

    def leaves(self, target: Target) -> str | None:
        if isinstance(target.module, nn.Embedding | nn.EmbeddingBag):
            return "an embedding is looked up: there are no products to save"
        for pattern in self.must_fit():
            try:
                pattern.check(target.shape, target.name)
            except PatternError as error:
                return str(error).partition("]: ")[2].partition(";")[0]
        return None


@dataclass(frozen=True, kw_only=True)
class ASP(Fitting, Magnitude):
    """ASP: prune a trained network once to the N largest of every M, then train on with that mask.

    Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378, sec. 4); NVIDIA's Automatic SParsity.
    It is `magnitude` on N:M groups, at step `start`, and what is different is only which layers take part: those that the
    pattern does not fit (a stem of three channels, depthwise convolutions) and embeddings stay dense and are listed with the
    reason; what `include` names must fit. Gradients and optimizer state of pruned weights are zero from then on. The paper
    trains on for as long as the dense network was trained, with the same schedule.

    Groups run along the inputs (a convolution: its input channels); "N:M@0" has them along the outputs.

    Options:
        pattern: any "N:M". Default "2:4" (the paper).
        sparsity: 1 - N/M, and nothing else. Default 0.5.
        start: when to prune. 0 (default): at once, for a trained network. An int is a step, a float in [0, 1] a
            fraction of total_steps, for a network that is trained in the same run.
        allocation: of no effect, for every layer keeps N of M.

    Raises SelectionError where no layer fits, PatternError where one does not that `include` names, OptionError as
    `magnitude`.
    """

    name: ClassVar[str] = "asp"
    family: ClassVar[Family] = "after training"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM,)


@dataclass(frozen=True, kw_only=True)
class NMRigL(Fitting, RigL):
    """N:M RigL: RigL whose drops and growth stay within N:M groups, so that the network is N:M at every step.

    Evci et al. 2020 (arXiv 1911.11134) on the groups of an N:M pattern. It is `rigl` with that pattern: at an update the
    smallest weights of the whole layer are dropped, so that a group may lose none or all of its N, and every group grows as
    many as it has lost, where the dense gradient is largest. What is different is only which layers take part: those that
    the pattern does not fit and embeddings stay dense and are listed with the reason; what `include` names must fit.

    Unlike `ste` and `sr-ste` it holds no dense weights: weights, gradients and optimizer state are N:M all the time, and a
    dense gradient is seen once in `every` steps.

    Options (beside those of `rigl`):
        pattern: any "N:M". Default "2:4".
        sparsity: 1 - N/M, and nothing else. Default 0.5.
        allocation: of no effect, for every layer keeps N of M.

    Raises SelectionError where no layer fits, PatternError where one does not that `include` names, OptionError as `rigl`.
    """

    name: ClassVar[str] = "nm-rigl"
    family: ClassVar[Family] = "sparse to sparse"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM,)
