"""Reference networks: by name, at any width, and with published weights."""

from __future__ import annotations

from rarefy.models._build import available, build, find, options
from rarefy.models.published import PUBLISHED, Published, load_published, published_entry, published_normalisation
from rarefy.models.width import small_dense_width

__all__ = [
    "PUBLISHED",
    "Published",
    "available",
    "build",
    "find",
    "load_published",
    "options",
    "published_entry",
    "published_normalisation",
    "small_dense_width",
]
