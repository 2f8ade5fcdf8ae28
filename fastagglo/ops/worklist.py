"""The tiles of a packed layout, in the order in which a kernel should take them.

Apart from `layout.py` because it is arithmetic on numpy arrays alone, which needs no tensors, and
because its order and its bound are what the kernels rely on.
"""

from __future__ import annotations

import numpy as np

SHORT_TILE, LONG_TILE = 64, 128


def max_tiles(capacity: int, segments: int) -> int:
    """The most tiles of 128 rows that so many segments can have in so many rows, spare ones too.

    Reached when all stretches but one (the spare rows behind the last segment are a stretch) hold
    one row, a tile for each, and the last one fills whole tiles and begins one more.
    """
    stretches = min(segments + 1, capacity)
    return stretches + (capacity - stretches) // LONG_TILE


def count_tiles(boundaries: np.ndarray, capacity: int, tile_rows: int) -> int:
    """Tiles that hold rows: those of the segments and of the spare rows behind them."""
    lengths = np.diff(boundaries.astype(np.int64), append=capacity)
    return int(((lengths + (tile_rows - 1)) // tile_rows).sum())


def build_tiles(
    boundaries: np.ndarray, capacity: int, tile_rows: int, size: int | None
) -> np.ndarray:
    """The work list: (size or live tiles, 4) int32.

    A row is ``[first packed row of the segment, rows of the segment, first row of the tile within
    the segment, segment]``. Longest segment first, so that the last tiles to start are short; then
    the rows from the last boundary to ``capacity`` as a segment -1; then dead rows
    ``[0, 0, 0, -1]`` up to ``size``.

    Args:
        boundaries: (segments + 1,) integers from 0 that do not decrease.
        capacity: rows of the packed tensors.
        tile_rows: rows of a tile; the last tile of a segment may hold fewer.
        size: rows of the work list, at least the live ones, or None for just those.
    """
    starts = boundaries.astype(np.int64)
    lengths = starts[1:] - starts[:-1]
    shorter_by = lengths.max(initial=0) - lengths
    if shorter_by.max(initial=0) < 2**16:
        shorter_by = shorter_by.astype(np.uint16)  # numpy sorts 16 bits by radix, in half the time
    order = np.argsort(shorter_by, kind="stable")

    # Segments, spare rows, dead rows: repeated as often as each has tiles.
    stretches = np.empty((order.size + 2, 4), dtype=np.int32)
    stretches[:-2, 0] = starts[order]
    stretches[:-2, 1] = lengths[order]
    stretches[:-2, 3] = order
    stretches[-2] = starts[-1], capacity - starts[-1], 0, -1
    stretches[-1] = 0, 0, 0, -1
    counts = (stretches[:, 1].astype(np.int64) + (tile_rows - 1)) // tile_rows
    ends = counts.cumsum()
    live = int(ends[-1])
    counts[-1] = 0 if size is None else size - live
    stretches[:-1, 2] = (counts - ends)[:-1]  # minus the position of a stretch's first tile
    tiles = np.repeat(stretches, counts, axis=0)
    offsets = tiles[:live, 2]
    offsets += np.arange(live, dtype=np.int32)
    offsets *= tile_rows
    return tiles
