"""A tile of rows of one head, in the pieces that Triton's power-of-two blocks allow.

A head of 80 is a piece of 64 and one of 16 (``head_pieces`` in tiles.py). A tile is a tuple of
blocks (rows, piece), and a product over the head is a sum of products over the pieces. Kernels know
the pieces by their bounds, (0, 64, 80): piece i is columns BOUNDS[i] to BOUNDS[i + 1].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, BOUNDS: tl.constexpr):
    """One fp32 accumulator (R, piece) for each piece of the head."""
    result = ()
    for i in tl.static_range(len(BOUNDS) - 1):
        result = result + (_zeros(ROWS, BOUNDS[i + 1] - BOUNDS[i]),)
    return result


@triton.jit
def load_pieces(
    base,
    limit,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    taken,
):
    """R rows of a head as one tile (R, piece) a piece; zeros where a row is ``limit`` or more.

    ``taken`` is 8 times the row to begin with: kept in 32 bits, and so that
    LLVM cannot know that it never wraps, each address of a loop is one multiply-add to pointers
    that stay. As pointers that move, LLVM gives each address a 64-bit addition, two instructions.
    """
    rows = tl.arange(0, ROWS)
    result = ()
    for i in tl.static_range(len(BOUNDS) - 1):
        columns = BOUNDS[i] + tl.arange(0, BOUNDS[i + 1] - BOUNDS[i])
        pointers = base + (rows[:, None] * STRIDE + columns[None, :])
        pointers += tl.cast(taken, tl.int64) * (STRIDE // 8)
        if BOUNDS[i + 1] > D:
            # The next head's columns lie here, or another tensor's: they must not be read.
            inside = columns[None, :] < D
            if MASKED:
                inside = inside & (rows[:, None] < limit)
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif MASKED:
            tile = tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
        else:
            tile = tl.load(pointers)
        result = result + (tile,)
    return result


@triton.jit
def store_pieces(
    base,
    limit,
    tiles,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store one tile (R, piece) a piece to rows 0 .. ``limit`` of a head."""
    rows = tl.arange(0, ROWS)
    for i in tl.static_range(len(BOUNDS) - 1):
        columns = BOUNDS[i] + tl.arange(0, BOUNDS[i + 1] - BOUNDS[i])
        pointers = base + (rows[:, None] * STRIDE + columns[None, :])
        inside = (rows[:, None] < limit) & (columns[None, :] < D)
        tl.store(pointers, tiles[i].to(base.dtype.element_ty), mask=inside)


@triton.jit
def dot_transposed(a, b, PRECISION: tl.constexpr):
    """``a @ b.T`` over the pieces of the head, (R, C) in fp32."""
    result = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        result = tl.dot(a[i], tl.trans(b[i]), result, input_precision=PRECISION)
    return result


@triton.jit
def dot_add(weights, b, sums, PRECISION: tl.constexpr):
    """``sums + weights @ b``, piece by piece; the weights (R, C) rounded to the dtype of b."""
    weights = weights.to(b[0].dtype)
    result = ()
    for i in tl.static_range(len(b)):
        result = result + (tl.dot(weights, b[i], sums[i], input_precision=PRECISION),)
    return result


@triton.jit
def scaled(tiles, factor):
    result = ()
    for i in tl.static_range(len(tiles)):
        result = result + (tiles[i] * factor,)
    return result
