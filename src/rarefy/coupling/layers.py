"""Rules of operations with weights, and of products of values: what they do to labels."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.coupling.atoms import FIXED
from rarefy.coupling.follow import Call, Follower, Unknown, spread, still
from rarefy.coupling.labels import along, bind_vectors, elementwise, separate, varying

# --- layers ------------------------------------------------------------------------------------------------------------


def linear(f: Follower, call: Call) -> list[Tensor]:
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    inputs, outputs = f.dim(weight, 1), f.dim(weight, 0)
    label = f.label(x)
    if label.shape[-1] == 1 and varying(label):  # it mixes what stands at one channel, for all channels alike
        f.atoms.pin(torch.cat([inputs, outputs]), "mixes the places of a value along another dimension")
        return [label]
    f.atoms.bind(inputs, along(f, x, -1, "a product"), "reads values that do not move")
    bind_vectors(f, outputs, bias)
    return [spread(outputs, call.out.ndim, -1)]


def conv(f: Follower, call: Call) -> list[Tensor]:
    x, weight, bias, groups = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias"), call.get(6, "groups", 1)
    dim = x.ndim - weight.ndim + 1
    outputs, inputs = f.dim(weight, 0), along(f, x, dim, "a convolution")
    rows, cols = weight.shape[0] // groups, weight.shape[1]
    if groups == 1:
        f.atoms.bind(f.dim(weight, 1), inputs, "reads values that do not move")
    elif cols == 1:  # depthwise: a channel's filters move with it
        f.atoms.bind(outputs, inputs.repeat_interleave(rows), "filters a channel that does not move")
    else:
        for g in range(groups):
            mine = f.dim(weight, 1, (g * rows, (g + 1) * rows))
            f.atoms.bind(mine, inputs[g * cols : (g + 1) * cols], "reads values that do not move")
        f.atoms.separate(outputs, torch.arange(groups).repeat_interleave(rows))
    bind_vectors(f, outputs, bias)
    return [spread(outputs, call.out.ndim, dim)]


def conv_transpose(f: Follower, call: Call) -> list[Tensor]:
    x, weight, bias, groups = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias"), call.get(6, "groups", 1)
    dim = x.ndim - weight.ndim + 1
    inputs, rows, cols = f.dim(weight, 0), weight.shape[0] // groups, weight.shape[1]
    f.atoms.bind(inputs, along(f, x, dim, "a convolution"), "reads values that do not move")
    if groups == 1:
        outputs = f.dim(weight, 1)
    elif rows == cols == 1:
        outputs = inputs
    else:
        outputs = torch.cat([f.dim(weight, 1, (g * rows, (g + 1) * rows)) for g in range(groups)])
        f.atoms.separate(inputs, torch.arange(groups).repeat_interleave(rows))
    bind_vectors(f, outputs, bias)
    return [spread(outputs, call.out.ndim, dim)]


def channel_norm(f: Follower, call: Call) -> list[Tensor]:
    """Batch and instance norm: input, running mean, running variance, weight, bias."""
    x = call.get(0, "input")
    channels = along(f, x, 1, "a norm")
    names = ("running_mean", "running_var", "weight", "bias")
    bind_vectors(f, channels, *[call.get(i + 1, name) for i, name in enumerate(names)])
    return [spread(channels, x.ndim, 1)]


def group_norm(f: Follower, call: Call) -> list[Tensor]:
    x, groups = call.get(0, "input"), call.get(1, "num_groups")
    channels = along(f, x, 1, "a norm")
    if 1 < groups < x.shape[1]:
        f.atoms.separate(channels, torch.arange(groups).repeat_interleave(x.shape[1] // groups))
    bind_vectors(f, channels, call.get(2, "weight"), call.get(3, "bias"))
    return [spread(channels, x.ndim, 1)]


def layer_norm(f: Follower, call: Call) -> list[Tensor]:
    x, shape = call.get(0, "input"), call.get(1, "normalized_shape")
    normed = range(x.ndim - len(shape), x.ndim)
    label = f.label(x)
    if any(label.shape[d] > 1 for d in normed):
        separate(f, label, [d for d in range(x.ndim) if d not in normed])
    vectors = [t for t in (call.get(2, "weight"), call.get(3, "bias")) if isinstance(t, Tensor)]
    return [elementwise(f, [x, *vectors], call.out, "a norm")]


def embedding(f: Follower, call: Call) -> list[Tensor]:
    indices, weight = call.get(0, "input"), call.get(1, "weight")
    f.fix(indices, "are looked up")
    f.atoms.pin(f.dim(weight, 0), "is looked up by its place")
    return [spread(f.dim(weight, 1), call.out.ndim, -1)]


def prelu(f: Follower, call: Call) -> list[Tensor]:
    x, weight = call.get(0, "input"), call.get(1, "weight")
    if weight.numel() > 1:
        f.atoms.bind(f.dim(weight, 0), along(f, x, 1, "an activation"), "meets values that do not move")
    return [f.label(x)]


def multi_head(f: Follower, call: Call) -> list[Tensor]:
    given = inspect.signature(F.multi_head_attention_forward).bind(*call.args, **call.kwargs)
    given.apply_defaults()
    a = given.arguments
    if a["use_separate_proj_weight"] or a["bias_k"] is not None:
        raise Unknown("attention with separate projections or added keys is not understood")
    width, weight, bias, final = a["embed_dim_to_check"], a["in_proj_weight"], a["in_proj_bias"], a["out_proj_weight"]
    for x in (a["query"], a["key"], a["value"]):
        f.atoms.bind(f.dim(weight, 1), along(f, x, -1, "a product"), "reads values that do not move")
    rows, heads = f.dim(weight, 0), torch.arange(a["num_heads"]).repeat_interleave(width // a["num_heads"])
    q, k, v = rows.split(width)
    f.atoms.bind(q, k, "attention")
    f.atoms.bind(v, f.dim(final, 1), "attention")
    f.atoms.separate(q, heads)
    f.atoms.separate(v, heads)
    bind_vectors(f, rows, bias)
    bind_vectors(f, f.dim(final, 0), a["out_proj_bias"])
    first = call.results[0]
    return [spread(f.dim(final, 0), first.ndim, -1), *[still(t) for t in call.results[1:]]]


# --- products of values ------------------------------------------------------------------------------------------------


def _product(f: Follower, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Labels of a [.., n, k] times b [.., k, m]: what is summed over may move in both at once, or a side may move alone."""
    if a.ndim < 2 or b.ndim < 2:
        raise Unknown("a product with a vector is not understood")
    n = out.ndim
    left, right = (f.label(t).reshape([1] * (n - t.ndim) + list(f.label(t).shape)) for t in (a, b))
    batch = range(n - 2)
    outer = (left.shape[-2] > 1, right.shape[-1] > 1)
    if left.shape[-1] > 1 and right.shape[-2] > 1 and not any(outer):
        summed = right.transpose(-1, -2)
        for label in (left, summed):
            separate(f, label, batch)
        f.atoms.bind(left, summed, "a product with values that do not move")
        return still(out)
    moving = [label for label in (left, right) if varying(label)]
    if left.shape[-1] == 1 and right.shape[-2] == 1 and len(moving) == 1:
        separate(f, moving[0], batch)
        return moving[0]
    if not moving and not bool((left != FIXED).any() or (right != FIXED).any()):
        return still(out)
    raise Unknown("a product of values that move in different ways is not understood")


