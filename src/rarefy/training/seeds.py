"""Separate streams of randomness from one seed, so that paired runs share what they should share."""

from __future__ import annotations

import hashlib


def derive(seed: int, stream: str) -> int:
    """Return the seed of one stream, in [0, 2**63).

    init: the weights; data: order, split and augmentation; mask: the sparsifier; torch: dropout and the rest; attack: where
    attacks start. Searches name streams of their own, such as "phase 2/member 0". Runs with the same `seed` get the same
    weights and the same batches whatever their method does with random numbers.
    """
    digest = hashlib.sha256(f"rarefy/{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
