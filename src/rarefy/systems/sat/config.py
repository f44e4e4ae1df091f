"""The accelerator's parameters: a file, not constants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rarefy.training.config import Part
from rarefy.training.reading import read_mapping, validate

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Cost = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Accelerator(Part):
    """One SAT: a systolic array (STCE), a vector unit (WUVE), a pruning unit (SORE), buffers and a memory.

    rows, columns: of the array; each PE multiplies in FP16 and adds in FP32, one multiply-add a cycle.
    mhz: the clock. bandwidth: of the memory, in GB/s (1e9 bytes).
    interleave: accumulators of a PE, so the most outputs that it can work on in turn.
    adder_latency: cycles from the start of an addition until its sum can be added to.
    pipeline: cycles from the last operand to the result, multiplier and adder together.
    lanes: of the WUVE, fused multiply-adds a cycle, and of the SORE, weights a cycle.
    window: activations that a PE selects from, so the longest M; also the weights that it can hold.
    row_buffer, column_buffer, output_buffer: KiB on chip for the left factor, the right one, and sums.
    energy_mac, energy_byte: costs of a multiply-add and of a byte from memory, in multiply-adds.
    elementwise: whether normalisation, activation and other passes over data take time after the products, or are hidden.

    The array, 200 MHz and the pipeline are the method sheet's (32 x 32 at 200 MHz from memory of the paper); bandwidth,
    latencies, lanes, window and buffers are assumptions. 80 multiply-adds a byte: 640 pJ for 32 bits of DRAM against
    1.1 + 0.9 pJ for an FP16 product and an FP32 sum (Horowitz 2014, "Computing's energy problem", 45 nm).
    """

    rows: Positive = 32
    columns: Positive = 32
    mhz: Rate = 200.0
    bandwidth: Rate = 25.6
    interleave: Positive = 4
    adder_latency: Positive = 4
    pipeline: Annotated[int, Field(ge=0)] = 8
    lanes: Positive = 32
    window: Positive = 16
    row_buffer: Positive = 1024
    column_buffer: Positive = 1024
    output_buffer: Positive = 1024
    energy_mac: Cost = 1.0
    energy_byte: Cost = 80.0
    elementwise: bool = True

    @model_validator(mode="after")
    def _adder_in_pipeline(self) -> Accelerator:
        if self.pipeline < self.adder_latency - 1:
            raise ValueError(
                f"pipeline is {self.pipeline}, shorter than its adder ({self.adder_latency} cycles): "
                f"give at least {self.adder_latency - 1}"
            )
        return self

    @property
    def bytes_per_cycle(self) -> float:
        return self.bandwidth * 1e3 / self.mhz

    @property
    def peak_gflops(self) -> float:
        """Dense peak, two operations for a multiply-add."""
        return 2e-3 * self.rows * self.columns * self.mhz

    def seconds(self, cycles: float) -> float:
        return cycles / (self.mhz * 1e6)

    def changed(self, **fields: Any) -> Accelerator:
        """Return another accelerator with some fields replaced, validated."""
        return accelerator({**self.model_dump(), **fields}, "the accelerator")


def accelerator(fields: Mapping[str, Any], source: str) -> Accelerator:
    """Return the accelerator with these fields and defaults; ConfigError for unknown or impossible ones."""
    return validate(Accelerator, fields, source)


def read_accelerator(path: str | Path) -> Accelerator:
    """Read a YAML file of accelerator fields; what it leaves out keeps its default."""
    return accelerator(read_mapping(path), Path(path).name)
