"""ONNX export: exact zeros, equal outputs in onnxruntime, any batch size, and the command."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rarefy
from rarefy import models
from rarefy.cli import app
from rarefy.deploy import export_onnx
from rarefy.errors import ModelError, OptionError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def session(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["resnet-20", "mobilenet-v2", "lenet-5"])
def test_outputs_and_zeros(tmp_path, name):
    torch.manual_seed(0)
    gray = name == "lenet-5"
    model = models.build(name, in_channels=1 if gray else 3).eval()
    kept = {}
    for n, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.mul_(torch.rand_like(module.weight) < 0.3)
            kept[n] = int(module.weight.count_nonzero())
    x = torch.randn(1, 1, 28, 28) if gray else torch.randn(1, 3, 32, 32)
    path = tmp_path / "m.onnx"
    export_onnx(model, x, path)
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    assert sorted(int((w != 0).sum()) for w in stored if w.ndim > 1) == sorted(kept.values())
    for batch in (1, 3):
        more = torch.randn(batch, *x.shape[1:])
        found = torch.from_numpy(session(path).run(None, {"input": more.numpy()})[0])
        expected = model(more).detach()
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_accelerated_models_are_exported_as_what_they_were_made_from(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    fast = rarefy.accelerate(model, torch.randn(1, 6))
    export_onnx(fast, torch.randn(1, 6), tmp_path / "m.onnx")
    x = torch.randn(2, 6)
    found = session(tmp_path / "m.onnx").run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


def test_layers_of_kept_values_are_exported_as_dense_ones(tmp_path):
    torch.manual_seed(0)
    first, last = nn.Linear(16, 16), nn.Linear(16, 8)
    mask = torch.arange(16) % 4 < 2
    mask = mask.expand(16, 16)
    model = nn.Sequential(
        rarefy.nn.NMLinear.from_dense(first, mask, 2, 4, transposable=False),
        rarefy.nn.SparseLinear.from_dense(last, torch.rand(8, 16) < 0.3),
    ).eval()
    x = torch.randn(3, 16)
    export_onnx(model, x, tmp_path / "m.onnx")
    found = session(tmp_path / "m.onnx").run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)
    assert type(model[0]) is rarefy.nn.NMLinear and type(model[1]) is rarefy.nn.SparseLinear


def test_a_failed_export_leaves_the_file(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eig(x)[0]

    path = tmp_path / "m.onnx"
    path.write_text("old")
    with pytest.raises(ModelError):
        export_onnx(Odd(), torch.randn(3, 3), path)
    assert path.read_text() == "old"


def test_command(tmp_path):
    runner, folder = CliRunner(), tmp_path / "run"
    flags = ["--data", "digits", "--model", "lenet-300-100", "--method", "static", "--sparsity", "0.9", "--steps", "3"]
    assert runner.invoke(app, ["train", *flags, "--out", str(folder)]).exit_code == 0
    for kind in ("onnx", "safetensors"):
        result = runner.invoke(app, ["export", str(folder), "--format", kind])
        assert result.exit_code == 0, result.output
        assert "not zero" in result.output and (folder / f"model.{kind}").exists()
    state = rarefy.load(folder / "model.safetensors")
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer]
    assert sum(int((w != 0).sum()) for w in stored if w.ndim > 1) == sum(
        int(t.count_nonzero()) for t in state.values() if t.dim() > 1
    )
    assert runner.invoke(app, ["export", str(tmp_path)]).exit_code == 2
    assert runner.invoke(app, ["export", str(folder), "--format", "tflite"]).exit_code == 2


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"rarefy\[onnx\]"):
        export_onnx(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "m.onnx")
