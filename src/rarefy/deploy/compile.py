"""A graph made ready for inputs of one shape: every step measured, runs of native steps joined into programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.deploy.graph import Graph, Step, fill, names_in
from rarefy.deploy.lower import Run, dense_layer, in_torch, native_layers
from rarefy.deploy.measure import Memory, fingerprint, race
from rarefy.deploy.plan import LayerPlan
from rarefy.kernels import planes, threads
from rarefy.kernels.program import Buffer, Program, ProgramBuilder

LEAVING = 15e-6  # seconds that a step in PyTorch costs a native program around it
WEIGHTED = ("conv", "linear")
NEVER_NATIVE = ("torch", "flatten", "identity")


@dataclass(frozen=True, eq=False)
class Stage:
    """Reads named values and gives others: a native program, or one step in PyTorch."""

    run: Callable[..., Sequence[Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Compiled:
    """The stages of a network for one shape of inputs."""

    inputs: tuple[str, ...]
    stages: tuple[Stage, ...]
    outputs: Any
    layers: tuple[LayerPlan, ...]

    def __call__(self, *args: Tensor) -> Any:
        values: dict[str, Any] = dict(zip(self.inputs, args, strict=True))
        for stage in self.stages:
            found = stage.run(*[values[name] for name in stage.inputs])
            values.update(zip(stage.outputs, found, strict=True))
        return fill(self.outputs, values)

    @property
    def programs(self) -> list[Program]:
        """The native programs, in order."""
        return [stage.run for stage in self.stages if isinstance(stage.run, Program)]


@dataclass(frozen=True, eq=False)
class _Lowered:
    step: Step
    layer: planes.Layer | None  # None: in PyTorch, by `run`
    run: Run | None
    shape: tuple[int, ...]  # of its output, without the batch

    @property
    def native(self) -> bool:
        return self.layer is not None or (self.step.kind == "flatten" and len(self.shape) == 1)


@torch.inference_mode()
def compile_graph(graph: Graph, args: Sequence[Tensor], memory: Memory, dtype: torch.dtype = torch.float32) -> Compiled:
    """Measure every step of a graph on inputs like `args` and join the native ones into programs."""
    values: dict[str, Any] = dict(zip(graph.inputs, args, strict=True))
    last = {name: i for i, step in enumerate(graph.steps) for name in step.inputs}
    last |= dict.fromkeys(names_in(graph.outputs), len(graph.steps))
    shapes = {name: tuple(v.shape[1:]) for name, v in values.items() if isinstance(v, Tensor)}
    lowered: list[_Lowered] = []
    layers: list[LayerPlan] = []
    for i, step in enumerate(graph.steps):
        inputs = [values[name] for name in step.inputs]
        out = in_torch(step)(*inputs)
        values[step.name] = out
        shapes[step.name] = tuple(out.shape[1:]) if isinstance(out, Tensor) else ()
        layer, run = _choose(step, inputs, out, memory, dtype, layers)
        lowered.append(_Lowered(step, layer, run, shapes[step.name]))
        for name in step.inputs:
            if last[name] == i:
                values.pop(name, None)
    return Compiled(graph.inputs, tuple(_stages(lowered, graph, shapes)), graph.outputs, tuple(layers))


def _choose(
    step: Step, inputs: list[Any], out: Any, memory: Memory, dtype: torch.dtype, layers: list[LayerPlan]
) -> tuple[planes.Layer | None, Run | None]:
    natives = native_layers(step, inputs, out, threads(), dtype) if step.kind not in NEVER_NATIVE else {}
    if step.kind not in WEIGHTED:
        layer = natives.get("native")
        return layer, None if layer is not None else in_torch(step)
    weight: Tensor = step.options["weight"]
    dense: dict[str, Run] = {"torch": in_torch(step)}
    for name, precision in (("onednn", torch.float32), ("onednn bfloat16", torch.bfloat16)):
        if precision in (torch.float32, dtype) and (packed := dense_layer(step, inputs[0], precision)) is not None:
            dense[name] = packed
    geometry = {k: v for k, v in step.options.items() if not isinstance(v, Tensor) and k != "label"}
    key = fingerprint(step.kind, weight, [tuple(x.shape) for x in inputs], sorted(geometry.items()), [*dense])
    times = memory.get(key)
    if times is None or times.keys() != {*dense, *natives}:
        ways: dict[str, Callable[[], object]] = {name: _bind(run, inputs) for name, run in dense.items()}
        ways |= {name: _native_run(layer, inputs, out) for name, layer in natives.items()}
        times = race(ways)
        memory.put(key, times)
    fastest = min(dense, key=lambda name: times[name])
    best = min(natives, key=lambda name: times[name], default=None)
    sparsity = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    native = best is not None and times[best] <= times[fastest] + LEAVING
    if best is not None and native:
        choice, why = best.replace("native", "sparse") if sparsity > 0 else best, ""
        if times[best] > times[fastest]:
            why = "a little slower alone, but it saves leaving the native program"
    else:
        choice = fastest
        why = "no native kernel for it" if best is None else f"the sparse kernel takes {times[best] * 1e6:.0f} us"
    kind = "depthwise" if step.options.get("groups", 1) > 1 and weight.shape[1] == 1 else step.kind
    layers.append(
        LayerPlan(
            step.options["label"], kind, tuple(weight.shape), sparsity, choice,
            times[best] if best is not None and native else times[fastest], times[fastest], why,
        )
    )  # fmt: skip
    return (natives[best], None) if best is not None and native else (None, dense[fastest])


def _bind(run: Run, inputs: list[Tensor]) -> Callable[[], object]:
    return lambda: run(*inputs)


def _native_run(layer: planes.Layer, inputs: list[Tensor], out: Tensor) -> Callable[[], object]:
    arrays, result, count = (
        [x.contiguous().numpy() for x in inputs],
        torch.empty_like(out).contiguous().numpy(),
        threads(),
    )
    return lambda: layer.run(arrays, result, out.shape[0], count)


def _stages(lowered: list[_Lowered], graph: Graph, shapes: dict[str, tuple[int, ...]]) -> list[Stage]:
    """Join runs of native steps; a value leaves its program when anything outside reads it."""
    stages: list[Stage] = []
    at = 0
    while at < len(lowered):
        end = at
        while end < len(lowered) and lowered[end].native:
            end += 1
        group = lowered[at:end]
        if any(item.layer is not None for item in group):
            outside = {n for item in (*lowered[:at], *lowered[end:]) for n in item.step.inputs} | set(
                names_in(graph.outputs)
            )
            stages.append(_program(group, outside, shapes))
            at = end
            continue
        item = lowered[at]
        run = item.run if item.run is not None else in_torch(item.step)
        stages.append(Stage(_one(run), item.step.inputs, (item.step.name,)))
        at += 1
    return stages


def _one(run: Run) -> Callable[..., Sequence[Any]]:
    return lambda *inputs: (run(*inputs),)


def _program(group: list[_Lowered], outside: set[str], shapes: dict[str, tuple[int, ...]]) -> Stage:
    build = ProgramBuilder()
    made = {item.step.name for item in group}
    inputs = tuple(dict.fromkeys(n for item in group for n in item.step.inputs if n not in made))
    buffers: dict[str, Buffer] = {name: build.input(shapes[name]) for name in inputs}
    for item in group:
        read = [buffers[name] for name in item.step.inputs]
        if item.layer is None:
            buffers[item.step.name] = build.reshape(read[0], item.shape)
        else:
            buffers[item.step.name] = build.add(item.layer, *read, shape=item.shape, name=item.step.name)
    outputs = tuple(item.step.name for item in group if item.step.name in outside)
    return Stage(build.program(*[buffers[name] for name in outputs]), inputs, outputs)
