"""Calibration error against a loop over samples and bins."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rarefy.errors import OptionError
from rarefy.metrics import accuracy, ece, nll


def ece_by_loops(p: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        members = [i for i, row in enumerate(p.tolist()) if (low < max(row) <= high) or (b == 0 and max(row) == 0)]
        if members:
            hits = [p[i].tolist().index(max(p[i].tolist())) == int(labels[i]) for i in members]
            sure = [max(p[i].tolist()) for i in members]
            total += len(members) / len(p) * abs(sum(hits) / len(hits) - sum(sure) / len(sure))
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_ece_against_loops(bins: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(bins)
    logits = 3 * torch.randn(300, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (300,), generator=generator)
    p = logits.softmax(-1)
    expected = ece_by_loops(p, labels, bins)
    assert ece(p, labels, bins) == pytest.approx(expected, abs=1e-12)
    assert ece(logits, labels, bins, logits=True) == pytest.approx(expected, abs=1e-12)


def test_bin_edges_belong_to_the_bin_below() -> None:
    p = torch.tensor([[0.5, 0.5], [0.6, 0.4], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0])
    assert ece(p, labels, bins=2) == pytest.approx(ece_by_loops(p, labels, 2)) == pytest.approx((0.5 + 0.6) / 3)


def test_extremes() -> None:
    sure = torch.eye(4)
    assert ece(sure, torch.arange(4)) == 0.0 and ece(sure, (torch.arange(4) + 1) % 4) == 1.0
    assert accuracy(sure, torch.tensor([0, 1, 2, 0])) == 0.75
    assert accuracy(torch.zeros(1, 3), torch.tensor([0])) == 1.0  # ties: the lowest class


def test_nll_is_cross_entropy() -> None:
    logits, labels = torch.randn(50, 7, dtype=torch.float64) * 30, torch.randint(7, (50,))
    expected = float(F.cross_entropy(logits, labels))
    assert nll(logits, labels) == pytest.approx(expected)
    assert nll(logits.softmax(-1), labels) == pytest.approx(expected)
    assert nll(torch.tensor([[1000.0, 0.0]]), torch.tensor([1])) == pytest.approx(1000.0)
    assert nll(torch.eye(2), torch.tensor([1, 1])) == math.inf


def test_sequences_and_half_precision() -> None:
    logits, labels = torch.randn(4, 6, 5).bfloat16(), torch.randint(5, (4, 6))
    flat = ece(logits.reshape(24, 5).double(), labels.reshape(24), logits=True)
    assert ece(logits, labels) == pytest.approx(flat)


def test_logits_that_look_like_probabilities_can_be_named() -> None:
    looks = torch.tensor([[1.0, 0.0]])
    assert ece(looks, torch.tensor([0])) == 0.0
    assert ece(looks, torch.tensor([0]), logits=True) == pytest.approx(1 - math.e / (1 + math.e))
    assert nll(looks, torch.tensor([0]), logits=True) == pytest.approx(-math.log(math.e / (1 + math.e)))
    with pytest.raises(OptionError, match="not probabilities"):
        ece(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), logits=False)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.tensor([[float("nan"), 1.0]]), torch.tensor([0]), "NaN"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "no samples"),
        (torch.zeros(2, 3), torch.tensor([0]), "1 of torch.int64 for 2 samples"),
        (torch.zeros(1, 3), torch.tensor([3]), r"\[0, 3\)"),
        (torch.zeros(1, 3), torch.tensor([0.5]), "whole number"),
        (torch.zeros(3), torch.tensor([0]), "at least 2 dimensions"),
    ],
)
def test_bad_input_is_refused(scores: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    for measure in (ece, nll, accuracy):
        with pytest.raises(OptionError, match=message):
            measure(scores, labels)
    with pytest.raises(OptionError, match="bins is 0"):
        ece(torch.zeros(1, 2), torch.tensor([0]), bins=0)
