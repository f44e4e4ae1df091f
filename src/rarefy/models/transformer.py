"""One block, two nets: a small GPT (Radford et al. 2019) and a small ViT (Dosovitskiy et al. 2021, 2010.11929)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.errors import ModelError
from rarefy.models._parts import scaled


class Attention(nn.Module):
    """Multi-head attention whose four projections are plain linear layers; [batch, length, dim] to the same shape."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers with a GELU, each after a normalisation and added to its input."""

    def __init__(self, dim: int, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def _blocks(dim: int, hidden: int, depth: int, heads: int, causal: bool) -> nn.Sequential:
    return nn.Sequential(*(Block(dim, hidden, heads, causal) for _ in range(depth)))


def _dim(dim: int, heads: int, width: float) -> int:
    """Scale the model's dimension by whole units per head, so that every head keeps the same valid size."""
    if heads < 1 or dim < heads or dim % heads:
        raise ModelError(f"dim={dim} does not divide into heads={heads}; give a dim that is a multiple of heads")
    return heads * scaled(dim // heads, width)


def _init(model: nn.Module) -> None:
    """GPT-2's N(0, 0.02) for all matrices, zero biases; layers that end a residual branch get 0.02 / sqrt(2 depth)."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    last = {id(layer) for block in blocks for layer in (block.attention.out, block.fc2)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            shrink = (2 * len(blocks)) ** -0.5 if id(module) in last else 1.0
            nn.init.normal_(module.weight, std=0.02 * shrink)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


class GPT(nn.Module):
    """Predict the next token with a pre-norm decoder; 842,496 parameters with the defaults (text as bytes).

    Input int64 [batch, length] of token numbers below `num_classes` with length <= `context`; output logits
    [batch, length, num_classes], where position t sees tokens 0..t. `tied` shares the embedding with the head. GPT-2's
    small size is num_classes=50257, context=1024, dim=768, depth=12, heads=12 (124,439,808 parameters).
    `width` scales the units per head and the hidden units. Raises ModelError where dim is no multiple of heads, or
    a text is longer than the context.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_classes: int = 256,
        context: int = 128,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        tied: bool = True,
    ) -> None:
        super().__init__()
        inner = _dim(dim, heads, width)
        self.context = context
        self.token = nn.Embedding(num_classes, inner)
        self.position = nn.Embedding(context, inner)
        self.blocks = _blocks(inner, scaled(4 * dim, width), depth, heads, causal=True)
        self.norm = nn.LayerNorm(inner)
        self.head = nn.Linear(inner, num_classes, bias=False)
        if tied:
            self.head.weight = self.token.weight
        _init(self)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ModelError(f"{length} tokens given, but this gpt has context={self.context}; cut the text")
        x = self.token(tokens) + self.position.weight[:length]
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """Classify images from their patches with a pre-norm encoder and a class token; CIFAR size by default.

    Input float [batch, in_channels, image_size, image_size], output logits [batch, num_classes]. `patch` is the side
    of a patch in pixels and must divide image_size. ViT-B/16 is image_size=224, patch=16, dim=768, depth=12, heads=12,
    num_classes=1000 (86,567,656 parameters). `width` scales the units per head and the hidden units. Raises ModelError
    where a size does not divide.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        patch: int = 4,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        if patch < 1 or image_size % patch:
            raise ModelError(f"patch={patch} does not divide image_size={image_size}; give a patch that does")
        inner = _dim(dim, heads, width)
        self.patch = nn.Conv2d(in_channels, inner, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, inner))
        self.position = nn.Parameter(torch.empty(1, (image_size // patch) ** 2 + 1, inner).normal_(std=0.02))
        self.blocks = _blocks(inner, scaled(4 * dim, width), depth, heads, causal=False)
        self.norm = nn.LayerNorm(inner)
        self.head = nn.Linear(inner, num_classes)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1) + self.position
        return self.head(self.norm(self.blocks(x)[:, 0]))
