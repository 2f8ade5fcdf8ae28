"""Which tokens of the multi-teacher loss count, for how much, and where they read their target.

Letters: R tokens side by side, I images of all terms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastagglo.kernels.loss_table import field, number, size, term_of, wide
from fastagglo.kernels.sampling import taps


@triton.jit
def cell_of(token, rows, columns):
    """Image, row and column of a comparison cell."""
    image = token // (rows * columns)
    cell = token - image * (rows * columns)
    row = cell // columns
    return image, row, cell - row * columns


@triton.jit
def target_resampled(table, terms, term):
    rows = size(table, terms, term, "rows") != size(table, terms, term, "target_rows")
    columns = size(table, terms, term, "columns") != size(table, terms, term, "target_columns")
    return rows | columns | (field(table, terms, term, "shift") != 0)


@triton.jit
def target_taps(table, terms, term, image, row, column, live, RESAMPLE: tl.constexpr):
    """How tokens (R,) read the target: taps of rows and of columns, and which tokens count."""
    by_row = (row, row, row.to(tl.float32) * 0)
    by_column = (column, column, row.to(tl.float32) * 0)
    if RESAMPLE:
        shift = field(table, terms, term, "shift")
        if target_resampled(table, terms, term):
            down = row.to(tl.float64) * 0
            right = down
            if shift != 0:
                place = shift.to(tl.pointer_type(tl.float64))
                place += image * field(table, terms, term, "shift_stride")
                down = tl.load(place, mask=live, other=0.0)
                right = tl.load(place + 1, mask=live, other=0.0)
            step = wide(table, terms, term, "row_step")
            ratio = wide(table, terms, term, "row_ratio")
            source = size(table, terms, term, "target_rows")
            low, high, weight, inside = taps(row, step, ratio, source, down)
            by_row = (low, high, weight)
            live = live & inside
            step = wide(table, terms, term, "column_step")
            ratio = wide(table, terms, term, "column_ratio")
            source = size(table, terms, term, "target_columns")
            low, high, weight, inside = taps(column, step, ratio, source, right)
            by_column = (low, high, weight)
            live = live & inside
    valid = field(table, terms, term, "valid")
    if valid != 0:
        cells = valid.to(tl.pointer_type(tl.int8))
        cells += image * field(table, terms, term, "valid_image")
        row_stride = field(table, terms, term, "valid_row")
        column_stride = field(table, terms, term, "valid_column")
        # Both taps are one cell where a weight is zero: a cell without a share may be invalid.
        for i in tl.static_range(2 if RESAMPLE else 1):
            for j in tl.static_range(2 if RESAMPLE else 1):
                cell = cells + by_row[i] * row_stride + by_column[j] * column_stride
                live = live & (tl.load(cell, mask=live, other=0) != 0)
    return by_row, by_column, live


@triton.jit
def count_kernel(table, counts, terms, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Valid tokens (I,) of the images of terms with a mask or a shift, in fp32."""
    term, image = term_of(table, terms, tl.program_id(0), "count_start", TERMS)
    rows = size(table, terms, term, "rows")
    columns = size(table, terms, term, "columns")
    cells = rows * columns
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, cells, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        _, row, column = cell_of(cell, rows, columns)
        images = cell.to(tl.int64) * 0 + image
        _, _, live = target_taps(table, terms, term, images, row, column, cell < cells, True)
        total += live.to(tl.int32)
    place = field(table, terms, term, "first_image") + image
    tl.store(counts + place, tl.sum(total, 0).to(tl.float32))


@triton.jit
def count_of(table, counts, terms, term, image, live):
    """Valid tokens of images, fp32."""
    cells = size(table, terms, term, "rows") * size(table, terms, term, "columns")
    count = tl.zeros_like(image).to(tl.float32) + cells
    counted = field(table, terms, term, "valid") | field(table, terms, term, "shift")
    if counted != 0:
        place = counts + field(table, terms, term, "first_image") + image
        count = tl.load(place, mask=live, other=0.0)
    return tl.where(live, count, 0.0)


@triton.jit
def weigh_kernel(
    table, counts, image_weights, shares, factors, term_weights, terms, BLOCK: tl.constexpr
):
    """What images count for, (I,) each, and the factor that the gradients have of the term, (n,).

    The square root of the valid tokens' number, the image's share of its term, the factor of a
    token's gradient.
    """
    term = tl.program_id(0)
    images = size(table, terms, term, "images")
    first = field(table, terms, term, "first_image")
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, images, BLOCK):
        image = start + tl.arange(0, BLOCK)
        live = image < images
        weight = tl.sqrt_rn(count_of(table, counts, terms, term, image, live))
        tl.store(image_weights + first + image, weight, mask=live)
        total += weight
    denominator = number(table, terms, term, "denominator")
    if denominator < 0:  # none is given
        denominator = tl.sum(total, 0)
    denominator = tl.where(denominator == 0, 1.0, denominator)
    term_weight = number(table, terms, term, "weight")
    # The total does not see a term of weight 0, but something else may.
    term_weight = tl.where(term_weight == 0, 1.0, term_weight)
    tl.store(term_weights + term, term_weight)
    dispersion = number(table, terms, term, "dispersion")
    for start in range(0, images, BLOCK):
        image = start + tl.arange(0, BLOCK)
        live = image < images
        count = count_of(table, counts, terms, term, image, live)
        share = tl.sqrt_rn(count) / denominator
        tl.store(shares + first + image, share, mask=live)
        factor = term_weight * share / (tl.maximum(count, 1.0) * dispersion)
        tl.store(factors + first + image, factor, mask=live)
