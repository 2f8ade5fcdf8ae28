"""Which tokens merge: cosine similarity and row argmax in one kernel, selection in another.

Bipartite soft matching (ToMe, arXiv 2210.09461) of packed images of any mix of lengths. A round is
three launches, and the tokens then move in one of merge_move.py:

- :func:`norm_kernel`: one over the norm of every destination. A launch of its own because every
  tile of sources reads all destinations, and would square them anew.
- :func:`match_kernel`: each program takes a tile of one image's sources and walks over the image's
  destinations, a block at a time, products on tensor cores. No similarity leaves the program.
- :func:`select_kernel`: one program an image finds the most similar sources by radix select, gives
  every token its slot, and sorts the tokens by slot, so that means need no atomics.

Ties. The product of two tokens does not depend on where in a block they stand, so equal
destinations have equal similarity to a source, and the first of them is taken. The similarity of a
source to the destination that it took is then computed again, from these two rows alone together
with their norms: equal pairs have equal similarity, equal tokens exactly 1, and of equals the first
sources are merged. Cosines that are equal by arithmetic, of unlike tokens, may be rounded apart.

Nothing here waits for the device, and results are bit-equal from run to run. What the kernels come
to in machine code: ``pytest -s tests/kernels/test_merge_compiled.py``, or, for shapes of your own,
``python -m fastagglo.kernels.inspect launch module:function`` with a function that calls
:func:`match` on tensors of "meta".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastagglo.kernels.merge_move import on_device, segment_sum, stride_in_units
from fastagglo.kernels.merge_plan import (
    BITS,
    COLUMNS,
    DESTINATION,
    DESTINATION_LIST,
    DESTINATIONS,
    ENTRY,
    FIXED,
    FREE,
    LENGTH,
    MERGES,
    NORM_ROWS,
    ROLES,
    ROW,
    SOURCE,
    SOURCE_LIST,
    SOURCES,
    TOKEN,
    Plan,
    Round,
)
from fastagglo.kernels.tiles import arch_of

# Squares of norms below 1e-12: such a token has similarity 0 to all.
TINY = tl.constexpr(1e-24)

SELECT_ROWS = 2048  # at most 32,768, for counts of 16 bits


@triton.jit
def _rows_of(base, positions, row_stride, UNIT: tl.constexpr):
    """Where these rows begin, (R, 1). Strides come in units of 8 elements where they can: Triton
    learns only whether a number divides by 16, and wants to know that a row begins at 16 bytes."""
    return base + (positions.to(tl.int64) * row_stride * UNIT)[:, None]


@triton.jit
def norm_kernel(
    metric, work, buffer, table, inverse, row_stride, width,
    C: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``inverse[d] = 1 / |destination d|``, 0 for a tiny one, NaN for one with NaN."""
    program = tl.program_id(0)
    image = buffer + table + tl.load(buffer + work + program * 2) * COLUMNS
    first = tl.load(buffer + work + program * 2 + 1)
    rows = first + tl.arange(0, ROWS)
    inside = rows < tl.load(image + DESTINATIONS)
    place = tl.load(buffer + tl.load(image + DESTINATION_LIST) + rows, mask=inside, other=0)
    base = metric + tl.load(image + ENTRY).to(tl.int64) * row_stride * UNIT
    pointers = _rows_of(base, place, row_stride, UNIT)
    columns = tl.arange(0, CHANNELS)[None, :]
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for channel in range(0, width, CHANNELS):
        at = channel + columns
        x = tl.load(pointers + at, mask=at < C, other=0.0).to(tl.float32)
        squares += x * x
    square = tl.sum(squares, 1)
    result = tl.where(square < TINY, 0.0, 1.0 / tl.sqrt(square))
    tl.store(inverse + tl.load(image + DESTINATION) + rows, result, mask=inside)


