"""Run a model as the graph it is: weights are edges, activations are nodes, and operations only connect.

A `TorchFunctionMode` stands between the model and PyTorch, whichever way an operation is called. Linear operations run as they
are, with masks in place of weights; operations on one entry at a time (activations, norms, dropout) become the identity;
what reduces (pooling, mean, softmax) becomes a sum; what joins two activations (+, *, attention) connects both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from rarefy.errors import ModelError

# one entry of the first argument to one entry of the result
ONE_TO_ONE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid",
    "tanh", "hardtanh", "softplus", "softsign", "logsigmoid", "prelu", "rrelu", "threshold", "abs", "neg", "exp", "log",
    "sqrt", "rsqrt", "square", "pow", "clamp", "clip", "clamp_min", "clamp_max", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_dropout", "batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm",
    "normalize", "local_response_norm", "clone", "detach", "contiguous", "to", "float", "double", "half", "bfloat16",
    "type", "type_as", "requires_grad", "nan_to_num", "masked_fill",
}  # fmt: skip
# entries are moved, left out or repeated, not mixed
MOVES = {
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "permute", "transpose", "swapaxes",
    "swapdims", "movedim", "t", "T", "mT", "squeeze", "unsqueeze", "getitem", "chunk", "split", "split_with_sizes",
    "tensor_split", "unbind", "narrow", "select", "expand", "expand_as", "repeat", "tile", "roll", "flip", "index_select",
    "gather", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "diagonal", "as_strided",
}  # fmt: skip
JOINS = {"add", "iadd", "radd", "sub", "isub", "rsub", "maximum", "minimum"}
PRODUCTS = {"mul", "imul", "rmul", "multiply", "div", "idiv", "truediv", "true_divide", "rdiv", "rtruediv"}
MATMULS = {"matmul", "rmatmul", "mm", "bmm"}
LINEAR = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "amax", "amin", "logsumexp"}
SOFTMAXES = {"softmax", "log_softmax", "softmin"}


class Alive(torch.autograd.Function):
    """1 where anything arrives, going forward and going back: counts of paths never grow, so they never overflow.

    All that arrives is a sum of ones: 0.5 tells them from what a convolution by FFT or Winograd makes of zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0] > 0.5).to(grads[0].dtype)


class Paths(TorchFunctionMode):
    """Replaces operations by their connections. With `count`, entries are numbers of paths; without, 1 where there is one.

    `active` holds every tensor that carries paths from an input; everything else is a weight or a constant.
    """

    def __init__(self, *, count: bool) -> None:
        super().__init__()
        self.count = count
        self._active: dict[int, Tensor] = {}
        self._now: dict[int, Tensor] = {}  # what a tensor that was changed in place stands for
        self._held: list[Tensor] = []

    def mark(self, tensor: Tensor) -> Tensor:
        """Note that `tensor` carries paths from an input; it is held, so that its address stays its own."""
        self._active[id(tensor)] = tensor
        return tensor

    def active(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._active

    def now(self, value: Any) -> Any:
        """Return what a tensor stands for now: itself, or what an in-place operation has made of it."""
        return self._now.get(id(value), value) if isinstance(value, Tensor) else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args, kwargs = tree_map(self.now, (args, kwargs))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if self.active(leaf)]
        if not given:
            return func(*args, **kwargs)
        name = _name(func)
        short = name.strip("_")
        rule = RULES.get(short)
        if rule is None:
            out = func(*args, **kwargs)
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if short not in MOVES and any(leaf.is_floating_point() for leaf in made):
                raise ModelError(
                    f"paths through {name}() are not known here; linear, convolution, pooling, normalisation, attention by "
                    "scaled_dot_product_attention, element-wise and reshaping operations are."
                )
            return tree_map(lambda v: self.mark(v) if isinstance(v, Tensor) and short in MOVES else v, out)
        out = rule(self, func, *args, **kwargs)
        if isinstance(out, Tensor):
            out = self.mark(out if self.count or short in ONE_TO_ONE else Alive.apply(out))
            changed = args[0] if args else None
            if name.endswith("_") and not name.startswith("__") and isinstance(changed, Tensor) and changed is not out:
                self._held.append(changed)
                self._now[id(changed)] = out
        return out


Rule = Callable[..., Any]


