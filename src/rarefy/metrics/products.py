"""The work of one forward pass, in order: its matrix products with their sizes, and the passes over data between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from rarefy.metrics._counter import Tally
from rarefy.metrics._masks import fit
from rarefy.metrics._run import arguments
from rarefy.metrics._weights import Weights, _storage
from rarefy.metrics.flops import run

Kind = Literal["linear", "convolution", "transposed convolution", "attention", "matmul"]


@dataclass(frozen=True)
class Product:
    """One matrix product: `groups` times [rows, inputs * positions] by [inputs * positions, columns].

    Of a convolution, as it is computed without zeros between pixels: `rows` are the output pixels of the batch (input
    pixels of a transposed one), `inputs` and `columns` the channels of a group, `positions` those of the kernel. A
    weight stands on the right. Products without a weight (attention) have `weight` None.

    `read` and `written` count the entries of the data that goes in and comes out, as tensors: a convolution's pixels
    once, not once for each kernel position. `input_gradient` tells whether training needs the gradient of the left
    factor (not of a network's own input), `weight_gradient` that of the right one.
    """

    name: str
    weight: str | None
    kind: Kind
    groups: int
    rows: int
    inputs: int
    positions: int
    columns: int
    read: int
    written: int
    input_gradient: bool
    weight_gradient: bool

    @property
    def reduction(self) -> int:
        """Length of a sum."""
        return self.inputs * self.positions

    @property
    def right(self) -> int:
        """Entries of the right factor: of the weight."""
        return self.groups * self.reduction * self.columns

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense product."""
        return self.rows * self.right


@dataclass(frozen=True)
class Pass:
    """One operation over data that is no matrix product: `read` entries go in, `written` come out.

    `operation` is PyTorch's name of it (relu, native_batch_norm, add ...), `gradient` tells whether training comes
    back through it. Views are no passes.
    """

    module: str
    operation: str
    read: int
    written: int
    gradient: bool


@dataclass(frozen=True)
class Work:
    """All that one forward pass does, in the order of doing it, and what could not be read, by name."""

    steps: tuple[Product | Pass, ...]
    not_counted: tuple[str, ...] = ()

    @property
    def products(self) -> tuple[Product, ...]:
        return tuple(step for step in self.steps if isinstance(step, Product))

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(step for step in self.steps if isinstance(step, Pass))


def work(model: nn.Module, example_input: Any) -> Work:
    """Run the model once on `example_input` and return every matrix product and every pass over data, with sizes.

    The model runs in eval mode, with gradients on so that each step knows whether training comes back through it, and
    is left as it was. Sizes are those of the whole batch in `example_input`; build model and example under
    `torch.device("meta")` to read a large batch in no time. Recurrent layers and layers that hold kept values only are
    named in `not_counted`, as are weights that meet an operation whose cost is not known.

    Args:
        model: any module, on any device, "meta" included.
        example_input: one tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Raises:
        ModelError: the model does not run on `example_input`.

    >>> step = work(nn.Conv2d(8, 4, 3, stride=2, padding=1), torch.zeros(2, 8, 6, 6)).products[0]
    >>> step.rows, step.inputs, step.positions, step.columns, step.read, step.written
    (18, 8, 9, 4, 576, 72)
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    recorder = Recorder(model, Weights(model, fit(model, None)))
    with torch.enable_grad():
        run(model, arguments(example_input), recorder, {})
    unknown = [f"{name} in {where}: {op}" for (name, op), where in recorder.unknown.items()]
    return Work(tuple(recorder.steps), tuple(dict.fromkeys([*recorder.left_out, *unknown])))


class Recorder(Tally):
    """A tally that also writes down each step with its sizes."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        super().__init__(model, weights)
        self.steps: list[Product | Pass] = []
        self.left_out: list[str] = []
        self.uses: Counter[str] = Counter()

    def _product(
        self,
        label: str | None,
        kind: Kind,
        sizes: tuple[int, int, int, int, int],
        moved: tuple[int, int],
        gradients: tuple[bool, bool],
    ) -> None:
        """Write down a product of (groups, rows, inputs, positions, columns) under a name of its own."""
        name = label or f"{self.where}:{kind}"
        self.uses[name] += 1
        if self.uses[name] > 1:
            name = f"{name} #{self.uses[name]}"
        groups, rows, inputs, positions, columns = sizes
        self.steps.append(Product(name, label, kind, groups, rows, inputs, positions, columns, *moved, *gradients))

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().matmul(a, b)
        left, right = self.weights.find(a), self.weights.find(b)
        rows, inputs = (a.shape[-2] if a.dim() > 1 else 1), a.shape[-1]
        columns = b.shape[-1] if b.dim() > 1 else 1
        groups = prod(a.shape[:-2])
        if left and not right:  # W x is (x' W')': the weight stands on the right
            a, b, right, rows, columns = b, a, left, columns, rows
        if right and groups > 1 and b.stride(0) == 0:  # one weight for all of a batch
            groups, rows = 1, groups * rows
        label = right.source.name if right else None
        self._product(
            label, "linear" if label else "matmul", (groups, rows, inputs, 1, columns),
            (groups * rows * inputs, groups * rows * columns), (a.requires_grad, b.requires_grad),
        )  # fmt: skip

    def convolution(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, transposed: bool) -> None:
        super().convolution(x, w, out, transposed)
        weight = self.weights.find(w)
        grid = x if transposed else out
        groups = out.shape[1] // w.shape[1] if transposed else x.shape[1] // w.shape[1]
        sides = (w.shape[0] // groups, w.shape[1])
        inputs, columns = sides if transposed else sides[::-1]
        self._product(
            weight.source.name if weight else None, "transposed convolution" if transposed else "convolution",
            (groups, grid.shape[0] * prod(grid.shape[2:]), inputs, prod(w.shape[2:]), columns),
            (x.numel(), out.numel()), (x.requires_grad, w.requires_grad),
        )  # fmt: skip

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().attention(query, key, value)
        *lead, length, size = query.shape
        groups, keys, width = prod(lead), key.shape[-2], value.shape[-1]
        table, grad = groups * length * keys, query.requires_grad or key.requires_grad
        one, two = (query.requires_grad, key.requires_grad), (grad, value.requires_grad)
        self._product(None, "attention", (groups, length, size, 1, keys), (query.numel(), table), one)
        self.steps.append(Pass(self.where, "softmax", table, table, grad))
        self._product(None, "attention", (groups, length, keys, 1, width), (table, groups * length * width), two)

    def recurrent(self, module: nn.RNNBase, sequence: torch.Tensor | PackedSequence) -> None:
        super().recurrent(module, sequence)
        self.left_out.append(f"{self.where}: recurrent layers run step by step and are not read")

    def compressed(self, values: torch.Tensor, crow: torch.Tensor, out: torch.Tensor, cols: int) -> None:
        super().compressed(values, crow, out, cols)
        self.left_out.append(f"{self.where}: a layer of kept values only is not read; give the dense model")

    def n_m(self, x: torch.Tensor, held: torch.Tensor, out: torch.Tensor, kept: int | None) -> None:
        super().n_m(x, held, out, kept)
        self.left_out.append(f"{self.where}: a layer on the N:M kernels is not read; give the dense model")

    def other(self, op: str, tensors: list[torch.Tensor], out: object) -> None:
        super().other(op, tensors, out)
        data = [t for t in tensors if t.is_floating_point() and not self.weights.known(t)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        places = {_storage(t) for t in tensors}
        in_place = op.endswith("_")
        made = [t for t in results if in_place or _storage(t) not in places]
        if data and made:
            read, grad = sum(t.numel() for t in data), any(t.requires_grad for t in data)
            self.steps.append(
                Pass(self.where, op, read, max(t.numel() for t in made), grad)
            )  # without saved statistics