@triton.jit
def _sortable(x):
    """int32 that, read as unsigned, order as these floats do; 0, below all, for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return tl.where(x == x, bits, 0)


@triton.jit
def _similarity(a, b, width, C: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Cosine of each row of a to that of b, times its magnitude: as good an order, and 1 for equal
    rows however their squares are rounded."""
    columns = tl.arange(0, CHANNELS)[None, :]
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    a_squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    b_squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for channel in range(0, width, CHANNELS):
        at = channel + columns
        u = tl.load(a + at, mask=at < C, other=0.0).to(tl.float32)
        v = tl.load(b + at, mask=at < C, other=0.0).to(tl.float32)
        products += u * v
        a_squares += u * u
        b_squares += v * v
    product = tl.sum(products, 1)
    a_square = tl.sum(a_squares, 1)
    b_square = tl.sum(b_squares, 1)
    tiny = (a_square < TINY) | (b_square < TINY)
    cosine = tl.div_rn(tl.abs(product), a_square) * tl.div_rn(product, b_square)
    return tl.where(tiny, 0.0, cosine)


@triton.jit
def match_kernel(
    metric, inverse, work, buffer, table, keys, partners, row_stride, width,
    C: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    PAIR_CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Position of the most similar destination of each source, and how similar it is."""
    program = tl.program_id(0)
    image = buffer + table + tl.load(buffer + work + program * 2) * COLUMNS
    first = tl.load(buffer + work + program * 2 + 1)
    rows = first + tl.arange(0, ROWS)
    inside = rows < tl.load(image + SOURCES)
    destinations = tl.load(image + DESTINATIONS)
    listed = buffer + tl.load(image + DESTINATION_LIST)
    inverse += tl.load(image + DESTINATION)
    base = metric + tl.load(image + ENTRY).to(tl.int64) * row_stride * UNIT
    # A row or column that is not there stands for position 0, and its result goes nowhere: loads
    # of the loop need no mask.
    place = tl.load(buffer + tl.load(image + SOURCE_LIST) + rows, mask=inside, other=0)
    a = _rows_of(base, place, row_stride, UNIT)
    channels = tl.arange(0, CHANNELS)[None, :]
    WHOLE: tl.constexpr = C // CHANNELS * CHANNELS
    whole = width // CHANNELS * CHANNELS

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    number = tl.zeros((ROWS,), tl.int32)
    for block in range(0, destinations, BLOCK_COLUMNS):
        columns = block + tl.arange(0, BLOCK_COLUMNS)
        there = columns < destinations
        b = _rows_of(base, tl.load(listed + columns, mask=there, other=0), row_stride, UNIT)
        sums = tl.zeros((ROWS, BLOCK_COLUMNS), tl.float32)
        for channel in range(0, whole, CHANNELS):
            u = tl.load(a + (channel + channels))
            v = tl.load(b + (channel + channels))
            sums = tl.dot(u, tl.trans(v), sums, input_precision=PRECISION)
        if WHOLE < C:
            u = tl.load(a + (WHOLE + channels), mask=WHOLE + channels < C, other=0.0)
            v = tl.load(b + (WHOLE + channels), mask=WHOLE + channels < C, other=0.0)
            sums = tl.dot(u, tl.trans(v), sums, input_precision=PRECISION)
        # NaN for a column that is not there, as for one with NaN: a maximum passes it over.
        sums *= tl.load(inverse + columns, mask=there, other=float("nan"))[None, :]
        top = tl.max(sums, 1)
        leftmost = tl.where(sums == top[:, None], columns[None, :], 2147483647)
        better = top > best  # not where equal: the lowest destination stays
        number = tl.where(better, tl.min(leftmost, 1), number)
        best = tl.where(better, top, best)

    partner = tl.load(listed + number)
    b = _rows_of(base, partner, row_stride, UNIT)
    key = _sortable(_similarity(a, b, width, C, PAIR_CHANNELS, ROWS))
    own = tl.load(image + SOURCE) + rows
    tl.store(keys + own, key, mask=inside)
    tl.store(partners + own, partner, mask=inside)


# --- selection ------------------------------------------------------------------------------------


@triton.jit
def _threshold(keys, count, take, BLOCK: tl.constexpr):
    """The ``take``-th largest of these keys, and how many equal to it are among the ``take``."""
    bins = tl.arange(0, 256)
    prefix = tl.full((), 0, tl.int64)
    for step in tl.static_range(4):
        histogram = tl.zeros((256,), tl.int32)
        for block in range(0, count, BLOCK):
            rows = block + tl.arange(0, BLOCK)
            key = tl.load(keys + rows, mask=rows < count, other=0)
            key = key.to(tl.uint32, bitcast=True).to(tl.int64)
            # A row that is not there is 0, below all: it moves no threshold.
            among = (key >> (32 - 8 * step)) == prefix
            histogram += tl.histogram(
                ((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=among
            )
        from_here = tl.sum(histogram) - tl.cumsum(histogram) + histogram
        digit = tl.sum((from_here >= take).to(tl.int32)) - 1
        take -= tl.sum(tl.where(bins > digit, histogram, 0))
        prefix = prefix * 256 + digit
    return prefix, take


@triton.jit
def _digit_counts(packed):
    """Four counts of 16 bits each, as four numbers."""
    total = tl.sum(packed)
    return total & 65535, (total >> 16) & 65535, (total >> 32) & 65535, (total >> 48) & 65535


@triton.jit
def _sort_by_slot(items, length, bits, T, BLOCK: tl.constexpr):
    """Stable radix sort, two bits a pass, of (slot << 32 | token), back and forth between
    items[0 : length] and items[T : T + length]; returns where the sorted ones are."""
    step = tl.full((), 0, tl.int32)
    for shift in range(0, bits, 2):
        source = items + (step % 2).to(tl.int64) * T
        target = items + (1 - step % 2).to(tl.int64) * T
        n0 = tl.full((), 0, tl.int64)
        n1 = tl.full((), 0, tl.int64)
        n2 = tl.full((), 0, tl.int64)
        for block in range(0, length, BLOCK):
            rows = block + tl.arange(0, BLOCK)
            item = tl.load(source + rows, mask=rows < length, other=0)
            digit = (item >> (32 + shift)) & 3
            one = tl.full((BLOCK,), 1, tl.int64) << (16 * digit)
            m0, m1, m2, _ = _digit_counts(tl.where(rows < length, one, 0))
            n0 += m0
            n1 += m1
            n2 += m2
        # Where the next item of each digit goes.
        n2 += n0 + n1
        n1 += n0
        p0 = tl.full((), 0, tl.int64)
        p1 = n0
        p2 = n1
        p3 = n2
        for block in range(0, length, BLOCK):
            rows = block + tl.arange(0, BLOCK)
            item = tl.load(source + rows, mask=rows < length, other=0)
            digit = (item >> (32 + shift)) & 3
            one = tl.full((BLOCK,), 1, tl.int64) << (16 * digit)
            one = tl.where(rows < length, one, 0)
            rank = ((tl.cumsum(one) >> (16 * digit)) & 65535) - 1
            begin = tl.where(digit < 2, tl.where(digit == 0, p0, p1), tl.where(digit == 2, p2, p3))
            tl.store(target + begin + rank, item, mask=rows < length)
            m0, m1, m2, m3 = _digit_counts(one)
            p0 += m0
            p1 += m1
            p2 += m2
            p3 += m3
        tl.debug_barrier()  # all threads see what each has stored
        step += 1
    return items + (step % 2).to(tl.int64) * T


@triton.jit
def select_kernel(
    keys, partners, buffer, table, images, used, T, slots,
    moved, items, index, slot, order, starts,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots of one image's tokens after a round, and its tokens in the order of their slots.

    ``index`` holds the slots before the round, unless it is the first. The last program does the
    rows of no image: slots of -1, and the last place in the order.
    """
    program = tl.program_id(0)
    if program == images:
        tl.store(starts + slots, used)
        for block in range(used, T, BLOCK):
            rows = block + tl.arange(0, BLOCK)
            none = tl.full((BLOCK,), -1, tl.int64)
            tl.store(index + rows, none, mask=rows < T)
            tl.store(slot + rows, none, mask=rows < T)
            tl.store(order + rows, rows, mask=rows < T)
        return
    image = buffer + table + program * COLUMNS
    token = tl.load(image + TOKEN)
    length = tl.load(image + LENGTH)
    fixed = tl.load(image + FIXED)
    free = tl.load(image + FREE)
    merges = tl.load(image + MERGES)
    roles = buffer + tl.load(image + ROLES)
    keys += tl.load(image + SOURCE)
    partners += tl.load(image + SOURCE)
    moved += token
    items += token
    index += token
    slot += token

    # Where each unprotected position goes; of a merged one -1 - the position of its partner.
    least, room = _threshold(keys, tl.load(image + SOURCES), merges, BLOCK)
    tied = 0
    kept = 0
    for block in range(0, free, BLOCK):
        rows = block + tl.arange(0, BLOCK)
        there = rows < free
        role = tl.load(roles + rows, mask=there & (merges > 0), other=-1)
        key = tl.load(keys + role, mask=role >= 0, other=0)
        key = key.to(tl.uint32, bitcast=True).to(tl.int64)
        same = (role >= 0) & (key == least)
        # Ties: the first ones go, as far as there is room.
        rank = tied + tl.cumsum(same.to(tl.int32))
        gone = (role >= 0) & ((key > least) | (same & (rank <= room)))
        partner = tl.load(partners + role, mask=gone, other=0)
        stays = (there & (gone == 0)).to(tl.int32)
        place = kept + tl.cumsum(stays) - 1
        tl.store(moved + rows, tl.where(gone, -1 - partner, place), mask=there)
        tied += tl.sum(same.to(tl.int32))
        kept += tl.sum(stays)
    tl.debug_barrier()

    row = tl.load(image + ROW)
    for block in range(0, length, BLOCK):
        rows = block + tl.arange(0, BLOCK)
        there = rows < length
        before = rows if FIRST else tl.load(index + rows, mask=there, other=0).to(tl.int32)
        position = before - fixed
        place = tl.load(moved + position, mask=there & (position >= 0), other=0)
        into = tl.load(moved + (-1 - place), mask=there & (place < 0), other=0)
        place = tl.where(place < 0, into, place)
        after = tl.where(position >= 0, place + fixed, before).to(tl.int64)
        tl.store(index + rows, after, mask=there)
        tl.store(slot + rows, after + row, mask=there)
        tl.store(items + rows, (after << 32) | rows, mask=there)
    tl.debug_barrier()

    items = _sort_by_slot(items, length, tl.load(image + BITS), T, BLOCK)
    for block in range(0, length, BLOCK):
        rows = block + tl.arange(0, BLOCK)
        there = rows < length
        item = tl.load(items + rows, mask=there, other=0)
        tl.store(order + token + rows, token + item.to(tl.int32), mask=there)
        own = (item >> 32).to(tl.int32)
        left = tl.load(items + rows - 1, mask=there & (rows > 0), other=-1)
        starting = there & (own != (left >> 32).to(tl.int32))
        tl.store(starts + row + own, token + rows, mask=starting)


# --- launchers ------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Block sizes of :func:`match_kernel`.

    Attributes:
        rows: sources that a program owns.
        columns: destinations that one trip of its loop takes in.
        channels: of both, that one product takes in.
        warps, stages: as in `tiles.Tile`.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


# By generation, the latest that is not newer than the GPU's, for elements of 2 and of 4 bytes.
TILES = {
    80: {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 16, 4, 2)},
    86: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 16, 4, 2)},
    90: {2: Tile(128, 256, 64, 8, 3), 4: Tile(64, 64, 16, 4, 2)},
    100: {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 16, 4, 2)},
    120: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 16, 4, 2)},
}


