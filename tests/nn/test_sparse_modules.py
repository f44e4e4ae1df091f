"""Sparse layers: the same numbers as their dense twins, and everything that Python and PyTorch do to a model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from rarefy.errors import OptionError
from rarefy.nn import SparseConv2d, SparseLinear, SparseModule


def linear(**kwargs: object) -> SparseLinear:
    options = {"sparsity": 0.7, "generator": torch.Generator().manual_seed(0)} | kwargs
    return SparseLinear(19, 11, **options)  # type: ignore[arg-type]


def conv(**kwargs: object) -> SparseConv2d:
    options = {"sparsity": 0.6, "generator": torch.Generator().manual_seed(0), "padding": 1} | kwargs
    return SparseConv2d(6, 8, 3, **options)  # type: ignore[arg-type]


LAYERS = {"linear": (linear, (5, 19)), "conv": (conv, (2, 6, 9, 7))}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[SparseModule, Tensor]:
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def twin(layer: SparseModule) -> nn.Module:
    return layer.to_dense()  # type: ignore[operator]


def test_numbers_and_gradients_are_those_of_the_dense_twin(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    dense, y = twin(layer), x.clone()
    close(layer(x.requires_grad_()), dense(y.requires_grad_()))
    layer(x).square().sum().backward()
    dense(y).square().sum().backward()
    close(x.grad, y.grad, 1e-4)
    close(layer.bias.grad, dense.bias.grad, 1e-4)
    close(layer.values.grad, dense.weight.grad.reshape(-1)[layer.positions()], 1e-4)


@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2, "padding": (0, 1)},
        {"dilation": 2, "padding": "same"},
        {"padding": "valid", "bias": False},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect", "groups": 2},
        {"groups": 2, "stride": (1, 2)},
    ],
)
def test_every_geometry(geometry: dict[str, object]) -> None:
    layer, x = conv(**geometry), torch.randn(2, 6, 9, 8)
    close(layer(x), twin(layer)(x))
    close(layer(x[0]), twin(layer)(x[0]))


def test_an_even_kernel_padded_to_the_same_size() -> None:
    layer, x = SparseConv2d(3, 4, (2, 4), padding="same", sparsity=0.5), torch.randn(2, 3, 7, 6)
    close(layer(x), twin(layer)(x))


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_through_a_stride_for_many_images(threads: int) -> None:
    torch.set_num_threads(threads)  # more images than are spread out at once
    layer, x = SparseConv2d(3, 8, 3, stride=2, padding=1, sparsity=0.6), torch.randn(37, 3, 64, 64)
    dense, y = twin(layer), x.clone()
    weights = torch.randn(37, 8, 32, 32)
    (layer(x.requires_grad_()) * weights).sum().backward()
    (dense(y.requires_grad_()) * weights).sum().backward()
    close(x.grad, y.grad, 1e-4)


def test_from_dense_and_back(case: tuple[SparseModule, Tensor]) -> None:
    dense = twin(case[0])
    torch.nn.init.normal_(dense.weight)
    mask = torch.rand(dense.weight.shape) < 0.3
    layer = type(case[0]).from_dense(dense, mask)  # type: ignore[attr-defined]
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(layer.to_dense().weight, dense.weight * mask)
    assert torch.equal(type(layer).from_dense(layer.to_dense()).values, layer.values)
    assert layer.bias is not dense.bias and torch.equal(layer.bias, dense.bias)
    with pytest.raises(OptionError, match="mask must be bool"):
        type(layer).from_dense(dense, mask.float())


def test_the_drawing_is_exact_seeded_and_spread_like_dense_layers() -> None:
    layer, again = linear(), linear()
    assert layer.nnz == 63 and torch.equal(layer.values, again.values) and torch.equal(layer.col, again.col)
    wide = SparseLinear(4000, 400, sparsity=0.99)
    y = wide(torch.randn(64, 4000))
    dense = nn.Linear(4000, 400)(torch.randn(64, 4000))
    assert 0.8 < float((y.std() / dense.std()).detach()) < 1.25
    assert repr(layer) == "SparseLinear(in_features=19, out_features=11, nnz=63, sparsity=0.698565, bias=True)"


def test_copies_pickles_and_files(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        other(x).sum().backward()
        assert other.values.grad is not None and layer.values.grad is None
    ema = torch.optim.swa_utils.AveragedModel(layer)
    ema.update_parameters(layer)
    assert torch.equal(ema(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(case: tuple[SparseModule, Tensor], dtype: torch.dtype) -> None:
    layer, x = case
    expected = layer(x)
    layer.to(dtype)
    assert layer.values.dtype == layer.bias.dtype == dtype and layer.crow.dtype == torch.int64
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    close(y.float(), expected, 1e-5 if dtype == torch.float64 else 5e-2)
    y.sum().backward()
    assert layer.values.grad.dtype == dtype
    close(layer.float()(x), expected, 5e-2)


def test_autocast(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_state_dict_brings_its_topology_along(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"values", "crow", "col", "bias"}
    other = copy.deepcopy(layer)
    held = other(x).square().sum()  # a graph that knows the old length is still alive
    held.backward()
    for move in (layer.positions()[::3], torch.arange(40)):  # fewer, then others
        other.rewire_(move)
        values = other.values
        loss = other(x).square().sum()
        loss.backward()
        assert values.grad.shape == move.shape
        other.load_state_dict(state)
        assert other.values is values and torch.equal(other(x), layer(x))
        other(x).sum().backward()
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), layer(x))


def test_a_dense_checkpoint_is_taken_where_weights_are_kept(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    dense = twin(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.values.zero_()
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other(x), layer(x))
    torch.nn.init.ones_(dense.weight)
    with pytest.warns(UserWarning, match="were left out"):
        other.load_state_dict(dense.state_dict())
    assert (other.values == 1).all()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("col", lambda c: c.flip(0), "ascend within each row"),
        ("col", lambda c: c + 1000, r"must lie in \[0, 19\)"),
        ("col", lambda c: c.long(), "must be int32"),
        ("crow", lambda c: c[:-1], r"crow must be int64 \[12\]"),
        ("crow", lambda c: c + 1, "rise from 0"),
        ("values", lambda v: v[1:], "as long as values"),
    ],
)
def test_a_state_that_is_no_topology_changes_nothing(key: str, change: object, message: str) -> None:
    layer, x = linear(), torch.randn(3, 19)
    before, state = layer(x), layer.state_dict()
    state[key] = change(state[key])  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)


def test_rewiring_keeps_what_stays(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    weight = layer.dense_weight()
    layer(x).sum().backward()
    gradient = torch.zeros(weight.numel()).index_put_((layer.positions(),), layer.values.grad)
    new = torch.randperm(weight.numel())[: layer.nnz].sort().values
    stays = int(layer.mask().reshape(-1)[new].sum())
    parameter, column = layer.values, layer.col
    move = layer.rewire_(new)
    assert layer.values is parameter and layer.col is column, "edited in place"
    assert (move.dropped, move.grown) == (layer.nnz - stays, layer.nnz - stays)
    assert torch.equal(layer.positions(), new)
    keep = layer.mask()
    assert torch.equal(layer.dense_weight(), weight * keep)
    assert torch.equal(layer.values.grad, (gradient * keep.reshape(-1))[new])
    close(layer(x), twin(layer)(x))


def test_compile_and_export(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x))
    compiled(x).sum().backward()
    gradient = layer.values.grad.clone()
    layer.values.grad = None
    model(x).sum().backward()
    close(gradient, layer.values.grad)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x)
        layer.rewire_(torch.randperm(layer.rows * layer.cols)[: layer.nnz].sort().values)
        close(compiled(x), model(x))
    exported = torch.export.export(model.eval(), (x,))
    close(exported.module()(x), model(x))


def test_training_with_adam_follows_the_masked_dense_twin(case: tuple[SparseModule, Tensor]) -> None:
    layer, x = case
    dense, mask = twin(layer), layer.mask()
    mine, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (layer, dense))
    for _ in range(20):
        for model, optimizer in ((layer, mine), (dense, theirs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if model is dense:
                dense.weight.grad *= mask
            optimizer.step()
    close(layer.dense_weight(), dense.weight.detach(), 1e-4)
    assert mine.state[layer.values]["exp_avg"].shape == layer.values.shape


def test_what_needs_a_dense_weight_is_refused() -> None:
    layer = linear()
    for attempt in (
        lambda: nn.utils.weight_norm(layer),
        lambda: nn.utils.parametrizations.weight_norm(layer),
        lambda: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        lambda: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        with pytest.raises((AttributeError, ValueError), match="weight"):
            attempt()
    assert set(dict(layer.named_parameters())) == {"values", "bias"}


def test_errors_say_what_and_where() -> None:
    with pytest.raises(OptionError, match="leaves none"):
        SparseLinear(4, 4, sparsity=0.99)
    with pytest.raises(OptionError, match=r"in \[0, 1\)"):
        SparseLinear(4, 4, sparsity=1.0)
    with pytest.raises(OptionError, match="x has 18 features"):
        linear()(torch.randn(2, 18))
    with pytest.raises(OptionError, match="2\\^31"):
        SparseLinear(1 << 31, 1, sparsity=1 - 1e-9)
    with pytest.raises(ValueError, match="divisible by groups"):
        SparseConv2d(3, 4, 3, groups=2)


def test_huge_layers_never_exist_densely() -> None:
    layer = SparseLinear(60_000, 60_000, sparsity=1 - 1e-6)  # 14 GB if it were dense
    x = torch.randn(3, 60_000, requires_grad=True)
    layer(x).square().sum().backward()
    rows, cols = layer.row_indices(), layer.col.long()
    y = torch.zeros(3, 60_000).index_add_(1, rows, x.detach()[:, cols] * layer.values.detach()) + layer.bias.detach()
    close(layer(x), y, 1e-4)
    close(layer.values.grad, (2 * y[:, rows] * x.detach()[:, cols]).sum(0), 1e-4)


def test_a_layer_without_weights_left() -> None:
    layer = linear()
    layer.rewire_(torch.empty(0, dtype=torch.int64))
    y = layer(torch.randn(2, 19))
    assert torch.equal(y, layer.bias.detach().expand(2, 11)) and layer.nnz == 0
    layer.rewire_(torch.tensor([3, 30]))
    assert torch.equal(layer.values.detach(), torch.zeros(2))


def test_inside_a_model_with_a_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), SparseLinear(8 * 9 * 7, 5, sparsity=0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(16, 6, 9, 7), torch.arange(16) % 5
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
