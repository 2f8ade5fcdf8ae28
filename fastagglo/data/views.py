"""Fixed crops of held-out data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from fastagglo.data.crops import Box, centre_and_corner_boxes, render, square_boxes
from fastagglo.data.decode import MAX_PIXELS, BadImage
from fastagglo.data.plan import GroupPlan, GroupViews, check_int
from fastagglo.data.source import Source
from fastagglo.data.split import check_region, region_start
from fastagglo.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def eval_views(
    source: Source,
    plan: GroupPlan,
    kind: Literal["regions", "photos"],
    *,
    region: float = 0.3,
    crops: int = 2,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[GroupViews]:
    """Crops of held-out data that are the same every time: no randomness, no flip, no shift.

    Args:
        source: for "regions" the training photos (``Split.train``), for "photos" the held-out ones
            (``Split.held_out``).
        plan: sizes of the student's and the teachers' views; ``count`` is the number of crops in
            each group that is given out (the last may be smaller), at least 1. Its shifts are not
            used.
        kind: "regions": squares within the held-out strip of each photo, as wide as the strip and
            evenly along it. "photos": squares of 3/4 the shorter side, the centre first, then the
            corners.
        region: the share of each photo's width that is held out, as in :func:`split`; for
            "regions" only.
        crops: crops of each photo; for "photos" at most 5.
        limit: use at most this many photos, spread evenly over the source; None for all.
        max_pixels: larger images are not decoded.

    Yields:
        Views of ``plan.count`` crops, with the key of the photo of each.

    Raises:
        UserError: none of the photos can be read. Single bad ones are left out with one warning.
        TypeError, ValueError: an argument of another kind or out of range.
    """
    if kind not in ("regions", "photos"):
        raise ValueError(f'kind must be "regions" or "photos", got {kind!r}')
    check_int("crops", crops, 1)
    check_int("plan.count", plan.count, 1)
    if kind == "photos" and crops > 5:
        raise ValueError(f"crops must be at most 5 for photos, got {crops}")
    if kind == "regions" and check_region(region) == 0:
        raise ValueError("region must be above 0 for regions, got 0: nothing is held out")
    count = len(source) if limit is None else min(check_int("limit", limit, 1), len(source))
    strip = region if kind == "regions" else None
    return _batches(source, plan, count, strip, crops, max_pixels)


def _batches(
    source: Source, plan: GroupPlan, count: int, strip: float | None, crops: int, max_pixels: int
) -> Iterator[GroupViews]:
    waiting: list[tuple[str, Image, Box]] = []
    bad: list[str] = []
    for number in range(count):
        index = number * len(source) // count
        try:
            image = source.image(index, max_pixels=max_pixels)
        except BadImage as error:
            bad.append(f"{source.key(index)!r} ({error.detail})")
            continue
        if strip is None:
            boxes = centre_and_corner_boxes(image.width, image.height, crops)
        else:
            # Cut before resizing: the filter must not look at what was trained on.
            start = region_start(image.width, strip)
            image = image.crop((start, 0, image.width, image.height))
            boxes = square_boxes(image.width, image.height, crops)
        waiting += [(source.key(index), image, box) for box in boxes]
        while len(waiting) >= plan.count:
            yield _views(plan, waiting[: plan.count])
            del waiting[: plan.count]
    if count and len(bad) == count:
        raise UserError(f"none of the {count} held-out photos can be read, for example {bad[0]}")
    if bad:
        warnings.warn(
            f"{len(bad)} of {count} held-out photos cannot be read and are left out, for example "
            f"{bad[0]}",
            stacklevel=2,
        )
    if waiting:
        yield _views(plan, waiting)


def _views(plan: GroupPlan, items: list[tuple[str, Image, Box]]) -> GroupViews:
    tensors = {
        size: torch.from_numpy(np.stack([render(image, box, size) for _, image, box in items]))
        for size in {plan.size, *plan.teachers.values()}
    }
    return GroupViews(
        student=tensors[plan.size],
        teachers={name: tensors[size] for name, size in plan.teachers.items()},
        keys=tuple(key for key, _, _ in items),
    )
