"""Linear layers that train a dense weight and compute with N of every M inputs of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from rarefy.errors import ModelError, OptionError, RarefyError
from rarefy.kernels.n_m import NMIndex, n_m_gather, n_m_index, n_m_linear
from rarefy.nn.rewriting import layer_name, replaceable

GRADIENTS = ("kept", "dense")


class NMLinear(nn.Linear):
    """y = x W^T + b, computed with the weights that an N:M mask keeps.

    `weight` stays the dense parameter: optimizers, checkpoints and methods see it as before, whatever it holds where nothing
    is kept. Every forward pass gathers the kept values; the output, and with a transposable mask the input's gradient from
    the same copy, take n/m of a dense product. Buffers `index` and `used` hold the mask, and are in the state dict: as
    bytes, which every backend of `torch.distributed` sends and averaging in float32 (`torch.optim.swa_utils`) leaves alone.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        mask: bool [out_features, in_features], True = kept; at most n in every m inputs.
        n, m: of the pattern; m is 2, 4, 8 or 16.
        transposable: the mask also keeps at most n of every m outputs (`rarefy.patterns.TransposableNM`). Without it, the
            input's gradient runs on the unstructured kernel.
        gradient: of the weight: "kept" (computed where something is kept, zero elsewhere: n/m of the dense product) or
            "dense" (all of it, straight through the mask, for methods that choose again).

    Raises:
        OptionError, PatternError: as `rarefy.kernels.n_m.n_m_index`; or `gradient` is neither.

    Example:
        >>> import torch, rarefy
        >>> from rarefy.patterns import TransposableNM
        >>> layer = torch.nn.Linear(32, 64)
        >>> mask = TransposableNM(2, 8).project(layer.weight.detach().abs(), keep=16)
        >>> rarefy.nn.NMLinear.from_dense(layer, mask, 2, 8)
        NMLinear(in_features=32, out_features=64, bias=True, 2:8 transposable, gradient=kept)
    """

    index: Tensor
    used: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: Tensor,
        n: int,
        m: int,
        transposable: bool = True,
        gradient: str = "kept",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._begin(mask, n, m, transposable, gradient)

    def _begin(self, mask: Tensor, n: int, m: int, transposable: bool, gradient: str) -> None:
        if gradient not in GRADIENTS:
            raise OptionError(f"NMLinear: gradient={gradient!r} must be one of {', '.join(GRADIENTS)}")
        index = self._index(mask, n, m, transposable)
        self.n, self.m, self.transposable, self.gradient = n, m, transposable, gradient
        for name, buffer in _buffers(index).items():
            self.register_buffer(name, buffer)

    def _index(self, mask: Tensor, n: int, m: int, transposable: bool) -> NMIndex:
        if tuple(mask.shape) != tuple(self.weight.shape):
            raise OptionError(f"NMLinear: a mask of {list(mask.shape)} for a weight of {list(self.weight.shape)}")
        return n_m_index(mask, n, m, transposable=transposable).to(self.weight.device)

    @property
    def topology(self) -> NMIndex:
        """Where the kept weights stand, as the kernels want it."""
        return self._topology(self.index, self.used)

    def _topology(self, index: Tensor, used: Tensor) -> NMIndex:
        return NMIndex(
            index.view(torch.int32), used.view(torch.int16), (self.out_features, self.in_features), self.transposable
        )

    def mask(self) -> Tensor:
        """Return the mask, bool [out_features, in_features]."""
        return self.topology.mask()

    @torch.no_grad()
    def set_mask_(self, mask: Tensor) -> None:
        """Compute with another mask of the same pattern from now on. Raises as the class does; nothing has changed then."""
        for name, buffer in _buffers(self._index(mask, self.n, self.m, self.transposable)).items():
            getattr(self, name).copy_(buffer)

    def forward(self, x: Tensor) -> Tensor:
        values = n_m_gather(self.weight, self.topology)
        straight = self.weight if self.gradient == "dense" else None
        return n_m_linear(x, values, self.topology, self.bias, straight_through=straight)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, mask: Tensor, n: int, m: int, *, transposable: bool = True, gradient: str = "kept"
    ) -> NMLinear:
        """Return a layer with the same parameters (the very objects) that computes with this mask."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = module.in_features, module.out_features
        new.weight, new.bias = module.weight, module.bias
        new._begin(mask, n, m, transposable, gradient)
        return new.train(module.training)

    def to_dense(self) -> nn.Linear:
        """Return a `torch.nn.Linear` with copies of the kept weights and exact zeros elsewhere."""
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.detach().masked_fill(~self.mask(), 0)  # what was dropped may have become NaN
        new.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return new.train(self.training)

    @torch.no_grad()
    def dense_(self) -> None:
        """Become a plain `torch.nn.Linear` again, in place: the same parameters, exact zeros where nothing is kept."""
        self.weight.masked_fill_(~self.mask(), 0)
        del self.index, self.used, self.n, self.m, self.transposable, self.gradient
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load the mask that an index stands for, and index it anew: one that is damaged, or for rows alone, would not fit."""
        index, used = (state_dict.get(prefix + name) for name in ("index", "used"))
        if _alike(index, self.index) and _alike(used, self.used):
            new = {"index": self.index, "used": self.used}
            try:
                mask = self._topology(index.to("cpu", copy=True), used.to("cpu", copy=True)).mask()
                new = _buffers(n_m_index(mask, self.n, self.m, transposable=self.transposable).to(index.device))
            except (RarefyError, IndexError) as error:
                errors: list[str] = others[-1]
                errors.append(f"{prefix}index and {prefix}used are not a mask of this layer: {error}")
            state_dict.update({prefix + name: buffer for name, buffer in new.items()})
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        how = " transposable" if self.transposable else ""
        return f"{super().extra_repr()}, {self.n}:{self.m}{how}, gradient={self.gradient}"


def _buffers(index: NMIndex) -> dict[str, Tensor]:
    return {"index": index.index.view(torch.uint8), "used": index.used.view(torch.uint8)}


def _alike(new: object, old: Tensor) -> TypeGuard[Tensor]:
    return isinstance(new, Tensor) and new.shape == old.shape and new.dtype == old.dtype and not new.is_meta


def n_m_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    n: int,
    m: int,
    *,
    transposable: bool = True,
    gradient: str = "kept",
) -> list[str]:
    """Let linear layers of a model compute with N:M masks from now on, in place; return their names.

    Each named layer becomes an `NMLinear`: the same module object with the same parameters, so that hooks, optimizers and a
    sparsifier that holds the masks go on as they were. After masks changed, tell each layer (`set_mask_`). A sparsifier comes
    first: `sparsify` refuses layers that have a mask of their own already.

    Args:
        model: is changed.
        masks: by the layers' names ("fc1") or their weights' ("fc1.weight"); bool [out, in].
        n, m, transposable, gradient: as in `NMLinear`.

    Raises:
        ModelError: a name is no plain `nn.Linear` of the model. OptionError, PatternError: a mask does not fit; the message
            names the layer. The model is then as it was.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    >>> n_m_(model, {"0.weight": torch.eye(4).bool()}, 1, 4)
    ['0']
    """
    found, why = replaceable(model, (nn.Linear,), tied=True)
    ready: dict[str, tuple[nn.Linear, NMLinear]] = {}
    for full, mask in masks.items():
        name = layer_name(full)
        module = found.get(name)
        if not isinstance(module, nn.Linear):
            reason = why.get(name, "the model has no linear layer of that name")
            raise ModelError(f"n_m_: {full}: {reason}; leave it out, or choose one of: {', '.join(found) or 'none'}")
        try:
            new = NMLinear.from_dense(module, mask, n, m, transposable=transposable, gradient=gradient)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
        ready[name] = (module, new)
    for module, new in ready.values():
        module.__class__ = NMLinear
        for attribute in ("n", "m", "transposable", "gradient"):
            setattr(module, attribute, getattr(new, attribute))
        for buffer in ("index", "used"):
            module.register_buffer(buffer, getattr(new, buffer))
    return list(ready)
