"""FLOPs against PyTorch's own counter on dense models, and against closed forms with masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from rarefy import models
from rarefy.errors import OptionError
from rarefy.metrics import flops


def dense_by_torch(model: nn.Module, *args: torch.Tensor) -> int:
    """FlopCounterMode without the fused CPU attention kernels, which it does not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            copy.deepcopy(model).eval()(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def random_mask(shape: Any, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class OwnAttention(nn.Module):
    """Hand-written attention from a fused projection and scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, value=v, is_causal=True)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,ijk->bjk", x, self.w)


DENSE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "linear 3-D": (lambda: nn.Linear(7, 5, bias=False), (4, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding="valid"), (4, 4, 17)),
    "conv2d groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, stride=2, padding=1, dilation=2), (4, 8, 9, 11)),
    "conv2d same": (lambda: nn.Conv2d(8, 12, 3, padding="same", padding_mode="circular"), (4, 8, 9, 11)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (4, 8, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1)), (4, 2, 4, 6, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2, stride=2, output_padding=1), (4, 8, 5, 5)),
    "attention": (lambda: SelfAttention(batch_first=True), (4, 5, 8)),
    "attention weights": (lambda: SelfAttention(True, batch_first=True, add_bias_kv=True), (4, 5, 8)),
    "attention no bias": (lambda: SelfAttention(True, bias=False, add_zero_attn=True, batch_first=True), (4, 5, 8)),
    "own attention": (OwnAttention, (4, 6, 8)),
    "einsum": (Einsum, (4, 8)),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), (4, 5, 8)
    ),
    "rnn": (lambda: nn.RNN(5, 6, 2, batch_first=True), (4, 3, 5)),
    "gru": (lambda: nn.GRU(5, 6, 2, bidirectional=True, batch_first=True), (4, 3, 5)),
    "lstm": (lambda: nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True), (4, 3, 5)),
    "lstm cell": (lambda: nn.LSTMCell(5, 6), (4, 5)),
    "gru cell": (lambda: nn.GRUCell(5, 6), (4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense_counts_agree_with_pytorch(name: str) -> None:
    build, shape = DENSE[name]
    model, x = build(), torch.randn(shape)
    report = flops(model, x)
    assert report.dense * report.batch == dense_by_torch(model, x) > 0
    assert report.sparse == report.dense and report.ratio == 1.0
    assert report.not_counted == ()


@pytest.mark.parametrize("name", ["resnet-20", "wrn-22-2", "vgg-19-bn", "mobilenet-v2", "lenet-5"])
def test_reference_networks_agree_with_pytorch(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name)
    shape = (2, 1, 28, 28) if name == "lenet-5" else (2, 3, 32, 32)
    if name == "mobilenet-v2":
        shape = (2, 3, 224, 224)
    x = torch.empty(shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    report = flops(model, x)
    assert report.dense * 2 == counter.get_total_flops()
    assert report.not_counted == ()


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_reference_transformers_agree_with_pytorch(name: str) -> None:
    model = models.build(name)
    x = torch.zeros(2, 16, dtype=torch.long) if name == "gpt" else torch.randn(2, 3, 32, 32)
    report = flops(model, x)
    assert report.dense * 2 == dense_by_torch(model, x)
    assert report.not_counted == ()
    assert report.layers["blocks.0.attention:attention"].dense > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", DENSE)
def test_counts_are_the_same_on_a_gpu(name: str) -> None:
    build, shape = DENSE[name]
    model, x = build(), torch.randn(shape)
    masks = {n: random_mask(p.shape) for n, p in model.named_parameters() if p.dim() > 1}
    expected = flops(model, x, masks)
    assert flops(model.cuda(), x.cuda(), masks) == expected
    assert flops(model, x.cuda(), {n: m.cuda() for n, m in masks.items()}) == expected


@pytest.mark.parametrize("batch", [1, 3])
def test_a_kept_weight_of_a_linear_layer_costs_one_multiply_add_per_row(batch: int) -> None:
    layer, mask = nn.Linear(20, 10), random_mask((10, 20))
    report = flops(layer, torch.randn(batch, 7, 20), {"weight": mask})
    assert report.layers["weight"] == (2 * 200 * 7, 2 * int(mask.sum()) * 7)
    assert report.positions("weight") == 7


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_kept_weight_of_a_convolution_costs_one_multiply_add_per_output_position(groups: int) -> None:
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    mask = random_mask(layer.weight.shape)
    report = flops(layer, torch.randn(5, 8, 9, 13), {"weight": mask})
    assert report.layers["weight"] == (2 * mask.numel() * 5 * 7, 2 * int(mask.sum()) * 5 * 7)
    channels_last = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert flops(channels_last, torch.randn(5, 8, 9, 13), {"weight": mask}) == report


def test_transposed_convolutions_use_each_weight_once_per_input_position() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=2)
    mask = random_mask(layer.weight.shape)
    assert flops(layer, torch.randn(2, 4, 11), {"weight": mask}).sparse == 2 * int(mask.sum()) * 11


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 4}])
def test_attention_with_masks_and_different_lengths(need_weights: bool, options: dict[str, int]) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    length, sources, heads = 5, 7, 2
    names = [n for n in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") if hasattr(model, n)]
    names = [n for n in names if getattr(model, n) is not None] + ["out_proj.weight"]
    masks = {n: random_mask(model.get_parameter(n).shape, seed=i) for i, n in enumerate(names)}
    example = {
        "query": torch.randn(3, length, 8),
        "key": torch.randn(3, sources, options.get("kdim", 8)),
        "value": torch.randn(3, sources, options.get("vdim", 8)),
        "need_weights": need_weights,
    }
    report = flops(model, example, masks)
    if options:
        q, k, v = (masks[f"{c}_proj_weight"] for c in "qkv")
    else:
        q, k, v = masks["in_proj_weight"].chunk(3)
    projections = int(q.sum()) * length + int(k.sum() + v.sum()) * sources
    out = int(masks["out_proj.weight"].sum()) * length
    products = heads * length * sources * 4 * 2
    assert report.sparse == 2 * (projections + out + products)
    assert report.layers["out_proj.weight"] == (2 * 64 * length, 2 * out)
    (product,) = [layer for name, layer in report.layers.items() if name not in masks]
    assert product == (2 * products, 2 * products)


def test_the_fast_path_of_attention_hides_nothing() -> None:
    model = SelfAttention(batch_first=True).eval()  # these are the fast path's conditions
    masks = {
        f"attention.{n}": random_mask(model.attention.get_parameter(n).shape)
        for n in ("in_proj_weight", "out_proj.weight")
    }
    assert torch.backends.mha.get_fastpath_enabled()
    report = flops(model, torch.randn(2, 5, 8), masks)
    assert report.sparse == sum(2 * int(m.sum()) * 5 for m in masks.values()) + 2 * 2 * 2 * 5 * 5 * 4
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched", "packed"])
def test_recurrent_layers_use_each_weight_once_per_token(kind: Any, layout: str) -> None:
    options = {"proj_size": 3} if kind is nn.LSTM else {}
    model = kind(5, 6, 2, bidirectional=True, batch_first=layout != "sequence first", **options)
    masks = {n: random_mask(p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters()) if p.dim() == 2}
    x: Any = torch.randn(3, 4, 5)
    tokens, batch = 12, 3
    if layout == "sequence first":
        batch = 4
    elif layout == "unbatched":
        x, tokens, batch = torch.randn(4, 5), 4, 1
    elif layout == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1], batch_first=True)
        tokens = 7
    report = flops(model, x, masks, batch=None if layout in ("batch first", "packed") else batch)
    assert report.batch == batch
    for name, mask in masks.items():
        expected = (2 * tokens * mask.numel() / batch, 2 * tokens * int(mask.sum()) / batch)
        assert report.layers[name] == pytest.approx(expected)
    assert set(report.layers) == set(masks)
    if layout == "batch first" and not options:
        assert report.dense * batch == dense_by_torch(model, x)


def test_shared_and_tied_weights_are_counted_each_time_they_are_used() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.mix = nn.Linear(6, 6, bias=False)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return self.head(self.mix(self.mix(self.mix(x))))

    model = Tied()
    mask, head = random_mask((6, 6)), random_mask((11, 6))
    tokens = torch.zeros(2, 5, dtype=torch.long)
    report = flops(model, tokens, {"mix.weight": mask, "head.weight": head})
    assert report.layers["mix.weight"] == (3 * 2 * 36 * 5, 3 * 2 * int(mask.sum()) * 5)
    assert report.layers["head.weight"] == (2 * 66 * 5, 2 * int(head.sum()) * 5)  # the look-up costs nothing
    same = flops(model, tokens, {"embed.weight": head, "head.weight": head.clone()})
    assert same.layers["embed.weight"] == report.layers["head.weight"]
    with pytest.raises(OptionError, match=r"head.weight.*tied to.*embed.weight"):
        flops(model, tokens, {"embed.weight": head, "head.weight": ~head})


def test_an_embedding_alone_costs_nothing() -> None:
    report = flops(nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.long), {"weight": random_mask((10, 4))})
    assert report.layers == {"weight": (0.0, 0.0)} and report.not_counted == () and report.ratio == 1.0


def test_functional_use_of_a_weight_and_of_its_views() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, self.w[:, 2:6])  # a part of the columns
            y = y @ self.w  # [.., 6] x [6, 8]
            return y @ self.w.t().contiguous()  # a copy

    mask = random_mask((6, 8))
    report = flops(Functional(), torch.randn(3, 4), {"w": mask})
    assert report.layers == {"w": (2 * (24 + 48 + 48), 2 * int(mask[:, 2:6].sum() + 2 * mask.sum()))}


def test_the_product_of_two_masked_weights_counts_the_pairs_that_meet() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a @ self.b

    a, b = random_mask((5, 4), seed=1), random_mask((4, 6), seed=2)
    report = flops(LowRank(), torch.zeros(1), {"a": a, "b": b})
    assert report.sparse == 2 * int((a[:, :, None] & b[None]).sum()) and report.dense == 2 * 5 * 4 * 6


def test_casts_and_masks_of_weights_are_followed() -> None:
    mask, x = random_mask((6, 4)), torch.randn(3, 4)
    pruned = nn.Linear(4, 6)
    prune.custom_from_mask(pruned, "weight", mask)
    assert flops(pruned, x, {"weight_orig": mask}).layers["weight_orig"] == (48, 2 * int(mask.sum()))

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x)

    assert flops(Autocast(), x, {"fc.weight": mask}).sparse == 2 * int(mask.sum())


class Soft(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return torch.sign(w) * torch.relu(w.abs() - 0.1)


def test_parametrised_weights_take_their_masks_under_either_name() -> None:
    mask, x = random_mask((6, 4)), torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 6))
    parametrize.register_parametrization(model[0], "weight", Soft())
    for name in ("0.weight", "0.parametrizations.weight.original"):
        report = flops(model, x, {name: mask})
        assert (report.dense, report.sparse) == (48, 2 * int(mask.sum()))
    assert flops(parametrizations.weight_norm(nn.Linear(4, 6)), x).dense == 48


def test_unknown_work_is_named() -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(5, 4))
            self.scale = nn.Parameter(torch.ones(1, 4))
            self.shift = nn.Parameter(torch.zeros(1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x * self.scale + self.shift, self.centres)

    model = nn.Sequential(nn.Linear(4, 4), Distance())
    report = flops(model, torch.randn(3, 4))
    assert {(item.weight, item.module) for item in report.not_counted} == {
        ("1.centres", "1 (Distance)"),
        ("1.scale", "1 (Distance)"),
    }
    assert "not counted: 1.centres" in str(report)
    bilinear = flops(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4)))
    assert [item.weight for item in bilinear.not_counted] == ["weight"]


def test_a_mask_that_cannot_be_followed_is_named() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, torch.cat([self.q, self.k]))

    report = flops(Joined(), torch.randn(2, 4), {"q": random_mask((4, 4))})
    assert report.dense == report.sparse == 64
    assert [(item.weight, item.operation) for item in report.not_counted] == [("q", "cat")]
    assert flops(Joined(), torch.randn(2, 4)).not_counted == ()
