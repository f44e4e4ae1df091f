"""FLOPs of layers that run on the N:M kernels: those of the kept weights, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from rarefy.metrics import flops, work
from rarefy.nn import TransposableMask, n_m_
from rarefy.patterns import TransposableNM


def network() -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24), nn.Linear(24, 10))
    masks = {f"{i}.weight": TransposableNM(2, 8).project(net[i].weight.detach().abs(), 16) for i in (0, 2)}
    return net, masks


@pytest.mark.parametrize("gradient", ["kept", "dense"])
@pytest.mark.parametrize("where", ["cpu", "autocast", "meta"])
def test_layers_of_kept_values(gradient: str, where: str) -> None:
    net, masks = network()
    wanted = flops(net, torch.zeros(3, 7, 32), masks)
    n_m_(net, masks, 2, 8, gradient=gradient)
    x = torch.zeros(3, 7, 32)
    if where == "meta":
        net, x = net.to("meta"), x.to("meta")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "autocast"):
        report = flops(net, x)
    assert report.layers == wanted.layers and not report.not_counted
    assert report.ratio < 0.4
    assert [line.split(":")[0] for line in work(net, x).not_counted] == ["0", "2"]


def test_a_method_that_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for worth in (0, 1 << 60):
        monkeypatch.setattr(TransposableMask, "WORTH", worth)
        net, _ = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        sparse = rarefy.sparsify(
            net, "t-mask", pattern="2:8t", sparsity=0.75, optimizer=optimizer, total_steps=4, exclude="3"
        )
        reports += [(flops(net, torch.zeros(5, 32), masks).layers, str(sparse.summary(torch.zeros(5, 32))))
                    for masks in (None, sparse.masks())]  # fmt: skip
    assert reports[:2] == reports[2:]
    assert reports[1][0]["0.weight"].sparse == 2 * 32 * 48 / 4