def tiles_for(metric: Tensor) -> tuple[Tile, Tile]:
    """The table's block sizes for what is compared, and for the float32 of later rounds."""
    arch = arch_of(metric)
    found = TILES[max(entry for entry in TILES if entry <= arch)]
    return found[metric.element_size()], found[4]


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels compare and move tokens of this dtype."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32)


def match(
    metric: Tensor,
    size: Tensor | None,
    buffer: Tensor,
    plan: Plan,
    *,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots of the tokens after all rounds of a plan.

    Launches three kernels a round, and one more between two rounds, for the means that the next
    one compares. Where nothing is to be merged there is one launch.

    Args:
        metric: (T, D) with a unit last stride, bfloat16, float16 or float32: what is compared.
        size: (T,) float32, or None for ones; read where there are several rounds.
        buffer: ``plan.buffer``, on the device of ``metric``.
        plan: of T tokens or fewer; the others belong to no image.
        tiles: block sizes of the first round and of later ones, with the rows that the plan was
            made for; default: the table's.

    Returns:
        The slot of each token within its image and among all slots, (T,) int64, -1 for tokens of no
        image; the tokens in the order of their slots, within a slot by position, those of no image
        last, (T,) int32; and where each slot begins in that order, (slots + 1,) int32.
    """
    tiles = tiles or tiles_for(metric)
    if (tiles[0].rows, tiles[1].rows) != plan.tile_rows:
        raise ValueError(f"the plan is for tiles of {plan.tile_rows} rows, got {tiles}")
    tokens = metric.shape[0]
    index, slot = (metric.new_empty(tokens, dtype=torch.int64) for _ in range(2))
    order, moved = (metric.new_empty(tokens, dtype=torch.int32) for _ in range(2))
    items = metric.new_empty(2 * tokens, dtype=torch.int64)
    starts = order  # not read before the first round has made its own
    compared = metric
    with on_device(metric):
        for number, part in enumerate(plan.rounds):
            if number:
                compared, _ = segment_sum(
                    metric, order, starts, size=size, mean=True, dtype=torch.float32
                )
            keys, partners = _compare(compared, buffer, part, tiles[number > 0])
            starts = metric.new_empty(part.rows + 1, dtype=torch.int32)
            select_kernel[(plan.images + 1,)](
                keys, partners, buffer, part.table, plan.images, plan.tokens, tokens, part.rows,
                moved, items, index, slot, order, starts,
                FIRST=number == 0, BLOCK=SELECT_ROWS, num_warps=8, num_stages=1,
            )  # fmt: skip
    return index, slot, order, starts


def _compare(compared: Tensor, buffer: Tensor, part: Round, tile: Tile) -> tuple[Tensor, Tensor]:
    """Sortable similarity of each source of a round, and the position of its destination."""
    keys, partners = (compared.new_empty(part.sources, dtype=torch.int32) for _ in range(2))
    if part.match_programs == 0:
        return keys, partners
    inverse = compared.new_empty(part.destinations, dtype=torch.float32)
    channels = compared.shape[1]
    row_stride, unit = stride_in_units(compared)
    norm_kernel[(part.norm_programs,)](
        compared, part.norm_work, buffer, part.table, inverse, row_stride, channels,
        C=channels, UNIT=unit, ROWS=NORM_ROWS, CHANNELS=64, num_warps=4, num_stages=1,
    )  # fmt: skip
    match_kernel[(part.match_programs,)](
        compared, inverse, part.match_work, buffer, part.table, keys, partners,
        row_stride, channels,
        C=channels, UNIT=unit, ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, CHANNELS=tile.channels,
        PAIR_CHANNELS=16 if tile.rows >= 128 else 32, PRECISION="ieee",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return keys, partners
