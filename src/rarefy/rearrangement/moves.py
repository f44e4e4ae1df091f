"""Channels that change places: in parameters, and in everything that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.coupling import Member
from rarefy.engine import Layer, Sparsifier
from rarefy.engine.loading import AfterLoad
from rarefy.engine.optimizer_state import Optimizers
from rarefy.errors import OptionError, PatternError, SelectionError, StateError
from rarefy.nn import SparseModule

Move = tuple[Member, Tensor]
"""A member, and the order of its group's units."""


@torch.no_grad()
def move_(tensor: Tensor, moves: Sequence[Move]) -> None:
    """Let channels change places in a tensor of the parameter's shape, in place: unit order[i] goes to place i."""
    for member, order in moves:
        part = tensor if member.rows is None else tensor[slice(*member.rows)]
        index = member.index.to(tensor.device)
        source = index[order.to(tensor.device)]
        part.index_copy_(member.dim, index.reshape(-1), part.index_select(member.dim, source.reshape(-1)))


def by_name(moves: Sequence[tuple[Sequence[Member], Tensor]]) -> dict[str, list[Move]]:
    """Return what happens to each parameter and buffer, in order."""
    found: dict[str, list[Move]] = {}
    for members, order in moves:
        for member in members:
            found.setdefault(member.name, []).append((member, order))
    return found


class Holders:
    """Everything beside the model that knows which channel stands where: optimizers and a sparsifier."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, sparsifier: Sparsifier | None
    ) -> None:
        given = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        for item in given:
            if not isinstance(item, Optimizer):
                raise OptionError(f"optimizer={type(item).__name__} is not a torch.optim.Optimizer")
        self._optimizers = Optimizers(given)
        self._layers: dict[int, Layer] = {}
        if sparsifier is not None:
            self._layers = {id(layer.target.parameter): layer for layer in sparsifier.layers.values()}
        for name, module in model.named_modules():
            if isinstance(module, SparseModule):
                raise SelectionError(
                    f"{name}: its weight holds kept values only, whose channels cannot be moved; rearrange before sparsify(), "
                    "or after finalize()."
                )
            for hook in module._load_state_dict_post_hooks.values():
                owner = hook.owner if isinstance(hook, AfterLoad) else None
                if isinstance(owner, Layer) and owner not in self._layers.values():
                    raise SelectionError(f"{owner.name} is managed by a sparsifier: pass it as sparsifier=.")

    def check(self, parameters: Mapping[str, nn.Parameter], moves: Mapping[str, Sequence[Move]]) -> None:
        """Raise where something could not follow; changes nothing."""
        for name in moves.keys() & parameters.keys():
            parameter = parameters[name]
            for optimizer, key in self._optimizers.not_per_element(parameter):
                raise StateError(
                    f"{name} {list(parameter.shape)}: {type(optimizer).__name__} remembers {key!r}, which is not one number "
                    "for each weight and cannot be moved with the channels. Rearrange before training, or make a new optimizer."
                )
            layer = self._layers.get(id(parameter))
            if layer is not None:
                mask = layer.mask()
                move_(mask, moves[name])
                if not layer.pattern.obeys(mask):
                    raise PatternError(
                        f"{name} {list(layer.shape)}: its mask would no longer obey {layer.pattern} once the channels have "
                        "moved. Rearrange before the first mask is chosen."
                    )

    def follow(self, parameter: nn.Parameter, move: Callable[[Tensor], None]) -> None:
        """Move the channels in the gradient, the optimizers' state and the mask of one parameter."""
        if parameter.grad is not None:
            move(parameter.grad)
        self._optimizers.change(parameter, move)
        if (layer := self._layers.get(id(parameter))) is not None:
            layer.reorder(move)
