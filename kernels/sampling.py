"""Where a cell of one grid lies in another: bilinear resampling inside a kernel.

The rules are those of ``fastagglo.ops.LossTerm``: grids over one view are aligned as by
``F.interpolate(mode="bilinear", align_corners=False)``, and a view may start elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

SNAP = tl.constexpr(1e-6)  # cells: so close to a centre a sample is that cell, whatever rounding


@triton.jit
def taps(cell, step, ratio, source, shift):
    """How one axis of ``source`` cells is read by cells over a view.

    Args:
        cell: (R,) int32, places on the axis.
        step: fp64, what one of these cells is in cells of the view. ratio: fp64, source cells to a
            cell of the view.
        source: int32.
        shift: (R,) fp64, where the source's view starts, in cells of the view.

    Returns:
        The cells to read, (R,) int32 twice, the weight of the second, fp32, and whether the place
        lies in the source's view. Where the weight is zero both cells are the same one.
    """
    # fp64: an fp32 position at cell 100 is off by more than SNAP.
    place = ((cell.to(tl.float64) + 0.5) * step - shift) * ratio
    end = source.to(tl.float64)  # an int32 and a number make an fp32
    inside = (place >= -SNAP) & (place <= end + SNAP)
    place = tl.where(inside, place, 0.5) - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), end - 1.0)
    nearest = tl.floor(place + 0.5)
    place = tl.where(tl.abs(place - nearest) < SNAP, nearest, place)
    low = tl.floor(place)
    weight = place - low
    high = low.to(tl.int32) + (weight > 0).to(tl.int32)
    return low.to(tl.int32), high, weight.to(tl.float32), inside


@triton.jit
def share_of(cell, low, high, weight):
    """With how much weight taps (scalars) read ``cell``."""
    first = tl.where(low == cell, 1.0 - weight, 0.0)
    return first + tl.where((high == cell) & (high != low), weight, 0.0)


@triton.jit
def read(source, channels, live, resampled, RESAMPLE: tl.constexpr):
    """Features (R, B) in fp32.

    Args:
        source: pointers (R,) to images, the strides of their rows and columns, and by which rows
            and which columns to read them: what :func:`taps` gave, but for the last.
        channels: (B,). live: (R, B), what may be read; the rest is 0.
        resampled: whether more than the first cells count. RESAMPLE: whether it can be so.
    """
    base, row_stride, column_stride, by_row, by_column = source
    top = base + by_row[0].to(tl.int64) * row_stride
    left = by_column[0].to(tl.int64) * column_stride
    value = tl.load((top + left)[:, None] + channels[None, :], mask=live, other=0.0).to(tl.float32)
    if RESAMPLE:
        bottom = base + by_row[1].to(tl.int64) * row_stride
        right = by_column[1].to(tl.int64) * column_stride
        if resampled:
            b = tl.load((bottom + left)[:, None] + channels[None, :], mask=live, other=0.0)
            c = tl.load((top + right)[:, None] + channels[None, :], mask=live, other=0.0)
            d = tl.load((bottom + right)[:, None] + channels[None, :], mask=live, other=0.0)
            down = by_row[2][:, None]
            value += down * (b.to(tl.float32) - value)
            other = c.to(tl.float32)
            other += down * (d.to(tl.float32) - other)
            value += by_column[2][:, None] * (other - value)
    return value
