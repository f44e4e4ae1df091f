"""Forward FLOPs of one sample, counted from a real run of the model and from the real masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from rarefy.errors import ModelError, OptionError
from rarefy.metrics._counter import RECURRENT, AttentionMode, OpMode, Tally
from rarefy.metrics._masks import Masks, fit
from rarefy.metrics._run import arguments, left_as_it_was
from rarefy.metrics._weights import Weights


class LayerFlops(NamedTuple):
    """Forward FLOPs of one layer for one sample: as a dense layer, and with its mask."""

    dense: float
    sparse: float


class NotCounted(NamedTuple):
    """A weight of two or more dimensions that was used by an operation whose cost is not known here."""

    weight: str
    operation: str
    module: str

    def __str__(self) -> str:
        return f"{self.weight} in {self.module}: used by {self.operation}, which is not counted"


@dataclass(frozen=True)
class FlopsReport:
    """Forward FLOPs of one sample, per layer and in total.

    `layers` is keyed by parameter name ("conv1.weight"); products without a weight stand under "module:attention"
    (Q K^T and A V) and "module:matmul". `weights` holds the number of entries of every parameter of the model.
    `not_counted` names what the totals lack; an empty tuple means that nothing is missing.
    """

    layers: dict[str, LayerFlops]
    weights: dict[str, int]
    batch: int
    not_counted: tuple[NotCounted, ...] = ()

    @property
    def dense(self) -> float:
        """FLOPs of one sample without masks."""
        return sum(layer.dense for layer in self.layers.values())

    @property
    def sparse(self) -> float:
        """FLOPs of one sample with the masks that were given."""
        return sum(layer.sparse for layer in self.layers.values())

    @property
    def ratio(self) -> float:
        """Sparse FLOPs over dense FLOPs (1.0 for a model that computes nothing)."""
        return self.sparse / self.dense if self.dense else 1.0

    def positions(self, name: str) -> float:
        """Return how often each entry of weight `name` is used for one sample (output positions, tokens, calls)."""
        layer = self.layers.get(name)
        return layer.dense / (2 * self.weights[name]) if layer and layer.dense else 0.0

    def __str__(self) -> str:
        width = max([len(name) for name in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'dense':>16}  {'sparse':>16}  ratio"]
        for name, (dense, sparse) in [*self.layers.items(), ("total", (self.dense, self.sparse))]:
            ratio = sparse / dense if dense else 1.0
            lines.append(f"{name:<{width}}  {dense:>16,.0f}  {sparse:>16,.0f}  {ratio:5.3f}")
        return "\n".join(lines + [f"not counted: {item}" for item in self.not_counted])


def flops(model: nn.Module, example_input: Any, masks: Masks | None = None, *, batch: int | None = None) -> FlopsReport:
    """Count the forward FLOPs of one sample, dense and with `masks`.

    The model runs once, in eval mode and without gradients, and is left as it was (training flags, buffers, random
    state, masks, hooks). One multiply-add is 2 FLOPs. Counted are matrix products, convolutions (groups, stride,
    padding, dilation, transposed), attention (projections with their masks; Q K^T and A V dense, causal ones whole)
    and recurrent layers; a weight that is used several times is counted each time. Not counted, by definition:
    biases, element-wise operations, normalisation, pooling, look-ups (embeddings cost 0). A weight of 2 or more
    dimensions that meets any other operation is named in `report.not_counted`.

    A kept weight costs one multiply-add per position: a Linear layer 2 * kept * rows, a convolution 2 * kept * output
    positions (RigL, Evci et al. 2020, counts the same products). Padding zeros are counted, as PyTorch's
    own `FlopCounterMode` does.

    Args:
        model: any module, on any device, "meta" included.
        example_input: one tensor, a tuple or list of arguments, or a mapping of keyword arguments; a batch of any size.
        masks: bool masks (True = kept) by parameter name, each of its parameter's shape; weights without one are dense.
        batch: samples in `example_input`; by default the first dimension of its first tensor. Give it where that is not
            the batch (sequence-first models, inputs without a batch dimension).

    Raises:
        SelectionError: a mask's name is no parameter of the model.
        OptionError: a mask is not bool or has another shape; the batch is not positive.
        ModelError: the model does not run on `example_input`.

    >>> layer = nn.Linear(4, 3)
    >>> mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    >>> report = flops(layer, torch.zeros(8, 4), {"weight": mask})
    >>> report.dense, report.sparse, report.layers["weight"]
    (24.0, 6.0, LayerFlops(dense=24.0, sparse=6.0))
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    inputs = arguments(example_input)
    samples = _batch_size(inputs) if batch is None else batch
    if samples < 1:
        raise OptionError(f"batch is {samples}, but at least one sample is needed; give `example_input` with samples")
    fitted = fit(model, masks)
    weights = Weights(model, fitted)
    tally = Tally(model, weights)
    with torch.no_grad():
        run(model, inputs, tally, {fitted.labels[name]: m for name, m in fitted.masks.items()})
    layers = {fitted.labels[name]: LayerFlops(0.0, 0.0) for name in fitted.masks}
    for name, dense in tally.dense.items():
        layers[name] = LayerFlops(2 * dense / samples, 2 * tally.sparse[name] / samples)
    unknown = tuple(NotCounted(weight, op, where) for (weight, op), where in tally.unknown.items())
    return FlopsReport(layers, dict(weights.sizes), samples, unknown)


def run(
    model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], tally: Tally, masks: dict[str, torch.Tensor]
) -> None:
    """Run the model on (arguments, keyword arguments) with every operation told to `tally`; it is left as it was.

    `masks` by label tell of what parametrisations give. Raises ModelError where the model does not run.
    """
    args, kwargs = inputs
    with ExitStack() as stack:
        stack.enter_context(left_as_it_was(model))
        stack.enter_context(_hooks(model, tally, tally.weights, masks))
        stack.enter_context(AttentionMode(tally))
        stack.enter_context(OpMode(tally))
        try:
            model(*args, **kwargs)
        except Exception as error:
            shapes = [tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            raise ModelError(
                f"{type(model).__name__} does not run on the example input (shapes {shapes}): {error}"
            ) from error


def _batch_size(inputs: Any) -> int:
    for leaf in tree_leaves(inputs, is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    return 1


@contextmanager
def _hooks(model: nn.Module, tally: Tally, weights: Weights, masks: dict[str, torch.Tensor]) -> Iterator[None]:
    """Follow which module runs, count recurrent layers as a whole, and know what parametrisations give."""
    handles = []

    def enter(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tally.push(name)
            if type(module).forward in RECURRENT:
                if not tally.quiet:
                    assert isinstance(module, nn.RNNBase)
                    tally.recurrent(module, args[0] if args else kwargs["input"])
                tally.quiet += 1

        return hook

    def leave(module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tally.pop()
            if type(module).forward in RECURRENT:
                tally.quiet -= 1

        return hook

    def made(label: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor) and weights.find(output) is None:
                mask = masks.get(label)
                weights.sizes.setdefault(label, output.numel())
                weights.dims.setdefault(label, output.dim())
                weights.add(label, output, mask if mask is not None and mask.shape == output.shape else None)

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name, module), prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave(module), always_call=True))
        if isinstance(module, parametrize.ParametrizationList):
            label = name.replace("parametrizations.", "", 1) if name.startswith("parametrizations.") else None
            handles.append(module.register_forward_hook(made(label or name.replace(".parametrizations.", ".", 1))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
