"""Run a sparse model as fast as this machine can: on sparse kernels wherever they were measured to be faster."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rarefy.deploy.compile import Compiled, compile_graph
from rarefy.deploy.graph import Graph, trace
from rarefy.deploy.measure import Memory, race
from rarefy.deploy.plan import LayerPlan, Plan
from rarefy.engine.conversion import decompress
from rarefy.engine.optimizer_state import Optimizers
from rarefy.errors import ModelError, OptionError
from rarefy.kernels import threads
from rarefy.nn import NMLinear, SparseModule

LARGEST = 1 << 28  # entries (1 GB): compressed layers whose dense weight would be larger stay on their own operators
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class AcceleratedModel(nn.Module):
    """A model for inference, made by `accelerate`: the same outputs, and a `plan` that says how each layer runs.

    Inputs of another shape than the example's are measured when they first come. `model` is the model that it was made
    from; state dict, copies and pickles are made of that, and measure anew where they run.
    """

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype
        self._example = [(tuple(x.shape), x.dtype) for x in example]
        self._prepare(example)
        super().train(False)

    def _prepare(self, example: tuple[Tensor, ...]) -> None:
        self._memory = Memory()
        self._ready: dict[Any, Callable[..., Any]] = {}
        notes: list[str] = []
        with torch.inference_mode():
            expected = self.model(*example)
        self._graph: Graph | None
        try:
            self._graph = trace(self.model)
        except Exception as error:  # what stops a tracer is the user's code: anything
            self._graph = None
            notes.append(f"not traced as a whole ({_first_line(error)}): its layers are replaced one by one")
        notes += [
            f"{name}: {module.rows:,} x {module.cols:,} is too large to be held dense; it runs on its own sparse operator"
            for name, module in self.model.named_modules()
            if isinstance(module, SparseModule)
        ]
        ways = _dense_ways(self.model, example, self._dtype)
        compiled: Compiled | _Swapped
        if self._graph is not None:
            compiled = compile_graph(self._graph, example, self._memory, self._dtype)
        else:
            compiled = _Swapped(self.model, example, self._memory, self._dtype)
        gap = _difference(compiled(*example), expected)
        if gap <= TOLERANCE[self._dtype]:
            ways["rarefy"] = lambda: compiled(*example)
        else:
            notes.append(f"the native network differs by {gap:.1e} of the largest output: it is not used")
        with torch.inference_mode():
            times = race(ways, seconds=0.1)
        # Dense is what users have: leave it only for a gain.
        choice = min(times, key=lambda way: times[way])
        self.plan = Plan(compiled.layers, times, choice, tuple(notes), threads())
        self._dense = None if choice in ("rarefy", "torch") else _dense_runner(choice, self.model, example, self._dtype)
        if choice == "rarefy":
            self._ready[self._key(example)] = compiled
        self._memory.save()

    @staticmethod
    def _key(args: Sequence[Tensor]) -> Any:
        return (*(tuple(x.shape) for x in args), threads())

    def forward(self, *args: Tensor) -> Any:
        if len(args) != len(self._example) or not all(isinstance(x, Tensor) for x in args):
            raise ModelError(f"an accelerated model takes its {len(self._example)} tensor(s), as in the example")
        for x, (shape, dtype) in zip(args, self._example, strict=True):
            if x.dtype != dtype or x.device.type != "cpu" or x.dim() != len(shape):
                raise ModelError(
                    f"this accelerated model takes {dtype} on the CPU with {len(shape)} dimensions, as in the example "
                    f"{list(shape)}; this is {x.dtype} on {x.device} of shape {list(x.shape)}"
                )
        if torch.is_grad_enabled() and any(x.requires_grad for x in args):
            raise ModelError("an accelerated model is for inference: train the model that it was made from")
        with torch.inference_mode():
            if self.plan.choice != "rarefy":
                return (self._dense or self.model)(*args)
            run = self._ready.get(self._key(args))
            if run is None:
                run = self._ready[self._key(args)] = (
                    compile_graph(self._graph, args, self._memory, self._dtype)
                    if self._graph is not None
                    else _Swapped(self.model, args, self._memory, self._dtype)
                )
            return run(*args)

    def train(self, mode: bool = True) -> AcceleratedModel:
        """Refuse to be trained: raises ModelError."""
        if mode:
            raise ModelError("an accelerated model is for inference: train the model that it was made from")
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "dtype": self._dtype, "example": self._example}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], _zeros(state["example"]), state["dtype"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> AcceleratedModel:
        return AcceleratedModel(copy.deepcopy(self.model, memo), _zeros(self._example), self._dtype)

    def extra_repr(self) -> str:
        return f"runs as {self.plan.choice}, {self.plan.speedup:.2f}x the fastest dense way"


class _Swapped:
    """A model that cannot be traced, with each convolution and linear layer replaced by itself, accelerated."""

    def __init__(self, model: nn.Module, example: Sequence[Tensor], memory: Memory, dtype: torch.dtype) -> None:
        self._model = copy.deepcopy(model)
        seen: dict[str, Tensor] = {}
        named = {n: m for n, m in self._model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0].clone()))
            for name, module in named.items()
        ]
        with torch.no_grad():
            self._model(*example)
        for handle in handles:
            handle.remove()
        layers: list[LayerPlan] = []
        for name, x in seen.items():
            layer = _Layer(named[name], name, x, memory, dtype)
            layers.extend(layer.plans)
            parent, _, last = name.rpartition(".")
            if parent or last:
                setattr(self._model.get_submodule(parent), last, layer)
        self.layers = tuple(layers)

    def __call__(self, *args: Tensor) -> Any:
        with torch.inference_mode():
            return self._model(*args)


class _Layer(nn.Module):
    """One layer, made ready for each shape it meets."""

    def __init__(self, module: nn.Module, name: str, x: Tensor, memory: Memory, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, module.bias  # what code around it may look at
        self._graph, self._memory, self._dtype = trace(nn.Sequential(module).eval()), memory, dtype
        self._ready: dict[Any, Compiled] = {}
        self.plans = [
            LayerPlan(name, p.kind, p.shape, p.sparsity, p.choice, p.seconds, p.dense_seconds, p.why)
            for p in self._for(x).layers
        ]

    def _for(self, x: Tensor) -> Compiled:
        key = (tuple(x.shape), threads())
        if key not in self._ready:
            self._ready[key] = compile_graph(self._graph, (x,), self._memory, self._dtype)
        return self._ready[key]

    def forward(self, x: Tensor) -> Any:
        return self._for(x)(x)


def accelerate(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    *,
    objective: str = "latency",
    dtype: torch.dtype = torch.float32,
) -> AcceleratedModel:
    """Make a sparse model fast on this machine's CPU, for inference.

    The model is traced, its batch norms are folded, activations and residuals fused. Every layer is then measured on
    this machine, dense (PyTorch's default and oneDNN with packed weights) and on the sparse kernels, and runs as the
    fastest of them; neighbours that run natively become one program over NCHW planes. In the end the whole network is
    measured against the dense ways to run it, and stays dense where those are faster. Measurements are remembered in
    the user's cache folder (`RAREFY_CACHE`; empty: nowhere). A model that cannot be traced has its layers replaced one by one.

    Args:
        model: the trained model; it is copied and stays as it is. Zeros in its weights are what makes it faster.
        example_input: on the CPU, float32 or whole numbers (tokens); one tensor, or one per argument. Its shape is what
            is measured.
        objective: what to make small; "latency" is the only one so far.
        dtype: torch.float32, or torch.bfloat16 to allow layers to run in bfloat16 where that is faster.

    Returns:
        A module with the same outputs (to 1e-4 of the largest in float32, checked on the example) and a `plan`.

    Raises:
        OptionError: an argument is none of these. ModelError: the model does not run on the example.

    >>> import torch, rarefy
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> fast = rarefy.accelerate(model, torch.randn(1, 3, 16, 16))
    >>> torch.allclose(fast(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)), atol=1e-5)
    True
    """
    if objective != "latency":
        raise OptionError(f"objective={objective!r} is not known; the only one so far is 'latency'")
    if dtype not in TOLERANCE:
        raise OptionError(f"dtype={dtype} cannot be used; it is torch.float32 or torch.bfloat16")
    example = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    for x in example:
        fits = isinstance(x, Tensor) and x.device.type == "cpu"
        if not fits or x.dtype not in (torch.float32, torch.int64, torch.int32, torch.bool):
            what = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise OptionError(f"example_input must be tensors on the CPU, float32 or whole numbers; one is {what}")
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    plain_(copied)
    try:
        with torch.inference_mode():
            copied(*example)
    except Exception as error:
        shapes = [list(x.shape) for x in example]
        raise ModelError(
            f"{type(model).__name__} does not run on the example input {shapes}: {_first_line(error)}"
        ) from error
    return AcceleratedModel(copied, tuple(x.detach().clone() for x in example), dtype)


def _dense_ways(model: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the dense ways to run the whole model that work for it."""
    ways: dict[str, Callable[[], object]] = {"torch": lambda: model(*example)}
    names = ["torch, channels last", "torch, frozen"] + ["torch, bfloat16"] * (dtype == torch.bfloat16)
    for name in names:
        try:
            run = _dense_runner(name, model, example, dtype)
            run(*example)
        except Exception:  # a way that this model cannot go
            continue
        ways[name] = lambda run=run: run(*example)  # type: ignore[misc]
    return ways


