"""Which kept weights matter at all: those on a path from an input to an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from rarefy.analysis._path_rules import Paths
from rarefy.analysis._table import aligned
from rarefy.engine.selection import Target, list_weights
from rarefy.errors import ModelError, RarefyError
from rarefy.metrics._masks import Masks, fit
from rarefy.nn import SparseModule


@dataclass(frozen=True)
class LayerPaths:
    """One weight: how many entries there are, are kept, and are effective; and which output units are dead.

    `dead` are the indices of output units (neurons, channels; features of an embedding) that no effective weight enters:
    they hear nothing from the input, or nothing hears them. `units` is how many there are.
    """

    numel: int
    kept: int
    effective: int
    units: int
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Effective:
    """What is left of a set of masks when weights on no path from an input to an output do not count.

    Attributes:
        layers: parameter name -> `LayerPaths`, in the model's order.
        masks: the effective masks, bool, True = kept and on a path.
        left_out: weights that are no edges between activations (position embeddings, unused layers).
    """

    layers: dict[str, LayerPaths]
    masks: dict[str, Tensor]
    left_out: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers.values())

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers.values())

    @property
    def effective(self) -> int:
        """Kept weights that lie on a path."""
        return sum(layer.effective for layer in self.layers.values())

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, as the masks have it."""
        return 1 - self.kept / self.numel

    @property
    def effective_sparsity(self) -> float:
        """1 - effective weights / all weights: never below `sparsity`."""
        return 1 - self.effective / self.numel

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers that carry nothing: none of their weights is effective."""
        return tuple(name for name, layer in self.layers.items() if layer.effective == 0)

    @property
    def dead(self) -> int:
        """Number of dead output units over all layers."""
        return sum(len(layer.dead) for layer in self.layers.values())

    def __str__(self) -> str:
        head = ("layer", "weights", "kept", "effective", "sparsity", "effective sparsity", "dead units")
        rows = [
            (n, f"{p.numel:,}", f"{p.kept:,}", f"{p.effective:,}", f"{1 - p.kept / p.numel:.2%}",
             f"{1 - p.effective / p.numel:.2%}", f"{len(p.dead):,} of {p.units:,}")
            for n, p in self.layers.items()
        ]  # fmt: skip
        rows.append(("all", f"{self.numel:,}", f"{self.kept:,}", f"{self.effective:,}", f"{self.sparsity:.2%}",
                     f"{self.effective_sparsity:.2%}", f"{self.dead:,}"))  # fmt: skip
        lines = aligned(head, rows)
        if self.collapsed:
            lines.append(f"collapsed, nothing passes: {', '.join(self.collapsed)}")
        if self.left_out:
            lines.append(f"no edges between activations: {', '.join(self.left_out)}")
        return "\n".join(lines)


def effective(model: nn.Module, example_input: Any, masks: Masks | None = None) -> Effective:
    """Find the kept weights that lie on a path of kept weights from an input to an output.

    A weight is *effective* when its input unit can be reached from an input and an output can be reached from its output
    unit: the rest may be removed without any change. Exact for the graph that the model computes at this input size:
    linear and convolution layers are unrolled over all positions (a kernel's rim that only ever meets padding is not
    effective), additions and concatenations join branches, pooling connects whole windows, norms and activations are one to
    one. A product of two activations, and attention, depend on both sides. Biases, constants and values do not matter:
    a weight that is kept counts, whatever it is.

    The model is run once with one sample and left as it was. Source: effective sparsity, Vysogorets & Kempe 2023,
    "Connectivity Matters" (arXiv 2107.02306); layer collapse: Tanaka et al. 2020 (arXiv 2006.05467).

    Args:
        model: any module of the operations above, on any device.
        example_input: a tensor, a tuple of arguments, or a mapping of keyword arguments; only its shape matters. Integer
            tensors are tokens: any token may stand anywhere.
        masks: bool masks (True = kept) by parameter name, as `Sparsifier.masks()` gives; weights without one are
            dense. None: what is exactly zero is not kept.

    Raises:
        ModelError: the model uses an operation whose connections are not known here (recurrent layers,
            `nn.MultiheadAttention`), or holds compressed layers (`finalize()` first).
        SelectionError, OptionError: a mask does not fit the model.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> masks = {"0.weight": torch.tensor([[1, 0], [1, 1]]).bool(), "2.weight": torch.tensor([[1, 0]]).bool()}
    >>> found = effective(net, torch.zeros(1, 2), masks)
    >>> found.kept, found.effective, found.layers["0.weight"].dead  # the second neuron is heard by none
    (4, 2, (1,))
    """
    model = getattr(model, "_orig_mod", model)
    targets, kept = _kept(model, masks)
    edges = {name: mask.float().requires_grad_() for name, mask in kept.items()}
    total = _run(model, example_input, edges, Paths(count=False))
    found = (
        torch.autograd.grad(total, list(edges.values()), allow_unused=True)
        if total.requires_grad
        else [None] * len(edges)
    )
    layers, effective_masks, left_out = {}, {}, []
    for (name, target), gradient in zip(targets.items(), found, strict=True):
        if gradient is None and total.requires_grad:
            left_out.append(name)
            continue
        mask = kept[name]
        on_path = mask & (gradient > 0.5) if gradient is not None else torch.zeros_like(mask)
        units = 1 if isinstance(target.module, nn.Embedding | nn.EmbeddingBag) else 0
        heard = on_path.transpose(0, units).flatten(1).any(1)
        dead = tuple((~heard).nonzero().flatten().tolist())
        effective_masks[name] = on_path
        layers[name] = LayerPaths(mask.numel(), int(mask.sum()), int(on_path.sum()), len(heard), dead)
    return Effective(layers, effective_masks, tuple(left_out))


def path_count(model: nn.Module, example_input: Any, masks: Masks | None = None) -> float:
    """Count the paths of kept weights from the input's entries to the output's, for one sample.

    In the unrolled network (see `effective`, whose arguments and errors are these): for a chain of linear layers the sum of
    all entries of the product of their masks. A float: exact up to 2^53, with 53 significant bits beyond, `inf` from
    1.8e308 on.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> path_count(net, torch.zeros(1, 3))
    24.0
    """
    model = getattr(model, "_orig_mod", model)
    _, kept = _kept(model, masks)
    edges = {name: mask.double().requires_grad_() for name, mask in kept.items()}
    return float(_run(model, example_input, edges, Paths(count=True)).detach())


def _kept(model: nn.Module, masks: Masks | None) -> tuple[dict[str, Target], dict[str, Tensor]]:
    """Return the weights by name, and the mask of each."""
    compressed = [name for name, module in model.named_modules() if isinstance(module, SparseModule)]
    if compressed:
        raise ModelError(
            f"{', '.join(compressed[:4])}: paths are followed through dense layers; call finalize() first."
        )
    targets = {target.name: target for target in list_weights(model)[0]}
    if not targets:
        raise ModelError(f"{type(model).__name__} holds no Linear, convolution or Embedding weight: it has no paths.")
    if masks is None:
        return targets, {name: target.parameter.detach() != 0 for name, target in targets.items()}
    fitted = fit(model, masks).masks
    return targets, {
        name: fitted.get(name, torch.ones_like(target.parameter, dtype=torch.bool)) for name, target in targets.items()
    }


def _run(model: nn.Module, example: Any, edges: Mapping[str, Tensor], mode: Paths) -> Tensor:
    """Run the model as a graph, with `edges` as weights; return the sum of what arrives at its outputs."""
    dtype = torch.float64 if mode.count else torch.float32
    raw = {id(parameter): name for name, parameter in model.named_parameters()}
    targets = {target.name: target for target in list_weights(model)[0]}
    weights: dict[str, Tensor] = {
        name: (torch.zeros if p.dim() < 2 else torch.ones)(p.shape, dtype=dtype, device=p.device)
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }
    weights |= {raw[id(targets[name].parameter)]: edge for name, edge in edges.items()}
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (example, {})
    args = args if isinstance(args, tuple | list) else (args,)

    def source(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        one = value[:1] if value.dim() else value
        return mode.mark(torch.ones_like(one, dtype=dtype) if one.is_floating_point() else one.clone())

    args, kwargs = tree_map(source, (tuple(args), kwargs))
    with _evaluating(model), torch.enable_grad(), mode:
        try:
            out = functional_call(model, weights, args, kwargs)
        except RarefyError:
            raise
        except Exception as error:
            shapes = [tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            raise ModelError(f"{type(model).__name__} does not run on one sample {shapes}: {error}") from error
    arrived = [leaf.sum() for leaf in map(mode.now, tree_leaves(out)) if isinstance(leaf, Tensor) and mode.active(leaf)]
    return torch.stack(arrived).sum() if arrived else torch.zeros((), dtype=dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, with the random state put back."""
    flags = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
