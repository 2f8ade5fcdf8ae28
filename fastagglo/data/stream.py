"""Training batches as a pure function of (seed, step, rank, world)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from fastagglo.data.crops import CropRange, draw_views, render
from fastagglo.data.decode import MAX_PIXELS, BadImage
from fastagglo.data.order import make_order, sample_generator
from fastagglo.data.plan import (
    MAX_BAD,
    GroupPlan,
    GroupViews,
    StepPlan,
    TrainBatch,
    check_float,
    check_int,
)
from fastagglo.data.source import Source, find_duplicates
from fastagglo.data.split import check_region, region_start
from fastagglo.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Filters:
    """Which images are replaced by others.

    Attributes:
        min_size: least native width and height, in pixels.
        uniform_std: an image whose colour channels all have a smaller standard deviation (0 to
            255) is uniform; 0 keeps all.
        duplicates: drop files that equal an earlier one byte for byte; reads every file once.
    """

    min_size: int = 0
    uniform_std: float = 0.0
    duplicates: bool = False

    def __post_init__(self) -> None:
        check_int("min_size", self.min_size, 0)
        check_float("uniform_std", self.uniform_std, 0.0, 255.0)
        if not isinstance(self.duplicates, bool):
            raise TypeError(f"duplicates must be a bool, got {self.duplicates!r}")


class CropStream(Dataset[TrainBatch]):
    """Crops for each step of one rank; ``stream[step]`` is a pure function of the step.

    Nothing is remembered between steps: a run resumes from its step number alone, any number of
    workers gives the same batches bit for bit, and any step can be looked at again.

    Each image is cropped once (a random resized crop, arXiv 1409.4842); the student and all
    teachers of its group see that crop, with the same flip, each at its own size; with
    ``GroupPlan.shift_std`` they see it from places that differ by whole student patches
    (C-RADIOv4, arXiv 2601.17237).

    The images of a run are numbered over all steps, ranks and groups; within an epoch none comes
    twice, on any rank. An image that cannot be used is replaced by another one, drawn from the
    same few shards, and counted.

    Args:
        source: the training images.
        planner: the plan of each step. It must be a pure function of the step, and plan the same
            number of images on every rank. A resumed run calls it once for each earlier step.
        seed: 0 or more.
        rank, world: this process among all.
        scale: smallest and largest crop area, as a share of the allowed area.
        ratio: smallest and largest width over height of a crop.
        flip: probability of a horizontal flip.
        region: share of each image's width, at its right edge, that no crop touches
            (see :func:`split`).
        filters: which images are replaced.
        max_pixels: larger images are not decoded.
        max_attempts: so many unusable images in a row end the run.

    Raises:
        UserError: no images in the source; at a step, ``max_attempts`` unusable images in a row.
        TypeError, ValueError: an argument of another kind or out of range.
    """

    def __init__(
        self,
        source: Source,
        planner: Callable[[int], StepPlan],
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        region: float = 0.0,
        filters: Filters | None = None,
        max_pixels: int = MAX_PIXELS,
        max_attempts: int = 16,
    ) -> None:
        if not isinstance(source, Source):
            raise TypeError(f"source must be a Source, got {type(source).__name__}")
        if not callable(planner):
            raise TypeError(f"planner must be callable, got {type(planner).__name__}")
        self.source = source
        self.planner = planner
        self.seed = check_int("seed", seed, 0)
        self.world = check_int("world", world, 1)
        self.rank = check_int("rank", rank, 0)
        if self.rank >= self.world:
            raise ValueError(f"rank must be below world {self.world}, got {rank}")
        self.crops = CropRange(scale, ratio, flip)
        self.region = check_region(region)
        self.filters = Filters() if filters is None else filters
        self.max_pixels = check_int("max_pixels", max_pixels, 1)
        self.max_attempts = check_int("max_attempts", max_attempts, 1)
        if len(source) == 0:
            raise UserError("the training source holds no images")
        self._order = make_order(source, self.seed)
        self._duplicate = find_duplicates(source) if self.filters.duplicates else None
        self._before = array("q", [0])  # images per rank before each step

    def __getitem__(self, step: int) -> TrainBatch:
        step = check_int("step", step, 0)
        position = self.first_position(step)
        plan = self._plan(step)
        skipped: Counter[str] = Counter()
        bad: list[tuple[str, str]] = []
        groups = []
        for group in plan.groups:
            groups.append(self._group(group, position, skipped, bad))
            position += group.count
        keys = [key for group in groups for key in group.keys]
        return TrainBatch(groups, keys, dict(skipped), bad[:MAX_BAD], step, plan)

    def first_position(self, step: int) -> int:
        """The number, over the whole run, of this rank's first image of a step."""
        while len(self._before) <= step:
            self._before.append(self._before[-1] + self._plan(len(self._before) - 1).images)
        return self._before[step] * self.world + self._plan(step).images * self.rank

    def _plan(self, step: int) -> StepPlan:
        plan = self.planner(step)
        if not isinstance(plan, StepPlan):
            raise TypeError(f"planner must return a StepPlan, got {type(plan).__name__}")
        return plan

    def _group(
        self,
        group: GroupPlan,
        position: int,
        skipped: Counter[str],
        bad: list[tuple[str, str]],
    ) -> GroupViews:
        names = list(group.teachers)
        sizes = [group.size, *group.teachers.values()]
        # Without shifts all views have the same box: one buffer for each size serves them all.
        shifted = group.shift_std > 0
        slots = list(range(len(sizes))) if shifted else [sizes.index(size) for size in sizes]
        buffers = {
            slot: np.empty((group.count, 3, sizes[slot], sizes[slot]), dtype=np.uint8)
            for slot in slots
        }
        shifts = np.zeros((len(names), group.count, 2), dtype=np.float32)
        keys = []
        for row in range(group.count):
            index, image, random = self._usable(position + row, skipped, bad)
            keys.append(self.source.key(index))
            views = draw_views(
                random,
                image.width,
                image.height,
                self.crops,
                views=len(sizes) if shifted else 1,
                shift_std=group.shift_std,
                grid=max(1, group.size // group.patch_size),
            )
            for slot, buffer in buffers.items():
                box = views.boxes[slot if shifted else 0]
                buffer[row] = render(image, box, sizes[slot], views.flip)
            if shifted:
                shifts[:, row] = views.relative_shifts()
        tensors = {slot: torch.from_numpy(buffer) for slot, buffer in buffers.items()}
        return GroupViews(
            student=tensors[0],
            teachers={name: tensors[slots[i + 1]] for i, name in enumerate(names)},
            shifts={name: torch.from_numpy(shifts[i]) for i, name in enumerate(names)}
            if shifted
            else {},
            keys=tuple(keys),
        )

    def _usable(
        self, position: int, skipped: Counter[str], bad: list[tuple[str, str]]
    ) -> tuple[int, Image, np.random.Generator]:
        """Index, allowed pixels and random numbers of a position's image or its replacement."""
        reasons: Counter[str] = Counter()
        index = self._order.index(position)
        for attempt in range(self.max_attempts):
            random = sample_generator(self.seed, position, attempt)
            if attempt:
                index = self._order.replacement(position, random)
            try:
                return index, self._image(index), random
            except BadImage as error:
                last = error
                reasons[error.reason] += 1
                skipped[error.reason] += 1
                bad.append((self.source.key(index), error.reason))
        raise UserError(
            f"{self.max_attempts} images in a row cannot be used ({_listed(reasons)}); the last "
            f"one is {self.source.key(index)!r}: {last.detail}; mend the data or loosen the filters"
        )

    def _image(self, index: int) -> Image:
        """The pixels of an image that training may see, or BadImage."""
        if self._duplicate is not None and self._duplicate[index]:
            raise BadImage("duplicate", "the same bytes as an earlier file")
        image = self.source.image(index, max_pixels=self.max_pixels)
        least = self.filters.min_size
        if min(image.size) < least:
            raise BadImage("too_small", f"{image.width} x {image.height} is below {least} pixels")
        if self.region > 0:
            # Cut before resizing: a filter near the edge would else look over it.
            start = region_start(image.width, self.region)
            if start < 1:
                raise BadImage("too_small", f"{image.width} pixels wide: no column is left")
            image = image.crop((0, 0, start, image.height))
        if self.filters.uniform_std > 0 and _spread(image) < self.filters.uniform_std:
            raise BadImage("uniform", f"standard deviation {_spread(image):.2f}")
        return image


def _spread(image: Image) -> float:
    """The largest standard deviation of a colour channel, from at most 64 x 64 of the pixels."""
    from PIL.Image import Resampling

    size = (min(64, image.width), min(64, image.height))
    return float(np.asarray(image.resize(size, Resampling.NEAREST)).std(axis=(0, 1)).max())


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


class SkipCounter:
    """Counts replaced images over a run and ends it when there are too many.

    Args:
        limit_fraction: the largest share of all images looked at that may be replaced.
        min_count: below this many replaced images the share is not judged.

    Attributes:
        counts: replaced images by reason.
        images: images used.
    """

    def __init__(self, limit_fraction: float = 0.1, min_count: int = 32) -> None:
        self.limit_fraction = check_float("limit_fraction", limit_fraction, 0.0, 1.0)
        self.min_count = check_int("min_count", min_count, 1)
        self.counts: Counter[str] = Counter()
        self.images = 0
        self._example = ""

    @property
    def skipped(self) -> int:
        """Replaced images, all reasons together."""
        return sum(self.counts.values())

    def update(
        self, skipped: Mapping[str, int], images: int, bad: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Add a batch: ``batch.skipped``, the number of its images, ``batch.bad``.

        Raises:
            UserError: too many images of the run were replaced; names the counts and an example.
        """
        self.counts.update(skipped)
        self.images += images
        if bad and not self._example:
            self._example = f"{bad[0][0]!r} ({bad[0][1]})"
        looked_at = self.images + self.skipped
        if self.skipped >= self.min_count and self.skipped > self.limit_fraction * looked_at:
            example = f"; for example {self._example}" if self._example else ""
            raise UserError(
                f"{self.skipped} of {looked_at} images cannot be used ({_listed(self.counts)}), "
                f"more than the limit of {self.limit_fraction:.1%}{example}; mend the data, loosen "
                "the filters or raise the limit"
            )
