"""Shared weights under what Python and PyTorch do to a model: copies, dtypes, compile, autocast, ties, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy.nn import SharedArray, SharedConv2d, SharedEmbedding, SharedLinear, SharedModule, share_
from tests.nn.shared import Net, net, tokens, train


@pytest.mark.parametrize("options", [{}, {"mapping": "tile", "tile": 4}])
def test_copies_pickles_and_states(options: dict[str, Any]) -> None:
    model = net()
    (array,) = share_(model, 0.1, **options)
    train(model)
    x, _ = tokens(9)
    model.eval()
    expected = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(twin(x), expected)
        own = [m for m in twin.modules() if isinstance(m, SharedArray)]
        assert len(own) == 1 and own[0] is not array
        assert all(m.array is own[0] for m in twin.modules() if isinstance(m, SharedModule))
        with torch.no_grad():
            own[0].values.zero_()
    assert torch.equal(model(x), expected)
    state = model.state_dict()
    assert [k for k in state if "shared" in k] == [
        "embed.shared.values", "embed.shared.scales", "embed.shared.layout"
    ]  # fmt: skip
    torch.manual_seed(5)
    other = Net()
    share_(other, 0.1, **options)
    assert not torch.equal(other.embed.array.scales, array.scales)
    other.load_state_dict(state)
    other.eval()
    assert torch.equal(other(x), expected)
    assert torch.equal(other.embed.array.gain, array.gain)  # follows the loaded scales
    wrong = net()
    share_(wrong, 0.1, seed=1, **options)
    with pytest.raises(RuntimeError, match="another mapping, seed"):
        wrong.load_state_dict(state)


def test_moving_to_another_dtype_moves_the_one_array() -> None:
    model = net()
    (array,) = share_(model, 0.1)
    model.double()
    assert array.values.dtype == torch.float64 == model.head.weight_now().dtype
    assert len([p for p in model.parameters() if p.numel() == array.size]) == 1
    train(model)


@pytest.mark.parametrize("options", [{}, {"mapping": "tile", "tile": 4}])
def test_compile_and_export(options: dict[str, Any]) -> None:
    model = net()
    (array,) = share_(model, 0.1, **options)
    x, y = tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    found = array.values.grad
    array.values.grad = None
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(found, array.values.grad)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_autocast_and_frozen_arrays() -> None:
    model = net()
    (array,) = share_(model, 0.1)
    x, y = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    F.cross_entropy(out.float(), y).backward()
    assert array.values.grad is not None and array.values.grad.dtype == torch.float32
    array.values.requires_grad_(False)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert array.values.grad is None and model.hidden.bias.grad is not None


def test_sparse_gradients_reach_only_the_rows_that_were_looked_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8, padding_idx=3), nn.Linear(8, 4))
    dense = copy.deepcopy(model)
    share_(model, 1.0)
    assert isinstance(model[0], SharedEmbedding)
    x = torch.tensor([[1, 3, 1], [7, 2, 3]])
    assert torch.equal(model(x), dense(x))
    model(x).sum().backward()
    dense(x).sum().backward()
    array = model[0].array
    slot, enter = array.places[0].slots(torch.arange(400))
    grad = (array.values.grad[slot] * array.signs[enter] * array.scales[0]).view(50, 8)
    torch.testing.assert_close(grad, dense[0].weight.grad)


def test_tied_weights_stand_in_the_array_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30, bias=False))
    model[2].weight = model[0].weight
    dense = copy.deepcopy(model)
    (array,) = share_(model, 1.0)
    assert array.represented == 30 * 8 + 64
    x = torch.arange(10)
    assert torch.equal(model(x), dense(x))


def test_hooks_and_references_stay_valid() -> None:
    model = net()
    head, seen = model.head, []
    head.register_forward_hook(lambda *args: seen.append(1))
    share_(model, 0.1)
    model(tokens()[0])
    assert head is model.head and isinstance(head, SharedLinear) and isinstance(model.conv, SharedConv2d) and seen


def test_flops_are_the_dense_ones_under_the_layers_names_and_parameters_are_the_arrays() -> None:
    x, _ = tokens()
    model = net()
    dense = rarefy.metrics.flops(model, x)
    before = rarefy.metrics.parameters(model).total
    (array,) = share_(model, 1 / 16)
    shared = rarefy.metrics.flops(model, x)
    assert shared.dense == dense.dense == shared.sparse
    assert {k: v for k, v in shared.layers.items() if v.dense} == {k: v for k, v in dense.layers.items() if v.dense}
    assert not shared.not_counted
    assert all(shared.positions(name) == dense.positions(name) for name in shared.layers)
    count = rarefy.metrics.parameters(model)
    assert count.kept == count.total == before - array.represented + array.size


def test_other_layers_stay_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8), nn.Conv1d(3, 3, 1),
    )  # fmt: skip
    nn.utils.parametrizations.weight_norm(model[1])
    model.append(nn.Linear(8, 4))
    model.append(nn.Linear(4, 2))
    share_(model, 0.5, smallest=9)
    assert [type(m) for m in model.modules() if isinstance(m, SharedModule)] == [SharedLinear]
    assert isinstance(model[3], SharedLinear)
    model[0](torch.randn(1, 3, 8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"keep": 1e-6}, "leaves none"),
        ({"keep": 0.5, "mapping": "folt"}, "did you mean 'fold'"),
        ({"keep": 0.5, "scaler": "v9"}, "scaler"),
        ({"keep": 0.5, "scope": "all"}, "scope"),
        ({"keep": 0.5, "init_std": 0}, "init_std"),
        ({"keep": 0.5, "tile": 0}, "tile"),
        ({"keep": 0.5, "smallest": 10**9}, "to share"),
        ({"keep": 0.01, "mapping": "tile"}, "not larger than a tile"),
    ],
)
def test_a_refused_model_is_left_as_it_was(options: dict[str, Any], match: str) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(rarefy.RarefyError, match=match):
        share_(model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, SharedModule) for m in model.modules())


def test_layers_that_cannot_share_are_named() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    with pytest.raises(rarefy.RarefyError, match=r"0: an Embedding with max_norm"):
        share_(model, 0.5)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(rarefy.RarefyError, match=r"1 \[3, 4\]: all its weights are 0"):
        share_(model, 0.5)
