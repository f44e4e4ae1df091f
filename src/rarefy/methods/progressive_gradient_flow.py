"""Progressive gradient flow: N:M reached gradually, by fading what is pruned or by tightening the pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rarefy.engine import Family, Sparsifier
from rarefy.engine.options import check_clock, check_ends, check_positive
from rarefy.errors import OptionError, nearest
from rarefy.methods.n_m import Fitting
from rarefy.nn import FadingMask, Reparametrisation
from rarefy.patterns import NM, Pattern
from rarefy.schedules import Clock

RECIPES = ("mdgf-exponential", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric")


@dataclass(frozen=True, kw_only=True)
class PGF(Fitting):
    """Progressive gradient flow: reach N:M gradually, for high sparsities where `sr-ste` loses accuracy.

    Bambhaniya et al. 2024, "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers" (arXiv 2402.04744).
    Dense weights W are trained. From step t0 on the network becomes sparse, and from t1 on it is N:M and stays so. E marks
    the N largest |w| of every M, anew in every forward pass. Mask decay (MdGf) fades the others out,

        W' = W (E + beta (1 - E)),   beta = max(1 - c j, 0) or exp(-c j),   j = t - t0,

    with beta = 1, the dense network, up to t0 and beta = 0 from t1 on. Structure decay (SdGf) is dense up to t0 and then has
    beta = 0 and a pattern that becomes tighter, in frames of equal length up to t1:

        stepwise    (M-1):M, M/2:M, M/4:M, ..., N:M     (1:8: 7:8, 4:8, 2:8, 1:8)
        geometric   8N:8M, 4N:4M, 2N:2M, N:M            (1:8: 8:64, 4:32, 2:16, 1:8).

    The gradient of the pruned weights, with G = dL/dW', can be read in two ways:

        "ste"       dL/dW = G, as the authors' code does in all its recipes,
        "scaled"    dL/dW = G (E + beta (1 - E)), as the paper's words and the chain rule say.

    While beta is above 0 nothing is zero, so all weights count as kept and training FLOPs are dense. A run that is stopped
    before t1 leaves a network that is not N:M yet.

    The authors' code has errors that are not repeated here: beta falls from the run's beginning on, so that it is small
    already where the dense phase ends, a layer that fails or is not told the step computes densely without a word, and a
    resumed run keeps the wrong pattern to the end of the frame. Their transformers prune the two matrices of each
    feed-forward network (`include=["*.fc1", "*.fc2"]` of `rarefy.models`), some also queries, keys and values, each
    pattern along the inputs; the rest is dense. Layers that a frame's pattern does not fit, and embeddings, stay dense
    and are listed; what `include` names must fit.

    Options:
        pattern: the final "N:M". Default "2:4"; the paper's regime is 1:8 to 1:32.
        sparsity: 1 - N/M, and nothing else. Default 0.5.
        recipe: "mdgf-exponential" (default, the paper's best), "mdgf-linear", "sdgf-stepwise", "sdgf-geometric".
        gradient: "ste" (default, measured better) or "scaled".
        coefficient: c of mask decay, per step. Default: beta reaches 0 (linear) or 1/150 (exponential) 0.6 total_steps
            after t0. The authors' ViT has 1e-4, their Swin 8e-4 with a linear decay.
        start, stop: t0 and t1; an int is a step, a float in [0, 1] a fraction of total_steps. Defaults 0.05 and 0.9.

    Raises OptionError for an unknown recipe, for weights that are NaN, and where total_steps is needed but not given;
    SelectionError where no layer fits, PatternError where one does not that `include` names.
    """

    name: ClassVar[str] = "pgf"
    family: ClassVar[Family] = "dense to sparse"
    patterns: ClassVar[tuple[type[Pattern], ...]] = (NM,)
    recipe: str = RECIPES[0]
    gradient: str = "ste"
    coefficient: float | None = None
    start: int | float = 0.05
    stop: int | float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe not in RECIPES:
            raise OptionError(f"recipe={self.recipe!r} is not known{nearest(self.recipe, RECIPES)}; one of {RECIPES}.")
        if self.gradient not in ("ste", "scaled"):
            raise OptionError(f"gradient={self.gradient!r} must be 'ste' or 'scaled'.")
        if self.coefficient is not None:
            check_positive("coefficient", self.coefficient)
        check_clock(1, self.start, self.stop)
        check_ends(self.stop)

    def clock(self, total_steps: int | None) -> Clock:
        return Clock(every=1, start=self.start, stop=self.stop, total=total_steps)

    # --- the schedule -----------------------------------------------------------------------------------------------

    @property
    def frames(self) -> tuple[NM, ...]:
        """The patterns of the frames, in order; mask decay has the final one alone."""
        last = self.cut
        assert isinstance(last, NM)
        n, m, dim = last.n, last.m, last.dim
        if self.recipe == "sdgf-stepwise":
            halves = (m >> k for k in range(1, m.bit_length()))
            looser = dict.fromkeys(kept for kept in (m - 1, *halves) if kept > n)
            return (*(NM(kept, m, dim) for kept in looser), last)
        if self.recipe == "sdgf-geometric":
            return tuple(NM(k * n, k * m, dim) for k in (8, 4, 2, 1))
        return (last,)

    def stage(self, sparse: Sparsifier, step: int) -> tuple[float, int]:
        """Return beta and the frame's number for the forward passes that follow optimizer step `step`."""
        first, last = sparse.clock.first, sparse.clock.last
        assert last is not None
        if step >= last:
            return 0.0, len(self.frames) - 1
        if step < first:
            return 1.0, 0
        if self.recipe.startswith("sdgf"):
            return 0.0, (step - first) * len(self.frames) // (last - first)
        gone = self._decay(sparse.total_steps) * (step - first)
        if self.recipe == "mdgf-exponential":
            return math.exp(-gone), 0
        return (1 - gone if gone < 1 - 1e-9 else 0.0), 0  # 49 times 1/49 is less than 1 in floating point

    def _decay(self, total_steps: int | None) -> float:
        if self.coefficient is not None:
            return self.coefficient
        if total_steps is None:
            raise OptionError(f"{self.name} needs to know how fast to fade: pass total_steps, or a coefficient.")
        return (1 if self.recipe == "mdgf-linear" else math.log(150)) / (0.6 * total_steps)

    # --- what it does -----------------------------------------------------------------------------------------------

    def must_fit(self) -> tuple[Pattern, ...]:
        return self.frames

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation:
        return FadingMask(self.frames, scaled=self.gradient == "scaled")

    def check(self, sparse: Sparsifier) -> None:
        if self.recipe.startswith("mdgf"):
            self._decay(sparse.total_steps)

    def choose(self, sparse: Sparsifier) -> None:
        self._enter(sparse, self.stage(sparse, 0))

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        if (now := self.stage(sparse, step)) != self.stage(sparse, step - 1):
            self._enter(sparse, now)

    def _enter(self, sparse: Sparsifier, stage: tuple[float, int]) -> None:
        for layer in sparse.layers.values():
            layer.settings["beta"].fill_(stage[0])
            layer.settings["frame"].fill_(stage[1])
            layer.refresh()