def _dense_runner(name: str, model: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[..., Any]:
    if name == "torch, frozen":
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.jit.optimize_for_inference(
                torch.jit.freeze(torch.jit.trace(model, example, check_trace=False))
            )
    if name == "torch, bfloat16":
        low = copy.deepcopy(model).bfloat16()

        def run(*args: Tensor) -> Any:
            found = low(*[x.bfloat16() if x.is_floating_point() else x for x in args])
            return torch.utils._pytree.tree_map(lambda y: y.float() if isinstance(y, Tensor) else y, found)

        return run
    last: Any = copy.deepcopy(model)
    last = last.to(memory_format=torch.channels_last)
    return lambda *args: last(*[x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in args])


def plain_(model: nn.Module) -> None:
    """Give layers that compute with kept values only plain dense weights, in place, for tracing, packing and dense rivals."""
    for module in [m for m in model.modules() if isinstance(m, SparseModule)]:
        if module.rows * module.cols <= LARGEST:
            decompress(module, Optimizers([]))
    for layer in [m for m in model.modules() if isinstance(m, NMLinear)]:
        layer.dense_()


def _zeros(example: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in example)


def _difference(found: Any, expected: Any) -> float:
    """Return the largest difference between two structures of tensors over the largest expected value."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    worst = 0.0
    for a, b in pairs:
        if isinstance(b, Tensor) and b.numel():
            if a.shape != b.shape:
                return float("inf")
            gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
            worst = max(worst, float(gap) if gap == gap else float("inf"))
    return worst


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
