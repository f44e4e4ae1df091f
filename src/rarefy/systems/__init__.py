"""Whole systems built on the library, one folder each."""

from __future__ import annotations
