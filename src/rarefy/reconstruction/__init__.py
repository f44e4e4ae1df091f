"""Networks become N:M sparse without training: masks by magnitude, then each layer's outputs are brought back."""

from __future__ import annotations

from rarefy.reconstruction.network import convert
from rarefy.reconstruction.result import Conversion, Converted
from rarefy.reconstruction.solvers import SOLVERS, AdaPrune, LeastSquares, Solver

__all__ = ["SOLVERS", "AdaPrune", "Conversion", "Converted", "LeastSquares", "Solver", "convert"]
