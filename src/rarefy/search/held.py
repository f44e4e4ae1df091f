"""Hold given masks while something trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

import rarefy
from rarefy.engine import Family, Method, Selector, Sparsifier, find_targets
from rarefy.errors import SelectionError, StateError, nearest
from rarefy.patterns import Pattern

Layers = Selector | Sequence[Selector] | None


@dataclass(frozen=True, kw_only=True)
class Held(Method):
    """Masks that were found elsewhere and stay as they are."""

    name: ClassVar[str] = "held"
    family: ClassVar[Family] = "before training"
    pattern: str | Pattern = "unstructured"


def hold(model: nn.Module, masks: Mapping[str, Tensor]) -> Sparsifier:
    """Make a model sparse, in place, with these masks by parameter name (bool, True = kept), and hold them.

    Pass the optimizer to the sparsifier's `follow`, or call its `step()` after each step. Raises SelectionError for a name
    that is no weight of the model, StateError for a mask of another shape; the model is then as it was.
    """
    shapes = {target.name: target.shape for target in find_targets(model)[0]}
    for name, mask in masks.items():
        if name not in shapes:
            raise SelectionError(
                f"{name!r} is no weight that can be made sparse{nearest(name, shapes)}: {', '.join(shapes)}."
            )
        if tuple(mask.shape) != shapes[name]:
            raise StateError(f"{name} {list(shapes[name])}: its mask is {list(mask.shape)}.")
    sparse = rarefy.sparsify(model, Held(), include=lambda name, module: name in masks)
    for name, layer in sparse.layers.items():
        layer.keep(masks[name])
    return sparse
