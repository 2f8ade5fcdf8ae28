"""Matrix products with a LayerNorm or GELU on what they read and bias, GELU or residual on what
they write. Launchers are in mlp.py.

A program computes a tile of the result; fp32 accumulators. The loop over the inner dimension takes
in whole blocks only, without masks: rows beyond the last are read as copies of it and not stored,
and a last block that is not whole is a copy of the loop's body with masks.

A result may be stored, and a gradient read, in the place that a pixel shuffle gives it: row m of a
grid ``width`` tokens wide, and channel n of UPSAMPLE * ``span``, stand at

    span * (m + m // width * width * (UPSAMPLE - 1))  +  n + n // span * span * (width - 1)

which has no term of both, so that a tile's addresses are a column plus a row as ever.

Letters: M rows, N columns, K inner size; R, C, D the block's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastagglo.kernels.gelu import gelu, gelu_slope
from fastagglo.kernels.mlp_table import field, pointer, problem_of, size


@triton.jit
def _ordered(program, down, across, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that both sides stay in L2."""
    width = GROUP * across
    group = program // width
    first = group * GROUP
    height = tl.minimum(down - first, GROUP)
    within = program % width
    return first + within % height, within // height


@triton.jit
def _activated(
    tile, centre, inverse, scale, shift,
    NORM: tl.constexpr, GELU: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """What the product takes of a tile: LayerNorm, GELU, both or neither; in the tile's dtype."""
    if NORM or GELU:
        value = tile.to(tl.float32)
        if NORM:
            value = (value - centre) * inverse
            if scale is not None:
                value = value * scale
            if shift is not None:
                value = value + shift
        if GELU:
            value = gelu(value, TANH)
        return value.to(tile.dtype)
    else:
        return tile


@triton.jit
def _vector(base, at, limit, MASKED: tl.constexpr):
    """Elements of a vector in fp32, zeros from ``limit`` on; None of None."""
    if base is None:
        return None
    elif MASKED:
        return tl.load(base + at, mask=at < limit, other=0.0).to(tl.float32)
    else:
        return tl.load(base + at).to(tl.float32)


@triton.jit
def _row_places(rows, span, width, UPSAMPLE: tl.constexpr):
    """Where rows of a shuffled matrix begin."""
    places = rows.to(tl.int64)
    if UPSAMPLE > 1:
        places += (rows // width).to(tl.int64) * width * (UPSAMPLE - 1)
    return places * span


@triton.jit
def _column_places(columns, span, width, UPSAMPLE: tl.constexpr):
    """Where columns of a shuffled matrix are, from where its rows begin."""
    if UPSAMPLE > 1:
        return columns + columns // span * (span * (width - 1))
    else:
        return columns


@triton.jit
def _linear_step(
    sums, a, b, a_taken, b_taken, taken, centre, inverse, ln_weight, ln_bias, across, K,
    NORM: tl.constexpr, GELU_IN: tl.constexpr, TANH: tl.constexpr, TRANSPOSED: tl.constexpr,
    COLUMN_MASK: tl.constexpr, DEPTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add D more products. ``across`` masks columns of a weight that is read as it lies."""
    inner = tl.arange(0, DEPTH)
    limit = K - taken
    a += tl.cast(a_taken, tl.int64)
    b += tl.cast(b_taken, tl.int64)
    if MASKED:
        left = tl.load(a, mask=(inner < limit)[None, :], other=0.0)
    else:
        left = tl.load(a)
    if TRANSPOSED:
        if MASKED:
            right = tl.trans(tl.load(b, mask=(inner < limit)[None, :], other=0.0))
        else:
            right = tl.trans(tl.load(b))
    else:
        if MASKED:
            right = tl.load(b, mask=across & (inner < limit)[:, None], other=0.0)
        elif COLUMN_MASK:
            right = tl.load(b, mask=across, other=0.0)
        else:
            right = tl.load(b)
    if NORM:
        scale = _vector(ln_weight, taken + inner[None, :], K, MASKED)
        shift = _vector(ln_bias, taken + inner[None, :], K, MASKED)
    else:
        scale = None
        shift = None
    left = _activated(left, centre, inverse, scale, shift, NORM, GELU_IN, TANH)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def _finish(
    sums, bias, extra, out, pre, rows, first, M, N, extra_row, span, width,
    GELU_OUT: tl.constexpr, SLOPE: tl.constexpr, TANH: tl.constexpr, COLUMNS: tl.constexpr,
    UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """What comes after a product; write it from column ``first`` on."""
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = (rows.to(tl.int64) * N)[:, None] + columns[None, :]
    if pre is not None:
        tl.store(pre + at, sums.to(pre.dtype.element_ty), mask=inside)
    if GELU_OUT:
        sums = gelu(sums, TANH)
    if extra is not None:
        others = extra + (rows.to(tl.int64) * extra_row)[:, None] + columns[None, :]
        other = tl.load(others, mask=inside, other=0.0).to(tl.float32)
        if SLOPE:
            sums *= gelu_slope(other, TANH)
        else:
            sums += other
    if UPSAMPLE > 1:
        at = _row_places(rows, span, width, UPSAMPLE)[:, None]
        at += _column_places(columns, span, width, UPSAMPLE)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    WIDTH: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, WIDTH)), (0, 2, 1)))


@triton.jit
def _finish_halves(
    sums, bias, extra, out, pre, rows, first, M, N, extra_row, span, width,
    GELU_OUT: tl.constexpr, SLOPE: tl.constexpr, TANH: tl.constexpr, COLUMNS: tl.constexpr,
    UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """:func:`_finish` in two parts: a wide tile leaves a thread no registers for all that is added
    to it at once."""
    left, right = _halves(sums)
    _finish(
        left, bias, extra, out, pre, rows, first, M, N, extra_row, span, width,
        GELU_OUT, SLOPE, TANH, COLUMNS // 2, UPSAMPLE,
    )  # fmt: skip
    _finish(
        right, bias, extra, out, pre, rows, first + COLUMNS // 2, M, N, extra_row, span, width,
        GELU_OUT, SLOPE, TANH, COLUMNS // 2, UPSAMPLE,
    )  # fmt: skip


@triton.jit
def _linear_tile(
    program, x, weight, bias, mean, rstd, ln_weight, ln_bias, extra, out, pre,
    M, N, K, x_row, w_row, extra_row, width,
    GELU_IN: tl.constexpr, GELU_OUT: tl.constexpr, SLOPE: tl.constexpr, TANH: tl.constexpr,
    TRANSPOSED: tl.constexpr, COLUMN_MASK: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = mean is not None
    OUT_UPSAMPLE: tl.constexpr = UPSAMPLE if TRANSPOSED else 1
    IN_UPSAMPLE: tl.constexpr = 1 if TRANSPOSED else UPSAMPLE
    span = N if TRANSPOSED else K
    N *= OUT_UPSAMPLE
    row_tile, column_tile = _ordered(program, tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    last = tl.minimum(rows, M - 1)
    if IN_UPSAMPLE > 1:
        a = x + _row_places(last, span, width, IN_UPSAMPLE)[:, None] + inner[None, :]
    else:
        a = x + (last.to(tl.int64) * x_row)[:, None] + inner[None, :]
    across = (columns < N)[None, :]
    if TRANSPOSED:
        b = weight + (tl.minimum(columns, N - 1).to(tl.int64) * w_row)[:, None] + inner[None, :]
        b_step = DEPTH
    else:
        b = weight + (inner.to(tl.int64) * w_row)[:, None] + columns[None, :]
        b_step = DEPTH * w_row
    centre = None
    inverse = None
    if NORM:
        centre = tl.load(mean + last)[:, None]
        inverse = tl.load(rstd + last)[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    whole = K // DEPTH * DEPTH
    b_taken = b_step * 0
    if IN_UPSAMPLE > 1:
        # One run of ``span`` channels after the other, each in blocks of its own.
        trips = tl.cdiv(span, DEPTH)
        for trip in range(0, trips * IN_UPSAMPLE):
            run = trip // trips
            taken = (trip - run * trips) * DEPTH
            sums = _linear_step(
                sums, a, b, run * width * span + taken, (run * span + taken) * w_row, taken,
                centre, inverse, ln_weight, ln_bias, across, span,
                NORM, GELU_IN, TANH, TRANSPOSED, COLUMN_MASK, DEPTH, TAIL, PRECISION,
            )  # fmt: skip
    else:
        for taken in range(0, whole, DEPTH):
            sums = _linear_step(
                sums, a, b, taken, b_taken, taken, centre, inverse, ln_weight, ln_bias, across, K,
                NORM, GELU_IN, TANH, TRANSPOSED, COLUMN_MASK, DEPTH, False, PRECISION,
            )  # fmt: skip
            b_taken += b_step
        if TAIL:  # noqa: SIM102, one is known when compiled, one is not
            if whole < K:
                sums = _linear_step(
                    sums, a, b, whole, b_taken, whole, centre, inverse, ln_weight, ln_bias, across,
                    K, NORM, GELU_IN, TANH, TRANSPOSED, COLUMN_MASK, DEPTH, True, PRECISION,
                )  # fmt: skip

    start = column_tile * COLUMNS
    if COLUMNS > 128:
        left, right = _halves(sums)
        _finish_halves(
            left, bias, extra, out, pre, rows, start, M, N, extra_row, span, width,
            GELU_OUT, SLOPE, TANH, COLUMNS // 2, OUT_UPSAMPLE,
        )  # fmt: skip
        _finish_halves(
            right, bias, extra, out, pre, rows, start + COLUMNS // 2, M, N, extra_row, span, width,
            GELU_OUT, SLOPE, TANH, COLUMNS // 2, OUT_UPSAMPLE,
        )  # fmt: skip
    else:
        _finish(
            sums, bias, extra, out, pre, rows, start, M, N, extra_row, span, width,
            GELU_OUT, SLOPE, TANH, COLUMNS, OUT_UPSAMPLE,
        )  # fmt: skip


@triton.jit
def linear_kernel(
    x, weight, bias, mean, rstd, ln_weight, ln_bias, extra, out, pre,
    M, N, K, x_row, w_row, extra_row, width,
    N_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr, W_UNIT: tl.constexpr, EXTRA_UNIT: tl.constexpr,
    GELU_IN: tl.constexpr, GELU_OUT: tl.constexpr, SLOPE: tl.constexpr, TANH: tl.constexpr,
    TRANSPOSED: tl.constexpr, COLUMN_MASK: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """``out = [gelu]([gelu](norm(x)) @ weight.T + bias) + extra``.

    Not TRANSPOSED: ``@ weight``. SLOPE: ``* gelu'(extra)`` in the place of the sum. ``pre``: what
    comes before GELU_OUT. Sizes and strides in units: Triton learns only whether a number divides
    by 16, and wants to know that rows begin at 16 bytes. UPSAMPLE beyond 1: out, or x where not
    TRANSPOSED, is shuffled, and its N or K is that of one run, ``span``.
    """
    _linear_tile(
        tl.program_id(0), x, weight, bias, mean, rstd, ln_weight, ln_bias, extra, out, pre,
        M, N * N_UNIT, K * K_UNIT,
        tl.cast(x_row, tl.int64) * X_UNIT, tl.cast(w_row, tl.int64) * W_UNIT,
        tl.cast(extra_row, tl.int64) * EXTRA_UNIT, width,
        GELU_IN, GELU_OUT, SLOPE, TANH, TRANSPOSED, COLUMN_MASK, TAIL,
        ROWS, COLUMNS, DEPTH, GROUP, PRECISION, UPSAMPLE,
    )  # fmt: skip


@triton.jit
def grouped_linear_kernel(
    table, problems,
    TYPE: tl.constexpr, BIAS: tl.constexpr, STATISTIC: tl.constexpr,
    LN_WEIGHT: tl.constexpr, LN_BIAS: tl.constexpr, EXTRA: tl.constexpr, PRE: tl.constexpr,
    UNIT: tl.constexpr,
    GELU_IN: tl.constexpr, GELU_OUT: tl.constexpr, SLOPE: tl.constexpr, TANH: tl.constexpr,
    TRANSPOSED: tl.constexpr, PROBLEMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`linear_kernel` for each problem of a table, see mlp_table.py.

    Dtypes of what the problems have, None for what none of them has.
    """
    at, program = problem_of(table, problems, tl.program_id(0), PROBLEMS)
    ALIGNED: tl.constexpr = UNIT > 1
    x = pointer(table, problems, at, "x", TYPE, ALIGNED)
    weight = pointer(table, problems, at, "weight", TYPE, ALIGNED)
    out = pointer(table, problems, at, "out", TYPE, ALIGNED)
    bias = pointer(table, problems, at, "bias", BIAS, ALIGNED)
    mean = pointer(table, problems, at, "mean", STATISTIC, False)
    rstd = pointer(table, problems, at, "rstd", STATISTIC, False)
    ln_weight = pointer(table, problems, at, "ln_weight", LN_WEIGHT, ALIGNED)
    ln_bias = pointer(table, problems, at, "ln_bias", LN_BIAS, ALIGNED)
    extra = pointer(table, problems, at, "extra", EXTRA, ALIGNED)
    pre = pointer(table, problems, at, "pre", PRE, ALIGNED)
    _linear_tile(
        program, x, weight, bias, mean, rstd, ln_weight, ln_bias, extra, out, pre,
        size(table, problems, at, "M"),
        size(table, problems, at, "N") * UNIT, size(table, problems, at, "K") * UNIT,
        field(table, problems, at, "x_row") * UNIT, field(table, problems, at, "w_row") * UNIT,
        field(table, problems, at, "extra_row") * UNIT, 1,
        GELU_IN, GELU_OUT, SLOPE, TANH, TRANSPOSED, True, True,
        ROWS, COLUMNS, DEPTH, GROUP, PRECISION, 1,
    )  # fmt: skip


# --- gradient of a weight -------------------------------------------------------------------------


@triton.jit
def _weight_step(
    sums, column_sums, grad, x, mean, rstd, row, limit, scale, shift, grad_row, x_row, down, across,
    width,
    NORM: tl.constexpr, GELU_IN: tl.constexpr, TANH: tl.constexpr, SUMS: tl.constexpr,
    DOWN_MASK: tl.constexpr, ACROSS_MASK: tl.constexpr,
    DEPTH: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Add the products of D more rows."""
    inner = tl.arange(0, DEPTH)
    if UPSAMPLE > 1:
        grad += _row_places(row + inner, grad_row, width, UPSAMPLE)[:, None]
    else:
        grad += tl.cast(row, tl.int64) * grad_row
    x += tl.cast(row, tl.int64) * x_row
    there = (inner < limit)[:, None]
    if MASKED:
        left = tl.load(grad, mask=there & down, other=0.0)
        right = tl.load(x, mask=there & across, other=0.0)
    else:
        left = tl.load(grad, mask=down, other=0.0) if DOWN_MASK else tl.load(grad)
        right = tl.load(x, mask=across, other=0.0) if ACROSS_MASK else tl.load(x)
    centre = None
    inverse = None
    if NORM:
        centre = _vector(mean + row, inner, limit, MASKED)[:, None]
        inverse = _vector(rstd + row, inner, limit, MASKED)[:, None]
    right = _activated(right, centre, inverse, scale, shift, NORM, GELU_IN, TANH)
    if SUMS:
        column_sums += left.to(tl.float32)
    sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    return sums, column_sums


@triton.jit
def _weight_loop(
    grad, x, mean, rstd, scale, shift, first, end, grad_row, x_row, down, across, width,
    NORM: tl.constexpr, GELU_IN: tl.constexpr, TANH: tl.constexpr, SUMS: tl.constexpr,
    DOWN_MASK: tl.constexpr, ACROSS_MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    UPSAMPLE: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    column_sums = tl.zeros((DEPTH, ROWS), tl.float32)
    whole = first + (end - first) // DEPTH * DEPTH
    for row in range(first, whole, DEPTH):
        sums, column_sums = _weight_step(
            sums, column_sums, grad, x, mean, rstd, row, DEPTH, scale, shift, grad_row, x_row,
            down, across, width, NORM, GELU_IN, TANH, SUMS, DOWN_MASK, ACROSS_MASK, DEPTH, False,
            PRECISION, UPSAMPLE,
        )  # fmt: skip
    if whole < end:
        sums, column_sums = _weight_step(
            sums, column_sums, grad, x, mean, rstd, whole, end - whole, scale, shift, grad_row,
            x_row, down, across, width, NORM, GELU_IN, TANH, SUMS, DOWN_MASK, ACROSS_MASK, DEPTH,
            True, PRECISION, UPSAMPLE,
        )  # fmt: skip
    return sums, column_sums


@triton.jit
def weight_grad_kernel(
    grad, x, mean, rstd, ln_weight, ln_bias, out, bias_out,
    M, N, K, grad_row, x_row, rows_each, width,
    N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    GELU_IN: tl.constexpr, TANH: tl.constexpr, SUMS: tl.constexpr,
    DOWN_MASK: tl.constexpr, ACROSS_MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """``out[part] = grad.T @ act(x)`` over a part of the rows; bias_out: column sums of grad.

    UPSAMPLE beyond 1: grad is shuffled, and N and grad_row are those of one run, ``span``.
    """
    NORM: tl.constexpr = mean is not None
    N *= N_UNIT
    span = N
    N *= UPSAMPLE
    K *= K_UNIT
    grad_row = tl.cast(grad_row, tl.int64) * GRAD_UNIT
    x_row = tl.cast(x_row, tl.int64) * X_UNIT
    row_tile, column_tile = _ordered(tl.program_id(0), tl.cdiv(N, ROWS), tl.cdiv(K, COLUMNS), GROUP)
    part = tl.program_id(1)
    first = part * rows_each
    end = tl.minimum(first + rows_each, M)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH).to(tl.int64)[:, None]
    down = (rows < N)[None, :]
    across = (columns < K)[None, :]
    if UPSAMPLE > 1:
        grad += _column_places(rows, span, width, UPSAMPLE)[None, :]
    else:
        grad += inner * grad_row + rows[None, :]
    x += inner * x_row + columns[None, :]
    scale = None
    shift = None
    if NORM:
        scale = _vector(ln_weight, columns[None, :], K, True)
        shift = _vector(ln_bias, columns[None, :], K, True)
    bias_out += part.to(tl.int64) * N
    # The sums of grad's columns are the business of one program of each row of tiles: the others'
    # loop does without.
    if SUMS and column_tile == 0:
        sums, column_sums = _weight_loop(
            grad, x, mean, rstd, scale, shift, first, end, grad_row, x_row, down, across, width,
            NORM, GELU_IN, TANH, True, DOWN_MASK, ACROSS_MASK, ROWS, COLUMNS, DEPTH, PRECISION,
            UPSAMPLE,
        )  # fmt: skip
        column_sums = tl.sum(column_sums, 0)
        tl.store(bias_out + rows, column_sums, mask=rows < N)
    else:
        sums, _ = _weight_loop(
            grad, x, mean, rstd, scale, shift, first, end, grad_row, x_row, down, across, width,
            NORM, GELU_IN, TANH, False, DOWN_MASK, ACROSS_MASK, ROWS, COLUMNS, DEPTH, PRECISION,
            UPSAMPLE,
        )  # fmt: skip
    out += part.to(tl.int64) * N * K
    at = (rows.to(tl.int64) * K)[:, None] + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(rows < N)[:, None] & across)
