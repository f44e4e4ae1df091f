"""Count multiply-adds while a model runs: every operation is seen, weights are recognised, the rest is named."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rarefy.kernels.reference import n_m_used
from rarefy.metrics._weights import Weight, Weights

# operation -> positions of the two factors among its arguments
MATMULS = {
    "mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "addbmm": (1, 2), "mv": (0, 1), "addmv": (1, 2),
    "dot": (0, 1), "vdot": (0, 1), "_int_mm": (0, 1), "_scaled_mm": (0, 1), "_addmm_activation": (1, 2),
}  # fmt: skip
CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable"}
ATTENTIONS = {
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math_for_mps",
}  # fmt: skip
# no multiply-adds by our definition: look-ups, normalisations, shapes
FREE = {
    "embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select", "gather",
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_fused_rms_norm", "empty_like", "zeros_like",
    "ones_like", "new_empty", "new_zeros", "detach", "sym_size", "equal", "_local_scalar_dense", "isnan",
}  # fmt: skip
# additions and moves: free, but the image of a masked weight would be counted dense if it then met a matrix product
MOVES = {"add", "add_", "sub", "sub_", "cat", "stack", "repeat", "constant_pad_nd", "roll", "flip", "rsub"}
COPIES = {"clone", "_to_copy", "contiguous", "alias"}
SCALINGS = {"mul", "div", "where"}
RECURRENT: tuple[Callable[..., Any], ...] = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


def attention_products(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """Return the multiply-adds of Q K^T and A V for shapes [..., heads, length, size]; causal ones whole."""
    *lead, length, size = query
    return prod(lead) * length * key[-2] * (size + value[-1])


class Tally:
    """Multiply-adds of one run, by parameter name or "module:matmul", and what could not be counted."""

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self.weights = weights
        self.dense: dict[str, int] = {}
        self.sparse: dict[str, int] = {}
        self.unknown: dict[tuple[str, str], str] = {}  # (parameter, operation) -> module
        self.quiet = 0  # > 0 inside something that is counted as a whole
        self._stack: list[str] = []
        self._types = {name: type(module).__name__ for name, module in model.named_modules()}

    @property
    def where(self) -> str:
        return (self._stack[-1] if self._stack else "") or "model"

    def push(self, name: str) -> None:
        self._stack.append(name)

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()

    def count(self, name: str, dense: int, sparse: int) -> None:
        self.dense[name] = self.dense.get(name, 0) + dense
        self.sparse[name] = self.sparse.get(name, 0) + sparse

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Count a [.., m, k] times b [.., k, n]; kept products only, from whichever factor has a mask."""
        left, right = self.weights.find(a), self.weights.find(b)
        k = a.shape[-1]
        rows = a.shape[-2] if a.dim() > 1 else 1
        columns = b.shape[-1] if b.dim() > 1 else 1
        dense = prod(a.shape[:-2]) * rows * k * columns
        sparse = dense
        if left and left.masked and right and right.masked:
            mask_a, mask_b = left.mask(), right.mask()
            per_k_a = mask_a.sum(-2) if a.dim() > 1 else mask_a.long()
            per_k_b = mask_b.sum(-1) if b.dim() > 1 else mask_b.long()
            sparse = int((per_k_a * per_k_b).sum())
        elif right and right.masked:
            sparse = rows * self.weights.nonzero(right)
        elif left and left.masked:
            sparse = columns * self.weights.nonzero(left)
        owner = left if left and (left.masked or not right) and not (right and right.masked) else right
        self.count(owner.source.name if owner else f"{self.where}:matmul", dense, sparse)

    def convolution(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, transposed: bool) -> None:
        """Count a convolution: each kept weight is used once per output position (per input position if transposed)."""
        grid = x if transposed else out
        uses = grid.shape[0] * prod(grid.shape[2:])
        weight = self.weights.find(w)
        dense = uses * w.numel()
        sparse = uses * self.weights.nonzero(weight) if weight and weight.masked else dense
        self.count(weight.source.name if weight else f"{self.where}:convolution", dense, sparse)

    def compressed(self, values: torch.Tensor, crow: torch.Tensor, out: torch.Tensor, cols: int) -> None:
        """Count a layer that holds kept values only, under its dense weight's name."""
        weight = self.weights.find(values)
        name = weight.source.name.removesuffix("values") + "weight" if weight else f"{self.where}:compressed"
        rows = crow.shape[0] - 1
        uses = out.numel() // rows
        self.weights.sizes[name] = rows * cols
        self.count(name, uses * rows * cols, uses * values.numel())

    def packed(self, values: torch.Tensor, dense: torch.Tensor) -> None:
        """Know the kept values of a weight that was packed for the N:M kernels."""
        if (weight := self.weights.find(dense)) is not None:
            self.weights.add(weight.source.name, values, None)

    def n_m(self, x: torch.Tensor, held: torch.Tensor, out: torch.Tensor, kept: int | None) -> None:
        """Count a product on the N:M kernels, x [n, in] -> out [n, out], of packed values or (kept None) under a mask."""
        weight = self.weights.find(held)
        uses, size = x.shape[0], x.shape[1] * out.shape[1]
        if kept is None:
            kept = self.weights.nonzero(weight) if weight and weight.masked else size
        self.count(weight.source.name if weight else f"{self.where}:n_m", uses * size, uses * kept)

    def gathered(self, weight: torch.Tensor) -> None:
        """Know a weight that was read from a shared array: dense to compute with, under its dense layer's name."""
        name = f"{self._stack[-1]}.weight" if self._stack and self._stack[-1] else "weight"
        self.weights.sizes[name] = weight.numel()
        self.weights.dims.setdefault(name, 2)
        self.weights.add(name, weight, None)

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        products = attention_products(tuple(query.shape), tuple(key.shape), tuple(value.shape))
        self.count(f"{self.where}:attention", products, products)

    def recurrent(self, module: nn.RNNBase, sequence: torch.Tensor | PackedSequence) -> None:
        """Count an RNN, LSTM or GRU: each weight once per token (real tokens of a packed sequence)."""
        data = sequence.data if isinstance(sequence, PackedSequence) else sequence
        tokens = prod(data.shape[:-1])
        prefix = f"{self._stack[-1]}." if self._stack and self._stack[-1] else ""
        for name in module._flat_weights_names:
            tensor = getattr(module, name, None)
            if not name.startswith("weight") or tensor is None:
                continue
            weight = self.weights.find(tensor)
            dense = tokens * tensor.numel()
            sparse = tokens * self.weights.nonzero(weight) if weight and weight.masked else dense
            self.count(weight.source.name if weight else prefix + name, dense, sparse)

    def other(self, op: str, tensors: list[torch.Tensor], out: object) -> None:
        """Look at an operation that is not counted: follow copies of weights, and name uses that may cost something."""
        for tensor in tensors:
            weight = self.weights.find(tensor)
            if weight is None:
                continue
            if isinstance(out, torch.Tensor) and self._follows(op, tensor, tensors):
                self.weights.derive(out, weight)
            elif not self._is_free(op, weight, tensors) and not self._is_view(out, weight):
                name = weight.source.name
                if self.weights.dims[name] >= 2:
                    module = self._types.get(self._stack[-1], "module") if self._stack else "model"
                    self.unknown.setdefault((name, op), f"{self.where} ({module})")

    def _is_free(self, op: str, weight: Weight, tensors: list[torch.Tensor]) -> bool:
        if op in MOVES:
            return not weight.masked or not all(self.weights.known(t) for t in tensors)
        return op in FREE or op in COPIES

    def _follows(self, op: str, tensor: torch.Tensor, tensors: list[torch.Tensor]) -> bool:
        if op in COPIES:
            return True
        return op in SCALINGS and all(t is tensor or t.numel() == 1 or self.weights.known(t) for t in tensors)

    def _is_view(self, out: object, weight: Weight) -> bool:
        """Tell whether every result is a view of the same parameter: nothing was computed."""
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        found = [self.weights.find(result) for result in results]
        return bool(results) and all(f is not None and f.source is weight.source for f in found)


