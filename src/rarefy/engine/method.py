"""What a method is: options, and what it does at each moment of a sparse model's life."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from rarefy.engine.taxonomy import Family
from rarefy.errors import OptionError, nearest
from rarefy.nn import Reparametrisation
from rarefy.patterns import Pattern, parse_pattern
from rarefy.penalties import Proximal
from rarefy.schedules import Clock

if TYPE_CHECKING:
    from rarefy.engine.layer import Layer
    from rarefy.engine.selection import Target
    from rarefy.engine.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods: a frozen dataclass whose fields are the options, with their defaults.

    A method overrides the moments that it needs and composes patterns, scores, allocation and schedules there. It reads
    and changes weights only through `sparse.layers`. What it must remember between steps goes into `sparse.memory`
    (numbers, strings, tensors), which is saved and restored with the rest.
    """

    name: ClassVar[str]
    family: ClassVar[Family]  # its place in the taxonomy; every method states its own
    aliases: ClassVar[tuple[str, ...]] = ()  # other names that the field knows it by
    needs_calibration: ClassVar[bool] = False  # looks at data before training; a property where options decide it
    keeps_calibration: ClassVar[bool] = False  # and again while it trains
    prunes: ClassVar[bool] = True  # makes zeros: without that it has no sparse layers, and all work is in `model`
    reserves: ClassVar[bool] = False  # dropped weights keep their values: see `rarefy.engine.reserve`
    patterns: ClassVar[tuple[type[Pattern], ...]] = (Pattern,)  # the kinds that its option `pattern` takes

    def __post_init__(self) -> None:
        """Raise OptionError where an option, or two together, cannot be."""

    def model(self, build: Callable[[float], nn.Module], example: Any = None) -> nn.Module:
        """Build the network that this method trains.

        `build(width)` makes it with its hidden widths multiplied. `example` is an input of the network, for methods that
        must see it run: as `rarefy.metrics.flops` takes it.
        """
        return build(1.0)

    def clock(self, total_steps: int | None) -> Clock:
        """Return the method's update times for a run of that many steps (None: not known)."""
        return Clock(total=total_steps)

    def lr_step(self, step: int, total_steps: int) -> tuple[int, int]:
        """Return which step of how many the learning-rate schedule is at for the run's 0-based optimizer step.

        A method that trains several times in one run begins again; a training loop asks with every step.
        """
        return step, total_steps

    def must_fit(self) -> tuple[Pattern, ...]:
        """Return all patterns that a layer has to fit: that of its masks, and others that the method cuts it by."""
        return (parse_pattern(getattr(self, "pattern", "unstructured")),)

    def leaves(self, target: Target) -> str | None:
        """Return why this weight stays dense where nobody names it by `include`; None: it does not.

        What is left is listed with the reason. A weight that is named must fit: it is an error there.
        """
        return None

    def check(self, sparse: Sparsifier) -> None:
        """Raise OptionError when the method cannot do this model; changes nothing."""

    def choose(self, sparse: Sparsifier) -> None:
        """Choose the first masks. The weights are not touched yet: a failure here leaves the model as it was."""

    def initialise(self, sparse: Sparsifier) -> None:
        """Adjust the weights once the first masks are applied."""

    def owns_bias(self) -> bool:
        """Whether an output unit's bias lives and dies with its weights; for patterns of whole rows."""
        return False

    def reparametrise(self, weight: nn.Parameter) -> Reparametrisation | None:
        """Return what computes the forward weight from this trained one; None: nothing does, they are the same.

        Parameters of it join the optimizer, in the weight's own group, as `layer.extras`. Changes nothing.
        """
        return None

    def freezes(self, sparse: Sparsifier, step: int) -> bool:
        """Whether the model's own parameters stand still at this step (1-based), and only `extras` are trained."""
        return False

    def penalty(self, sparse: Sparsifier) -> Tensor | None:
        """Return what is added to the loss, a scalar differentiable in what is trained (`layer.live_weight()`), or None.

        The loss itself stays as it is: the penalty's gradient joins that of the loss, whole, when an optimizer steps: not
        scaled by GradScaler or by accumulation, and not clipped.
        """
        return None

    def proximal(self, sparse: Sparsifier, layer: Layer) -> Proximal | None:
        """Return the penalty on this layer whose proximal operator follows each of its optimizer's steps, or None."""
        return None

    def wants_gradient(self, sparse: Sparsifier, step: int) -> bool:
        """Whether the dense gradient of this step (1-based) is needed."""
        return False

    def carries_gradient(self, sparse: Sparsifier, step: int) -> float:
        """How many times the dense gradient gathered in earlier steps counts beside this step's own; 0: not at all."""
        return 0.0

    def wants_factors(self, sparse: Sparsifier, step: int) -> bool:
        """Whether what this step's gradient is made of is needed: the layers' inputs and output gradients."""
        return False

    def after_step(self, sparse: Sparsifier, step: int) -> None:
        """Act after optimizer step number `step` (1-based)."""

    def options(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def make(cls, **options: Any) -> Method:
        """Build the method; an unknown option is refused with the nearest right name."""
        known = [f.name for f in dataclasses.fields(cls)]
        for option in options:
            if option not in known:
                raise OptionError(
                    f"{cls.name} has no option {option!r}{nearest(option, known)}. Its options: {', '.join(known) or 'none'}."
                )
        return cls(**options)


def check_fraction(name: str, value: object, *, zero: bool = True) -> None:
    """Raise OptionError unless value is a number in [0, 1) (or (0, 1) without zero)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 or (value == 0 and not zero):
        raise OptionError(f"{name}={value!r} must be a number in {'[0, 1)' if zero else '(0, 1)'}.")
