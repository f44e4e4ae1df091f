"""Linear layers on 2:4 sparse tensor cores, for inference and training, wherever the device, dtype and shape allow it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import ModelError, OptionError
from rarefy.kernels import semi_structured
from rarefy.kernels.plans import Seen
from rarefy.nn.n_m import GRADIENTS
from rarefy.nn.rewriting import layer_name, replaceable
from rarefy.nn.straight_through import straight


class SemiStructuredLinear(nn.Linear):
    """y = x W^T + b with a 2:4 weight on CUDA's sparse tensor cores. Made by `semi_structured_`.

    `weight` stays the dense parameter. It is masked and compressed when it has changed since the last forward pass: once for
    inference, once a step in training (twice with `transposable`: the input's gradient then runs on sparse tensor cores too).
    Changes through `weight.data` are not seen, for PyTorch does not count them: write to the weight under `torch.no_grad()`.
    The weight's gradient is a dense product. Computes in the weight's dtype, or under autocast in that of autocast. Where a
    forward pass cannot run so (the model was moved to the CPU, say) it runs dense and warns once, with the reason, which
    `reason` keeps.

    Attributes:
        mask: buffer, bool [out, in].
        transposable, gradient: as in `rarefy.nn.NMLinear`.
        reason: why the last forward pass ran dense; None if it did not.
    """

    mask: Tensor
    transposable: bool
    gradient: str
    reason: str | None
    _cache: tuple[Seen, dict[torch.dtype, Any]]

    @staticmethod
    def become(module: nn.Linear, mask: Tensor, transposable: bool, gradient: str) -> None:
        """Make a layer that was found to fit one of these, in place."""
        module.__class__ = SemiStructuredLinear
        assert isinstance(module, SemiStructuredLinear)
        module.register_buffer("mask", mask.clone())
        module.transposable, module.gradient, module.reason = transposable, gradient, None
        module._cache = (Seen(), {})

    @torch.no_grad()
    def set_mask_(self, mask: Tensor) -> None:
        """Compute with another mask from now on. Raises OptionError where it does not fit; nothing has changed then."""
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise OptionError(f"a mask of {mask.dtype} {list(mask.shape)} for a weight of {list(self.weight.shape)}")
        if (problem := semi_structured.pattern_problem(mask, both=self.transposable)) is not None:
            raise OptionError(f"the mask is not 2:4: {problem}")
        self.mask.copy_(mask)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if on else self.weight.dtype
        weight = self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        problem = semi_structured.layout_problem(weight.detach(), both=self.transposable)
        if problem is None and x.dtype != dtype and not on:
            problem = f"x is {x.dtype} and the weight {dtype}"
        if problem is not None:
            if self.reason is None:
                warnings.warn(f"SemiStructuredLinear runs dense: {problem}", stacklevel=2)
            self.reason = problem
            kept = self.gradient == "kept"
            masked = self.weight.masked_fill(~self.mask, 0) if kept else straight(self.weight, self.mask)
            return F.linear(x, masked, self.bias)
        self.reason = None
        packed, turned = self._packed(weight.detach())
        with torch.autocast(device, enabled=False):
            return semi_structured.linear(
                x.to(dtype), weight, self.mask, packed, turned, bias, dense_gradient=self.gradient == "dense"
            )

    def _packed(self, weight: Tensor) -> tuple[Any, Any]:
        """Return the compressed weight, and its transpose's where that is wanted; anew where weight or mask have changed."""
        seen, ready = self._cache
        if not seen.again(self.weight, self.mask):
            ready.clear()
        if weight.dtype not in ready:
            masked = weight.masked_fill(~self.mask, 0)  # what was dropped may have become NaN
            turned = semi_structured.convert(masked.t().contiguous()) if self.transposable else None
            ready[weight.dtype] = (semi_structured.convert(masked), turned)
        found: tuple[Any, Any] = ready[weight.dtype]
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Refuse a mask that is not 2:4: cuSPARSELt would compute something else without a word."""
        mask, problem = state_dict.get(prefix + "mask"), None
        if isinstance(mask, Tensor) and mask.shape == self.mask.shape and not mask.is_meta:
            problem = semi_structured.pattern_problem(mask != 0, both=self.transposable)
        if problem is not None:
            errors: list[str] = others[-1]
            errors.append(f"{prefix}mask is not 2:4: {problem}")
            state_dict[prefix + "mask"] = self.mask
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = (Seen(), {})

    def extra_repr(self) -> str:
        how = " transposable" if self.transposable else ""
        return f"{super().extra_repr()}, 2:4{how}, gradient={self.gradient}"


def semi_structured_(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    transposable: bool = False,
    gradient: str = "kept",
) -> dict[str, str | None]:
    """Let the linear layers of a model that can run on 2:4 sparse tensor cores do so from now on, in place.

    Such a layer becomes a `SemiStructuredLinear`: the same module object with the same parameters, so that optimizers, hooks
    and a sparsifier go on as they were.

    Args:
        model: is changed. Move it to its device and dtype before.
        masks: by the layers' names or their weights'; bool [out, in]. Default: where the weights are not zero.
        dtype: that it will be computed in, where autocast makes it another than the weights'.
        transposable: the masks also keep at most 2 of every 4 outputs, and training's input gradients use that.
        gradient: "kept" or "dense", as in `rarefy.nn.NMLinear`.

    Returns:
        For every linear layer (of the masks, if given) None if it runs on 2:4 now, else the reason why it stays as it was.

    Raises:
        OptionError: `gradient` is neither. ModelError: a mask's name is no layer of the model.

    >>> import torch
    >>> semi_structured_(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    {'0': 'it is on cpu; PyTorch has semi-structured kernels for CUDA only'}
    """
    if gradient not in GRADIENTS:
        raise OptionError(f"semi_structured_: gradient={gradient!r} must be one of {', '.join(GRADIENTS)}")
    found, why = replaceable(model, (nn.Linear,), tied=True)
    given = None if masks is None else {layer_name(name): mask for name, mask in masks.items()}
    verdicts: dict[str, str | None] = {}
    for name in (*found, *why) if given is None else given:
        module = found.get(name)
        if not isinstance(module, nn.Linear):
            if name not in why:
                raise ModelError(
                    f"semi_structured_: the model has no linear layer {name}; it has {', '.join(found) or 'none'}"
                )
            verdicts[name] = why[name]
            continue
        weight = module.weight.detach()
        mask = (weight != 0) if given is None else given[name].to(weight.device)
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            verdicts[name] = f"its mask is {mask.dtype} {list(mask.shape)}, its weight {list(weight.shape)}"
        else:
            verdicts[name] = semi_structured.reason_against(weight.to(dtype or weight.dtype), mask, both=transposable)
        if verdicts[name] is None:
            SemiStructuredLinear.become(module, mask, transposable, gradient)
    return verdicts
