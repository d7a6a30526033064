"""Types of the native CPU module (csrc/bindings/cpu.cpp)."""

from typing import Any

class Plan:
    def __init__(self, fields: dict[str, Any]) -> None: ...
    def forward(self, *arguments: int) -> None: ...
    def backward(self, *arguments: int | tuple[int, int, int]) -> None: ...
    def takes_decode_path(self) -> bool: ...

def rms_norm(
    dtype: int,
    rows: int,
    columns: int,
    x: int,
    x_row: int,
    weight: int,
    out: int,
    eps: float,
    gain_offset: float,
    num_threads: int,
) -> None: ...
def gate(
    is_silu: bool,
    dtype: int,
    rows: int,
    columns: int,
    gate: int,
    gate_row: int,
    value: int,
    value_row: int,
    out: int,
    num_threads: int,
) -> None: ...
def rotate(
    dtype: int,
    rows: int,
    heads: int,
    head_dim: int,
    x: int,
    x_row: int,
    x_head: int,
    cos: int,
    sin: int,
    angle_row: int,
    out: int,
    num_threads: int,
) -> None: ...
def gelu_tanh(dtype: int, rows: int, columns: int, x: int, out: int, num_threads: int) -> None: ...
def gelu_tanh_gradient(dtype: int, rows: int, columns: int, x: int, dy: int, out: int, num_threads: int) -> None: ...
def cross_entropy(
    dtype: int,
    rows: int,
    columns: int,
    logits: int,
    logits_row: int,
    labels: int,
    ignored: int,
    rows_of: int,
    num_threads: int,
) -> None: ...
def cross_entropy_gradient(
    dtype: int,
    rows: int,
    columns: int,
    logits: int,
    logits_row: int,
    labels: int,
    ignored: int,
    rows_of: int,
    scale: float,
    out: int,
    num_threads: int,
) -> None: ...
def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def force_isa(name: str) -> None: ...
def measure_peak(dtype: str, num_threads: int) -> float: ...
def row_interval(mask: tuple[int, int, int, int, int], row: int) -> list[int]: ...
def tile_range(mask: tuple[int, int, int, int, int], first_row: int, last_row: int) -> list[int]: ...