def _one(paths: Paths, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    x = next(value for value in (*args, *kwargs.values()) if paths.active(value))
    return x if kwargs.get("inplace") or _name(func).endswith("_") else x.view_as(x)  # a later += must not reach x


def _linear(paths: Paths, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    if paths.active(named["weight"]):
        raise ModelError(f"{_name(func)}() with a weight that depends on the input: its paths are not known here.")
    rest = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
    return func(named["input"], named["weight"], None, *args[3:], **rest)  # a bias carries nothing from the input


def _join(paths: Paths, func: Any, /, a: Any, b: Any, **kwargs: Any) -> Any:
    """Connect the entries of both; a constant brings nothing but its shape."""
    shape = torch.broadcast_shapes(*(v.shape for v in (a, b) if isinstance(v, Tensor)))
    parts = [v.expand(shape) for v in (a, b) if paths.active(v)]
    return sum(parts[1:], start=parts[0])


def _product(paths: Paths, func: Any, /, a: Any, b: Any, **kwargs: Any) -> Any:
    if paths.active(a) and paths.active(b):
        return _join(paths, func, a, b)  # a gate: the result depends on either
    x, constant = (a, b) if paths.active(a) else (b, a)
    return x * ((constant != 0).to(x.dtype) if isinstance(constant, Tensor) else float(constant != 0))


def _matmul(paths: Paths, func: Any, /, a: Tensor, b: Tensor, **kwargs: Any) -> Any:
    if paths.active(a) and paths.active(b):
        return a.sum(-1, keepdim=True) + b.sum(-2, keepdim=True)
    return func(a, b)


def _where(paths: Paths, func: Any, /, condition: Any, a: Any, b: Any) -> Any:
    return _join(paths, func, a, b)


def _reduce(paths: Paths, func: Any, /, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    dim = kwargs.get("axis", dim)
    return x.sum() if dim is None else x.sum(dim, keepdim=keepdim)


def _max(paths: Paths, func: Any, /, x: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, Tensor):
        return _join(paths, func, x, dim)
    if dim is None:
        return x.sum()
    made = func(x, dim, keepdim)
    found = x.sum(dim, keepdim=keepdim)
    return type(made)((paths.mark(found if paths.count else Alive.apply(found)), made.indices))


def _softmax(paths: Paths, func: Any, /, x: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    return x.sum(-1 if dim is None else dim, keepdim=True).expand_as(x)


def _cat(paths: Paths, func: Any, /, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    parts = [t if paths.active(t) else torch.zeros_like(t, dtype=_dtype(paths)) for t in tensors]
    return func(parts) if _name(func) in ("hstack", "vstack") else func(parts, kwargs.get("dim", dim))


def _pad(paths: Paths, func: Any, /, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    return F.pad(x, pad, mode)


def _dtype(paths: Paths) -> torch.dtype:
    return torch.float64 if paths.count else torch.float32


def _pool(dims: int) -> Rule:
    """Sum over windows: a convolution with ones in each channel, with room at the end where `ceil_mode` asks for it."""

    def rule(paths: Paths, func: Any, /, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any,
             **kwargs: Any) -> Any:  # fmt: skip
        peak = "max" in _name(func)
        extra = dict(zip(("dilation", "ceil_mode") if peak else ("ceil_mode",), args, strict=False))
        options = {"dilation": 1, "ceil_mode": False, **extra, **{k: kwargs[k] for k in kwargs if k in
                   ("dilation", "ceil_mode")}}  # fmt: skip
        size, step = _many(kernel_size, dims), _many(stride or kernel_size, dims)
        around, apart = _many(padding, dims), _many(options["dilation"], dims)
        lead = x.shape[:-dims]
        flat = x.reshape(math.prod(lead), 1, *x.shape[-dims:])
        reach = [a * (k - 1) + 1 for a, k in zip(apart, size, strict=True)]
        room: list[int] = []
        for length, window, hop, edge in zip(x.shape[-dims:], reach, step, around, strict=True):
            steps = (length + 2 * edge - window) / hop
            count = (math.ceil(steps) if options["ceil_mode"] else math.floor(steps)) + 1
            if options["ceil_mode"] and (count - 1) * hop >= length + edge:
                count -= 1  # a window must begin inside the input or its padding on the left
            room = [edge, max(0, (count - 1) * hop + window - length - edge), *room]
        ones = torch.ones(1, 1, *size, dtype=x.dtype, device=x.device)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        out = convolve(F.pad(flat, room), ones, stride=step, dilation=apart)
        return out.reshape(*lead, *out.shape[-dims:])

    return rule


def _adaptive_pool(dims: int) -> Rule:
    """Sum over the windows of adaptive pooling: entry i of n outputs covers floor(i L / n) up to ceil((i + 1) L / n)."""

    def rule(paths: Paths, func: Any, /, x: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Any:
        for axis, wanted in enumerate(_many(output_size, dims)):
            at = axis - dims
            length = x.shape[at]
            count = length if wanted is None else wanted
            edges = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
            x = torch.stack([x.narrow(at, low, high - low).sum(at) for low, high in edges], at)
        return x

    return rule


def _interpolate(paths: Paths, func: Any, /, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if len(args) > 2 or kwargs.get("mode", "nearest") != "nearest":
        raise ModelError("paths through interpolate() are known for mode='nearest' only.")
    return func(x, *args, **kwargs)


def _attention(paths: Paths, func: Any, /, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None,
               dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any) -> Any:  # fmt: skip
    """Connect an output to the values, keys and queries of every position that it may look at."""
    length, others = query.shape[-2], key.shape[-2]
    sees = torch.ones(length, others, dtype=query.dtype, device=query.device)
    if is_causal:
        sees = sees.tril()
    if isinstance(attn_mask, Tensor):
        sees = sees * (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf)
    query, key, value = (v if paths.active(v) else torch.zeros_like(v) for v in (query, key, value))
    repeat = query.shape[-3] // key.shape[-3] if kwargs.get("enable_gqa") else 1
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    asked = (sees * query.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return sees @ value + sees @ key.sum(-1, keepdim=True) + asked


def _embedding(paths: Paths, func: Any, /, index: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Connect a position to every row of the table: any token may stand there."""
    return weight.sum(0).expand(*index.shape, weight.shape[1])


def _many(value: Any, dims: int) -> list[Any]:
    return list(value) * (dims if len(value) == 1 else 1) if isinstance(value, tuple | list) else [value] * dims


def _name(func: Any) -> str:
    """Return an operation's plain name; "T" for the attribute of that name."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = (resolve_name(func) or str(func)).removesuffix(".__get__").rpartition(".")[2]
    return name


RULES: dict[str, Rule] = {
    **dict.fromkeys(ONE_TO_ONE, _one),
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(JOINS, _join),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(SOFTMAXES, _softmax),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), _cat),
    **{f"{kind}_pool{d}d": _pool(d) for kind in ("max", "avg") for d in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{d}d": _adaptive_pool(d) for kind in ("max", "avg") for d in (1, 2, 3)},
    "where": _where,
    "max": _max,
    "min": _max,
    "pad": _pad,
    "interpolate": _interpolate,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
}
