"""Does a network know what it does not know: detection of inputs from elsewhere by its confidence."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.errors import OptionError
from rarefy.metrics.calibration import probabilities


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return the area under the ROC curve: how often a positive score exceeds a negative one, ties counting 1/2.

    Exact, in O((n + m) log m): P(s+ > s-) + P(s+ = s-) / 2 over all n m pairs. 1: the scores part the two; 0.5: chance.

    Args:
        positive, negative: scores of the two kinds, any shapes, no NaN.

    Raises:
        OptionError: no scores of one kind, or NaN.

    >>> auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
    0.875
    """
    above, below = (t.detach().reshape(-1).to("cpu", torch.float64) for t in (positive, negative))
    for name, scores in (("positive", above), ("negative", below)):
        if not scores.numel():
            raise OptionError(f"auroc: there are no {name} scores")
        if bool(scores.isnan().any()):
            raise OptionError(f"auroc: the {name} scores hold NaN")
    ordered = below.sort().values
    smaller = torch.searchsorted(ordered, above, right=False)
    not_larger = torch.searchsorted(ordered, above, right=True)
    return float((smaller + not_larger).sum()) / (2 * above.numel() * below.numel())


def ood_auroc(inside: Tensor, outside: Tensor, *, logits: bool = True) -> float:
    """Return how well a network's confidence, the largest softmax probability, tells its own inputs from foreign ones.

    The AUROC of the confidences, in-distribution as positives (Hendrycks & Gimpel 2017, arXiv 1610.02136; the measure of the
    random-pruning paper, arXiv 2202.02643).

    Args:
        inside, outside: logits [..., classes] on in-distribution and on foreign inputs, which were normalised alike.
        logits: False where they are probabilities.

    >>> ood_auroc(torch.tensor([[9.0, 0.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.0]]))
    1.0
    """
    return auroc(probabilities(inside, logits).amax(-1), probabilities(outside, logits).amax(-1))
