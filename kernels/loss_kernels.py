"""The Triton functions of the balanced multi-teacher loss; ``loss.py`` launches them.

A program of :func:`compare_kernel` takes some comparison cells ("tokens") of one term. It reads
each prediction and each target once, resamples, normalises and masks them on the way, and writes
the tokens' losses and, as fused cross-entropies do, their part of the gradient of the *total*, with
every factor that is known by then: 1 / valid tokens, the image's share of its term, the term's
weight. A backward that brings no other factor has nothing left to do; :func:`scale_kernel` finds
that out on the device. No atomics, sums in a fixed order: two runs give the same bits.

The losses are those of ``fastagglo.ops.multi_teacher_loss``, which names the papers.

Letters: C channels, R tokens side by side, B channels side by side, I images of all terms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastagglo.kernels.loss_geometry import cell_of, count_of, target_resampled, target_taps
from fastagglo.kernels.loss_table import field, number, size, term_of, wide
from fastagglo.kernels.sampling import read, share_of, taps

# Numbers of kinds: places in KINDS of loss.py; mse is 0.
SMOOTH_L1 = tl.constexpr(1)
COSINE = tl.constexpr(2)
COSINE_SMOOTH_L1 = tl.constexpr(3)

COSINE_SHARE = tl.constexpr(0.9)  # of cosine_smooth_l1: AM-RADIO, arXiv 2312.06709
EPS = tl.constexpr(1e-8)  # a shorter vector has no direction
COSINE_LIMIT = tl.constexpr(1 - 1e-6)  # of "angular": the slope of arccos has no bound at +-1


# --- one token ------------------------------------------------------------------------------------


@triton.jit
def _arccos(x):
    """Arccos of abs(x) < 1, to 2e-8: Abramowitz and Stegun, 4.4.46; Triton has none of its own."""
    a = tl.abs(x)
    p = -0.0012624911 * a + 0.0066700901
    p = p * a - 0.0170881256
    p = p * a + 0.0308918810
    p = p * a - 0.0501743046
    p = p * a + 0.0889789874
    p = p * a - 0.2145988016
    p = p * a + 1.5707963050
    angle = tl.sqrt_rn(1.0 - a) * p
    return tl.where(x < 0, 3.14159265358979 - angle, angle)


@triton.jit
def _features(table, terms, term, NAME: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where features begin, and the strides of their images, rows and columns."""
    pointer = field(table, terms, term, NAME).to(tl.pointer_type(TYPE))
    of_image = field(table, terms, term, NAME + "_image")
    of_row = field(table, terms, term, NAME + "_row")
    of_column = field(table, terms, term, NAME + "_column")
    if ALIGNED:
        # What Triton cannot see in a table: loads of 16 bytes. A hint to what comes out of a load
        # is lost on the way, a product is not.
        pointer = tl.multiple_of(pointer, 16)
        of_image = of_image // 8 * 8
        of_row = of_row // 8 * 8
        of_column = of_column // 8 * 8
    return pointer, of_image, of_row, of_column


@triton.jit
def _source(features, image, by_row, by_column):
    """How images (R,) of features are read; see ``sampling.read``."""
    pointer, of_image, of_row, of_column = features
    return pointer + image.to(tl.int64) * of_image, of_row, of_column, by_row, by_column


@triton.jit
def _normaliser(table, terms, term):
    """What :func:`_normalised` wants to know: addresses, and one over a scale of all channels."""
    one_scale = field(table, terms, term, "one_scale")
    inverse = 1.0
    if one_scale != 0:
        inverse = 1.0 / tl.load(one_scale.to(tl.pointer_type(tl.float32)))
    return field(table, terms, term, "mean"), field(table, terms, term, "scale"), inverse


@triton.jit
def _normalised(t, normaliser, channels, inside, ALIGNED: tl.constexpr):
    """(t - mean) / scale of a target (R, B), if the term has them."""
    mean, scale, inverse = normaliser
    if mean != 0:
        # One for each token of the block: else they would go through shared memory.
        places = tl.broadcast_to(channels[None, :], t.shape)
        means = mean.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            means = tl.multiple_of(means, 16)
        t -= tl.load(means + places, mask=inside[None, :], other=0.0)
        if scale != 0:
            scales = scale.to(tl.pointer_type(tl.float32))
            if ALIGNED:
                scales = tl.multiple_of(scales, 16)
            t *= 1.0 / tl.load(scales + places, mask=inside[None, :], other=1.0)
        else:
            t *= inverse
    return t