class OpMode(TorchDispatchMode):
    """Send every dispatched operation of the run to the tally."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        op: str = packet.__name__
        aten = func.namespace == "aten"
        counted = aten and (op in MATMULS or op in CONVOLUTIONS or op in ATTENTIONS)
        if aten and not counted and op not in FREE:
            with self:  # operations made of others (on backends that keep them whole) are counted by their parts
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        tally = self.tally
        if tally.quiet:
            return out
        if func.namespace == "rarefy" and op in ("sparse_linear", "sparse_conv2d"):
            cols = args[0].shape[-1] if op == "sparse_linear" else prod(args[5][1:])
            tally.compressed(args[1], args[2], out, cols)
        elif func.namespace == "rarefy" and op == "n_m_gather":
            tally.packed(out, args[0])
        elif func.namespace == "rarefy" and op in ("n_m_linear", "n_m_linear_straight"):
            x, values, _, used, *_ = args
            full = out.shape[1] * used.shape[1] * used.shape[2]  # a weight in every step of every output
            tally.n_m(x, values, out, full if used.is_meta else int(n_m_used(used).sum()))
        elif func.namespace == "rarefy" and op == "n_m_masked":
            tally.n_m(args[0], args[1], out[0], None)
        elif func.namespace == "rarefy" and op == "shared_weight" and args[5] is None:  # rows alone are a look-up
            tally.gathered(out)
        elif not counted:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            tally.other(op if aten else f"{func.namespace}.{op}", tensors, out)
        elif op in MATMULS:
            first, second = MATMULS[op]
            tally.matmul(args[first], args[second])
        elif op in CONVOLUTIONS:
            tally.convolution(args[0], args[1], out, transposed=bool(args[6]))
        else:
            tally.attention(args[0], args[1], args[2])
        return out


class AttentionMode(TorchFunctionMode):
    """Count `F.scaled_dot_product_attention` from the shapes the user gave: back ends pad and split them."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        if not self.tally.quiet:
            names = ("query", "key", "value")
            found = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
            self.tally.attention(*found)
        self.tally.quiet += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.tally.quiet -= 1
