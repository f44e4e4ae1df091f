"""How good predicted probabilities are: expected calibration error, negative log-likelihood, accuracy."""

from __future__ import annotations

import torch

from rarefy.errors import OptionError


def probabilities(scores: torch.Tensor, logits: bool | None = None) -> torch.Tensor:
    """Return float64 probabilities [samples, classes] from logits or probabilities [..., classes].

    `logits=None` takes scores as probabilities where every row is non-negative and sums to 1 (within 1e-3), else as
    logits. Say which where logits could look like that. OptionError for NaN, for no classes, and for
    `logits=False` with rows that are no probabilities.
    """
    if not isinstance(scores, torch.Tensor) or scores.dim() < 2 or scores.shape[-1] < 1:
        raise OptionError("scores must be a tensor [..., classes] with at least 2 dimensions")
    flat = scores.detach().to(device="cpu", dtype=torch.float64).reshape(-1, scores.shape[-1])
    if bool(flat.isnan().any()):
        raise OptionError("scores hold NaN: the model's output is broken; nothing can be measured on it")
    if logits is not True:
        proper = bool((flat >= 0).all()) and bool(((flat.sum(-1) - 1).abs() <= 1e-3).all())
        if proper:
            return flat
        if logits is False:
            raise OptionError("scores are not probabilities (rows must be non-negative and sum to 1); pass logits=True")
    return torch.softmax(flat, dim=-1)


def _flat_labels(labels: torch.Tensor, samples: int, classes: int) -> torch.Tensor:
    flat = labels.detach().to("cpu").reshape(-1)
    if flat.is_floating_point() or flat.numel() != samples:
        raise OptionError(
            f"labels must be one whole number per sample: got {flat.numel()} of {flat.dtype} for {samples} samples"
        )
    if samples == 0:
        raise OptionError("there are no samples to measure on")
    if int(flat.min()) < 0 or int(flat.max()) >= classes:
        raise OptionError(f"labels must lie in [0, {classes}), got {int(flat.min())} to {int(flat.max())}")
    return flat.long()


def ece(scores: torch.Tensor, labels: torch.Tensor, bins: int = 15, *, logits: bool | None = None) -> float:
    """Return the expected calibration error: how far confidence is from accuracy, on average.

    ECE = sum over bins of |B_b| / n * |accuracy(B_b) - confidence(B_b)|, with `bins` bins of equal width on the largest
    probability, bin b = ((b - 1) / bins, b / bins] (Guo et al. 2017, eq. 3; the random-pruning paper's measure). The
    predicted class is the largest, the lowest index among equals. In [0, 1], computed in float64.

    Args:
        scores: probabilities or logits [..., classes] (see `probabilities` for how they are told apart).
        labels: true classes [...], whole numbers.

    >>> round(ece(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 1])), 6)
    0.4
    """
    if bins < 1:
        raise OptionError(f"bins is {bins}, but at least one bin is needed")
    p = probabilities(scores, logits)
    y = _flat_labels(labels, *p.shape)
    confidence = p.amax(-1)
    correct = (p.argmax(-1) == y).double()
    inner = torch.arange(1, bins, dtype=torch.float64) / bins
    which = torch.bucketize(confidence, inner)  # right-closed: an edge belongs to the bin below it
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct - confidence)
    return float(gap.abs().sum() / len(y))


def nll(scores: torch.Tensor, labels: torch.Tensor, *, logits: bool | None = None) -> float:
    """Return the mean negative log-likelihood of the true classes, in nats; infinite where one had probability 0.

    Arguments as in `ece`; logits go through log-softmax, so that large ones do not underflow.
    """
    p = probabilities(scores, logits)
    y = _flat_labels(labels, *p.shape)
    flat = scores.detach().to(device="cpu", dtype=torch.float64).reshape(p.shape)
    log = p.log() if logits is not True and torch.equal(p, flat) else torch.log_softmax(flat, dim=-1)
    return float(-log.gather(1, y[:, None]).mean())


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of samples whose largest score is the true class (the lowest index among equals).

    Arguments as in `ece`; logits and probabilities give the same.
    """
    p = probabilities(scores, logits=True)
    y = _flat_labels(labels, *p.shape)
    best = scores.detach().to("cpu").reshape(p.shape).argmax(-1)
    return float((best == y).double().mean())
