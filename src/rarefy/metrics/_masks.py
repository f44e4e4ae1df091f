"""Fit a mapping of masks to a model's parameters: names, tied weights, parametrised weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from rarefy.errors import OptionError, SelectionError, nearest

Masks = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Fitted:
    """Masks keyed by each parameter's first name, and the name under which to report each parameter."""

    masks: dict[str, torch.Tensor]
    labels: dict[str, str]


def check_bool(name: str, mask: torch.Tensor) -> None:
    """Raise OptionError unless `mask` is a boolean tensor."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise OptionError(f"the mask of {name!r} must be a bool tensor (True = kept), got {got}; use `mask.bool()`")


def first_names(model: nn.Module) -> dict[int, str]:
    """Map the id of every parameter to the first name it has in the model (tied weights have several)."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def public_names(model: nn.Module) -> dict[str, str]:
    """Map "layer.weight" to "layer.parametrizations.weight.original" where a parametrisation keeps the shape."""
    found = {}
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor, chain in module.parametrizations.items():
            original = getattr(chain, "original", None)
            if isinstance(original, nn.Parameter) and original.shape == getattr(module, tensor).shape:
                dot = f"{prefix}." if prefix else ""
                found[f"{dot}{tensor}"] = f"{dot}parametrizations.{tensor}.original"
    return found


def fit(model: nn.Module, masks: Masks | None) -> Fitted:
    """Check `masks` against the model and key them by each parameter's first name.

    A mask may stand under any name of a tied weight, and under "layer.weight" where that weight is parametrised.
    Raises SelectionError for a name the model does not have, OptionError for a dtype or shape that does not fit and
    for two different masks on one tied weight.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    first = first_names(model)
    public = public_names(model)
    labels = {first[id(named[original])]: name for name, original in public.items()}
    kept: dict[str, torch.Tensor] = {}
    for name, mask in (masks or {}).items():
        parameter = named.get(public.get(name, name))
        if parameter is None:
            hint = nearest(name, [*named, *public])
            raise SelectionError(f"there is a mask for {name!r}, but the model has no such parameter{hint}")
        check_bool(name, mask)
        if mask.shape != parameter.shape:
            raise OptionError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, its parameter {tuple(parameter.shape)}; "
                "they must be equal"
            )
        owner = first[id(parameter)]
        if owner in kept and not torch.equal(kept[owner], mask):
            raise OptionError(f"{name!r} is tied to {labels[owner]!r} but their masks differ; give one mask for both")
        kept[owner] = mask.detach()
        labels.setdefault(owner, name)
    return Fitted(kept, labels)
