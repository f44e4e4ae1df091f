"""Dense layers that become sparse ones and back, in place: every parent, hook and reference stays valid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.selection import Target
from rarefy.errors import OptionError, PatternError, SelectionError
from rarefy.nn import SparseConv2d, SparseLinear, SparseModule
from rarefy.patterns import FanIn, Pattern, Unstructured

_TWINS: dict[type[nn.Module], type[SparseModule]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
_DENSE = {sparse: dense for dense, sparse in _TWINS.items()}
_MEND = 'use storage="masked", or exclude={}'


def check(model: nn.Module, targets: Sequence[Target], pattern: Pattern, optimizers: Optimizers) -> None:
    """Raise one error that names every weight that cannot be held compressed; changes nothing."""
    if not isinstance(pattern, Unstructured | FanIn):
        raise PatternError(
            f'storage="compressed" keeps single weights: pattern={str(pattern)!r} needs storage="masked", or take '
            "'unstructured' or 'fan-in'."
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise OptionError(
            'storage="compressed" replaces parameters, which DistributedDataParallel holds on to: call sparsify() on the '
            "model before wrapping it."
        )
    problems = {t.module_name: f"{t.name} {list(t.shape)}: {why}" for t in targets if (why := _why_not(model, t))}
    if problems:
        names = [*problems]
        mend = _MEND.format(repr(names[0] if len(names) == 1 else names))
        raise SelectionError('storage="compressed" cannot hold\n' + "\n".join(problems.values()) + f"\n{mend}.")
    held = {id(t.parameter) for t in targets}
    for optimizer in optimizers.all:
        if type(optimizer).__name__ == "Muon" and any(
            id(p) in held for group in optimizer.param_groups for p in group["params"]
        ):
            raise OptionError('Muon updates whole matrices, and compressed weights are vectors: use storage="masked".')


def _why_not(model: nn.Module, target: Target) -> str | None:
    module = target.module
    if isinstance(module, SparseModule):
        return None
    if type(module) not in _TWINS:
        return f"{type(module).__name__} has no sparse twin, only torch.nn.Linear and torch.nn.Conv2d themselves have"
    owners = {
        id(m) for m in model.modules() for p in m.parameters(recurse=False) if p is target.parameter and m is not module
    }
    if owners:
        return f"its weight is tied ({', '.join(target.aliases)})"
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer) and module in (parent.linear1, parent.linear2):
            return "TransformerEncoderLayer reads this layer's dense weight itself"
    if any(n.startswith("weight_") for n in dict(module.named_parameters(recurse=False))):
        return "its weight is computed by a hook"
    return None


@torch.no_grad()
def compress(module: nn.Module, positions: Tensor | None, optimizers: Optimizers) -> None:
    """Turn a dense layer into its sparse twin with the weights at these ascending flat positions (None: all)."""
    weight = module.get_parameter("weight")
    bias = module.get_parameter("bias") if module._parameters.get("bias") is not None else None
    if positions is None:
        positions = torch.arange(weight.numel(), device=weight.device)
    place = positions.to(weight.device)

    def kept(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[place.to(tensor.device)]

    del module._parameters["weight"], module._parameters["bias"]
    module.__class__ = _TWINS[type(module)]
    assert isinstance(module, SparseModule)
    module._set_weight(kept(weight.detach()), place, weight.requires_grad)
    module.register_parameter("bias", bias)
    if weight.grad is not None:
        module.values.grad = kept(weight.grad)
    optimizers.exchange(weight, module.values, lambda state, _: kept(state))


@torch.no_grad()
def decompress(module: SparseModule, optimizers: Optimizers) -> None:
    """Undo `compress`: a plain dense layer again, zero where nothing was kept."""
    values, bias, shape = module.values, module.bias, module.weight_shape
    place = module.positions()

    def spread(tensor: Tensor, fresh: float = 0.0) -> Tensor:
        flat = tensor.new_full((module.rows * module.cols,), fresh)
        flat[place.to(tensor.device)] = tensor
        return flat.view(shape)

    weight = nn.Parameter(spread(values.detach()), requires_grad=values.requires_grad)
    weight.grad = None if values.grad is None else spread(values.grad)
    optimizers.exchange(values, weight, spread)
    for name in ("values", "bias"):
        del module._parameters[name]
    for name in ("crow", "col"):
        del module._buffers[name]
    module.__class__ = _DENSE[type(module)]  # type: ignore[assignment]
    module.register_parameter("weight", weight)
    module.register_parameter("bias", bias)
