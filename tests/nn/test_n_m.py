"""Linear layers that compute with N of every M inputs: like masked dense ones, in training, in PyTorch's machinery and back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy
from rarefy.errors import ModelError, OptionError, PatternError, SelectionError, StateError
from rarefy.nn import NMLinear, n_m_
from rarefy.patterns import NM, TransposableNM


def transposable(weight: Tensor, n: int = 2, m: int = 8) -> Tensor:
    return TransposableNM(n, m).project(weight.detach().abs(), keep=n * m)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: transposable(p) for name, p in model.named_parameters() if name.endswith("weight")}


@pytest.mark.parametrize("gradient", ["kept", "dense"])
def test_ten_steps_equal_masked_training(gradient):
    dense, sparse = mlp(), mlp()
    masks = masks_of(dense)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    mine = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    assert n_m_(sparse, masks, 2, 8, gradient=gradient) == ["0", "2"]

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, mask):
            ctx.save_for_backward(mask)
            return weight * mask

        @staticmethod
        def backward(ctx, g):
            return g if gradient == "dense" else g * ctx.saved_tensors[0], None

    def run(x: Tensor) -> Tensor:
        first, last = (Straight.apply(dense[i].weight, masks[f"{i}.weight"]) for i in (0, 2))
        return F.linear(F.gelu(F.linear(x, first, dense[0].bias)), last, dense[2].bias)

    for step in range(10):
        x = torch.randn(40, 32, generator=torch.Generator().manual_seed(step))
        for optimizer, y in ((theirs, run(x)), (mine, sparse(x))):
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
            optimizer.step()
        if step == 4:  # the masks are chosen again
            masks = {name: transposable(p) for name, p in dense.named_parameters() if name in masks}
            for name in ("0", "2"):
                sparse[int(name)].set_mask_(masks[f"{name}.weight"])
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_sparsifier_goes_on_as_it_was():
    """Masked training with and without the kernels is the same training."""
    models, losses = [mlp(), mlp()], []
    for i, model in enumerate(models):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sparse = rarefy.sparsify(model, "static", pattern="2:4", optimizer=optimizer)
        if i:
            n_m_(model, sparse.masks(), 2, 4, transposable=False)
        for step in range(5):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
        sparse.finalize()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_sparsifier_that_comes_later_is_refused():
    """Its mask and the layer's would be two."""
    model = mlp()
    n_m_(model, {"0": transposable(model[0].weight)}, 2, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for method, options in (("static", {"sparsity": 0.5}), ("sr-ste", {"pattern": "2:8"})):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(SelectionError, match=r"0\.weight \[48, 32\]: NMLinear computes with a mask of its own"):
            rarefy.sparsify(model, method, optimizer=optimizer, **options)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [*rarefy.sparsify(model, "static", sparsity=0.5, exclude="0.weight").layers] == ["2.weight"]


def test_in_place_and_back():
    model = mlp()
    before = model[0], model[0].weight, model[0].bias
    mask = transposable(model[0].weight)
    n_m_(model, {"0": mask}, 2, 8)
    assert type(model[0]) is NMLinear and before == (model[0], model[0].weight, model[0].bias)
    assert torch.equal(model[0].mask(), mask) and type(model[2]) is nn.Linear
    x = torch.randn(5, 32)
    y = model(x)
    torch.testing.assert_close(model[0].to_dense()(x), model[0](x), rtol=1e-5, atol=1e-6)
    model[0].dense_()
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight != 0, mask)
    assert [*model.state_dict()] == [*mlp().state_dict()]
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)


def test_state_and_copies_keep_the_mask():
    model = mlp()
    n_m_(model, masks_of(model), 2, 8)
    x = torch.randn(5, 32)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    other = mlp(1)
    n_m_(other, masks_of(other), 2, 8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_compile_and_export():
    model = mlp()
    n_m_(model, masks_of(model), 2, 8)
    x = torch.randn(5, 32)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    expected.square().sum().backward()
    want = model[0].weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, want)


