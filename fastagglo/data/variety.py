"""Does a photo show anything? Few of its pixels tell."""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def first_columns(image: Image | np.ndarray, count: int) -> Image | np.ndarray:
    """The first columns of an image."""
    if isinstance(image, np.ndarray):
        return image[:, :count]
    return image if count == image.width else image.crop((0, 0, count, image.height))


def varies(image: Image | np.ndarray, height: int, least: float) -> bool:
    """Whether a few pixels show that ``spread`` is at least ``least``. False if they do not.

    Args:
        image: the first rows of an image, or all of them.
        height: rows of the whole image.
        least: a standard deviation.
    """
    if not isinstance(image, np.ndarray):
        return False
    places, all_places = _few(height, image.shape[1], len(image))
    if image.flags.c_contiguous:
        green = image.reshape(-1).take(places[2]).astype(np.int64)
    else:
        green = image[places[0], places[1], 1].astype(np.int64)
    squares = len(green) * int(green @ green) - int(green.sum()) ** 2  # len ** 2 * variance
    # As if none of the others were away from the mean: together they vary at least so much.
    return len(green) > 0 and squares >= len(green) * all_places * least**2


@lru_cache(maxsize=256)
def _few(height: int, width: int, present: int) -> tuple[tuple[np.ndarray, ...], int]:
    """Of the ``_grid`` of an image of which the first rows are present, every 16th pixel in them:
    rows, columns, places of the green values in memory; and how many pixels the grid has."""
    rows, columns = _grid(height, width)
    few = slice(0, int(np.searchsorted(rows, present)), 16)
    return (rows[few], columns[few], (rows[few] * width + columns[few]) * 3 + 1), len(rows)


def spread(image: Image | np.ndarray) -> float:
    """The largest standard deviation of a colour channel, from at most 64 x 64 of the pixels."""
    if isinstance(image, np.ndarray):
        some = image[_grid(*image.shape[:2])]
    else:
        from PIL.Image import Resampling

        size = (min(64, image.width), min(64, image.height))
        some = np.asarray(image.resize(size, Resampling.NEAREST))
    # In whole numbers, channel by channel: a tenth of the cost of numpy's std over the last axis.
    values = np.ascontiguousarray(some.reshape(-1, 3).T, dtype=np.int32)
    count, total = values.shape[1], values.sum(axis=1, dtype=np.int64)
    squares = np.einsum("cn,cn->c", values, values)  # below 2 ** 31: 64 * 64 * 255 ** 2
    return sqrt(int((count * squares.astype(np.int64) - total**2).max())) / count


@lru_cache(maxsize=64)
def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows, which rise, and columns of at most 64 x 64 pixels, evenly over an image."""
    rows, columns = (
        ((np.arange(count) + 0.5) * (side / count)).astype(np.int64)
        for side in (height, width)
        for count in [min(64, side)]
    )
    return np.repeat(rows, len(columns)), np.tile(columns, len(rows))
