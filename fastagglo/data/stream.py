"""Training batches as a pure function of (seed, step, rank, world)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from fastagglo.data.crops import CropRange, Views, cut, draw_views, render, resize, whole
from fastagglo.data.decode import MAX_PIXELS, BadImage
from fastagglo.data.fixed import FeatureReader, StoredViews, fixed_generator, view_address
from fastagglo.data.order import make_order, sample_generator
from fastagglo.data.picture import Picture
from fastagglo.data.plan import (
    MAX_BAD,
    EncodedCrops,
    GroupPlan,
    GroupViews,
    StepPlan,
    TrainBatch,
    check_float,
    check_int,
)
from fastagglo.data.source import Source, file_digest, find_duplicates
from fastagglo.data.split import check_region, region_start
from fastagglo.data.variety import first_columns, spread, varies
from fastagglo.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


_AHEAD = 16
"""So many photos' crops are drawn before the first of them is decoded; their files are held."""


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


class _Drawn(NamedTuple):
    """A photo of which it is known what to show."""

    key: str
    picture: Picture
    end: int  # the first column of the file that training may not see
    views: Views  # boxes in the file's pixels
    file: bytes = b""  # digest of the file, where views are fixed


class _Pick(NamedTuple):
    """A photo that is about to be cropped."""

    key: str
    # The pixels that training may see, ``shrink`` times smaller; or a JPEG for the device.
    image: Image | np.ndarray | bytes
    place: tuple[int, int, int, int]  # of the first box in them, edges moved to whole pixels
    end: int
    shrink: int
    views: Views
    file: bytes

    def address(self, view: int, size: int, shifted: bool) -> bytes:
        # All that the pixels depend on: those of shifted boxes are not cut whole.
        how = (self.end, self.shrink, shifted)
        return view_address(self.file, how, self.views.boxes[view], self.views.flip, size)


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
        planner: the plan of each step, a pure function of the step. Plans without a ``start`` must
            have the same number of images on every rank; of them a resumed run asks for all the
            earlier ones once.
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
        fixed_crops: 0 draws every crop anew; K gives each photo K crops, the same at every
            resolution, of which it shows the next one each epoch. With shifts, their shifts are
            fixed too.
        crop_seed: of the fixed crops. The run's own seed does not touch them.
        reader: gives stored features of the teachers' views of fixed crops.
        encoded: leave JPEG files to the device (``GroupViews.encoded``): those that are whole and
            upright. It has nothing to compare or to look at before: not with ``fixed_crops``, with
            ``Filters.uniform_std`` or with shifts.

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
        fixed_crops: int = 0,
        crop_seed: int = 0,
        reader: FeatureReader | None = None,
        encoded: bool = False,
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
        self.fixed_crops = check_int("fixed_crops", fixed_crops, 0)
        self.crop_seed = check_int("crop_seed", crop_seed, 0)
        self.reader = reader
        if reader is not None and self.fixed_crops == 0:
            raise ValueError("a reader needs fixed_crops of at least 1, got 0: no crop comes twice")
        self.encoded = encoded
        if encoded and (self.fixed_crops or self.filters.uniform_std > 0):
            raise ValueError(
                "encoded goes with fixed_crops 0 and filters.uniform_std 0, got "
                f"{self.fixed_crops} and {self.filters.uniform_std:g}"
            )
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
        if (start := self._plan(step).start) is not None:
            return start
        while len(self._before) <= step:
            self._before.append(self._before[-1] + self._plan(len(self._before) - 1).images)
        return self._before[step] * self.world + self._plan(step).images * self.rank

    def _plan(self, step: int) -> StepPlan:
        plan = self.planner(step)
        if not isinstance(plan, StepPlan):
            raise TypeError(f"planner must return a StepPlan, got {type(plan).__name__}")
        return plan

    def fixed_views(self, index: int, plans: Sequence[GroupPlan]) -> list[GroupViews]:
        """All fixed crops of one photo, as the teachers of each plan see them.

        Args:
            index: of the photo in the source.
            plans: sizes and shifts; their counts are not used.

        Returns:
            One group of ``fixed_crops`` images for each plan, without the student's views.

        Raises:
            BadImage: the photo cannot be used.
        """
        crops = range(self.fixed_crops)
        return [
            self._cut(
                plan,
                (self._shown(self._fixed(index, plan, crop), plan) for crop in crops),
                student=False,
            )
            for plan in plans
        ]

    def _group(
        self,
        group: GroupPlan,
        position: int,
        skipped: Counter[str],
        bad: list[tuple[str, str]],
    ) -> GroupViews:
        # One by one: a decoded photo is much larger than its crops.
        ahead = self._ahead(group, range(position, position + group.count))
        return self._cut(group, (self._usable(*first, group, skipped, bad) for first in ahead))

    def _ahead(
        self, group: GroupPlan, positions: Iterable[int]
    ) -> Iterator[tuple[int, _Drawn | BadImage]]:
        """Each position's first choice. What is drawn for several photos in a row costs half as
        much as between decoding one and the next, which leaves nothing of it in the caches."""
        waiting: list[tuple[int, _Drawn | BadImage]] = []
        for position in positions:
            try:
                drawn: _Drawn | BadImage = self._drawn_at(position, 0, group)
            except BadImage as error:
                drawn = error
            waiting.append((position, drawn))
            many = len(waiting) == _AHEAD or (isinstance(drawn, _Drawn) and drawn.picture.decoded)
            if many:
                yield from waiting
                waiting.clear()
        yield from waiting

    def _cut(self, group: GroupPlan, picks: Iterable[_Pick], student: bool = True) -> GroupViews:
        """The views of some photos; ``student=False`` leaves the student's out."""
        names = list(group.teachers)
        sizes = [group.size, *group.teachers.values()]
        # Without shifts all views have the same box: one buffer for each size serves them all.
        shifted = group.shift_std > 0
        slots = list(range(len(sizes))) if shifted else [sizes.index(size) for size in sizes]
        count = group.count if student else self.fixed_crops
        buffers: dict[int, torch.Tensor] = {}
        shifts = np.zeros((len(names), count, 2), dtype=np.float32)
        keys = []
        waiting: list[tuple[int, _Pick]] = []  # for the device, by row
        stored = StoredViews(names, self.reader) if self.fixed_crops else None
        for row, pick in enumerate(picks):
            keys.append(pick.key)
            if isinstance(pick.image, bytes):
                waiting.append((row, pick))
                continue
            needed = {0} if student else set()
            for slot, name in zip(slots[1:], names, strict=True):
                if stored is None or not stored.look(
                    name, pick.address(slot if shifted else 0, sizes[slot], shifted)
                ):
                    needed.add(slot)
            boxes = pick.views.scaled(1 / pick.shrink).boxes
            pixels = None if shifted or not needed else cut(pick.image, pick.place)
            for slot in needed:
                side = sizes[slot]
                if slot not in buffers:
                    buffers[slot] = _pixels(count, side)
                if pixels is None:
                    view = render(pick.image, boxes[slot], side, pick.views.flip)
                    buffers[slot][row].numpy()[:] = view
                else:
                    buffers[slot][row] = resize(pixels, side, pick.views.flip)
            if shifted:
                shifts[:, row] = pick.views.relative_shifts()
        for slot in slots:
            if slot not in buffers:  # views that nobody needs
                buffers[slot] = _pixels(count if stored is None else 0, sizes[slot])
        return GroupViews(
            student=buffers[0],
            teachers={name: buffers[slots[i + 1]] for i, name in enumerate(names)},
            shifts={name: torch.from_numpy(shifts[i]) for i, name in enumerate(names)}
            if shifted
            else {},
            keys=tuple(keys),
            encoded=_encoded(waiting),
            **({} if stored is None else stored.fields()),
        )

    def _usable(
        self,
        position: int,
        first: _Drawn | BadImage,
        group: GroupPlan,
        skipped: Counter[str],
        bad: list[tuple[str, str]],
    ) -> _Pick:
        """A position's image or its replacement."""
        reasons: Counter[str] = Counter()
        for attempt in range(self.max_attempts):
            try:
                if attempt:
                    first = self._drawn_at(position, attempt, group)
                if isinstance(first, BadImage):
                    raise first
                return self._shown(first, group)
            except BadImage as error:
                last = error
                reasons[error.reason] += 1
                skipped[error.reason] += 1
                bad.append((self._key_at(position, attempt), error.reason))
        raise UserError(
            f"{self.max_attempts} images in a row cannot be used ({_listed(reasons)}); the last "
            f"one is {bad[-1][0]!r}: {last.detail}; mend the data or loosen the filters"
        )

    def _index_at(self, position: int, attempt: int) -> tuple[int, np.random.Generator]:
        """The image of a position's attempt, and the random numbers of its crop."""
        random = sample_generator(self.seed, position, attempt)
        if attempt:
            return self._order.replacement(position, random), random
        return self._order.index(position), random

    def _key_at(self, position: int, attempt: int) -> str:
        return self.source.key(self._index_at(position, attempt)[0])

    def _drawn_at(self, position: int, attempt: int, group: GroupPlan) -> _Drawn:
        """What a position's attempt shows; or BadImage."""
        index, random = self._index_at(position, attempt)
        if self.fixed_crops:
            return self._fixed(index, group, self._order.epoch(position) % self.fixed_crops)
        return self._drawn(index, group, random)

    def _fixed(self, index: int, group: GroupPlan, crop: int) -> _Drawn:
        """What a photo's fixed crop shows; or BadImage."""
        random = fixed_generator(self.crop_seed, self.source.key(index), crop)
        drawn = self._drawn(index, group, random)
        try:
            return drawn._replace(file=file_digest(self.source, index))
        except OSError as error:
            raise BadImage("unreadable", str(error)) from error

    def _drawn(self, index: int, group: GroupPlan, random: np.random.Generator) -> _Drawn:
        """An image and boxes in what training may see of it; or BadImage."""
        if self._duplicate is not None and self._duplicate[index]:
            raise BadImage("duplicate", "the same bytes as an earlier file")
        picture = self.source.picture(index, max_pixels=self.max_pixels)
        width, height = picture.width, picture.height
        least = self.filters.min_size
        if min(width, height) < least:
            raise BadImage("too_small", f"{width} x {height} is below {least} pixels")
        # Cut before resizing: a filter near the edge would else look over it.
        end = region_start(width, self.region) if self.region > 0 else width
        if end < 1:
            raise BadImage("too_small", f"{width} pixels wide: no column is left")
        views = draw_views(
            random,
            end,
            height,
            self.crops,
            views=1 + len(group.teachers) if group.shift_std > 0 else 1,
            shift_std=group.shift_std,
            grid=max(1, group.size // group.patch_size),
        )
        return _Drawn(self.source.key(index), picture, end, views)

    def _shown(self, drawn: _Drawn, group: GroupPlan) -> _Pick:
        """The pixels of an image that training may see; or BadImage."""
        key, picture, end, views, file = drawn
        if self.encoded:
            if group.shift_std > 0:
                raise ValueError(f"encoded goes with shift_std 0, got {group.shift_std:g}")
            if (data := picture.plain_jpeg) is not None:
                place = whole(views.boxes[0], end, picture.height)
                return _Pick(key, data, place, end, 1, views, file)
        most = max(group.size, *group.teachers.values(), 1)
        shrink = picture.shrink(min(views.boxes[0][2:]) / most)
        if end < picture.width and end % shrink:
            shrink = 1  # a column would lie on both sides of the edge
        columns, rows = -(-end // shrink), -(-picture.height // shrink)
        boxes = views.scaled(1 / shrink).boxes
        place = whole(boxes[0], columns, rows)
        if group.shift_std > 0:  # the filter looks beyond the boxes
            sizes = (group.size, *group.teachers.values())
            below = max(box.top + box.height * (1 + 1 / min(sizes)) for box in boxes)
            seen = min(rows, int(below) + 2)
        else:
            seen = place[1] + place[3]
        # Pillow's own image is what render() wants.
        kept = picture.decoded and group.shift_std > 0
        image = first_columns(picture.image() if kept else picture.pixels(shrink, seen), columns)
        least = self.filters.uniform_std
        if least > 0 and not varies(image, rows, least):
            if isinstance(image, np.ndarray) and len(image) < rows:
                found = spread(first_columns(picture.pixels(shrink), columns))
            else:
                found = spread(image)
            if shrink > 1 and found < least:  # fewer pixels vary less
                found = spread(first_columns(picture.pixels(), end))
            if found < least:
                raise BadImage("uniform", f"standard deviation {found:.2f}")
        return _Pick(key, image, place, end, shrink, views, file)


def _encoded(picks: list[tuple[int, _Pick]]) -> EncodedCrops | None:
    if not picks:
        return None
    files = [pick.image for _, pick in picks]
    return EncodedCrops(
        # One tensor: each that a worker sends is a file that is open until the batch is gone.
        data=torch.frombuffer(bytearray().join(files), dtype=torch.uint8),  # type: ignore[arg-type]
        ends=tuple(accumulate(map(len, files))),
        rows=tuple(row for row, _ in picks),
        places=tuple(pick.place for _, pick in picks),
        flips=tuple(pick.views.flip for _, pick in picks),
    )


def _pixels(count: int, side: int) -> torch.Tensor:
    """Zeros, ``(count, 3, side, side)``, with the colours of a pixel side by side in memory.

    So they come out of the resizing. Whoever needs planes makes them after the copy to the device.
    """
    return torch.zeros((count, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


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
