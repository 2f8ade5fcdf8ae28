"""Where the windows of packed grids lie: arithmetic on numpy arrays for `PackedLayout.windowed`.

Apart from `layout.py` to keep that file to the layout itself.
"""

from __future__ import annotations

import numpy as np


def window_rows(grids: np.ndarray, window: int) -> np.ndarray:
    """Rows of each window, (windows,) int64: image by image, window by window, row by row.

    Args:
        grids: (images, 2) int64, rows and columns of each.
        window: rows and columns of a window; those at the lower and right border may have fewer.
    """
    down, across = (-(-grids // window)).T
    counts = down * across
    image = np.repeat(np.arange(len(grids)), counts)
    row, column = np.divmod(np.arange(image.size) - _starts(counts)[image], across[image])
    sides = np.minimum(grids[image] - window * np.stack([row, column], axis=1), window)
    return sides.prod(axis=1)


def window_positions(grids: np.ndarray, window: int) -> np.ndarray:
    """The place in window order of each packed row, (rows,) int64; arguments as above."""
    # The divisions are done once for each size of grid: of a thousand images few differ.
    codes, size_of = np.unique(grids[:, 0] << 32 | grids[:, 1], return_inverse=True)
    sizes = np.stack([codes >> 32, codes & 0xFFFFFFFF], axis=1)
    places = _places(sizes, window)
    counts = grids.prod(axis=1)
    starts = _starts(counts)
    ahead = np.repeat(_starts(sizes.prod(axis=1))[size_of] - starts, counts)
    ahead += np.arange(ahead.size)
    return places[ahead] + np.repeat(starts, counts)


def _places(grids: np.ndarray, window: int) -> np.ndarray:
    """The place in window order within its image of each row of packed images."""
    counts = grids.prod(axis=1)
    height, width = np.repeat(grids, counts, axis=0).T
    row, column = np.divmod(np.arange(height.size) - np.repeat(_starts(counts), counts), width)
    top, left = row - row % window, column - column % window
    # Ahead of a row: the windows above, each band of which is as wide as the grid; the windows to
    # the left, as high as this one; and this window's own rows.
    high, wide = np.minimum(height - top, window), np.minimum(width - left, window)
    return top * width + left * high + (row - top) * wide + (column - left)


def _starts(counts: np.ndarray) -> np.ndarray:
    return counts.cumsum() - counts
