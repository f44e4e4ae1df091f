"""How fast this machine is, and what its sparse kernels make of that: ceilings, a table of products, break-even sparsities."""

from __future__ import annotations

from rarefy.bench.machine import Ceilings, ceilings
from rarefy.bench.plot import speedups_svg
from rarefy.bench.table import Product, Row, as_json, break_even, measure

__all__ = ["Ceilings", "Product", "Row", "as_json", "break_even", "ceilings", "measure", "speedups_svg"]
