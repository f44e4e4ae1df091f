"""Networks with other layers in place of dense ones, deployed: accelerated, saved and loaded, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from rarefy import models
from rarefy.deploy import export_onnx
from rarefy.methods import SparseIFT, StableRPS
from rarefy.nn import SharedModule


def build(width: float) -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet-20", width=width * 0.25)


def network(kind: str) -> nn.Module:
    if kind == "shared":
        return StableRPS(sparsity=0.9).model(build).eval()
    method = SparseIFT(kind=kind, sparsity=0.5, masks="static")
    model = method.model(build, torch.zeros(1, 3, 8, 8))
    return rarefy.sparsify(model, method).finalize().eval()


@pytest.mark.parametrize("kind", ["wide", "parallel", "factorized", "doped", "shared"])
def test_outputs_stay(kind: str, tmp_path: Path) -> None:
    model, x = network(kind), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(rarefy.accelerate(model, x)(x), expected, rtol=1e-3, atol=1e-3)
    rarefy.save(model, tmp_path / "model.safetensors")
    twin = network(kind)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    rarefy.load(tmp_path / "model.safetensors", twin)
    assert torch.equal(twin(x), expected)


def test_a_shared_network_is_exported_with_dense_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    model, x = network("shared"), torch.randn(3, 3, 8, 8)
    export_onnx(model, x, tmp_path / "m.onnx")
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-3, atol=1e-3)
    assert any(isinstance(m, SharedModule) for m in model.modules())