def matmul(f: Follower, call: Call) -> list[Tensor]:
    a, b = call.get(0, "input"), call.get(1, "other", call.kwargs.get("mat2"))
    if call.name == "rmatmul":
        a, b = b, a
    if f.name(b) is not None and b.ndim == 2:  # a weight that is stored as [in, out]
        f.atoms.bind(f.dim(b, 0), along(f, a, -1, "a product"), "reads values that do not move")
        return [spread(f.dim(b, 1), call.out.ndim, -1)]
    return [_product(f, a, b, call.out)]


def addmm(f: Follower, call: Call) -> list[Tensor]:
    bias, a, b = call.get(0, "input"), call.get(1, "mat1"), call.get(2, "mat2")
    if f.name(b) is None or f.name(bias) is None or bias.ndim != 1:
        raise Unknown("'addmm' of values is not understood")
    f.atoms.bind(f.dim(b, 0), along(f, a, -1, "a product"), "reads values that do not move")
    bind_vectors(f, f.dim(b, 1), bias)
    return [spread(f.dim(b, 1), call.out.ndim, -1)]


def attention(f: Follower, call: Call) -> list[Tensor]:
    q, k, v = call.get(0, "query"), call.get(1, "key"), call.get(2, "value")
    mask = call.get(3, "attn_mask")
    if q.shape[:-2] != k.shape[:-2]:
        raise Unknown("attention with shared heads is not understood")
    left, right, label = f.label(q), f.label(k), f.label(v)
    if any(t.shape[-2] > 1 for t in (left, right, label)):
        raise Unknown("attention between places that move is not understood")
    if isinstance(mask, Tensor):
        f.fix(mask, "masks attention")
    for t in (left, right, label):
        separate(f, t, range(t.ndim - 2))
    f.atoms.bind(left, right, "attention with values that do not move")
    return [label]
