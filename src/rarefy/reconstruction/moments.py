"""What calibration data say about a linear layer: all that the error of any weight depends on."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FLOATS = 1 << 24  # in patches that exist at once

LinearLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Moments:
    """Sums over the samples of a layer that takes x [samples, p] and should give y [samples, rows].

    A convolution's patches are its samples: every place of every image is one; p runs over (input channel, kernel position),
    as in its weight. Each group of a convolution is a problem of its own. Where there is a bias, it is the weight of one more
    input that is always 1. With them, sum |y - x w^T|^2 = w G w^T - 2 w C + P for any weight w, with no data at hand.

    Attributes:
        gram: G = x^T x, float64 [groups, p, p].
        cross: C = x^T y, float64 [groups, p, rows].
        power: P = sum y^2, float64 [groups, rows].
        count: samples.
    """

    def __init__(self, layer: LinearLayer) -> None:
        self.layer = layer
        self.groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        self.biased = layer.bias is not None
        rows = layer.weight.shape[0] // self.groups
        self.inputs = math.prod(layer.weight.shape[1:])
        size = self.inputs + self.biased
        zeros = partial(torch.zeros, dtype=torch.float64, device=layer.weight.device)
        self.gram = zeros((self.groups, size, size))
        self.cross = zeros((self.groups, size, rows))
        self.power = zeros((self.groups, rows))
        self.count = 0
        self._x = layer.weight.new_empty(0)

    def see(self, x: Tensor) -> None:
        """Remember the input of a use of the layer until its output is added."""
        self._x = x

    def add(self, y: Tensor) -> None:
        """Take in one use of the layer: the input that was seen last, and the output y that it should give."""
        x, layer = self._x, self.layer
        if not isinstance(layer, nn.Linear) and x.dim() == layer.weight.dim() - 1:  # not a batch
            x, y = x[None], y[None]
        if y.numel() == 0:
            return
        if isinstance(layer, nn.Linear):
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        places = y.numel() // (len(y) * layer.weight.shape[0])
        step = max(1, _FLOATS // (self.inputs * self.groups * places))
        dtype = torch.promote_types(x.dtype, torch.float32)
        for part, wanted in zip(x.split(step), y.split(step), strict=True):
            self._add(patches(layer, part).to(dtype), self._by_group(wanted).to(dtype))

    def _add(self, x: Tensor, y: Tensor) -> None:
        if self.biased:
            x = F.pad(x, (0, 1), value=1.0)
        self.gram += x.mT @ x
        self.cross += x.mT @ y
        self.power += y.square().sum(1, dtype=torch.float64)
        self.count += x.shape[1]

    def finite(self) -> bool:
        """Whether all that was seen is."""
        return all(bool(t.isfinite().all()) for t in (self.gram, self.cross, self.power))

    def _by_group(self, y: Tensor) -> Tensor:
        """Return outputs [groups, samples, rows]."""
        if not isinstance(self.layer, nn.Linear):
            y = y.movedim(1, -1)
        return y.reshape(-1, self.groups, y.shape[-1] // self.groups).transpose(0, 1)

    def joined(self, layer: LinearLayer | None = None) -> Tensor:
        """Return the layer's weight as it is now, with its bias as the last column: float64 [groups, rows, p].

        Args:
            layer: another layer of this shape; default: the one whose moments these are.
        """
        layer = self.layer if layer is None else layer
        weight = layer.weight.detach().double().reshape(self.groups, -1, self.inputs)
        if layer.bias is None:
            return weight
        return torch.cat([weight, layer.bias.detach().double().reshape(self.groups, -1, 1)], 2)

    def free(self, mask: Tensor) -> Tensor:
        """Return which entries of `joined` a mask of the weight leaves free: bool [groups, rows, p]; a bias always is."""
        free = mask.reshape(self.groups, -1, self.inputs)
        return F.pad(free, (0, 1), value=True) if self.biased else free

    @torch.no_grad()
    def write(self, layer: LinearLayer, joined: Tensor) -> None:
        """Put weight and bias, as `joined` gives them, into a layer of this shape."""
        layer.weight.copy_(joined[..., : self.inputs].reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(joined[..., -1].reshape(-1))

    def errors(self, joined: Tensor) -> Tensor:
        """Return sum over the samples of (y - x w^T)^2 for each row: float64 [groups, rows]."""
        found = ((joined @ self.gram - 2 * self.cross.mT) * joined).sum(2) + self.power
        return found.clamp_(min=0)  # rounding

    def mean(self, errors: Tensor) -> float:
        """Return sums of squares of all rows as a mean over samples and rows."""
        return float(errors.sum()) / (self.count * errors.numel())


def patches(layer: LinearLayer, x: Tensor) -> Tensor:
    """Return what each output place of the layer reads [groups, samples, inputs of a row], in the order of its weight."""
    if isinstance(layer, nn.Linear):
        return x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    space = x.dim() - 2
    for d in range(space):
        span = layer.dilation[d] * (layer.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, span, layer.stride[d])[..., :: layer.dilation[d]]
    x = (
        x.unflatten(1, (layer.groups, -1)).movedim(2, 2 + space).transpose(0, 1)
    )  # [groups, n, places.., inputs, kernel..]
    return x.flatten(2 + space).flatten(1, -2)
