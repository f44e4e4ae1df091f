"""Bad input: the message says what, where and what to do, and the model is as it was."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy.errors import AllocationError, OptionError, PatternError, RarefyError, SelectionError
from tests.engine.common import batch, mlp

DATA = [batch(0), batch(1)]

BAD: list[tuple[str, dict[str, Any], type[RarefyError], str]] = [
    ("rigl", dict(sparsity=1.0), OptionError, r"sparsity=1.0 must be a number in \[0, 1\)"),
    ("rigl", dict(sparsity=-0.1), OptionError, "sparsity=-0.1"),
    ("rigl", dict(sparsity=90), OptionError, "sparsity=90"),
    ("rigl", dict(sparsity=float("nan")), OptionError, "sparsity=nan"),
    ("rigl", dict(sparsity="0.9"), OptionError, "sparsity='0.9'"),
    ("rgl", {}, OptionError, "did you mean 'rigl'"),
    ("rigl", dict(evry=3), OptionError, "did you mean 'every'"),
    ("rigl", dict(every=0), OptionError, "every"),
    ("rigl", dict(stop=0.5), OptionError, "total_steps"),
    ("gradual", {}, OptionError, "total_steps"),
    ("gradual", dict(start=30, stop=20), OptionError, "after stop"),
    ("gradual", dict(total_steps=10, initial=0.95), OptionError, "initial=0.95"),
    ("gradual", dict(total_steps=10, curve="cubik"), OptionError, "did you mean 'cubic'"),
    ("set", dict(drop_fraction=0.0), OptionError, "drop_fraction=0.0"),
    ("set", dict(decay="cosin"), OptionError, "cosine"),
    ("static", dict(init="he"), OptionError, "init='he'"),
    ("static", dict(allocation="erkk"), OptionError, "did you mean 'erk'"),
    ("static", dict(allocation={"0*": 0.5}), SelectionError, "3.weight"),
    ("static", dict(allocation={"*": 1.5}), OptionError, r"allocation\['\*'\]=1.5"),
    ("static", dict(sparsity=0.999, allocation="uniform"), AllocationError, "weight"),
    ("gradual", dict(sparsity=0.999, total_steps=100), AllocationError, "weight"),
    ("magnitude", dict(sparsity=0.999, allocation="uniform", start=5), AllocationError, "weight"),
    ("static", dict(pattern="4:2"), PatternError, "4:2"),
    ("static", dict(pattern="2:4", sparsity=0.9), OptionError, "contradicts"),
    ("static", dict(pattern="3:7"), PatternError, r"0.weight \[16, 12\]"),
    ("static", dict(pattern="blok"), OptionError, "pattern"),
    ("static", dict(storage="compresed"), OptionError, "storage"),
    ("static", dict(include="9"), SelectionError, "matches no layer"),
    ("static", dict(optimizer="adam"), OptionError, "not a torch.optim.Optimizer"),
    ("static", dict(total_steps=0), OptionError, "total_steps=0"),
    ("snip", {}, OptionError, "calibration"),
    ("snip", dict(calibration=[]), OptionError, "calibration set is empty"),
    ("snip", dict(calibration=[torch.zeros(2, 12)] * 2), OptionError, "pair"),
    (
        "snip",
        dict(calibration=[(torch.full((4, 12), float("nan")), torch.zeros(4, dtype=torch.int64))]),
        OptionError,
        "not finite",
    ),
    ("small-dense", {}, OptionError, "narrower"),
    ("dense", dict(sparsity=0.5), OptionError, "no option 'sparsity'"),
]


@pytest.mark.parametrize(("method", "options", "error", "message"), BAD)
def test_bad_input_is_refused_and_the_model_is_untouched(
    method: str, options: dict[str, Any], error: type[RarefyError], message: str
) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    with pytest.raises(error, match=message):
        rarefy.sparsify(model, method, **{"optimizer": optimizer, **options})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert str(state) == str(optimizer.state_dict())
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    assert not any(m._load_state_dict_post_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks


def test_a_failing_user_loss_leaves_the_model_untouched() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    def loss(model: nn.Module, data: Any) -> torch.Tensor:
        if random.random() >= 0:
            raise RuntimeError("the user's own bug")
        return torch.zeros(())

    with pytest.raises(RuntimeError, match="own bug"):
        rarefy.sparsify(model, "snip", calibration=DATA, loss=loss)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_snip_leaves_everything_but_the_masked_weights_untouched() -> None:
    model = mlp()
    model.insert(1, nn.Dropout(0.5))
    model.eval()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for module in model.modules():
        module.train()
    model[0].weight.requires_grad_(False)
    sparse = rarefy.sparsify(model, "snip", sparsity=0.8, calibration=DATA)
    assert torch.equal(rng, torch.get_rng_state())
    assert not model[0].weight.requires_grad
    for name, value in model.state_dict().items():
        expected = before[name] * sparse.layers[name].mask() if name in sparse.layers else before[name]
        assert torch.equal(value, expected), name
    assert all(p.grad is None for p in model.parameters())


def test_options_beside_a_method_object_are_refused() -> None:
    with pytest.raises(OptionError, match="sparsity, every"):
        rarefy.sparsify(mlp(), rarefy.methods.RigL(), sparsity=0.5, every=3)


def test_method_objects_are_read_only_and_readable() -> None:
    method = rarefy.methods.RigL(sparsity=0.5)
    assert "sparsity=0.5" in repr(method)
    with pytest.raises(AttributeError):
        method.sparsity = 0.6
    with pytest.raises(AttributeError, match="did you mean 'RigL'"):
        _ = rarefy.methods.RigLL
