"""Units that sparsity has cut off: what no kept weight leads to, and what no kept weight reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from rarefy.engine.layer import Layer


class DeadUnits(NamedTuple):
    """Of one layer: outputs without any kept weight (they give their bias, whatever comes in), and inputs that nothing reads.

    Where all outputs are dead nothing passes through the layer: it is disconnected.
    """

    layer: str
    outputs: int
    of_outputs: int
    inputs: int
    of_inputs: int

    @property
    def disconnected(self) -> bool:
        return self.outputs == self.of_outputs

    def __str__(self) -> str:
        if self.disconnected:
            return f"{self.layer} keeps nothing"
        said = f"{self.outputs} of {self.of_outputs} outputs keep no weight" if self.outputs else ""
        unread = f"{self.inputs} of {self.of_inputs} inputs are not read" if self.inputs else ""
        return f"{self.layer}: {' and '.join(filter(None, (said, unread)))}"


def dead_units(layers: Iterable[Layer]) -> list[DeadUnits]:
    """Count the dead outputs and unread inputs of each layer that has any; works on every storage.

    An output is an entry of the weight's dimension 0, an input one of dimension 1 (of each group of a grouped convolution);
    the other way round in embeddings.

    >>> import torch, rarefy
    >>> from rarefy.engine import dead_units
    >>> sparse = rarefy.sparsify(torch.nn.Linear(50, 10), "static", sparsity=0.98)
    >>> [(d.outputs > 0, d.inputs >= 40) for d in dead_units(sparse.layers.values())]
    [(True, True)]
    """
    found = []
    for layer in layers:
        ends = [layer.kept_per_output(), layer.kept_per_input()]
        outputs, inputs = reversed(ends) if isinstance(layer.module, nn.Embedding | nn.EmbeddingBag) else ends
        dead = DeadUnits(layer.name, int((outputs == 0).sum()), len(outputs), int((inputs == 0).sum()), len(inputs))
        if dead.outputs or dead.inputs:
            found.append(dead)
    return found
