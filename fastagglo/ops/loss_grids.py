"""The grids of the multi-teacher loss in PyTorch: what a comparison cell reads, and reading it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SNAP = 1e-6  # cells: a sample this close to a cell centre is that cell, whatever rounding says


class Taps(NamedTuple):
    """Linear interpolation along one axis, ``(1 or N, cells)`` each."""

    low: Tensor
    high: Tensor  # equal to low where its weight is zero: a masked neighbour is never touched
    weight: Tensor
    inside: Tensor
    whole: bool = False  # known to be without weights, which spares reading high

    def looked_at(self) -> Taps:
        """Sets ``whole``, if no device must be waited for."""
        return self._replace(whole=self.weight.device.type == "cpu" and not self.weight.any())


class Whole(NamedTuple):
    """Whole images, resized to a grid by PyTorch's own kernel, which reads channels last at once.

    It knows neither shifts nor masks.
    """

    grid: tuple[int, int]


Resampling = list[Taps] | Whole


def grid_of(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[1], shape[2]) if len(shape) == 4 else (1, 1)


def comparison_grid(
    prediction_shape: Sequence[int], target_shape: Sequence[int], resize: str
) -> tuple[int, int]:
    prediction, target = grid_of(prediction_shape), grid_of(target_shape)
    if resize == "larger":
        return max(prediction[0], target[0]), max(prediction[1], target[1])
    return prediction if resize == "student" else target


def _taps(cells: int, prediction: int, source: int, shift: Tensor) -> Taps:
    """How ``cells`` cells over a view of ``prediction`` cells read ``source`` cells, shifted.

    fp64 throughout: an fp32 position at cell 100 is off by more than ``SNAP``.
    """
    centre = torch.arange(cells, dtype=torch.float64, device=shift.device) + 0.5
    place = (centre * (prediction / cells) - shift[:, None]) * (source / prediction)
    inside = (place >= -SNAP) & (place <= source + SNAP)
    place = torch.nan_to_num(place - 0.5).clamp(0, source - 1)
    nearest = place.round()
    place = torch.where((place - nearest).abs() < SNAP, nearest, place)
    low = place.floor()
    weight = place - low
    return Taps(low.long(), (low + (weight > 0)).long(), weight, inside)


def target_taps(
    shift: Tensor | None,
    prediction: tuple[int, int],
    target: tuple[int, int],
    grid: tuple[int, int],
    device: torch.device,
) -> list[Taps] | None:
    """Rows' and columns' taps of the target, or None if the comparison reads it cell by cell."""
    if shift is None:
        if target == grid:
            return None
        shift = torch.zeros(1, 2, dtype=torch.float64, device=device)
    return [_taps(grid[a], prediction[a], target[a], shift[:, a]) for a in (0, 1)]


def valid_cells(
    valid: Tensor | None,
    shift: Tensor | None,
    prediction: tuple[int, int],
    target: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor | None:
    """The comparison cells that count, bool ``(1 or N, rows, columns)``; None if all do."""
    given = valid if valid is not None else shift
    if given is None:
        return None
    taps = target_taps(shift, prediction, target, grid, given.device)
    if taps is None:
        return valid
    rows, columns = taps
    inside = rows.inside[:, :, None] & columns.inside[:, None, :]
    if valid is None:
        return inside
    image = torch.arange(valid.shape[0], device=valid.device)[:, None]
    cells = valid[image, rows.low] & valid[image, rows.high]
    cells = cells.transpose(1, 2)
    cells = cells[image, columns.low] & cells[image, columns.high]
    return cells.transpose(1, 2) & inside


class Scratch:
    """Memory that one block after another uses.

    An allocation for each block costs more than its arithmetic: malloc gives large ones back to the
    system at once, and the page faults come anew.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; the next one of this name and dtype overwrites it."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, dtype] = self._like.new_empty(size, dtype=dtype)
        return kept[:size].view(shape)


def read(
    name: str,
    features: Tensor,
    taps: Resampling | None,
    images: slice,
    rows: slice,
    dtype: torch.dtype,
    scratch: Scratch,
) -> Tensor:
    """Comparison cells (n, rows, columns, C) of a block, resampled.

    In the scratch memory ``name``, unless the features themselves are what is asked for.
    """
    features = features[images]
    if taps is None:
        return in_dtype(name, features[:, rows], dtype, scratch)
    if isinstance(taps, Whole):
        features = in_dtype(f"{name} source", features, dtype, scratch)
        if not features.is_contiguous():  # one kernel for all strides, and so one rounding
            features = scratch(f"{name} source", features.shape, dtype).copy_(features)
        out = scratch(name, (len(features), *taps.grid, features.shape[3]), dtype)
        torch.ops.aten.upsample_bilinear2d.out(
            _nchw(features), taps.grid, False, None, None, out=_nchw(out)
        )
        return out
    for dim, tap in ((1, taps[0]), (2, taps[1])):
        # A shift of its own for each image comes with blocks of one image.
        image = images.start if len(tap.low) > 1 else 0
        part = rows if dim == 1 else slice(None)
        ends = []
        for place, index in ((name, tap.low), (f"{name} high", None if tap.whole else tap.high)):
            if index is None:
                continue
            place, index = place + " rows" * (dim == 1), index[image, part]
            shape = [*features.shape[:dim], len(index), *features.shape[dim + 1 :]]
            cells = scratch(place, shape, features.dtype)
            torch.index_select(features, dim, index, out=cells)
            ends.append(in_dtype(place, cells, dtype, scratch))
        if not tap.whole:
            weight = tap.weight[image, part].to(dtype).reshape(-1, *[1] * (3 - dim))
            torch.lerp(*ends, weight, out=ends[0])
        features = ends[0]
    return features


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def in_dtype(name: str, features: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Features in a dtype: themselves, or a copy in scratch memory."""
    if features.dtype == dtype:
        return features
    return scratch(name, features.shape, dtype).copy_(features)


def scatter(gradient: Tensor, taps: Resampling, rows: slice, out: Tensor, scratch: Scratch) -> None:
    """Add the gradient (n, rows, columns, C) of what :func:`read` read to out (n, h, w, C).

    Of the rows from 0 on, it is written and nothing is added to: out may come uninitialised.
    """
    if isinstance(taps, Whole):
        n, h, w, channels = out.shape
        torch.ops.aten.upsample_bilinear2d_backward.grad_input(
            _nchw(gradient), taps.grid, [n, channels, h, w], False, None, None,
            grad_input=_nchw(out),
        )  # fmt: skip
        return
    if rows.start == 0:
        out.zero_()
    by_row, by_column = taps
    shape = (*gradient.shape[:2], out.shape[2], gradient.shape[3])
    narrow = scratch("narrow", shape, gradient.dtype).zero_()
    for into, source, dim, tap, part in (
        (narrow, gradient, 2, by_column, slice(None)),
        (out, narrow, 1, by_row, rows),
    ):
        if tap.whole:
            into.index_add_(dim, tap.low[0, part], source)
            continue
        weight = tap.weight[0, part].to(gradient.dtype).reshape(-1, *[1] * (3 - dim))
        share = scratch("share", source.shape, source.dtype)
        into.index_add_(dim, tap.low[0, part], torch.mul(source, 1 - weight, out=share))
        into.index_add_(dim, tap.high[0, part], torch.mul(source, weight, out=share))
