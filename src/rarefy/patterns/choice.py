"""Which N:M a network that is sparse without structure can take."""

from __future__ import annotations

import math

from rarefy.errors import OptionError
from rarefy.patterns.kinds import NM


def nm_for(sparsity: float, m: int, confidence: float = 0.95) -> NM:
    """Return the sparsest N:M whose groups an unstructured sparsity fills with zeros almost always.

    Where zeros fall independently, their number in a group of m is X ~ Bin(m, sparsity). With z the largest number such that
    P[X >= z] > confidence, the pattern is (m - z):m: all but a share 1 - confidence of the groups obey it as they are, and the
    others lose a weight or two. At least one weight is kept.

    Args:
        sparsity: fraction of zeros, in [0, 1).
        m: length of a group, from 1 to 1024.
        confidence: in [0, 1). Default 0.95 (the paper's).

    Raises:
        OptionError: sparsity, m or confidence is out of its range.

    Source: Hubara et al. 2021, arXiv 2102.08124 (section on unstructured to N:M).

    Example:
        >>> from rarefy.patterns import nm_for
        >>> nm_for(0.8, 4), nm_for(0.8, 16), nm_for(0.9, 8)
        (NM(n=2, m=4, dim=1), NM(n=6, m=16, dim=1), NM(n=2, m=8, dim=1))
    """
    for name, value in (("sparsity", sparsity), ("confidence", confidence)):
        if not 0.0 <= value < 1.0:
            raise OptionError(f"{name}={value!r} must be in [0, 1)")
    if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= 1024:
        raise OptionError(f"m={m!r} must be a whole number from 1 to 1024")
    tail = 0.0
    for zeros in range(m, 0, -1):
        tail += math.comb(m, zeros) * sparsity**zeros * (1 - sparsity) ** (m - zeros)
        if tail > confidence:
            return NM(max(1, m - zeros), m)
    return NM(m, m)
