"""Weights that are computed from what is trained, and gradients that pass where values do not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rarefy.errors import RarefyError


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mask: Tensor, x: Tensor, slope: Tensor | None) -> Tensor:
        return mask.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.straight = inputs[2] is None
        if inputs[2] is not None:
            ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, gradient if ctx.straight else gradient * ctx.saved_tensors[0], None


def through(mask: Tensor, x: Tensor, slope: Tensor | None = None) -> Tensor:
    """Return a mask as numbers whose derivative in `x` is `slope`, by definition: a surrogate for that of a step.

    Args:
        mask: bool, True = 1.
        x: what the mask was made from, of its shape; the result has its dtype.
        slope: derivative, of the same shape, itself without one; None: 1 everywhere, the straight-through estimator
            (Bengio et al. 2013, arXiv 1308.3432).

    Example:
        >>> import torch
        >>> scores = torch.tensor([0.5, -2.0], requires_grad=True)
        >>> through(scores > 0, scores) @ torch.tensor([3.0, 7.0])
        tensor(3., grad_fn=<DotBackward0>)
        >>> torch.autograd.grad(through(scores > 0, scores) @ torch.tensor([3.0, 7.0]), scores)
        (tensor([3., 7.]),)
    """
    return _Through.apply(mask, x, slope)


def long_tailed(q: Tensor) -> Tensor:
    """Return the long-tailed derivative of the unit step: 2 - 4|q| up to 0.4, 0.4 up to 1, 0 beyond.

    Liu et al. 2020, arXiv 2005.06870, eq. 4 (from Xu & Cheung 2019); its integral is 1.44.

    Example:
        >>> long_tailed(torch.tensor([0.0, -0.25, 0.4, -1.0, 1.01]))
        tensor([2.0000, 1.0000, 0.4000, 0.4000, 0.0000])
    """
    size = q.detach().abs()
    return torch.where(size <= 0.4, 2 - 4 * size, 0.4).masked_fill(size > 1, 0.0)


class Reparametrisation(nn.Module, ABC):
    """Computes a layer's forward weight from its trained one: a parametrization of `torch.nn.utils.parametrize`.

    While it is there, the trained weight is called `parametrizations.weight.original` instead of `weight`, and this
    module's own parameters and buffers are `parametrizations.weight.0.*`; so the state dict holds all that the network
    computes with. Nothing here may depend on data or branch on values: it runs inside `torch.compile`.
    """

    follows: ClassVar[bool] = False
    """Whether what is kept follows from trained tensors at every step, so that nobody can set it."""

    order: tuple[str, ...] = ()  # the layer's parameters, as they were

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Return the forward weight; exactly zero (of either sign) where nothing is kept."""

    @abstractmethod
    def kept(self, weight: Tensor) -> Tensor:
        """Return which weights are kept; bool, weight-shaped."""

    def keep(self, mask: Tensor) -> None:
        """Keep exactly these weights from now on; bool, weight-shaped."""
        raise RarefyError(f"what {type(self).__name__} keeps follows from what it trains, and cannot be set.")

    def computes_output(self, module: nn.Module) -> bool:
        """Whether it computes the module's output too (`output`), and not the weight alone."""
        return False

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the module makes of an input, in place of the module's own forward pass."""
        raise NotImplementedError

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to the layer's weight becomes the trained one."""
        return weight


class ScoreMask(Reparametrisation):
    """weight * mask with a trained score for every weight: dL/dscore = weight * dL/dforward, kept or not.

    The mask is a buffer that the owner of the scores sets (`keep`), in place: a compiled network sees no new tensor.
    The weight's own gradient is that of the product, zero where it is not kept.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, initial: float = 0.0) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.full_like(weight, initial, requires_grad=False))
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * through(self.mask, self.scores)

    def kept(self, weight: Tensor) -> Tensor:
        return self.mask.clone()

    def keep(self, mask: Tensor) -> None:
        self.mask.copy_(mask)


class ThresholdMask(Reparametrisation):
    """weight * (|weight| > t) with one trained threshold t for each output unit (dimension 0).

    With G = dL/dforward, q = |weight| - t and H the long-tailed derivative of the step,

        dL/dweight = G (mask + |weight| H(q)),   dL/dt_i = - sum_j G_ij weight_ij H(q_ij).
    """

    follows = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.threshold = nn.Parameter(weight.detach().new_zeros(weight.shape[0]))

    def _above(self, weight: Tensor) -> Tensor:
        return weight.abs() - self.threshold.view(-1, *[1] * (weight.dim() - 1))

    def forward(self, weight: Tensor) -> Tensor:
        q = self._above(weight)
        return weight * through(q > 0, q, long_tailed(q))

    def kept(self, weight: Tensor) -> Tensor:
        return self._above(weight.detach()).detach() > 0


def reparametrised(module: nn.Module) -> dict[str, Reparametrisation]:
    """Return the weights of this module itself (not of its children) that are computed, by name."""
    if not parametrize.is_parametrized(module):
        return {}
    lists: Mapping[str, Any] = module.parametrizations  # type: ignore[assignment]
    return {name: chain[0] for name, chain in lists.items() if isinstance(chain[0], Reparametrisation)}


def plain_state_dict(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of a model with trained weights under their plain names, and nothing of what computes with them."""
    result = dict(state)
    for name, module in model.named_modules():
        path = f"{name}." if name else ""
        for attribute in reparametrised(module):
            inside = f"{path}parametrizations.{attribute}."
            weight = result.get(f"{inside}original")
            result = {key: value for key, value in result.items() if not key.startswith(inside)}
            if weight is not None:
                result[f"{path}{attribute}"] = weight
    return result


