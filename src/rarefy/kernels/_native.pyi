from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

version: str
compiler: str

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def share_threads(team: int) -> None: ...
def shares_threads() -> bool: ...
def available_isas() -> list[str]: ...
def pack_mask(bools: Array, bits: Array, threads: int) -> None: ...
def unpack_mask(bits: Array, bools: Array, threads: int) -> None: ...
def zero_out(x: Array, keep: Array, threads: int) -> None: ...
def select_k(scores: Array, k: Array, mask: Array, threads: int) -> bool: ...

class Layer:
    @property
    def input_sizes(self) -> list[int]: ...
    @property
    def output_size(self) -> int: ...
    def in_place(self, i: int) -> bool: ...
    def run(self, inputs: list[Array], output: Array, batch: int, threads: int) -> None: ...

class Depthwise(Layer):
    def __init__(
        self, weight: Array, bias: object, channels: int, size: list[int], stride: list[int], padding: list[int],
        dilation: list[int], residual: bool, act: str,
    ) -> None: ...  # fmt: skip

class DirectConv(Layer):
    def __init__(
        self, weight: Array, bias: object, size: list[int], stride: list[int], padding: list[int], dilation: list[int],
        residual: bool, act: str,
    ) -> None: ...  # fmt: skip

class Pool(Layer):
    def __init__(
        self, kind: str, channels: int, size: list[int], kernel: list[int], stride: list[int], padding: list[int],
        dilation: list[int], counted: list[int],
    ) -> None: ...  # fmt: skip

class AdaptiveAverage(Layer):
    def __init__(self, channels: int, size: list[int], out: list[int]) -> None: ...

class Elementwise(Layer):
    def __init__(self, op: str, size: int, act: str) -> None: ...

class Scale(Layer):
    def __init__(self, channels: int, pixels: int, scale: object, shift: object, act: str) -> None: ...

class Softmax(Layer):
    def __init__(self, size: int) -> None: ...

class Concat(Layer):
    def __init__(self, sizes: list[int]) -> None: ...

class Slice(Layer):
    def __init__(self, size: int, start: int, stop: int) -> None: ...

class Upsample(Layer):
    def __init__(self, channels: int, size: list[int], out: list[int]) -> None: ...

class Dense(Layer):
    def __init__(self, weight: Array, bias: object, act: str) -> None: ...

class Program:
    def __init__(self, steps: list[tuple[Layer, list[int], int]], inputs: list[int], outputs: list[int]) -> None: ...
    @property
    def input_sizes(self) -> list[int]: ...
    @property
    def output_sizes(self) -> list[int]: ...
    def arena_floats(self, batch: int, threads: int) -> int: ...
    def run(
        self, inputs: list[Array], outputs: list[Array], batch: int, threads: int, poison: bool = False
    ) -> None: ...
    def profile(self, inputs: list[Array], outputs: list[Array], batch: int, threads: int) -> list[float]: ...

def place(intervals: list[tuple[int, int, int]]) -> list[int]: ...

class SparsePlanes(Layer):
    def __init__(
        self, crow: object, col: object, values: object, cols: int, pixels: int, bias: object, residual: bool, act: str,
        batch: int, threads: int,
    ) -> None: ...  # fmt: skip
    @property
    def bytes(self) -> int: ...

class SparseLinear(Layer):
    def __init__(
        self,
        crow: object,
        col: object,
        values: object,
        cols: int,
        tokens: int,
        bias: object,
        act: str,
        batch: int,
        threads: int,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class SparseConv(Layer):
    def __init__(
        self, crow: object, col: object, values: object, weight: list[int], size: list[int], stride: list[int],
        padding: list[int], dilation: list[int], groups: int, bias: object, residual: bool, act: str, batch: int, threads: int,
    ) -> None: ...  # fmt: skip
    @property
    def bytes(self) -> int: ...

class Spmm:
    def planes(self, x: Array, y: Array, bias: object, residual: object, act: str, threads: int) -> None: ...
    def linear(self, x: Array, y: Array, bias: object, act: str, threads: int) -> None: ...
    def set_values(self, values: Array) -> None: ...
    @property
    def bytes(self) -> int: ...

def spmm(crow: Array, col: Array, values: Array, cols: int, columns: int, threads: int) -> Spmm: ...

class Conv:
    def run(self, x: Array, y: Array, bias: object, residual: object, act: str, threads: int) -> None: ...
    def set_values(self, values: Array) -> None: ...
    @property
    def bytes(self) -> int: ...

def conv(
    crow: Array, col: Array, values: Array, weight: list[int], size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int, batch: int, threads: int,
) -> Conv: ...  # fmt: skip

class LinearTraining:
    def forward(self, values: Array, x: Array, bias: object, y: Array, threads: int) -> None: ...
    def input_gradient(self, values: Array, dy: Array, dx: Array, threads: int) -> None: ...
    def values_gradient(self, x: Array, dy: Array, out: Array, threads: int) -> None: ...

def linear_training(crow: Array, col: Array, cols: int, n: int, threads: int) -> LinearTraining: ...

class ConvTraining:
    def forward(self, values: Array, x: Array, bias: object, y: Array, threads: int) -> None: ...
    def input_gradient(self, values: Array, dy: Array, dx: Array, threads: int) -> None: ...
    def values_gradient(self, x: Array, dy: Array, out: Array, threads: int) -> None: ...

def conv_training(
    crow: Array, col: Array, weight: list[int], size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int, batch: int, threads: int,
) -> ConvTraining: ...  # fmt: skip
def has_dot_products() -> bool: ...

class Bfloat16Linear(Layer):
    def __init__(
        self,
        crow: object,
        col: object,
        values: object,
        cols: int,
        tokens: int,
        bias: object,
        act: str,
        batch: int,
        threads: int,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class Bfloat16Planes(Layer):
    def __init__(
        self, crow: object, col: object, values: object, cols: int, pixels: int, bias: object, residual: bool, act: str,
        batch: int, threads: int,
    ) -> None: ...  # fmt: skip
    @property
    def bytes(self) -> int: ...

class Int8Product:
    def __init__(
        self, crow: object, col: object, values: object, cols: int, scale: object, n: int, threads: int
    ) -> None: ...
    def linear(self, x: Array, x_scale: float, x_zero: int, y: Array, bias: object, act: str, threads: int) -> None: ...
    @property
    def bytes(self) -> int: ...

def probe_flops(rounds: int, threads: int) -> float: ...
def probe_bandwidth(x: Array, times: int, threads: int) -> float: ...
