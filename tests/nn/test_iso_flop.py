"""Larger layers at equal FLOPs: ranks, budgets counted by the repository's counter, initialisation, failures."""

from __future__ import annotations

import copy
from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy import models
from rarefy.metrics import flops
from rarefy.nn import Doped, Parallel, iso_flop_
from rarefy.nn.iso_flop import KINDS
from rarefy.nn.iso_flop_layers import doped_rank, factorized_rank
from tests.nn.test_dataflow_and_widen import Residual, image

GRID = [Fraction(1, 2), Fraction(3, 4), Fraction(9, 10), Fraction(19, 20), Fraction(99, 100)]


@pytest.mark.parametrize("s", GRID)
@pytest.mark.parametrize("outputs", [10, 64, 65, 512])
@pytest.mark.parametrize("inputs", [27, 64, 576, 4608])
def test_ranks_are_exact_on_a_grid(inputs: int, outputs: int, s: Fraction) -> None:
    """Against whole-number arithmetic: floats alone would give 577 for 3 x 3, 64 -> 64 at 0.9, where 576 is exact."""
    assert factorized_rank(inputs, outputs, float(s)) == ceil(
        Fraction(inputs * outputs) / ((1 - s) * (inputs + outputs))
    )
    assert doped_rank(inputs, outputs, float(s)) == floor(s * inputs * outputs / (inputs + outputs))


def test_ranks_of_the_papers_layer() -> None:
    assert [factorized_rank(576, 64, s) for s in (0.5, 0.75, 0.9)] == [116, 231, 576]
    assert [doped_rank(576, 64, s) for s in (0.5, 0.75, 0.9)] == [28, 43, 51]


