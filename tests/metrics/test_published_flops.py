"""RigL's published inference FLOPs of ResNet-50 on ImageNet (Evci et al. 2020), from our own counter.

What the paper counts, found by trying the combinations against the printed figures (and stated by the authors'
counting notebook): ERK shares the budget over all 54 weights, first convolution and classifier included; "uniform"
keeps the first convolution dense and prunes the classifier like the rest; blocks have their stride in the 3x3
convolution (8.2 GFLOPs dense).
"""

from __future__ import annotations

import functools

import pytest
import torch

from rarefy import allocation, models
from rarefy.metrics import FlopsReport, flops


@functools.cache
def resnet50() -> tuple[FlopsReport, dict[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = models.build("resnet-50")
    report = flops(model, torch.empty(1, 3, 224, 224, device="meta"))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name in report.layers}
    return report, shapes


def ratio(densities: dict[str, float]) -> float:
    report, _ = resnet50()
    return sum(densities[name] * layer.dense for name, layer in report.layers.items()) / report.dense


def test_the_dense_network() -> None:
    report, shapes = resnet50()
    assert report.dense / 1e9 == pytest.approx(8.178368512, abs=1e-9)
    assert len(shapes) == 54 and report.not_counted == ()


@pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.42), (0.9, 0.24)])
def test_erk_over_all_layers(sparsity: float, published: float) -> None:
    _, shapes = resnet50()
    assert abs(ratio(allocation.densities(shapes, sparsity, "erk")) - published) < 0.01


def test_uniform_with_the_first_layer_dense() -> None:
    _, shapes = resnet50()
    first = next(iter(shapes))
    densities = {name: 1.0 if name == first else 0.2 for name in shapes}
    assert abs(ratio(densities) - 0.23) < 0.01


def test_leaving_the_first_layer_out_of_erk_would_miss_the_published_figure() -> None:
    _, shapes = resnet50()
    first, *others = shapes
    rest = allocation.densities({name: shapes[name] for name in others}, 0.9, "erk")
    assert ratio({first: 1.0, **rest}) - 0.24 > 0.01


def test_real_masks_of_the_erk_counts_give_the_same_ratio() -> None:
    _, shapes = resnet50()
    with torch.device("meta"):
        model = models.build("resnet-50")
    masks = {}
    for name, count in allocation.counts(shapes, 0.9, "erk").items():
        mask = torch.zeros(shapes[name], dtype=torch.bool)
        mask.view(-1)[:count] = True
        masks[name] = mask
    report = flops(model, torch.empty(1, 3, 224, 224, device="meta"), masks)
    assert report.ratio == pytest.approx(ratio(allocation.densities(shapes, 0.9, "erk")), abs=1e-5)  # whole weights
