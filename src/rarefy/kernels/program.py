"""Whole networks in one native call: layers over one planned block of memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.kernels.native import cpu_empty, native, threads
from rarefy.kernels.planes import Layer

__all__ = ["Buffer", "Program", "ProgramBuilder"]


class Buffer(NamedTuple):
    """A value that flows through a program: its number, and its shape without the batch."""

    id: int
    shape: tuple[int, ...]


class ProgramBuilder:
    """Collects the steps of a program.

    >>> import torch
    >>> from rarefy.kernels import planes
    >>> build = ProgramBuilder()
    >>> x = build.input((3, 4, 4))
    >>> y = build.add(planes.max_pool(3, 4, 2), x, shape=(3, 2, 2))
    >>> z = build.add(planes.add(12, "relu"), y, y)
    >>> program = build.program(z)
    >>> program(torch.ones(5, 3, 4, 4))[0].shape
    torch.Size([5, 3, 2, 2])
    """

    def __init__(self) -> None:
        self._inputs: list[Buffer] = []
        self._steps: list[tuple[Layer, list[int], int]] = []
        self._names: list[str] = []
        self._next = 0

    def _buffer(self, shape: Sequence[int]) -> Buffer:
        self._next += 1
        return Buffer(self._next - 1, tuple(shape))

    def input(self, shape: Sequence[int]) -> Buffer:
        """Declare an input of this shape per sample."""
        self._inputs.append(self._buffer(shape))
        return self._inputs[-1]

    def add(self, layer: Layer, *inputs: Buffer, shape: Sequence[int] | None = None, name: str = "") -> Buffer:
        """Append a layer and return its output, of `shape` per sample: that of the first input where not given."""
        shape = inputs[0].shape if shape is None else tuple(shape)
        who = name or type(layer).__name__
        if layer.output_size != math.prod(shape):
            raise OptionError(f"{who}: the output has {layer.output_size} floats a sample, not shape {list(shape)}")
        for i, (buffer, size) in enumerate(zip(inputs, layer.input_sizes, strict=False)):
            if math.prod(buffer.shape) != size:
                raise OptionError(f"{who}: input {i} has shape {list(buffer.shape)}, not {size} floats a sample")
        out = self._buffer(shape)
        self._steps.append((layer, [b.id for b in inputs], out.id))
        self._names.append(who)
        return out

    @staticmethod
    def reshape(buffer: Buffer, shape: Sequence[int]) -> Buffer:
        """Give a buffer another shape per sample (flatten, for one): nothing is done at run time."""
        if math.prod(shape) != math.prod(buffer.shape):
            raise OptionError(f"{list(buffer.shape)} cannot be reshaped to {list(shape)}")
        return Buffer(buffer.id, tuple(shape))

    def program(self, *outputs: Buffer) -> Program:
        """Build the program that computes these buffers."""
        return Program(self._steps, self._names, self._inputs, outputs)


class Program:
    """A network that runs natively in one call; made by `ProgramBuilder`.

    It holds its own memory, planned so that buffers share room where their lives do not meet, for each batch size and number
    of threads that it meets. Several Python threads may call it at once. Works on the CPU in float32.
    """

    def __init__(
        self,
        steps: Sequence[tuple[Layer, list[int], int]],
        names: Sequence[str],
        inputs: Sequence[Buffer],
        outputs: Sequence[Buffer],
    ) -> None:
        self.names, self.inputs, self.outputs = list(names), list(inputs), list(outputs)
        try:
            self.native = native.Program(list(steps), [b.id for b in inputs], [b.id for b in outputs])
        except ValueError as error:
            raise OptionError(str(error)) from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run on inputs [batch, *shape] and return the outputs [batch, *shape]."""
        xs, batch = self._checked(inputs)
        outputs = [cpu_empty(batch, *b.shape) for b in self.outputs]
        self.native.run([x.numpy() for x in xs], [y.numpy() for y in outputs], batch, threads())
        return outputs

    def profile(self, *inputs: Tensor, repeats: int = 20) -> list[tuple[str, float]]:
        """Return each step's name and its median time in seconds over some runs."""
        xs, batch = self._checked(inputs)
        outputs = [cpu_empty(batch, *b.shape) for b in self.outputs]
        arrays = [x.numpy() for x in xs], [y.numpy() for y in outputs]
        runs = [self.native.profile(*arrays, batch, threads()) for _ in range(repeats)]
        return [(name, statistics.median(run[i] for run in runs)) for i, name in enumerate(self.names)]

    def arena_bytes(self, batch: int) -> int:
        """Return how much memory the values between the layers take at this batch size, with scratch."""
        return 4 * self.native.arena_floats(batch, threads())

    def _checked(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        if len(inputs) != len(self.inputs):
            raise OptionError(f"this program takes {len(self.inputs)} inputs, not {len(inputs)}")
        batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 0
        for i, (x, buffer) in enumerate(zip(inputs, self.inputs, strict=True)):
            if tuple(x.shape) != (batch, *buffer.shape) or x.dtype != torch.float32 or x.device.type != "cpu":
                raise OptionError(
                    f"input {i} must be float32 on the CPU of shape [batch, {', '.join(map(str, buffer.shape))}]; "
                    f"this one is {x.dtype} on {x.device} of shape {list(x.shape)}"
                )
        return [x.detach().contiguous() for x in inputs], batch
