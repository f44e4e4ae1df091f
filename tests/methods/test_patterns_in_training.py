"""Every method keeps every pattern at every step; a new method or pattern is in this table by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy import methods
from rarefy.patterns import parse_pattern

PATTERNS = ["unstructured", "2:4", "1:4@0", "4x1", "2x4", "channel", "column", "fan-in", "group4", "group4-tap"]
PATTERNED = [
    name for name, cls in methods.available().items() if "pattern" in (f.name for f in dataclasses.fields(cls))
]


CASES = [(m, p) for m in PATTERNED for p in PATTERNS if isinstance(parse_pattern(p), methods.find(m).patterns)]


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_every_method_keeps_every_pattern(method: str, pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cls = methods.available()[method]
    options: dict[str, Any] = dict(every=2) if hasattr(cls, "every") else {}
    if hasattr(cls, "allocation"):
        options["allocation"] = "uniform"
    data = (torch.randn(16, 8, 4, 4), torch.randint(8, (16,)))
    sparse = rarefy.sparsify(
        model,
        method,
        sparsity=None if ":" in pattern else 0.75,
        pattern=pattern,
        optimizer=optimizer,
        total_steps=10,
        calibration=[data] if cls.needs_calibration else None,
        **options,
    )
    expected = parse_pattern(pattern).fixed_sparsity or 0.75
    for _ in range(10):
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in sparse.layers.values():
            mask = layer.mask()
            on_its_way = ":" in pattern and layer.sparsity < expected - 0.01  # 4:4, 3:4, 2:4; or dense by turns
            if not on_its_way:
                assert layer.pattern.obeys(mask), (layer, sparse.step_count)
            assert not layer.weight()[~mask].any()
    for layer in sparse.layers.values():
        assert layer.sparsity == pytest.approx(expected, abs=0.02)
        assert layer.pattern.obeys(layer.mask())


def test_all_layers_that_do_not_fit_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 10, 3), nn.Conv2d(10, 4, 1))
    with pytest.raises(
        rarefy.RarefyError,
        match=r"(?s)0\.weight \[16, 3, 3, 3\].*2\.weight \[4, 10, 1, 1\].*exclude=\['0\.weight', '2\.weight'\]",
    ):
        rarefy.sparsify(model, "static", pattern="2:4")
    assert rarefy.sparsify(model, "static", pattern="2:4", exclude=["0", "2"]).sparsity == 0.5
