"""The table that tells the grouped kernel what its problems are: one column each, int64.

A kernel that takes the problems' tensors as arguments would be compiled for each number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

# Addresses; sizes and strides, but for M in the launch's unit; the problem's first program.
FIELDS = (
    "x", "weight", "bias", "mean", "rstd", "ln_weight", "ln_bias", "extra", "out", "pre",
    "M", "N", "K", "x_row", "w_row", "extra_row", "start",
)  # fmt: skip
_ROW = {name: row for row, name in enumerate(FIELDS)}
_NAMES = tl.constexpr(" ".join(FIELDS))  # Triton takes a string from outside, not a tuple

# While a CUDA graph is captured its copies read host memory again at each replay: keep that.
_captured: list[Tensor] = []


def build(columns: Iterable[Mapping[str, int]], device: torch.device) -> Tensor:
    """The table (fields, problems) on the device; the copy does not wait for it."""
    columns = list(columns)
    rows = [[column.get(name, 0) for column in columns] for name in FIELDS]
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return table.to(device)
    pinned = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def padded(problems: int) -> int:
    """The power of two that a program searches for its problem."""
    return max(16, triton.next_power_of_2(problems))


@triton.constexpr_function
def _row_of(names, name):
    return names.split(" ").index(name)


@triton.jit
def field(table, problems, at, NAME: tl.constexpr):
    """A stride, int64."""
    return tl.load(table + _row_of(_NAMES, NAME) * problems + at)


@triton.jit
def size(table, problems, at, NAME: tl.constexpr):
    """A number of rows or columns, int32."""
    return tl.load(table + _row_of(_NAMES, NAME) * problems + at).to(tl.int32)


@triton.jit
def pointer(table, problems, at, NAME: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's first element, ALIGNED to 16 bytes; None of the TYPE None."""
    if TYPE is not None:
        address = tl.load(table + _row_of(_NAMES, NAME) * problems + at)
        result = address.to(tl.pointer_type(TYPE))
        if ALIGNED:
            result = tl.multiple_of(result, 16)
        return result
    else:
        return None


@triton.jit
def problem_of(table, problems, program, PROBLEMS: tl.constexpr):
    """The problem that ``program`` works for, and its place among the problem's programs."""
    columns = tl.arange(0, PROBLEMS)
    starts = table + _row_of(_NAMES, "start") * problems
    last = 0x7FFFFFFFFFFFFFFF
    firsts = tl.load(starts + columns, mask=columns < problems, other=last)
    # A problem without programs starts where the next one does, which is then the last to count.
    at = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    return at, program - tl.load(starts + at).to(tl.int32)