@triton.jit
def _slope(difference, kind, limit, inverse):
    """Of the part of a loss that looks at channels singly, in units that its coefficient has.

    ``limit`` is beta, but not 0, and ``inverse`` one over it.
    """
    if kind == 0:
        slope = difference
    else:
        slope = tl.minimum(tl.maximum(difference, -limit), limit) * inverse
        # min and max drop NaN.
        slope = tl.where(difference == difference, slope, difference)
    return slope


@triton.jit
def _smooth_l1(difference, slope, beta):
    """With c = beta * slope both branches of smooth L1 are c (d - c / 2) / beta."""
    return slope * (difference - 0.5 * beta * slope)


@triton.jit
def _direction(kind, dot, norm_x, norm_t):
    """Loss of tokens (R,) by their angle, and the factors of x and of t in its gradient."""
    no_direction = (norm_x <= EPS) | (norm_t <= EPS)
    # Beside a vector of zeros NaN is to be seen, too.
    no_direction &= (norm_x == norm_x) & (norm_t == norm_t)
    product = tl.where(no_direction, 1.0, norm_x) * tl.where(no_direction, 1.0, norm_t)
    cosine = tl.where(no_direction, 0.0, dot / product)
    # min and max drop NaN, which is to be seen.
    cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    if kind == COSINE:
        loss = 1.0 - cosine
        slope = tl.zeros_like(cosine) - 1.0
    elif kind == COSINE_SMOOTH_L1:
        loss = COSINE_SHARE * (1.0 - cosine)
        slope = tl.zeros_like(cosine) - COSINE_SHARE
    else:
        limited = tl.where(tl.abs(cosine) > COSINE_LIMIT, COSINE_LIMIT * 1.0, tl.abs(cosine))
        limited = tl.where(cosine < 0, -limited, limited)
        angle = _arccos(limited)
        loss = angle * angle
        slope = -2.0 * angle / tl.sqrt_rn((1.0 - limited) * (1.0 + limited))
        slope = tl.where(tl.abs(cosine) > COSINE_LIMIT, 0.0, slope)
    # d cos / dx = (t / |t| - cos x / |x|) / |x|
    of_t = tl.where(no_direction, 0.0, slope / product)
    of_x = tl.where(
        no_direction, 0.0, -slope * cosine / tl.where(no_direction, 1.0, norm_x * norm_x)
    )
    return loss, of_x, of_t