def accept_plain_weight(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a plain weight as the trained one, and leave what computes with it: a hook before `load_state_dict`."""
    for attribute in reparametrised(module):
        inside = f"{prefix}parametrizations.{attribute}."
        if f"{prefix}{attribute}" in state and f"{inside}original" not in state:
            state[f"{inside}original"] = state.pop(f"{prefix}{attribute}")
            chain = module.get_submodule(f"parametrizations.{attribute}")
            for name, tensor in chain.state_dict().items():
                state.setdefault(f"{inside}{name}", tensor.clone())


def install(module: nn.Module, attribute: str, computes: Reparametrisation) -> None:
    """Let the module's parameter be the trained weight from which `computes` makes the one that the module uses."""
    before = [other.order for other in reparametrised(module).values()]
    computes.order = before[0] if before else tuple(module._parameters)
    parametrize.register_parametrization(module, attribute, computes)
    if computes.computes_output(module):  # the class is this module's own, and its copies'

        def forward(self: nn.Module, input: Tensor) -> Tensor:  # named as torch's own is: it may be called by name
            return self.parametrizations[attribute][0].output(self, input)  # type: ignore[index,union-attr]

        type(module).forward = forward
    if isinstance(module, nn.RNNBase):
        # It keeps a list of its weights; computed ones must neither grow old in it nor be copied with it.
        names = "_flat_weights_names"
        always = property(
            lambda self: [getattr(self, name, None) for name in getattr(self, names)], lambda self, _: None
        )
        type(module)._flat_weights = always  # type: ignore[assignment]


@torch.no_grad()
def remove(module: nn.Module, attribute: str) -> Reparametrisation:
    """Undo `install`: the trained weight is the module's own again, in its old place; returns what computed with it."""
    computes = reparametrised(module)[attribute]
    cls = type(module)  # torch's class for computed weights: copies of the module share it, and must not lose theirs
    mine = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, mine)
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    old = dict(module._parameters)
    module._parameters.clear()
    for name in (*computes.order, *old):  # optimizers are resumed by the order of parameters
        if name in old:
            module._parameters[name] = old.pop(name)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    return computes


@torch.no_grad()
def bake_(model: nn.Module) -> nn.Module:
    """Make every computed weight of a model a plain one, in place: its forward values, with exact zeros.

    For copies (`copy.deepcopy`, averaged models) of a model that is still being trained; `Sparsifier.finalize()` does it
    for the model itself.

    Example:
        >>> import copy, torch, rarefy
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparse = rarefy.sparsify(model, "movement", sparsity=0.5, optimizer=optimizer, start=0, stop=0)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> list(model.state_dict())
        ['bias', 'parametrizations.weight.original', 'parametrizations.weight.0.scores', 'parametrizations.weight.0.mask']
        >>> twin = bake_(copy.deepcopy(model))
        >>> list(twin.state_dict()), int(twin.weight.count_nonzero())
        (['weight', 'bias'], 4)
    """
    for module in model.modules():
        for attribute in reparametrised(module):
            computes = remove(module, attribute)
            set_forward(module.get_parameter(attribute), computes)
    return model


@torch.no_grad()
def set_forward(weight: nn.Parameter, computes: Reparametrisation) -> Tensor:
    """Give a trained weight the values that the network computed with; returns the mask."""
    mask = computes.kept(weight)
    weight.copy_(computes(weight).masked_fill(~mask, 0))
    return mask