def test_autocast():
    model = mlp()
    n_m_(model, masks_of(model), 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(5, 32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_errors_leave_the_model_as_it_was():
    model = mlp()
    masks = masks_of(model)
    for wrong, error, message in (
        ({"0": masks["0.weight"], "1": masks["2.weight"]}, ModelError, "1: the model has no linear layer"),
        ({"0": masks["0.weight"], "2": masks["0.weight"]}, OptionError, "2: .*a mask of"),
        ({"0": masks["0.weight"], "2": torch.ones(24, 48, dtype=torch.bool)}, PatternError, "2: .*keeps 8 of 8"),
        ({"0": masks["0.weight"], "2": NM(2, 8).project(torch.ones(24, 48), 2)}, PatternError, "transposable"),
    ):
        with pytest.raises(error, match=message):
            n_m_(model, wrong, 2, 8)
        assert all(type(module) in (nn.Linear, nn.GELU) for module in model)
    with pytest.raises(OptionError, match="gradient='all'"):
        n_m_(model, {"0": masks["0.weight"]}, 2, 8, gradient="all")
    layer = NMLinear(32, 48, mask=masks["0.weight"], n=2, m=8)
    with pytest.raises(PatternError):
        layer.set_mask_(~masks["0.weight"])
    assert torch.equal(layer.mask(), masks["0.weight"])
    with pytest.raises(OptionError, match="x is"):
        layer(torch.randn(3, 31))


def test_a_bare_layer_goes_by_its_weight_or_no_name():
    for name in ("weight", ""):
        layer = nn.Linear(32, 48)
        mask = transposable(layer.weight)
        assert n_m_(layer, {name: mask}, 2, 8) == [""]
        assert torch.equal(layer.mask(), mask)


def test_what_was_dropped_may_be_anything():
    for value in (torch.nan, torch.inf):
        layer = NMLinear(32, 48, mask=transposable(torch.randn(48, 32)), n=2, m=8)
        with torch.no_grad():
            layer.weight[~layer.mask()] = value
        x = torch.randn(3, 32)
        y, plain = layer(x), layer.to_dense()
        assert bool(plain.weight.isfinite().all()) and bool(y.isfinite().all())
        torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-6)
        layer.dense_()
        assert torch.equal(layer.weight, plain.weight)


def test_a_mask_is_loaded_and_not_the_bits_of_an_index():
    """The index of a layer without the way back, loaded into one that needs it."""
    mask = transposable(torch.randn(40, 24))
    rows = NMLinear(24, 40, mask=mask, n=2, m=8, transposable=False)
    both = NMLinear(24, 40, mask=transposable(torch.randn(40, 24)), n=2, m=8)
    before = both.index, both.used
    both.load_state_dict(rows.state_dict())
    assert torch.equal(both.mask(), mask) and both.index is before[0] and both.used is before[1]
    x = torch.randn(6, 24, requires_grad=True)
    dy = torch.randn(6, 40)
    both(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ (rows.weight * mask), rtol=1e-5, atol=1e-5)
    again = NMLinear(24, 40, mask=mask, n=2, m=8)
    state = both.state_dict()
    again.load_state_dict(state, assign=True)
    assert torch.equal(again.index, both.index) and torch.equal(again(x), both(x))
    assert [*state] == ["weight", "bias", "index", "used"] and state["index"].data_ptr() == both.index.data_ptr()


def test_averaged_models_keep_the_mask():
    model = mlp()
    n_m_(model, masks_of(model), 2, 8)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    x = torch.randn(5, 32)
    torch.testing.assert_close(average(x), model(x))
    assert all(torch.equal(average.module[i].mask(), model[i].mask()) for i in (0, 2))


def test_data_parallel_training(tmp_path):
    """Buffers are broadcast at every step: in a dtype that the backend knows."""
    model = mlp()
    n_m_(model, masks_of(model), 2, 8)
    masks = [model[i].mask() for i in (0, 2)]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel(torch.randn(5, 32)).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert model[0].weight.grad is not None and all(
        torch.equal(model[i].mask(), m) for i, m in zip((0, 2), masks, strict=True)
    )


def test_a_layer_without_memory_is_filled_by_loading():
    mask = transposable(torch.randn(48, 32))
    full = NMLinear(32, 48, mask=mask, n=2, m=8)
    for assign in (True, False):
        empty = NMLinear(32, 48, mask=torch.zeros_like(mask), n=2, m=8, device="meta")
        assert empty.index.is_meta and empty.weight.is_meta
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(full.state_dict(), assign=assign)
        x = torch.randn(3, 32)
        assert torch.equal(empty(x), full(x))


@pytest.mark.parametrize("bits", [-1, 0x4321, 0x7FFF])
def test_a_damaged_index_is_refused(bits, tmp_path):
    layer = NMLinear(24, 40, mask=transposable(torch.randn(40, 24)), n=2, m=8)
    model = nn.Sequential(nn.Linear(24, 24), layer)
    kept, before = layer.mask(), {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t.clone() + (1 if t.is_floating_point() else 0) for name, t in before.items()}
    state["1.index"].view(torch.int32).fill_(bits)
    state["1.used"].fill_(255)
    path = tmp_path / "damaged.safetensors"
    rarefy.save(state, path)
    with pytest.raises(StateError, match=r"1\.index and 1\.used are not a mask of this layer"):
        rarefy.load(path, model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="not a mask of this layer"):
        model.load_state_dict(state)
    assert torch.equal(layer.mask(), kept)