@triton.jit
def _store_gradient(
    gradient, width, token, channels, value, inside, TYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Store the gradient (R, B) of cells of a prediction."""
    gradient = gradient.to(tl.pointer_type(TYPE))
    if ALIGNED:
        gradient = tl.multiple_of(gradient, 16)
    rows = gradient + token.to(tl.int64) * width
    tl.store(rows[:, None] + channels[None, :], value.to(TYPE), mask=inside)


@triton.jit
def compare_kernel(
    table, factors, losses, coefficients, terms,
    X: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    TERMS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, ALIGNED: tl.constexpr,
    RESAMPLE_X: tl.constexpr, RESAMPLE_T: tl.constexpr,
):  # fmt: skip
    """Losses of all tokens, fp32, and the gradients of predictions.

    For a prediction that is resized it stores what its gradient is made of, three coefficients of a
    token: ``of_x * x + of_t * t + of_slope * slope(x - t)``; see :func:`spread_kernel`. X, T and G
    are the dtypes of predictions, targets and gradients. CHUNKS: blocks that the channels of any
    term fit into, if some loss needs whole tokens, else 0. RESAMPLE: whether some term needs it.
    """
    term, part = term_of(table, terms, tl.program_id(0), "compare_start", TERMS)
    width = size(table, terms, term, "channels")
    if ALIGNED:
        width = width // 8 * 8
    kind = size(table, terms, term, "kind")
    beta = size(table, terms, term, "beta_bits").to(tl.float32, bitcast=True)
    limit = tl.maximum(beta, 1e-30)
    inverse = 1.0 / limit
    rows = size(table, terms, term, "rows")
    columns = size(table, terms, term, "columns")
    tokens = size(table, terms, term, "images") * (rows * columns)
    x_rows = size(table, terms, term, "prediction_rows")
    x_columns = size(table, terms, term, "prediction_columns")
    x_resampled = (rows != x_rows) | (columns != x_columns)
    t_resampled = target_resampled(table, terms, term)
    x_features = _features(table, terms, term, "prediction", X, ALIGNED)
    t_features = _features(table, terms, term, "target", T, ALIGNED)
    normaliser = _normaliser(table, terms, term)
    gradient = field(table, terms, term, "gradient")
    has_gradient = gradient != 0
    first_image = field(table, terms, term, "first_image")
    losses += field(table, terms, term, "first_token")
    coefficients += field(table, terms, term, "first_coefficient") * 3
    scale = 1.0 / width.to(tl.float32)

    begin = (part * TOKENS).to(tl.int32)
    for first in range(0, tl.minimum(tokens - begin, TOKENS), ROWS):
        token = begin + first + tl.arange(0, ROWS)
        here = token < tokens
        image, row, column = cell_of(token, rows, columns)
        t_row, t_column, live = target_taps(
            table, terms, term, image, row, column, here, RESAMPLE_T
        )
        x_row = (row, row, row.to(tl.float32) * 0)
        x_column = (column, column, row.to(tl.float32) * 0)
        if RESAMPLE_X:
            none = row.to(tl.float64) * 0
            if x_resampled:
                step = wide(table, terms, term, "row_step")
                low, high, weight, _ = taps(row, step, 1.0, x_rows, none)
                x_row = (low, high, weight)
                step = wide(table, terms, term, "column_step")
                low, high, weight, _ = taps(column, step, 1.0, x_columns, none)
                x_column = (low, high, weight)
        xs = _source(x_features, image, x_row, x_column)
        ts = _source(t_features, image, t_row, t_column)
        factor = tl.load(factors + first_image + image, mask=live, other=0.0)
        writes = has_gradient & (not x_resampled)

        loss = tl.zeros((ROWS,), tl.float32)
        of_x = tl.zeros((ROWS,), tl.float32)
        of_t = tl.zeros((ROWS,), tl.float32)
        of_slope = factor * scale * tl.where(kind == 0, 2.0, 1.0)
        if kind <= SMOOTH_L1:
            for start in range(0, width, BLOCK):
                channels = start + tl.arange(0, BLOCK)
                inside = channels < width
                both = live[:, None] & inside[None, :]
                x = read(xs, channels, both, x_resampled, RESAMPLE_X)
                t = read(ts, channels, both, t_resampled, RESAMPLE_T)
                t = _normalised(t, normaliser, channels, inside, ALIGNED)
                difference = tl.where(both, x - t, 0.0)
                slope = _slope(difference, kind, limit, inverse)
                if kind == 0:
                    loss += tl.sum(difference * difference, 1)
                else:
                    loss += tl.sum(_smooth_l1(difference, slope, beta), 1)
                if writes:
                    both = here[:, None] & inside[None, :]
                    value = slope * of_slope[:, None]
                    _store_gradient(gradient, width, token, channels, value, both, G, ALIGNED)
            loss *= scale
        elif CHUNKS > 0:
            x_blocks = ()
            t_blocks = ()
            square_x = tl.zeros((ROWS,), tl.float32)
            square_t = tl.zeros((ROWS,), tl.float32)
            dot = tl.zeros((ROWS,), tl.float32)
            for chunk in tl.static_range(CHUNKS):
                channels = chunk * BLOCK + tl.arange(0, BLOCK)
                inside = channels < width
                both = live[:, None] & inside[None, :]
                x = read(xs, channels, both, x_resampled, RESAMPLE_X)
                t = read(ts, channels, both, t_resampled, RESAMPLE_T)
                t = _normalised(t, normaliser, channels, inside, ALIGNED)
                t = tl.where(both, t, 0.0)
                x_blocks = x_blocks + (x,)
                t_blocks = t_blocks + (t,)
                square_x += tl.sum(x * x, 1)
                square_t += tl.sum(t * t, 1)
                dot += tl.sum(x * t, 1)
                if kind == COSINE_SMOOTH_L1:
                    slope = _slope(x - t, kind, limit, inverse)
                    loss += tl.sum(_smooth_l1(x - t, slope, beta), 1)
            by_angle, of_x, of_t = _direction(kind, dot, tl.sqrt_rn(square_x), tl.sqrt_rn(square_t))
            loss = tl.where(live, by_angle + loss * (scale * (1.0 - COSINE_SHARE)), 0.0)
            of_x *= factor
            of_t *= factor
            of_slope = tl.where(kind == COSINE_SMOOTH_L1, of_slope * (1.0 - COSINE_SHARE), 0.0)
            if writes:
                for chunk in tl.static_range(CHUNKS):
                    channels = chunk * BLOCK + tl.arange(0, BLOCK)
                    x, t = x_blocks[chunk], t_blocks[chunk]
                    value = x * of_x[:, None] + t * of_t[:, None]
                    if kind == COSINE_SMOOTH_L1:
                        slope = _slope(x - t, kind, limit, inverse)
                        value += slope * of_slope[:, None]
                    both = here[:, None] & (channels < width)[None, :]
                    _store_gradient(gradient, width, token, channels, value, both, G, ALIGNED)
        tl.store(losses + token, loss, mask=here)
        if RESAMPLE_X:
            place = coefficients + token.to(tl.int64) * 3
            keep = here & has_gradient & x_resampled
            tl.store(place, of_x, mask=keep)
            tl.store(place + 1, of_t, mask=keep)
            tl.store(place + 2, of_slope, mask=keep)


# --- the gradient of a resize ---------------------------------------------------------------------


@triton.jit
def _readers(cell, cells, source):
    """The comparison cells that may read ``cell``: from the first to before the last."""
    # Cell i has its centre at (i + 0.5) / ratio and reads the centres less than 1 away from it.
    # That holds beyond the outermost ones, too: half a cell is all there is.
    ratio = cells.to(tl.float64) / source.to(tl.float64)
    first = tl.maximum(tl.floor((cell - 0.5) * ratio - 0.501).to(tl.int32), 0)
    last = tl.minimum(tl.ceil((cell + 1.5) * ratio - 0.499).to(tl.int32), cells)
    return first, last


@triton.jit
def spread_kernel(
    table, coefficients, terms,
    X: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    TERMS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Gradients of predictions that were resized: a program sums up one cell, over its readers.

    It computes the readers' features again from what lies in the cache, instead of having their
    gradients written and read, which would take more memory than the predictions' own.
    """
    term, part = term_of(table, terms, tl.program_id(0), "spread_start", TERMS)
    width = size(table, terms, term, "channels")
    if ALIGNED:
        width = width // 8 * 8
    kind = size(table, terms, term, "kind")
    beta = size(table, terms, term, "beta_bits").to(tl.float32, bitcast=True)
    limit = tl.maximum(beta, 1e-30)
    inverse = 1.0 / limit
    rows = size(table, terms, term, "rows")
    columns = size(table, terms, term, "columns")
    x_rows = size(table, terms, term, "prediction_rows")
    x_columns = size(table, terms, term, "prediction_columns")
    t_resampled = target_resampled(table, terms, term)
    x_features = _features(table, terms, term, "prediction", X, ALIGNED)
    t_features = _features(table, terms, term, "target", T, ALIGNED)
    normaliser = _normaliser(table, terms, term)
    gradient = field(table, terms, term, "gradient")
    coefficients += field(table, terms, term, "first_coefficient") * 3
    cell = part.to(tl.int32)
    at = cell // (x_rows * x_columns)
    at_row = cell % (x_rows * x_columns) // x_columns
    at_column = cell % x_columns
    row_step = wide(table, terms, term, "row_step")
    column_step = wide(table, terms, term, "column_step")
    row_from, row_to = _readers(at_row, rows, x_rows)
    column_from, column_to = _readers(at_column, columns, x_columns)
    one = tl.zeros((1,), tl.int32)
    none = tl.zeros((1,), tl.float64)
    image = one + at
    for start in range(0, width, BLOCK):
        channels = start + tl.arange(0, BLOCK)
        inside = channels < width
        total = tl.zeros((1, BLOCK), tl.float32)
        for row in range(row_from, row_to):
            low, high, weight, _ = taps(one + row, row_step, 1.0, x_rows, none)
            x_row = (low, high, weight)
            down = tl.sum(share_of(at_row, low, high, weight), 0)
            for column in range(column_from, column_to):
                low, high, weight, _ = taps(one + column, column_step, 1.0, x_columns, none)
                x_column = (low, high, weight)
                share = down * tl.sum(share_of(at_column, low, high, weight), 0)
                token = (at * rows + row) * columns + column
                place = coefficients + token.to(tl.int64) * 3
                of_x = tl.load(place)
                of_t = tl.load(place + 1)
                of_slope = tl.load(place + 2)
                # Nothing of an invalid token may be read. NaN is not 0.
                some = (of_x != 0) | (of_t != 0) | (of_slope != 0)
                if (share != 0) & some:
                    t_row, t_column, _ = target_taps(
                        table, terms, term, image, one + row, one + column, one == 0, True
                    )
                    xs = _source(x_features, image, x_row, x_column)
                    ts = _source(t_features, image, t_row, t_column)
                    both = (one == 0)[:, None] & inside[None, :]
                    x = read(xs, channels, both, True, True)
                    t = read(ts, channels, both, t_resampled, True)
                    t = _normalised(t, normaliser, channels, inside, ALIGNED)
                    value = of_x * x + of_t * t + of_slope * _slope(x - t, kind, limit, inverse)
                    total += share * value
        token = one + (at * x_rows + at_row) * x_columns + at_column
        both = (one == 0)[:, None] & inside[None, :]
        _store_gradient(gradient, width, token, channels, total, both, G, ALIGNED)


# --- sums and scaling -----------------------------------------------------------------------------


@triton.jit
def collect_kernel(
    table, counts, shares, losses, per_image, per_term, terms,
    IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means over images' tokens, (I,), and over each term's images, (n,); fp32."""
    term = tl.program_id(0)
    images = size(table, terms, term, "images")
    first = field(table, terms, term, "first_image")
    cells = size(table, terms, term, "rows") * size(table, terms, term, "columns")
    dispersion = number(table, terms, term, "dispersion")
    losses += field(table, terms, term, "first_token")
    total = tl.zeros((IMAGES,), tl.float32)
    for start in range(0, images, IMAGES):
        image = start + tl.arange(0, IMAGES)
        live = image < images
        rows = losses + image.to(tl.int64) * cells
        sums = tl.zeros((IMAGES, BLOCK), tl.float32)
        for cell in range(0, cells, BLOCK):
            columns = cell + tl.arange(0, BLOCK)
            inside = live[:, None] & (columns < cells)[None, :]
            sums += tl.load(rows[:, None] + columns[None, :], mask=inside, other=0.0)
        count = count_of(table, counts, terms, term, image, live)
        mean = tl.sum(sums, 1) / (tl.maximum(count, 1.0) * dispersion)
        tl.store(per_image + first + image, mean, mask=live)
        total += mean * tl.load(shares + first + image, mask=live, other=0.0)
    tl.store(per_term + term, tl.sum(total, 0))


@triton.jit
def scale_kernel(
    table, grad_per_term, grad_per_image, shares, term_weights, terms,
    G: tl.constexpr, OUT: tl.constexpr, IN_PLACE: tl.constexpr, ALIGNED: tl.constexpr,
    TERMS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply the kept gradients by what the backward brings beyond what they hold already."""
    term, part = term_of(table, terms, tl.program_id(0), "scale_start", TERMS)
    elements = field(table, terms, term, "elements")  # of an image
    gradient = field(table, terms, term, "gradient").to(tl.pointer_type(G))
    out = field(table, terms, term, "out").to(tl.pointer_type(OUT))
    if ALIGNED:
        elements = elements // 8 * 8
        gradient = tl.multiple_of(gradient, 16)
        out = tl.multiple_of(out, 16)
    parts = (elements + PARTS * BLOCK - 1) // (PARTS * BLOCK)
    image = part // parts
    place = field(table, terms, term, "first_image") + image
    share = tl.load(shares + place)
    held = tl.load(term_weights + term) * share
    wanted = tl.load(grad_per_term + term) * share + tl.load(grad_per_image + place)
    # An image without a share has no valid token and a gradient of zeros, whatever is wanted. A
    # GPU's quotient of equals may be a bit off 1.
    factor = tl.where((held == 0) | (wanted == held), 1.0, wanted / held)
    if IN_PLACE:
        nothing_to_do = factor == 1.0
        if nothing_to_do:
            return
    first = part % parts * (PARTS * BLOCK)
    for start in range(first, tl.minimum(first + PARTS * BLOCK, elements), BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < elements
        value = tl.load(gradient + (image * elements + offsets), mask=inside).to(tl.float32)
        tl.store(out + (image * elements + offsets), (value * factor).to(OUT), mask=inside)
