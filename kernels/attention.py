"""Attention over packed segments of any mix of lengths: one launch forward, two backward.

FlashAttention-2 (arXiv 2307.08691) over a work list: each program takes one tile of rows of one
segment and one head, and walks over that segment's other rows. What is particular here:

- **Split head dims.** A head of 72 or 80 is a piece of 64 and one of 16, each with products of its
  own, so that tensor cores never multiply padding up to 128; see pieces.py.
- **A bias per key**, added to the logits in fp32: proportional attention (ToMe, arXiv 2210.09461).
- **No waste in the loop.** All blocks but the last are whole and carry no mask. The last is a copy
  of the loop's body with masks.
- **Determinism.** No atomics: one kernel owns the rows of dQ, another those of dK, dV and d bias.

Letters: T packed rows, H heads, D head dim, R rows of a program's tile, C rows ("columns" of the
logits) of a step of its loop.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastagglo.kernels.pieces import (
    dot_add,
    dot_transposed,
    load_pieces,
    scaled,
    store_pieces,
    zero_pieces,
)
from fastagglo.kernels.tiles import Tile, arch_of, head_pieces, tile_for, widest_piece

LOG2E = tl.constexpr(math.log2(math.e))

# The kernels take row strides twice. As a compile-time constant (Q_STRIDE) for the rows of a block,
# which then lie at fixed distances from one address; as an argument (q_row) for where a segment
# begins, because LLVM works out a product with a constant anew in every trip of a loop. Strides of
# heads are arguments: that of (H, T, D) changes with T. Arguments come in units of 8 elements, as
# Triton learns only whether one divides by 16: a head of 72 would cost it its 16-byte loads.
STRIDE_UNIT = 8


@triton.jit
def _work(tiles, H: tl.constexpr, TILE_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """What this program does: (head, first packed row of its segment, the segment's rows, first row
    of its tile, whether it is a segment at all)."""
    # Heads run fastest: neighbours share the entry, and a long segment's tiles all start early.
    program = tl.program_id(0)
    head = program % H
    item = program // H
    PARTS: tl.constexpr = TILE_ROWS // ROWS
    entry = tiles + (item // PARTS) * 4
    start = tl.load(entry)
    length = tl.load(entry + 1)
    first = tl.load(entry + 2) + item % PARTS * ROWS
    return head, start, length, first, tl.load(entry + 3) >= 0


@triton.jit
def _partial_sums(x, PARTS: tl.constexpr):
    """Sums of every PARTS-th column, (R, PARTS): a thread holds whole ones of a tensor core's
    result, so that threads need not meet until the loop is over."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // PARTS, PARTS)), 1)


