"""What each operation does to labels: the table of rules, and those of operations without weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rarefy.coupling import layers
from rarefy.coupling.atoms import FIXED
from rarefy.coupling.follow import Call, Follower, Unknown, spread, still
from rarefy.coupling.labels import compact, dims_of, elementwise, full, separate, varying

Rule = Callable[[Follower, Call], list[Tensor]]
_FIRST_ONLY = {"to", "type_as", "dropout", "feature_dropout", "alpha_dropout"}
_BY_INDEX = {"getitem", "index_select", "gather", "take_along_dim", "expand_as", "view_as", "reshape_as"}


def _pointwise(f: Follower, call: Call) -> list[Tensor]:
    tensors = call.tensors if call.name not in _FIRST_ONLY else call.tensors[:1]
    label = elementwise(f, tensors, call.results[0], f"'{call.name}'")
    return [label for _ in call.results]


def _glu(f: Follower, call: Call) -> list[Tensor]:
    x, dim = call.get(0, "input"), call.get(1, "dim", -1)
    halves = full(f.label(x), x.shape).chunk(2, dim)
    f.atoms.bind(halves[0], halves[1], "a gate")
    return [compact(halves[0])]


def _over(f: Follower, call: Call) -> list[Tensor]:
    """Softmax and its like: every entry depends on all along some dimensions, whatever their order."""
    x, label = call.get(0, "input"), f.label(call.get(0, "input"))
    dims = dims_of(x, call.get(1, "dim", -1) if call.name != "normalize" else call.get(2, "dim", 1))
    if any(label.shape[d] > 1 for d in dims):
        separate(f, label, [d for d in range(x.ndim) if d not in dims])
    return [label]


def _reduce(f: Follower, call: Call) -> list[Tensor]:
    x, label = call.get(0, "input", call.kwargs.get("self")), f.label(call.get(0, "input"))
    if not all(t is x for t in call.tensors):
        raise Unknown(f"'{call.name}' of two values is not understood")
    place = 2 if call.name in ("norm", "vector_norm") else 1
    dims = dims_of(x, call.get(place, "dim", call.kwargs.get("axis")))
    if any(label.shape[d] > 1 for d in dims):
        if call.name in ("argmax", "argmin") or len(call.results) > 1:
            raise Unknown(f"'{call.name}' gives the places of channels")
        separate(f, label, [d for d in range(x.ndim) if d not in dims])
        return [still(t) for t in call.results]
    kept = call.results[0].ndim == x.ndim
    rest = label if kept else label.reshape([s for d, s in enumerate(label.shape) if d not in dims])
    return [rest for _ in call.results]


def _spatial(f: Follower, call: Call) -> list[Tensor]:
    """Pooling and resizing: within a channel's plane."""
    x = call.get(0, "input")
    label = f.label(x)
    planes = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
    dims = range(x.ndim - planes, x.ndim) if "pool" in call.name else range(2, x.ndim)
    if any(label.shape[d] > 1 for d in dims):
        raise Unknown(f"'{call.name}' over channels is not understood")
    return [label for _ in call.results]


def _pad(f: Follower, call: Call) -> list[Tensor]:
    x, pads, mode = call.get(0, "input"), call.get(1, "pad"), call.get(2, "mode", "constant")
    label = f.label(x)
    for i in range(len(pads) // 2):
        before, after, dim = pads[2 * i], pads[2 * i + 1], x.ndim - 1 - i
        if before == after == 0 or (label.shape[dim] == 1 and x.shape[dim] > 1):
            continue
        if mode != "constant" or before < 0 or after < 0 or any(d != dim for d in varying(label)):
            raise Unknown("padding between channels is not understood")
        if x.shape[dim] == 1 and not bool((label != FIXED).any()):
            raise Unknown("padding a value that does not move")
        ends = spread(f.atoms.constants(before + after), x.ndim, dim).split((before, after), dim)
        label = torch.cat([ends[0], label, ends[1]], dim)
    return [label]


def _move(f: Follower, call: Call) -> list[Tensor]:
    """Run an operation that only moves entries on their labels."""
    if call.name in _BY_INDEX:
        for index in call.tensors[1:]:
            f.fix(index, "is an index")
        args = (full(f.label(call.args[0]), call.args[0].shape), *call.args[1:])
        kwargs = call.kwargs
    else:
        args, kwargs = tree_map(
            lambda t: full(f.label(t), t.shape) if isinstance(t, Tensor) else t, (call.args, call.kwargs)
        )
    try:
        moved = call.func(*args, **kwargs)
    except Exception as error:
        raise Unknown(f"'{call.name}' is not understood ({type(error).__name__})") from error
    return [compact(t) for t in ([moved] if isinstance(moved, Tensor) else moved)]


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# By the names that PyTorch gives its functions and methods, without the underscores at their ends.
RULES: dict[str, Rule] = {
    **_named(
        _pointwise,
        """
        relu relu6 leaky_relu rrelu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh
        softplus softsign tanhshrink softshrink hardshrink threshold dropout dropout1d dropout2d dropout3d alpha_dropout
        feature_dropout feature_alpha_dropout exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square pow rpow abs neg negative
        reciprocal sign sin cos erf clamp clip clamp_min clamp_max round floor ceil frac trunc logit nan_to_num add radd iadd
        sub rsub isub subtract mul rmul imul multiply div rdiv truediv rtruediv itruediv divide maximum minimum fmax fmin
        where lerp addcmul addcdiv masked_fill xlogy gt ge lt le eq ne logical_and logical_or logical_not bitwise_not and or
        invert isfinite isnan float half double bfloat16 type to type_as int long bool clone contiguous detach data cpu cuda
        requires_grad positive alias
        """,
    ),
    **_named(
        _move,
        """
        view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t T mT H ravel chunk split
        tensor_split split_with_sizes narrow getitem select squeeze unsqueeze expand expand_as view_as reshape_as broadcast_to
        repeat tile repeat_interleave roll flip rot90 cat concat concatenate stack hstack vstack unbind pixel_shuffle
        pixel_unshuffle channel_shuffle native_channel_shuffle index_select gather take_along_dim diagonal
        """,
    ),
    **_named(
        _reduce,
        "mean sum amax amin max min argmax argmin prod var std norm vector_norm logsumexp any all median mode",
    ),
    **_named(
        _spatial,
        """
        max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d lp_pool3d
        interpolate upsample
        """,
    ),
    **_named(_over, "softmax log_softmax softmin normalize"),
    **_named(_pad, "pad"),
    **_named(_glu, "glu"),
    **_named(layers.linear, "linear"),
    **_named(layers.conv, "conv1d conv2d conv3d"),
    **_named(layers.conv_transpose, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_named(layers.channel_norm, "batch_norm instance_norm"),
    **_named(layers.group_norm, "group_norm"),
    **_named(layers.layer_norm, "layer_norm rms_norm"),
    **_named(layers.embedding, "embedding"),
    **_named(layers.prelu, "prelu"),
    **_named(layers.multi_head, "multi_head_attention_forward"),
    **_named(layers.matmul, "matmul rmatmul bmm mm"),
    **_named(layers.addmm, "addmm"),
    **_named(layers.attention, "scaled_dot_product_attention"),
}
