"""A tile of rows of one head, in the pieces that Triton's power-of-two blocks allow.

A head of 80 is a piece of 64 and one of 16 (``head_pieces`` in tiles.py): a tile is a tuple of
blocks (rows, piece), and a product over the head is a sum of products over the pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """One fp32 accumulator (R, piece) for each piece of the head."""
    result = ()
    for i in tl.static_range(len(PIECES)):
        result = result + (_zeros(ROWS, PIECES[i]),)
    return result


@triton.jit
def _piece_offset(PIECES: tl.constexpr, INDEX: tl.constexpr):
    """Where a piece begins in the head: the pieces before it are powers of two, largest first."""
    if INDEX == 0:
        return 0
    elif INDEX == 1:
        return PIECES[0]
    else:
        return PIECES[0] + PIECES[1]


@triton.jit
def load_pieces(
    base,
    stride,
    limit,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows 0 .. R of a head as one tile (R, piece) a piece; zeros in rows from ``limit`` on."""
    rows = tl.arange(0, ROWS)
    result = ()
    for i in tl.static_range(len(PIECES)):
        columns = _piece_offset(PIECES, i) + tl.arange(0, PIECES[i])
        pointers = base + (rows[:, None] * stride + columns[None, :])
        if _piece_offset(PIECES, i) + PIECES[i] > D:
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
    base, stride, limit, tiles, D: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr
):
    """Store one tile (R, piece) a piece to rows 0 .. ``limit`` of a head."""
    rows = tl.arange(0, ROWS)
    for i in tl.static_range(len(PIECES)):
        columns = _piece_offset(PIECES, i) + tl.arange(0, PIECES[i])
        pointers = base + (rows[:, None] * stride + columns[None, :])
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
