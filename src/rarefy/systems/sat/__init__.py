"""SAT: a cycle model of a systolic accelerator that trains with N:M weights in both directions (arXiv 2309.13015)."""

from __future__ import annotations

from rarefy.systems.sat.array import run_array
from rarefy.systems.sat.config import Accelerator, accelerator, read_accelerator
from rarefy.systems.sat.gemms import Gemm, Layer
from rarefy.systems.sat.pregeneration import Packed, bytes_per_weight, pack
from rarefy.systems.sat.schedule import Instruction
from rarefy.systems.sat.simulate import Comparison, Simulation, compare, simulate
from rarefy.systems.sat.timing import Mapping, cycles

__all__ = [
    "Accelerator",
    "Comparison",
    "Gemm",
    "Instruction",
    "Layer",
    "Mapping",
    "Packed",
    "Simulation",
    "accelerator",
    "bytes_per_weight",
    "compare",
    "cycles",
    "pack",
    "read_accelerator",
    "run_array",
    "simulate",
]
