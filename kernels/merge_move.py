"""Tokens to their slots and back: means and sums of segments, and the gathers that undo them.

A merged token is the mean of its tokens weighted by size (ToMe, arXiv 2210.09461). ``order`` holds
the tokens by slot and ``starts`` where each slot begins in it, from merge.py. One program owns some
channels of one slot and adds its tokens up in their order: every token is read once, every slot
written once, sums are float32 and there are no atomics. The gradient of a mean is a weighted
gather, unmerging a gather, and its gradient a sum.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Row strides come in units of 8 elements where they can: Triton learns only whether a number
# divides by 16, and 72 channels of 2 bytes are 16-byte loads too.
STRIDE_UNIT = 8


@triton.jit
def segment_kernel(
    x, size, order, starts, out, totals, row_stride,
    C: tl.constexpr, UNIT: tl.constexpr,
    MEAN: tl.constexpr, HAS_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """``out[s] = sum of x[t]`` over the tokens t of slot s, or their mean and ``totals[s]``."""
    slot = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    first = tl.load(starts + slot)
    end = tl.load(starts + slot + 1)
    total = (end - first).to(tl.float32)
    if MEAN:
        if HAS_SIZE:
            sizes = tl.zeros((SIZES,), tl.float32)
            for block in range(first, end, SIZES):
                rows = block + tl.arange(0, SIZES)
                token = tl.load(order + rows, mask=rows < end, other=0)
                sizes += tl.load(size + token, mask=rows < end, other=0.0)
            total = tl.sum(sizes)
        if tl.program_id(1) == 0:
            tl.store(totals + slot, total)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for block in range(first, end, STEP):
        for step in tl.static_range(STEP):
            there = block + step < end
            token = tl.load(order + block + step, mask=there, other=0)
            row = x + token.to(tl.int64) * row_stride * UNIT
            value = tl.load(row + columns, mask=inside & there, other=0.0).to(tl.float32)
            if MEAN:
                # Before they are added: exactly 1 for a token alone, and no sum overflows.
                if HAS_SIZE:
                    weight = tl.load(size + token, mask=there, other=0.0)
                else:
                    weight = tl.where(there, 1.0, 0.0)
                value *= tl.div_rn(weight, total)
            sums += value
    out += slot.to(tl.int64) * C
    tl.store(out + columns, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gather_kernel(
    y, size, totals, slots, out, T, row_stride,
    C: tl.constexpr, UNIT: tl.constexpr,
    WEIGHTED: tl.constexpr, HAS_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``out[t] = y[slot of t]``, or its share of it by size; zeros for tokens of no slot."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    for step in tl.static_range(ROWS):
        token = first + step
        slot = tl.load(slots + token, mask=token < T, other=-1)
        value = tl.load(
            y + slot * row_stride * UNIT + columns, mask=inside & (slot >= 0), other=0.0
        )
        if WEIGHTED:
            total = tl.load(totals + slot, mask=slot >= 0, other=1.0)
            weight = 1.0
            if HAS_SIZE:
                weight = tl.load(size + token, mask=slot >= 0, other=0.0)
            value = value.to(tl.float32) * tl.div_rn(weight, total)
        tl.store(
            out + token * C + columns, value.to(out.dtype.element_ty), mask=inside & (token < T)
        )


# --- launchers ------------------------------------------------------------------------------------


def stride_in_units(x: Tensor) -> tuple[int, int]:
    """Row stride of (T, C) in units, and elements of a unit.

    Raises:
        ValueError: the last stride is not one.
    """
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"tokens must have a unit last stride, got strides {x.stride()}")
    unit = STRIDE_UNIT if x.stride(0) % STRIDE_UNIT == 0 else 1
    return x.stride(0) // unit, unit


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever one holds the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _columns(channels: int) -> int:
    """Channels of a program: the widest block that pads no more than one of 256 does."""
    whole = -(-channels // 256) * 256
    if whole == 256:
        return max(16, triton.next_power_of_2(channels))
    return next(block for block in (1024, 512, 256) if whole % block == 0)


def segment_sum(
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    *,
    size: Tensor | None = None,
    mean: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums, or means weighted by size, of the tokens of each slot.

    Args:
        x: (T, C) with a unit last stride, bfloat16, float16 or float32.
        order: (T,) int32: tokens by slot.
        starts: (R + 1,) int32: where each slot begins in ``order``.
        size: (T,) float32, weights of a mean; None for ones.
        mean: means instead of sums.
        dtype: of the result; default that of ``x``.

    Returns:
        (R, C), and for means the summed sizes, (R,) float32, else (0,).
    """
    slots, channels = len(starts) - 1, x.shape[1]
    out = x.new_empty(slots, channels, dtype=dtype or x.dtype)
    totals = x.new_empty(slots if mean else 0, dtype=torch.float32)
    columns = _columns(channels)
    row_stride, unit = stride_in_units(x)
    if totals.numel() or out.numel():
        with on_device(x):
            segment_kernel[(slots, -(-channels // columns))](
                x, size, order, starts, out, totals, row_stride,
                C=channels, UNIT=unit,
                MEAN=mean, HAS_SIZE=size is not None,
                COLUMNS=columns, STEP=4, SIZES=32,
                num_warps=max(1, columns // 256), num_stages=1,
            )  # fmt: skip
    return out, totals


def gather(
    y: Tensor,
    slots: Tensor,
    *,
    size: Tensor | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    """Every token's slot, or the token's share of it.

    Args:
        y: (R, C) with a unit last stride, bfloat16, float16 or float32.
        slots: (T,) int64: row of ``y`` of each token, -1 for none.
        size: (T,) float32, or None for ones.
        totals: (R,) float32, the summed sizes: rows are multiplied by ``size / totals``; None: not.

    Returns:
        (T, C) in the dtype of ``y``, zeros where there is no slot.
    """
    tokens, channels = len(slots), y.shape[1]
    out = y.new_empty(tokens, channels)
    columns, rows = _columns(channels), 4
    row_stride, unit = stride_in_units(y)
    if out.numel():
        with on_device(y):
            gather_kernel[(-(-tokens // rows), -(-channels // columns))](
                y, size, totals, slots, out, tokens, row_stride,
                C=channels, UNIT=unit, WEIGHTED=totals is not None, HAS_SIZE=size is not None,
                COLUMNS=columns, ROWS=rows, num_warps=max(1, columns // 256), num_stages=1,
            )  # fmt: skip
    return out
