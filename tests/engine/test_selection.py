"""Which weights are made sparse: every supported module, every selector, and a reason for what is left out."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import rarefy
from rarefy.errors import RarefyError, SelectionError
from tests.engine.common import mlp


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.bag = nn.EmbeddingBag(10, 8)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(2, 4, 3)
        self.bn, self.ln = nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.rnn, self.lstm, self.gru = nn.RNN(8, 8), nn.LSTM(8, 8, 2, bidirectional=True, proj_size=4), nn.GRU(8, 8)
        self.cell = nn.LSTMCell(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.position = nn.Parameter(torch.zeros(4, 8))
        self.up = nn.ConvTranspose2d(4, 4, 2)


def test_finds_every_supported_weight_once_and_says_why_the_rest_is_left_out() -> None:
    sparse = rarefy.sparsify(Zoo(), "static", sparsity=0.5, allocation="uniform")
    names = set(sparse.layers)
    assert {"embedding.weight", "bag.weight", "conv1.weight", "conv2.weight", "conv3.weight"} <= names
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= names
    assert {f"cross.{k}_proj_weight" for k in "qkv"} | {"cross.out_proj.weight"} <= names
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "gru.weight_ih_l0", "cell.weight_ih", "cell.weight_hh"} <= names
    assert {"lstm.weight_hr_l1_reverse", "lstm.weight_ih_l1"} <= names
    assert not any("bias" in name or name.startswith(("bn", "ln")) for name in names)
    left = {item.name: item.reason for item in sparse.summary().left_out}
    assert left["head.weight"] == "tied to embedding.weight, which stands for both"
    assert sparse.layers["embedding.weight"].target.aliases == ("head.weight",)
    assert left["bn.weight"] == "normalisation"
    assert left["lstm.bias_ih_l0"] == "bias or vector"
    assert "Zoo" in left["position"]
    assert "ConvTranspose2d" in left["up.weight"]
    assert len(names) + len(left) == sum(1 for _ in Zoo().named_parameters(remove_duplicate=False))
    for reason in ("normalisation", "tied to embedding.weight"):
        assert reason in str(sparse.summary())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(include="0"), ["0.weight"]),
        (dict(include="*.weight", exclude="5"), ["0.weight", "3.weight"]),
        (dict(include=["0", "5.weight"]), ["0.weight", "5.weight"]),
        (dict(include=re.compile(r"^[35]\.")), ["3.weight", "5.weight"]),
        (dict(exclude=nn.Linear, include=nn.Module), None),
        (dict(include=lambda name, module: module.out_features > 10), ["0.weight", "3.weight"]),
    ],
)
def test_selectors(options: dict[str, object], expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(SelectionError, match="leaves no layer"):
            rarefy.sparsify(mlp(), "static", sparsity=0.5, **options)
    else:
        sparse = rarefy.sparsify(mlp(), "static", sparsity=0.5, **options)
        assert list(sparse.layers) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(include="6.weight"), "matches no layer.*did you mean"),
        (dict(exclude="fc*"), "exclude='fc\\*' matches no layer"),
        (dict(include=nn.Conv2d), "Conv2d"),
        (dict(include=3), "cannot select layers"),
    ],
)
def test_a_selector_that_matches_nothing_is_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        rarefy.sparsify(mlp(), "static", sparsity=0.5, **options)


def test_models_that_cannot_be_sparse() -> None:
    with pytest.raises(SelectionError, match="holds no weight"):
        rarefy.sparsify(nn.Sequential(nn.ReLU()), "static")
    with pytest.raises(SelectionError, match="Run one batch"):
        rarefy.sparsify(nn.LazyLinear(3), "static")
    with pytest.raises(SelectionError, match="sparse=False"):
        rarefy.sparsify(nn.Embedding(4, 4, sparse=True), "static")


def test_a_parametrized_weight_is_left_out_by_name() -> None:
    model = mlp()
    parametrizations.weight_norm(model[0])
    sparse = rarefy.sparsify(model, "static", sparsity=0.5)
    assert list(sparse.layers) == ["3.weight", "5.weight"]
    left = {item.name: item.reason for item in sparse.left_out}
    assert "parametrization" in left["0.parametrizations.weight.original1"]


def test_tied_weights_count_and_train_once() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparse = rarefy.sparsify(model, "rigl", sparsity=0.75, optimizer=optimizer, every=1, stop=10)
    for _ in range(3):
        model(torch.randint(20, (6,))).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.numel == 160
    assert (
        sparse.nnz
        == 40
        == int(model[1].weight.count_nonzero()) + int((model[0].weight[sparse.layers["0.weight"].mask()] == 0).sum())
    )


@pytest.mark.parametrize("module", [nn.MultiheadAttention(8, 2), nn.LSTM(8, 8, 2), nn.GRU(8, 8, bidirectional=True)])
def test_attention_and_recurrent_nets_train_and_stay_sparse(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    sparse = rarefy.sparsify(module, "rigl", sparsity=0.75, optimizer=optimizer, every=1, stop=10)
    x = torch.randn(5, 3, 8)
    for _ in range(3):
        output = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)[0]
        output.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in sparse.layers.values():
            assert not layer.weight()[~layer.mask()].any()
    assert sparse.step_count == 3
    assert any(event.grown for event in sparse.events if event.step)


def test_errors_are_one_family() -> None:
    assert issubclass(SelectionError, RarefyError)
