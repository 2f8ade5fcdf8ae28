"""Fixed crops of held-out data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from fastagglo.data.crops import Box, centre_and_corner_boxes, render, square_boxes
from fastagglo.data.decode import MAX_PIXELS, BadImage
from fastagglo.data.fixed import view_address
from fastagglo.data.plan import GroupPlan, GroupViews, check_int
from fastagglo.data.source import Source, file_digest
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
    addressed: bool = False,
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
        addressed: say what stands for the pixels of each view (``GroupViews.addresses``), for a
            cache of features; reads each file once more.

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
    return _batches(source, plan, count, strip, crops, max_pixels, addressed)


class _Crop(NamedTuple):
    key: str
    image: Image
    box: Box
    start: int  # the image's first column in the file's
    file: bytes  # digest of the file, where addresses are wanted


def _batches(
    source: Source,
    plan: GroupPlan,
    count: int,
    strip: float | None,
    crops: int,
    max_pixels: int,
    addressed: bool,
) -> Iterator[GroupViews]:
    waiting: list[_Crop] = []
    bad: list[str] = []
    for number in range(count):
        index = number * len(source) // count
        try:
            image = source.image(index, max_pixels=max_pixels)
        except BadImage as error:
            bad.append(f"{source.key(index)!r} ({error.detail})")
            continue
        start, file = 0, file_digest(source, index) if addressed else b""
        if strip is None:
            boxes = centre_and_corner_boxes(image.width, image.height, crops)
        else:
            # Cut before resizing: the filter must not look at what was trained on.
            start = region_start(image.width, strip)
            image = image.crop((start, 0, image.width, image.height))
            boxes = square_boxes(image.width, image.height, crops)
        waiting += [_Crop(source.key(index), image, box, start, file) for box in boxes]
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


def _views(plan: GroupPlan, items: list[_Crop]) -> GroupViews:
    tensors = {
        size: torch.from_numpy(np.stack([render(i.image, i.box, size) for i in items]))
        for size in {plan.size, *plan.teachers.values()}
    }
    return GroupViews(
        student=tensors[plan.size],
        teachers={name: tensors[size] for name, size in plan.teachers.items()},
        keys=tuple(item.key for item in items),
        **(_addresses(plan, items) if items[0].file else {}),
    )


def _addresses(plan: GroupPlan, items: list[_Crop]) -> dict[str, Any]:
    """``addresses`` of the views of a group, all of them ``missing``: nothing has been read."""
    addresses = {
        name: tuple(
            view_address(i.file, ("held out", i.start, i.image.width), i.box, False, size)
            for i in items
        )
        for name, size in plan.teachers.items()
    }
    return {"addresses": addresses, "missing": {n: tuple(range(len(items))) for n in addresses}}
