"""Where layers stand in a network: which read its input, which make its output, which norm follows which layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from rarefy.errors import ModelError

_INPUT = ""  # stands among the names of layers for the network's input
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Flow:
    """What one run of a network showed.

    Attributes:
        stem: layers that read the network's input, through nothing but operations without weights.
        head: layers whose output reaches the network's output so.
        norms: layer -> the batch norm that alone reads its output.
        called: layers that were called at all.
        shapes: of the outputs.
    """

    stem: set[str] = field(default_factory=set)
    head: set[str] = field(default_factory=set)
    norms: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    shapes: list[tuple[int, ...]] = field(default_factory=list)


def follow(model: nn.Module, example: Any) -> Flow:
    """Run a copy of the network once, in eval mode and without gradients, and see how its layers follow each other.

    A layer is any module with a parameter of two or more dimensions of its own. `example` is an input as
    `rarefy.metrics.flops` takes it. Raises ModelError where the network does not run on it.
    """
    twin = copy.deepcopy(model).eval()
    tracker = _Tracker()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        for name, module in twin.named_modules():
            if any(p.dim() >= 2 for p in module.parameters(recurse=False)):
                stack.enter_context(tracker.layer(name, module))
            elif isinstance(module, _NORMS):
                stack.enter_context(tracker.norm(name, module))
        out = run(twin, example, tracker)
    return tracker.finish(out)


def run(model: nn.Module, example: Any, tracker: _Tracker | None = None) -> Any:
    """Call the model on an example; ModelError where it does not run."""
    args, kwargs = arguments(example)
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    try:
        if tracker is None:
            return model(*args, **kwargs)
        tracker.mark(inputs, _INPUT)
        with tracker:
            return model(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run on the example input (shapes {[tuple(t.shape) for t in inputs]}): {error}"
        ) from error


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs): a mapping is keyword arguments, a tuple or list several arguments, all else one."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


class _Tracker(TorchFunctionMode):
    """Carry with every tensor the names of the layers that made it, directly or through operations without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self._made: dict[int, tuple[Tensor, frozenset[str]]] = {}  # holds on to tensors, so that no id is used twice
        self._uses: dict[int, int] = {}
        self._direct: dict[int, str] = {}  # the output of a layer itself
        self._normed: dict[int, str] = {}

    def mark(self, tensors: Any, name: str) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._made[id(tensor)] = (tensor, frozenset([name]))

    def _sources(self, values: Any) -> frozenset[str]:
        found = [self._made[id(t)][1] for t in tree_leaves(values) if isinstance(t, Tensor) and id(t) in self._made]
        return frozenset().union(*found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if tensors:
            sources = self._sources((args, kwargs))
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._uses[id(tensor)] = self._uses.get(id(tensor), 0) + 1
            for tensor in tensors:
                self._made[id(tensor)] = (tensor, sources)
        return out

    @contextmanager
    def layer(self, name: str, module: nn.Module) -> Iterator[None]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.flow.called.add(name)
            if _INPUT in self._sources((args, kwargs)):
                self.flow.stem.add(name)

        def leave(_: nn.Module, args: Any, out: Any) -> None:
            self.mark(out, name)
            if isinstance(out, Tensor):
                self._direct[id(out)] = name
                self._uses[id(out)] = 0

        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def norm(self, name: str, module: nn.Module) -> Iterator[None]:
        def enter(_: nn.Module, args: Any) -> None:
            if args and id(args[0]) in self._direct:
                self._normed[id(args[0])] = name

        handle = module.register_forward_pre_hook(enter)
        try:
            yield
        finally:
            handle.remove()

    def finish(self, out: Any) -> Flow:
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.flow.head = set(self._sources(tensors)) - {_INPUT}
        self.flow.shapes = [tuple(t.shape) for t in tensors]
        for key, norm in self._normed.items():
            if self._uses[key] == 1:
                self.flow.norms[self._direct[key]] = norm
        return self.flow
