"""Watch a model run, and follow which channel each value belongs to.

Every tensor carries *labels*: for each entry the atom (see `atoms`) that it moves with, 0 where it does not move. Labels have
the tensor's number of dimensions, and length 1 along those where they do not change. A rule for each operation of PyTorch says
what labels its result has, and which atoms it binds; operations that only move data around are run on the labels themselves.
What has no rule fixes everything that goes into it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rarefy.coupling.atoms import FIXED, Atoms
from rarefy.coupling.groups import Coupling, Pinned
from rarefy.errors import ModelError
from rarefy.metrics._run import arguments, left_as_it_was

# these give no tensor, and tell nothing about the entries; whatever else gives none reads or writes them
_NAMES = """
    shape size dim ndim ndimension dtype device numel nelement stride layout len element_size itemsize nbytes names type is_cuda
    is_cpu is_meta is_sparse is_quantized is_complex is_floating_point is_signed is_contiguous is_leaf is_inference is_nested
    is_mkldnn is_mps is_xla is_xpu is_view requires_grad retains_grad grad grad_fn output_nr version base storage_offset
    get_device hash dim_order dense_dim sparse_dim has_names is_tensor is_same_size is_pinned is_shared data_ptr
"""
_ABOUT = set(_NAMES.split())
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"}


class Unknown(Exception):
    """A rule meets something that it does not understand; the text says what."""


class Call:
    """One call of an operation: its name, arguments and result, and what the arguments are labelled."""

    def __init__(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name, self.func, self.args, self.kwargs = name, func, args, kwargs
        self.out: Any = None

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument given by place or by name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @property
    def results(self) -> list[Tensor]:
        return [t for t in tree_leaves(self.out) if isinstance(t, Tensor)]


class Follower(TorchFunctionMode):
    """Sees every operation while a model runs, and keeps the labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.atoms = Atoms()
        self._labels: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by identity; holds on to the tensors, so that no id is used twice
        self._names: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names.setdefault(id(tensor), name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from rarefy.coupling.rules import RULES  # the rules know this file

        call = Call(_spell(func), func, args, kwargs or {})
        call.out = func(*args, **call.kwargs)
        if not any(self.known(t) for t in call.tensors):
            return call.out
        results = call.results
        if call.name in _CASTS and results and id(results[0]) in self._names:
            return call.out  # the parameter itself: there was nothing to convert
        if results or call.name not in _ABOUT:
            try:
                if call.name not in RULES or not results or "out" in call.kwargs:
                    raise Unknown(f"'{call.name}' is not understood")
                if any(_is_part(t) for t in results if any(t is given for given in call.tensors)):
                    raise Unknown(f"'{call.name}' changes some channels in place")
                found = RULES[call.name](self, call)
                if len(found) != len(results) or any(a.ndim != b.ndim for a, b in zip(found, results, strict=True)):
                    raise Unknown(f"'{call.name}' is not understood")
            except Unknown as reason:
                for tensor in call.tensors:
                    self.fix(tensor, str(reason))
                found = [still(t) for t in results]
            for tensor, label in zip(results, found, strict=True):
                self._labels[id(tensor)] = (tensor, label)
        return call.out

    def known(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter, or came from something that is followed."""
        return id(tensor) in self._labels or id(tensor) in self._names

    def followed(self, tensor: Tensor) -> bool:
        """Whether a tensor is a value that came up in the run, and no parameter."""
        return id(tensor) in self._labels

    def name(self, tensor: Tensor | None) -> str | None:
        """Return the name of a parameter or buffer."""
        return None if tensor is None else self._names.get(id(tensor))

    def label(self, tensor: Tensor) -> Tensor:
        """Return a tensor's labels; a parameter that is met outside its own layer moves along its last long dimension."""
        if id(tensor) in self._labels:
            return self._labels[id(tensor)][1]
        wide = [d for d, size in enumerate(tensor.shape) if size > 1]
        if self.name(tensor) is None or not wide:
            return still(tensor)
        return self.of_parameter(tensor, wide[-1])

    def of_parameter(self, tensor: Tensor, dim: int | None) -> Tensor:
        """Return labels of a parameter that move along one dimension, and fix its others."""
        name = self._names[id(tensor)]
        for d, size in enumerate(tensor.shape):
            if d != dim and size > 1:
                self.atoms.pin_dim(name, d, "meets values that do not move")
        if dim is None:
            return still(tensor)
        return spread(self.atoms.along(name, dim, tensor.shape[dim]), tensor.ndim, dim)

    def dim(self, tensor: Tensor | None, dim: int, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the labels [size] of a layer's own parameter along a dimension."""
        name = self.name(tensor)
        if name is None or tensor is None:
            raise Unknown("a weight is computed, not stored")
        return self.atoms.along(name, dim, tensor.shape[dim], rows)

    def fix(self, tensor: Tensor, reason: str) -> None:
        """Let nothing move that a tensor holds."""
        if id(tensor) in self._labels:
            self.atoms.pin(self._labels[id(tensor)][1], reason)
        elif (name := self.name(tensor)) is not None:
            for dim in range(tensor.ndim):
                self.atoms.pin_dim(name, dim, reason)


def still(tensor: Tensor) -> Tensor:
    """Return labels that say that nothing moves."""
    return torch.full([1] * tensor.ndim, FIXED)


def spread(labels: Tensor, ndim: int, dim: int) -> Tensor:
    """Return labels [n] as those of a tensor of `ndim` dimensions that change along one."""
    shape = [1] * ndim
    shape[dim] = -1
    return labels.reshape(shape)


def couple(model: nn.Module, example_input: Any) -> Coupling:
    """Find which dimensions of a model's parameters must move together.

    The model runs once on the example, in eval mode and without gradients, and is left as it was; every operation is
    watched, so any Python code may lie between them. Residual sums, batch norm, depthwise and grouped convolutions,
    concatenation, slices, channel shuffles, flattening, channel-wise gates, attention heads and tied weights are understood.
    The network's inputs and outputs never move. What is not understood is fixed, and named with the reason.

    Args:
        model: any module; one device.
        example_input: one tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Raises:
        ModelError: the model does not run on the example, holds TorchScript, whose operations cannot be watched, or returns
            an object whose tensors cannot be found.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> print(couple(net, torch.zeros(1, 3, 5, 5)).groups[0])  # doctest: +NORMALIZE_WHITESPACE
    8 units: 0.weight dim 0, 0.bias dim 0, 1.running_mean dim 0, 1.running_var dim 0, 1.weight dim 0, 1.bias dim 0,
    3.weight dim 1
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            raise ModelError(f"{name or 'the model'} is TorchScript, which runs unseen; give the original module")
    args, kwargs = arguments(example_input)
    follower = Follower(model)
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            follower._labels[id(tensor)] = (tensor, still(tensor))
    with left_as_it_was(model), torch.no_grad():
        try:
            with follower:
                output = model(*args, **kwargs)
        except Exception as error:
            shapes = [tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            raise ModelError(
                f"{type(model).__name__} does not run on the example input (shapes {shapes}): {error}"
            ) from error
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            follower.fix(leaf, "is the network's output")
        elif leaf is not None and not isinstance(leaf, int | float | str | bool):
            raise ModelError(
                f"{type(model).__name__} returns a {type(leaf).__name__}, in which tensors cannot be found"
            )
    groups, pinned = follower.atoms.solve()
    return Coupling(groups, pinned + _unseen(model, groups, pinned))


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a part of another."""
    return tensor._base is not None and tensor._base.numel() != tensor.numel()


def _unseen(model: nn.Module, groups: Any, pinned: tuple[Pinned, ...]) -> tuple[Pinned, ...]:
    """Name the weights' dimensions that no rule has met."""
    met = {(m.name, m.dim) for g in groups for m in g.members} | {(p.name, p.dim) for p in pinned}
    return tuple(
        Pinned(name, dim, "is used by nothing that is understood")
        for name, parameter in model.named_parameters()
        for dim in range(min(2, parameter.ndim))
        if parameter.shape[dim] > 1 and (name, dim) not in met
    )


def _spell(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return str(name).strip("_")