@triton.jit
def _load_bias(bias, limit, STRIDE: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The logits' addend (R,) in the log2 domain; -inf removes the keys from ``limit`` on."""
    rows = tl.arange(0, ROWS)
    if HAS_BIAS:
        pointers = bias + rows.to(tl.int64) * STRIDE
        return tl.load(pointers, mask=rows < limit, other=float("-inf")).to(tl.float32) * LOG2E
    else:
        return tl.where(rows < limit, 0.0, float("-inf"))


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _forward_step(
    q, sums, largest, total, k, v, bias, taken, limit, factor,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, BIAS_STRIDE: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in C more keys: online softmax with base 2, ``factor = abs(scale) * log2(e)``."""
    k_tile = load_pieces(k, limit, K_STRIDE, D, BOUNDS, COLUMNS, MASKED, taken)
    logits = dot_transposed(q, k_tile, PRECISION)
    v_tile = load_pieces(v, limit, V_STRIDE, D, BOUNDS, COLUMNS, MASKED, taken)
    if HAS_BIAS or MASKED:
        logits = logits * factor + _load_bias(bias, limit, BIAS_STRIDE, COLUMNS, HAS_BIAS)[None, :]
        new = tl.maximum(largest, tl.max(logits, 1))
        # All keys so far removed: -inf - -inf would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new) if HAS_BIAS else new
        weights = tl.exp2(logits - base[:, None])
    else:
        new = tl.maximum(largest, tl.max(logits, 1) * factor)
        base = new
        weights = tl.exp2(logits * factor - base[:, None])
    decay = tl.exp2(largest - base)
    total = total * decay[:, None] + _partial_sums(weights, total.shape[1])
    sums = dot_add(weights, v_tile, scaled(sums, decay[:, None]), PRECISION)
    return sums, new, total


@triton.jit
def forward_kernel(
    q, k, v, bias, out, lse, tiles,
    T, scale,
    q_row, k_row, v_row, q_head, k_head, v_head, bias_head,
    H: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEGATIVE: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = softmax(q k^T * scale + bias) v``; lse (H, T): its log-sum-exp, to base 2."""
    head, start, length, first, is_segment = _work(tiles, H, TILE_ROWS, ROWS)
    if first >= length:
        return
    limit = length - first
    wide_head = head.to(tl.int64)
    row = (start + first).to(tl.int64)
    out += (row * H + wide_head) * D
    lse += wide_head * T + row
    rows = tl.arange(0, ROWS)
    sums = zero_pieces(ROWS, BOUNDS)
    if not is_segment:  # rows that belong to no segment
        store_pieces(out, limit, sums, H * D, D, BOUNDS, ROWS)
        tl.store(lse + rows, tl.zeros((ROWS,), tl.float32), mask=rows < limit)
        return

    segment = start.to(tl.int64)
    q += row * q_row * 8 + wide_head * q_head * 8
    k += segment * k_row * 8 + wide_head * k_head * 8
    v += segment * v_row * 8 + wide_head * v_head * 8
    if HAS_BIAS:
        bias += segment * BIAS_STRIDE + wide_head * bias_head
    q_tile = load_pieces(q, limit, Q_STRIDE, D, BOUNDS, ROWS, True, 0)
    # The running maximum is taken before scaling, which a negative scale would turn around.
    if NEGATIVE:
        q_tile = scaled(q_tile, -1.0)
    factor = scale * LOG2E
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, PARTS), tl.float32)

    whole = length // COLUMNS * COLUMNS
    taken = 0
    for _ in range(0, whole, COLUMNS):
        sums, largest, total = _forward_step(
            q_tile, sums, largest, total, k, v, bias, taken, COLUMNS, factor,
            K_STRIDE, V_STRIDE, BIAS_STRIDE, D, BOUNDS, COLUMNS, HAS_BIAS, False, PRECISION,
        )  # fmt: skip
        taken += COLUMNS * 8
        if HAS_BIAS:
            bias += BIAS_STRIDE * COLUMNS
    if whole < length:
        sums, largest, total = _forward_step(
            q_tile, sums, largest, total, k, v, bias, taken, length - whole, factor,
            K_STRIDE, V_STRIDE, BIAS_STRIDE, D, BOUNDS, COLUMNS, HAS_BIAS, True, PRECISION,
        )  # fmt: skip

    total = tl.sum(total, 1)
    if HAS_BIAS:  # a row without a key: zeros, and a log-sum that makes exp2(-inf - lse) zero too
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        largest = tl.where(empty, 0.0, largest)
    store_pieces(out, limit, scaled(sums, (1.0 / total)[:, None]), H * D, D, BOUNDS, ROWS)
    tl.store(lse + rows, largest + tl.log2(total), mask=rows < limit)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _dq_step(
    q, grad_out, lse, delta, sums, k, v, bias, taken, limit, factor,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, BIAS_STRIDE: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add C keys' part of dQ / scale."""
    k_tile = load_pieces(k, limit, K_STRIDE, D, BOUNDS, COLUMNS, MASKED, taken)
    v_tile = load_pieces(v, limit, V_STRIDE, D, BOUNDS, COLUMNS, MASKED, taken)
    logits = dot_transposed(q, k_tile, PRECISION) * factor
    if HAS_BIAS or MASKED:
        logits += _load_bias(bias, limit, BIAS_STRIDE, COLUMNS, HAS_BIAS)[None, :]
    weights = tl.exp2(logits - lse[:, None])
    grad_logits = weights * (dot_transposed(grad_out, v_tile, PRECISION) - delta[:, None])
    return dot_add(grad_logits, k_tile, sums, PRECISION)


@triton.jit
def dq_kernel(
    q, k, v, bias, out, lse, grad_out, grad_q, delta, tiles,
    T, scale,
    q_row, k_row, v_row, q_head, k_head, v_head, grad_head, bias_head,
    H: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and ``delta = sum(grad_out * out)`` (H, T), which :func:`dkv_kernel` reads."""
    head, start, length, first, is_segment = _work(tiles, H, TILE_ROWS, ROWS)
    if first >= length:
        return
    limit = length - first
    wide_head = head.to(tl.int64)
    row = (start + first).to(tl.int64)
    grad_q += row * GRAD_STRIDE + wide_head * grad_head * 8
    sums = zero_pieces(ROWS, BOUNDS)
    if not is_segment:
        store_pieces(grad_q, limit, sums, GRAD_STRIDE, D, BOUNDS, ROWS)
        return

    segment = start.to(tl.int64)
    q += row * q_row * 8 + wide_head * q_head * 8
    k += segment * k_row * 8 + wide_head * k_head * 8
    v += segment * v_row * 8 + wide_head * v_head * 8
    if HAS_BIAS:
        bias += segment * BIAS_STRIDE + wide_head * bias_head
    own = (row * H + wide_head) * D
    q_tile = load_pieces(q, limit, Q_STRIDE, D, BOUNDS, ROWS, True, 0)
    grad_tile = load_pieces(grad_out + own, limit, H * D, D, BOUNDS, ROWS, True, 0)
    out_tile = load_pieces(out + own, limit, H * D, D, BOUNDS, ROWS, True, 0)
    rows = tl.arange(0, ROWS)
    lse_row = tl.load(lse + wide_head * T + row + rows, mask=rows < limit, other=0.0)
    delta_row = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(len(BOUNDS) - 1):
        delta_row += tl.sum(grad_tile[i].to(tl.float32) * out_tile[i].to(tl.float32), 1)
    tl.store(delta + wide_head * T + row + rows, delta_row, mask=rows < limit)
    factor = scale * LOG2E

    whole = length // COLUMNS * COLUMNS
    taken = 0
    for _ in range(0, whole, COLUMNS):
        sums = _dq_step(
            q_tile, grad_tile, lse_row, delta_row, sums, k, v, bias, taken, COLUMNS, factor,
            K_STRIDE, V_STRIDE, BIAS_STRIDE, D, BOUNDS, COLUMNS, HAS_BIAS, False, PRECISION,
        )  # fmt: skip
        taken += COLUMNS * 8
        if HAS_BIAS:
            bias += BIAS_STRIDE * COLUMNS
    if whole < length:
        sums = _dq_step(
            q_tile, grad_tile, lse_row, delta_row, sums, k, v, bias, taken, length - whole, factor,
            K_STRIDE, V_STRIDE, BIAS_STRIDE, D, BOUNDS, COLUMNS, HAS_BIAS, True, PRECISION,
        )  # fmt: skip
    store_pieces(grad_q, limit, scaled(sums, scale), GRAD_STRIDE, D, BOUNDS, ROWS)


@triton.jit
def _dkv_step(
    k, v, bias, grad_k, grad_v, grad_bias, q, grad_out, lse, delta, taken, limit, factor,
    Q_STRIDE: tl.constexpr, GRAD_OUT_STRIDE: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add C queries' part of dK / scale, dV and d bias. Keys run down, queries across."""
    queries = tl.arange(0, COLUMNS)
    q_tile = load_pieces(q, limit, Q_STRIDE, D, BOUNDS, COLUMNS, MASKED, taken)
    grad_tile = load_pieces(grad_out, limit, GRAD_OUT_STRIDE, D, BOUNDS, COLUMNS, MASKED, taken)
    if MASKED:  # exp2(0 - inf): a query that is not there weighs nothing
        lse_row = tl.load(lse + queries, mask=queries < limit, other=float("inf"))
        delta_row = tl.load(delta + queries, mask=queries < limit, other=0.0)
    else:
        lse_row = tl.load(lse + queries)
        delta_row = tl.load(delta + queries)
    logits = dot_transposed(k, q_tile, PRECISION) * factor
    if HAS_BIAS:
        logits += bias[:, None]
    weights = tl.exp2(logits - lse_row[None, :])
    grad_v = dot_add(weights, grad_tile, grad_v, PRECISION)
    grad_logits = weights * (dot_transposed(v, grad_tile, PRECISION) - delta_row[None, :])
    grad_k = dot_add(grad_logits, q_tile, grad_k, PRECISION)
    if BIAS_GRAD:
        grad_bias += tl.sum(grad_logits, 1)
    return grad_k, grad_v, grad_bias


@triton.jit
def dkv_kernel(
    q, k, v, bias, lse, delta, grad_out, grad_k, grad_v, grad_bias, tiles,
    T, scale,
    q_row, k_row, v_row, q_head, k_head, v_head, grad_head, bias_head,
    H: tl.constexpr, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    D: tl.constexpr, BOUNDS: tl.constexpr, TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v and, as (H, T) in fp32, of the bias."""
    head, start, length, first, is_segment = _work(tiles, H, TILE_ROWS, ROWS)
    if first >= length:
        return
    limit = length - first
    wide_head = head.to(tl.int64)
    row = (start + first).to(tl.int64)
    rows = tl.arange(0, ROWS)
    grad_k += row * GRAD_STRIDE + wide_head * grad_head * 8
    grad_v += row * GRAD_STRIDE + wide_head * grad_head * 8
    k_sums = zero_pieces(ROWS, BOUNDS)
    v_sums = zero_pieces(ROWS, BOUNDS)
    bias_sums = tl.zeros((ROWS,), tl.float32)
    if not is_segment:
        store_pieces(grad_k, limit, k_sums, GRAD_STRIDE, D, BOUNDS, ROWS)
        store_pieces(grad_v, limit, v_sums, GRAD_STRIDE, D, BOUNDS, ROWS)
        if BIAS_GRAD:
            tl.store(grad_bias + wide_head * T + row + rows, bias_sums, mask=rows < limit)
        return

    segment = start.to(tl.int64)
    q += segment * q_row * 8 + wide_head * q_head * 8
    k += row * k_row * 8 + wide_head * k_head * 8
    v += row * v_row * 8 + wide_head * v_head * 8
    grad_out += (segment * H + wide_head) * D
    lse += wide_head * T + segment
    delta += wide_head * T + segment
    k_tile = load_pieces(k, limit, K_STRIDE, D, BOUNDS, ROWS, True, 0)
    v_tile = load_pieces(v, limit, V_STRIDE, D, BOUNDS, ROWS, True, 0)
    if HAS_BIAS:
        own = bias + row * BIAS_STRIDE + wide_head * bias_head
        bias_row = _load_bias(own, limit, BIAS_STRIDE, ROWS, True)
    else:
        bias_row = None
    factor = scale * LOG2E

    whole = length // COLUMNS * COLUMNS
    taken = 0
    for _ in range(0, whole, COLUMNS):
        k_sums, v_sums, bias_sums = _dkv_step(
            k_tile, v_tile, bias_row, k_sums, v_sums, bias_sums, q, grad_out, lse, delta,
            taken, COLUMNS, factor, Q_STRIDE, H * D,
            D, BOUNDS, COLUMNS, HAS_BIAS, BIAS_GRAD, False, PRECISION,
        )  # fmt: skip
        taken += COLUMNS * 8
        lse += COLUMNS
        delta += COLUMNS
    if whole < length:
        k_sums, v_sums, bias_sums = _dkv_step(
            k_tile, v_tile, bias_row, k_sums, v_sums, bias_sums, q, grad_out, lse, delta,
            taken, length - whole, factor, Q_STRIDE, H * D,
            D, BOUNDS, COLUMNS, HAS_BIAS, BIAS_GRAD, True, PRECISION,
        )  # fmt: skip
    store_pieces(grad_k, limit, scaled(k_sums, scale), GRAD_STRIDE, D, BOUNDS, ROWS)
    store_pieces(grad_v, limit, v_sums, GRAD_STRIDE, D, BOUNDS, ROWS)
    if BIAS_GRAD:
        tl.store(grad_bias + wide_head * T + row + rows, bias_sums, mask=rows < limit)


# --- launchers ------------------------------------------------------------------------------------


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels have a tile for this dtype and head dim: 16 to 128 in steps of 8."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and head_dim in range(16, 129, 8)


def readable(x: Tensor) -> bool:
    """Whether the kernels read (T, H, D) in place: unit last stride, the rest in units of 8."""
    return (
        x.stride(2) == 1
        and x.stride(0) % STRIDE_UNIT == 0
        and x.stride(1) % STRIDE_UNIT == 0
        and x.data_ptr() % 16 == 0
        # Offsets within a tile of at most 128 rows are 32 bits wide.
        and x.stride(0) < 2**24
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    tiles: Tensor,
    tile_rows: int,
    scale: float,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each row over the rows of its segment.

    Args:
        q, k, v: (T, H, D), bfloat16, float16 or float32, of one dtype, each :func:`readable`.
        key_bias: (T, H) float32 of any strides, added to the logits, or None.
        tiles: the work list (N, 4) int32 of ``PackedLayout.tiles``.
        tile_rows: rows of a tile of the work list.
        scale: factor on ``q @ k``.
        tile: block sizes; default: the table's for this device.

    Returns:
        The output (T, H, D), zeros in rows of no segment, and (H, T) float32: the log-sum-exp of
        the logits to base 2, zero where there is no key.

    Raises:
        ValueError: q, k or v that the kernels cannot read.
    """
    _check(q=q, k=k, v=v)
    rows, heads, width = q.shape
    out = q.new_empty(rows, heads, width)
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    strides = _strides(key_bias, q, k, v)
    tile = tile or tile_for("fwd", q, tile_rows)
    with _on_device(q):
        if grid := _grid(tiles, tile_rows, tile, heads):
            forward_kernel[grid](
                q, k, v, key_bias, out, lse, tiles,
                rows, abs(scale), *strides,
                **_constants(q, k, v, key_bias, tile_rows, tile), NEGATIVE=scale < 0,
                # A thread reads whole rows of sm_100's tensor memory, else two of 8 columns.
                PARTS=1 if 100 <= arch_of(q) < 120 else 8,
            )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    tiles: Tensor,
    tile_rows: int,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    bias_grad: bool = False,
    fused: bool = False,
    tile_dq: Tile | None = None,
    tile_dkv: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`; two runs are bit-equal.

    Args:
        grad_out: (T, H, D), contiguous.
        q, k, v, key_bias, tiles, tile_rows, scale: as given to :func:`forward`.
        out, lse: what it returned.
        bias_grad: whether to compute the gradient of key_bias.
        fused: lay the gradients out as those of one (T, 3, H, D) projection.
        tile_dq, tile_dkv: block sizes; default: the table's for this device.

    Returns:
        Gradients of q, k and v, (3, T, H, D) or, fused, (T, 3, H, D); and that of key_bias, (H, T)
        float32, or (H, 0) if not asked for.
    """
    _check(q=q, k=k, v=v, grad_out=grad_out)
    rows, heads, width = q.shape
    if fused:
        grads = q.new_empty(rows, 3, heads, width)
        grad_q, grad_k, grad_v = grads.unbind(1)
    else:
        grads = q.new_empty(3, rows, heads, width)
        grad_q, grad_k, grad_v = grads.unbind(0)
    bias_grad = bias_grad and key_bias is not None
    grad_bias = lse.new_empty(heads, rows if bias_grad else 0)
    delta = torch.empty_like(lse)
    strides = _strides(key_bias, q, k, v, grad_q)
    tile_dq = tile_dq or tile_for("dq", q, tile_rows)
    tile_dkv = tile_dkv or tile_for("dkv", q, tile_rows)
    with _on_device(q):
        if grid := _grid(tiles, tile_rows, tile_dq, heads):
            dq_kernel[grid](
                q, k, v, key_bias, out, lse, grad_out, grad_q, delta, tiles,
                rows, scale, *strides,
                **_constants(q, k, v, key_bias, tile_rows, tile_dq), GRAD_STRIDE=grad_q.stride(0),
            )  # fmt: skip
        if grid := _grid(tiles, tile_rows, tile_dkv, heads):
            dkv_kernel[grid](
                q, k, v, key_bias, lse, delta, grad_out, grad_k, grad_v, grad_bias, tiles,
                rows, scale, *strides,
                **_constants(q, k, v, key_bias, tile_rows, tile_dkv), GRAD_STRIDE=grad_q.stride(0),
                BIAS_GRAD=bias_grad,
            )  # fmt: skip
    return grads, grad_bias


def _check(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not readable(x):
            raise ValueError(
                f"{name} must have a unit last stride, other strides in multiples of {STRIDE_UNIT} "
                f"and 16-byte alignment, got strides {x.stride()}; use {name}.contiguous()"
            )
    q = tensors["q"]
    if not supports(q.dtype, q.shape[2]):
        raise ValueError(
            "q must be bfloat16, float16 or float32 with a head dim of 16, 24, ..., 128, got "
            f"{q.dtype} and {q.shape[2]}"
        )


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whichever one holds the tensors.
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _grid(tiles: Tensor, tile_rows: int, tile: Tile, heads: int) -> tuple[int] | None:
    programs = tiles.shape[0] * (tile_rows // tile.rows) * heads
    return (programs,) if programs else None


def _strides(key_bias: Tensor | None, *tensors: Tensor) -> tuple[int, ...]:
    """What the kernels take: rows of q, k and v, heads of all tensors, heads of the bias."""
    rows = (x.stride(0) // STRIDE_UNIT for x in tensors[:3])
    heads = (x.stride(1) // STRIDE_UNIT for x in tensors)
    return (*rows, *heads, 0 if key_bias is None else key_bias.stride(1))


def _constants(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, tile_rows: int, tile: Tile
) -> dict[str, Any]:
    _, heads, width = q.shape
    pieces = head_pieces(width, widest_piece(arch_of(q), q.element_size()))
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "H": heads,
        "Q_STRIDE": q.stride(0),
        "K_STRIDE": k.stride(0),
        "V_STRIDE": v.stride(0),
        "BIAS_STRIDE": 0 if key_bias is None else key_bias.stride(0),
        "HAS_BIAS": key_bias is not None,
        "D": width,
        "BOUNDS": (0, *accumulate(pieces)),
        "TILE_ROWS": tile_rows,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
