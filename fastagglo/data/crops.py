"""Crop geometry: one box for the student and all its teachers, with known shifts between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastagglo.data.plan import check_float

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SHIFT = 0.25
"""Shifts end at this part of the view, so that any two views share half their rows and columns."""

_TRIES = 10  # draws of size and aspect before the largest box that fits is taken


class Box(NamedTuple):
    """A rectangle in an image, in its pixels; edges may lie between pixels."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class CropRange:
    """What random crops are drawn from (Inception crops, arXiv 1409.4842).

    Attributes:
        scale: smallest and largest area, as a share of the allowed area.
        ratio: smallest and largest width over height.
        flip: probability of a horizontal flip.
    """

    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        _check_range("scale", self.scale, 1.0)
        _check_range("ratio", self.ratio, float("inf"))
        check_float("flip", self.flip, 0.0, 1.0)


def _check_range(name: str, value: object, most: float) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (low, high), got {value!r}")
    low, high = (check_float(f"{name}[{i}]", v, 0.0, most) for i, v in enumerate(value))
    if not 0 < low <= high:
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high, got ({low}, {high})")


@dataclass(frozen=True)
class Views:
    """The boxes of one image.

    Attributes:
        boxes: one per view, the student's first; all of one extent.
        cells: ``(views, 2)`` ints: the shift of each view, (dy, dx), in student patches.
        flip: whether every view is mirrored left to right.
    """

    boxes: list[Box]
    cells: np.ndarray
    flip: bool

    def relative_shifts(self) -> np.ndarray:
        """``(views - 1, 2)``: where each other view starts relative to the first, as they lie
        after the flip: mirrored views start at their right edges, so dx changes its sign."""
        return (self.cells[1:] - self.cells[0]) * (1, -1 if self.flip else 1)

    def scaled(self, factor: float) -> Views:
        """The same boxes in the pixels of an image that is ``factor`` times as large."""
        if factor == 1:
            return self
        boxes = [Box(*(side * factor for side in box)) for box in self.boxes]
        return Views(boxes, self.cells, self.flip)


def draw_views(
    random: np.random.Generator,
    width: int,
    height: int,
    crops: CropRange,
    *,
    views: int = 1,
    shift_std: float = 0.0,
    grid: int = 1,
) -> Views:
    """Draw the boxes of ``views`` views of one image.

    With ``shift_std`` > 0 each view is moved on its own by round(N(0, shift_std)) cells down and
    right (C-RADIOv4, arXiv 2601.17237). The box is chosen small enough that all moved boxes lie
    in the image, so no shift is cut short.

    Args:
        random: the image's random numbers.
        width, height: the allowed pixels.
        crops: size, aspect and flip.
        views: number of views.
        shift_std: in cells of the grid; 0 for no shifts.
        grid: cells along each side of a view.
    """
    flip = bool(random.random() < crops.flip)
    cells = np.zeros((views, 2), dtype=np.int64)
    if shift_std > 0:
        limit = int(grid * MAX_SHIFT)
        drawn = np.rint(random.normal(0.0, shift_std, (views, 2)))
        cells = drawn.clip(-limit, limit).astype(np.int64)
    else:  # the same as below, for one box that all views share
        box_width, box_height = _draw_size(random, width, height, crops, 1.0, 1.0)
        left = random.random() * (width - box_width)
        top = random.random() * (height - box_height)
        box = Box(
            min(left, width - box_width), min(top, height - box_height), box_width, box_height
        )
        return Views([box] * views, cells, flip)
    first = cells.min(axis=0)
    # The moved boxes together span this many boxes, down and right.
    span_y, span_x = 1 + (cells.max(axis=0) - first) / grid
    box_width, box_height = _draw_size(random, width, height, crops, span_x, span_y)
    left = random.random() * (width - box_width * span_x)
    top = random.random() * (height - box_height * span_y)
    boxes = []
    for dy, dx in cells - first:
        x = left + dx * box_width / grid
        y = top + dy * box_height / grid
        # The sums above may pass the edge by a rounding error.
        boxes.append(
            Box(
                max(0.0, min(x, width - box_width)),
                max(0.0, min(y, height - box_height)),
                box_width,
                box_height,
            )
        )
    return Views(boxes, cells, flip)