def conv_net() -> nn.Sequential:
    """Stem, four inner layers with and without norms, head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10),
    )  # fmt: skip


def pixels(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_the_flops_are_the_dense_networks(kind: str, sparsity: float, allocation: str) -> None:
    model = conv_net()
    dense = flops(model, pixels()).dense
    made = iso_flop_(model, kind, sparsity, pixels(), allocation=allocation)
    assert made.flops_dense == dense and made.flops == pytest.approx(dense, rel=1e-9)
    sparse = rarefy.sparsify(model, "static", include=[*made.sparsities], allocation=made.sparsities)
    assert flops(model, pixels(), sparse.masks()).sparse == pytest.approx(dense, rel=0.01)
    assert model(pixels()).shape == (2, 10)
    if allocation == "uniform" and kind != "wide":  # dense ends are as they were: what is left to solve is rounding
        assert all(abs(s - sparsity) < 0.05 for s in made.sparsities.values())


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", ["parallel", "factorized", "doped"])
def test_a_single_layer_keeps_as_many_weights_as_the_dense_one_had(kind: str, sparsity: float) -> None:
    """Counted by hand from the shapes: sparse parts at the nominal sparsity and dense parts add up, but for the rank."""
    model = nn.Sequential(nn.Conv2d(5, 64, 1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 3, 1))
    x = torch.randn(2, 5, 7, 7)
    made = iso_flop_(model, kind, sparsity, x, match_flops=False)
    assert set(made.sparsities.values()) == {sparsity}
    kept = sum(
        p.numel() * (1 - made.sparsities.get(n, 0.0)) for n, p in model.named_parameters() if n[0] == "1" and p.ndim > 1
    )
    one_rank = 576 + 64
    assert abs(kept - 64 * 576) <= (0 if kind == "parallel" else one_rank) + 1e-6


def test_the_ends_stay_dense_and_as_they_were() -> None:
    for kind in ("parallel", "factorized", "doped"):
        model = conv_net()
        stem, head = model[0], model[-1]
        made = iso_flop_(model, kind, 0.75, pixels())
        assert model[0] is stem and model[-1] is head
        assert not {"0.weight", "14.weight"} & set(made.sparsities)
    wide = conv_net()
    made = iso_flop_(wide, "wide", 0.75, pixels())
    assert set(made.sparsities) == {"3.weight", "6.weight", "8.weight", "12.weight"}
    assert all(s > 0.75 for s in made.sparsities.values())  # they also pay for the wider dense ends


@pytest.mark.parametrize("kind", ["wide", "parallel", "doped"])
def test_sparsity_zero_is_the_dense_network_bit_for_bit(kind: str) -> None:
    model, dense = conv_net(), conv_net()
    made = iso_flop_(model, kind, 0.0, pixels())
    assert set(made.sparsities.values()) <= {0.0}
    assert torch.equal(model(pixels()), dense(pixels()))


def test_parallel_is_the_sum_of_its_normed_branches() -> None:
    model = conv_net()
    iso_flop_(model, "parallel", 0.75, pixels())
    layer = model[3]
    assert isinstance(layer, Parallel) and len(layer.branches) == 4 and isinstance(model[4], nn.Identity)
    assert [type(m) for m in layer.branches[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(m) for m in model[6].branches[0]] == [nn.Conv2d, nn.ReLU]  # no norm behind it: none in its branches
    assert isinstance(model[8], Parallel) and model[8].branches[0].layer.groups == 2
    x = torch.randn(2, 24, 6, 6)
    model.eval()
    wanted = sum(torch.relu(b.norm(b.layer(x))) for b in layer.branches)
    torch.testing.assert_close(layer(x), wanted)
    plain = conv_net()
    iso_flop_(plain, "parallel", 0.75, pixels(), nonlinearity="none")
    assert [type(m) for m in plain[3].branches[0]] == [nn.Conv2d, nn.BatchNorm2d]


def test_factorized_and_doped_compute_what_they_say() -> None:
    model = conv_net()
    iso_flop_(model, "factorized", 0.75, pixels())
    assert [type(m) for m in model[3]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert [type(m) for m in model[6]] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert [type(m) for m in model[12]] == [nn.Linear, nn.ReLU, nn.Linear]
    assert isinstance(model[8], nn.Conv2d)  # grouped: stays as it is
    assert model[3].expand.stride == (2, 2) and model[3].project.kernel_size == (1, 1)
    assert model[3].expand.weight.shape[0] == factorized_rank(216, 32, 0.75)
    model = conv_net()
    iso_flop_(model, "doped", 0.75, pixels())
    layer = model[3]
    assert isinstance(layer, Doped) and layer.down.weight.shape[0] == doped_rank(216, 32, 0.75)
    x = torch.randn(2, 24, 6, 6)
    torch.testing.assert_close(layer(x), layer.sparse(x) + layer.up(layer.down(x)))
    plain = conv_net()
    iso_flop_(plain, "factorized", 0.5, pixels(), nonlinearity="none")
    folded = torch.einsum("orxy,rihw->oihw", plain[3].project.weight, plain[3].expand.weight)
    torch.testing.assert_close(
        nn.functional.conv2d(x, folded, None, 2, 1), plain[3](x), rtol=1e-4, atol=1e-5
    )  # without a nonlinearity the two factors are one layer


@pytest.mark.parametrize("kind", ["parallel", "factorized", "doped"])
def test_outputs_start_with_the_variance_they_had(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 250, bias=False), nn.Linear(250, 100))
    x = torch.randn(400, 300)
    before = float(model[1](x).var().detach())
    made = iso_flop_(model, kind, 0.75, torch.zeros(1, 200), nonlinearity="none")
    rarefy.sparsify(model, "static", include=[*made.sparsities], allocation=made.sparsities)
    assert float(model[1](x).var().detach()) == pytest.approx(before, rel=0.12)


def test_a_residual_network_is_rewritten_whole() -> None:
    for kind in KINDS:
        torch.manual_seed(0)
        model = Residual()
        dense = flops(model, image()).dense
        made = iso_flop_(model, kind, 0.5, image())
        assert made.flops == pytest.approx(dense)
        model(image()).sum().backward()


def test_a_failure_leaves_the_network_as_it_was() -> None:
    for model, kind, sparsity, match in (
        (models.build("resnet-20", width=0.25), "wide", 0.5, "build it anew"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)), "parallel", 0.5, "no layer"),
        (nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 3, 1), nn.Conv2d(3, 40, 1)), "wide", 0.9, "dense cost"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)),
            "doped",
            0.5,
            "one rank|saves less",
        ),
    ):
        before = copy.deepcopy(model.state_dict())
        modules = dict(model.named_modules())
        with pytest.raises(rarefy.RarefyError, match=match):
            iso_flop_(model, kind, sparsity, torch.zeros(1, 3, 8, 8))
        assert dict(model.named_modules()) == modules
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        model(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "wider"}, "did you mean 'wide'"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"kind": "parallel", "sparsity": 0.2}, "less than two"),
        ({"allocation": "global"}, "allocation"),
        ({"nonlinearity": "tanh"}, "nonlinearity"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(rarefy.RarefyError, match=match):
        iso_flop_(conv_net(), **{"kind": "wide", "sparsity": 0.5, "example": pixels(), **options})


def test_other_networks_run_after_it() -> None:
    """Compile, copies and compressed storage see ordinary layers."""
    for kind in KINDS:
        model = conv_net()
        made = iso_flop_(model, kind, 0.75, pixels())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        sparse = rarefy.sparsify(
            model, "set", include=[*made.sparsities], allocation=made.sparsities, optimizer=optimizer, every=1,
            storage="compressed",
        )  # fmt: skip
        model(pixels()).square().mean().backward()
        optimizer.step()
        out = model.eval()(pixels())
        sparse.finalize()
        torch.testing.assert_close(model(pixels()), out, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(model)(pixels()), model(pixels()))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(pixels()), model(pixels()), rtol=1e-3, atol=1e-4)
