"""The table that tells the loss kernels what the terms are: one column a term, int64.

A kernel that takes the terms' tensors as arguments would be compiled for each number of teachers
and each set of grids. A table is data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

# Addresses are 0 where there is no such tensor; "<name>_bits" are the bits of an fp32 that counts
# where there is none. Steps and ratios, see ``sampling.taps``, are the bits of an fp64.
# "<kernel>_start" is the first program of that launch that works for the term.
FIELDS = (
    "prediction", "target", "gradient", "valid", "mean", "scale", "one_scale", "shift",
    "prediction_image", "prediction_row", "prediction_column",
    "target_image", "target_row", "target_column",
    "valid_image", "valid_row", "valid_column",
    "shift_stride",
    "images", "channels", "rows", "columns",
    "prediction_rows", "prediction_columns", "target_rows", "target_columns",
    "row_step", "column_step", "row_ratio", "column_ratio",
    "kind", "beta_bits", "weight", "weight_bits", "denominator", "denominator_bits",
    "dispersion", "dispersion_bits",
    "first_image", "first_token", "first_coefficient",
    "count_start", "compare_start", "spread_start",
    "out", "elements", "scale_start",
)  # fmt: skip

# While a CUDA graph is captured its copies read host memory again at each replay: keep that.
_captured: list[Tensor] = []


def build(columns: Iterable[Mapping[str, int]], device: torch.device) -> Tensor:
    """The table (fields, terms) on the device; fields that a column leaves out are 0.

    The copy does not wait for the device.
    """
    columns = list(columns)
    rows = [[column.get(name, 0) for column in columns] for name in FIELDS]
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return table
    pinned = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def bits(value: float) -> int:
    """An fp32 as the integer of the same bits."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def wide_bits(value: float) -> int:
    """An fp64 as the integer of the same bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def padded(terms: int) -> int:
    """The power of two that kernels search for a program's term."""
    return max(16, triton.next_power_of_2(terms))


_NAMES = tl.constexpr(" ".join(FIELDS))  # Triton takes a string from outside, not a tuple


@triton.constexpr_function
def _row_of(names, name):
    return names.split(" ").index(name)


@triton.jit
def field(table, terms, term, NAME: tl.constexpr):
    """An address, a stride or a place, int64."""
    return tl.load(table + _row_of(_NAMES, NAME) * terms + term)


@triton.jit
def size(table, terms, term, NAME: tl.constexpr):
    """A number of things, int32: what is divided by, which in 64 bits is slow."""
    return tl.load(table + _row_of(_NAMES, NAME) * terms + term).to(tl.int32)


@triton.jit
def wide(table, terms, term, NAME: tl.constexpr):
    """A number, fp64."""
    return tl.load(table + _row_of(_NAMES, NAME) * terms + term).to(tl.float64, bitcast=True)


@triton.jit
def number(table, terms, term, NAME: tl.constexpr):
    """A number, fp32, that lies on the device or in the table."""
    address = tl.load(table + _row_of(_NAMES, NAME) * terms + term)
    value = tl.load(table + (_row_of(_NAMES, NAME) + 1) * terms + term)
    value = value.to(tl.int32).to(tl.float32, bitcast=True)
    if address != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)))
    return value


@triton.jit
def term_of(table, terms, program, START: tl.constexpr, TERMS: tl.constexpr):
    """The term that ``program`` works for, and its place among the term's programs."""
    columns = tl.arange(0, TERMS)
    starts = table + _row_of(_NAMES, START) * terms
    last = 0x7FFFFFFFFFFFFFFF
    firsts = tl.load(starts + columns, mask=columns < terms, other=last)
    # A term without programs starts where the next one does, which is then the last to count.
    term = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    return term, program - tl.load(starts + term)