def _draw_size(
    random: np.random.Generator,
    width: int,
    height: int,
    crops: CropRange,
    span_x: float,
    span_y: float,
) -> tuple[float, float]:
    """Width and height of a box of which ``span_x`` by ``span_y`` fit into the image."""
    low, high = log(crops.ratio[0]), log(crops.ratio[1])
    for _ in range(_TRIES):
        area = width * height * random.uniform(*crops.scale)
        ratio = exp(random.uniform(low, high))
        box_width, box_height = sqrt(area * ratio), sqrt(area / ratio)
        if box_width * span_x <= width and box_height * span_y <= height:
            return box_width, box_height
    # The image is long, or the shifts are wide: the largest box of an allowed aspect.
    most_width, most_height = width / span_x, height / span_y
    ratio = min(max(most_width / most_height, crops.ratio[0]), crops.ratio[1])
    box_width = min(most_width, most_height * ratio)
    return box_width, min(most_height, box_width / ratio)


def render(image: Image | np.ndarray, box: Box, size: int, flip: bool = False) -> np.ndarray:
    """The pixels of a box, resized with antialiasing to ``(3, size, size)`` uint8.

    Bilinear: bicubic costs 1.7 times as much (1.3 against 0.75 ms at 224 px), and resizing is most
    of the cost of a crop. The filter reads beyond the box where the image goes on, so boxes that
    overlap agree where they overlap.
    """
    from PIL.Image import Resampling, fromarray

    if isinstance(image, np.ndarray):
        image = fromarray(image)
    right = min(box.left + box.width, image.width)
    bottom = min(box.top + box.height, image.height)
    resized = image.resize((size, size), Resampling.BILINEAR, (box.left, box.top, right, bottom))
    pixels = np.asarray(resized).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if flip else pixels


def whole(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a box of whole pixels next to it, within the image."""
    wide = min(max(1, round(box.width)), width)
    high = min(max(1, round(box.height)), height)
    return min(round(box.left), width - wide), min(round(box.top), height - high), wide, high


def cut(image: Image | np.ndarray, place: tuple[int, int, int, int]) -> np.ndarray:
    """The pixels at a place that :func:`whole` gave: ``(height, width, 3)`` uint8."""
    left, top, wide, high = place
    if isinstance(image, np.ndarray):
        # In memory of its own: PyTorch resizes a part of an image at half the speed of a whole.
        return np.ascontiguousarray(image[top : top + high, left : left + wide])
    return np.array(image.crop((left, top, left + wide, top + high)))


def resize(pixels: np.ndarray, size: int, flip: bool = False) -> Tensor:
    """All of ``(height, width, 3)`` uint8, resized to ``(3, size, size)``, colours innermost.

    The filter of :func:`render` in PyTorch's vectorised form, at a fifth of its cost. It takes
    whole pixels only.
    """
    # The batch axis is added in front, by PyTorch, before the others move: only then does it see
    # that the colours are innermost, and leaves them there. Laying out planes takes it a third of
    # its time.
    image = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(image, (size, size), mode="bilinear", antialias=True)[0]
    return resized.flip(2) if flip else resized


def square_boxes(width: int, height: int, count: int) -> list[Box]:
    """``count`` squares evenly along an image's longer side, as large as its shorter side."""
    side = min(width, height)
    places = [0.5] if count == 1 else np.linspace(0.0, 1.0, count).tolist()
    return [Box((width - side) * p, (height - side) * p, side, side) for p in places]


def centre_and_corner_boxes(width: int, height: int, count: int) -> list[Box]:
    """The first ``count`` of: the centre and the four corners; squares of 3/4 the shorter side."""
    side = 0.75 * min(width, height)
    places: Sequence[tuple[float, float]] = ((0.5, 0.5), (0, 0), (1, 1), (1, 0), (0, 1))
    return [Box((width - side) * x, (height - side) * y, side, side) for x, y in places[:count]]
