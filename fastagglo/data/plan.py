"""What one training step asks of the data, and what it gets: plans, views and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Integral, Real

import torch
from torch import Tensor

from fastagglo.features import Features


def check_int(name: str, value: object, least: int) -> int:
    """``value`` as an int, if it is a whole number of at least ``least``.

    Raises:
        TypeError: not a whole number (a bool is none).
        ValueError: below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_float(name: str, value: object, least: float, most: float) -> float:
    """``value`` as a float, if it is a finite number in [``least``, ``most``].

    Raises:
        TypeError: not a real number (a bool is none).
        ValueError: outside the range, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not isfinite(value) or not least <= value <= most:
        bounds = f"at least {least}" if most == float("inf") else f"between {least} and {most}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return float(value)


@dataclass(frozen=True)
class GroupPlan:
    """One group of images of a step: the same student size and the same teachers.

    Attributes:
        size: side of the student's crops, in pixels.
        count: images on this rank; 0 gives empty tensors.
        teachers: side of each teacher's crops, in pixels, by the teacher's name.
        shift_std: standard deviation, in student patches, of the independent shifts that the
            student and each teacher get (C-RADIOv4, arXiv 2601.17237, uses 0.5); 0 for none.
        patch_size: side of a student patch, in student pixels: the unit of the shifts.

    Raises:
        TypeError, ValueError: a field of another kind or out of range; with shifts, ``size`` must
            be a multiple of ``patch_size``.
    """

    size: int
    count: int
    teachers: Mapping[str, int] = field(default_factory=dict)
    shift_std: float = 0.0
    patch_size: int = 16

    def __post_init__(self) -> None:
        check_int("size", self.size, 1)
        check_int("count", self.count, 0)
        check_int("patch_size", self.patch_size, 1)
        check_float("shift_std", self.shift_std, 0.0, float("inf"))
        if not isinstance(self.teachers, Mapping):
            raise TypeError(
                f"teachers must map names to pixels, got {type(self.teachers).__name__}"
            )
        for name, pixels in self.teachers.items():
            check_int(f"teachers[{name!r}]", pixels, 1)
        if self.shift_std > 0 and self.size % self.patch_size:
            raise ValueError(
                f"with shift_std > 0, size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.size}"
            )


@dataclass(frozen=True)
class StepPlan:
    """The groups of images of one step on one rank.

    Attributes:
        groups: the groups, in the order of the packed batch.
        window: side of the student's attention windows in tokens, or None for its own setting.
            The data do not use it: it rides along to the student.
        start: number, over the whole run and all ranks, of the first image. None: as many images
            on every rank in every step so far, which the data then count.
        capacity, max_images: of the student's packed batch, or None; they ride along too.
    """

    groups: tuple[GroupPlan, ...]
    window: int | None = None
    start: int | None = None
    capacity: int | None = None
    max_images: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        for group in self.groups:
            if not isinstance(group, GroupPlan):
                raise TypeError(f"groups must hold GroupPlans, got {type(group).__name__}")
        if self.start is not None:
            check_int("start", self.start, 0)

    @property
    def images(self) -> int:
        """Images of the step on one rank."""
        return sum(group.count for group in self.groups)


@dataclass(frozen=True)
class EncodedCrops:
    """JPEG files that the device decodes, and what it shows of them.

    Attributes:
        data: the files one after the other, ``(bytes,)`` uint8 on the CPU, wherever the batch is.
        ends: where each of them ends.
        rows: of each, its row in the views of the group.
        places: left, top, width and height of each crop, in the file's pixels.
        flips: whether each crop is mirrored.
    """

    data: Tensor
    ends: tuple[int, ...]
    rows: tuple[int, ...]
    places: tuple[tuple[int, int, int, int], ...]
    flips: tuple[bool, ...]

    def files(self) -> list[Tensor]:
        """Each file's bytes."""
        return [self.data[a:b] for a, b in zip((0, *self.ends[:-1]), self.ends, strict=True)]


@dataclass(frozen=True)
class GroupViews:
    """The crops of one group: ``N`` images as the student and as each teacher see them.

    Attributes:
        student: ``(N, 3, S, S)`` uint8, RGB. Crops for training lie in PyTorch's channels-last
            format, as decoders write them: make planes, if you need them, on the device.
        teachers: ``(N, 3, s, s)`` uint8 by teacher name. Views of the same size and the same
            boxes are one tensor object (also the student's), which costs no second copy.
        shifts: ``(N, 2)`` float32 by teacher name: where the teacher's view starts relative to
            the student's, (dy, dx) in student patches, whole numbers, as the views lie after the
            flip. Empty when the plan has no shifts.
        keys: the stable id of each image.
        addresses: of fixed crops, what stands for the pixels of each view, by teacher name.
        features: stored features of the views, by teacher name, zeros in the rows of ``missing``.
            Where every teacher of a size has all of its features, its views are not made: they
            have no rows.
        missing: by teacher name, the rows whose features have to be computed.
        encoded: crops that are still to be decoded, whose rows are zeros; None if there are none.
    """

    student: Tensor
    teachers: dict[str, Tensor]
    shifts: dict[str, Tensor] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    addresses: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    features: dict[str, Features] = field(default_factory=dict)
    missing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    encoded: EncodedCrops | None = None


@dataclass(frozen=True)
class TrainBatch:
    """The images of one step on one rank.

    Attributes:
        groups: the views of each group of the plan.
        keys: the stable id of each image, all groups in order.
        skipped: how many images were replaced, by reason: "corrupt", "unreadable", "too_large",
            "too_small", "uniform", "duplicate". Only reasons that occurred.
        bad: some of the replaced images as (key, reason), at most ``MAX_BAD``.
        step: the step that this batch is for.
        plan: the plan that it was made from.
    """

    groups: list[GroupViews]
    keys: list[str]
    skipped: dict[str, int]
    bad: list[tuple[str, str]] = field(default_factory=list)
    step: int = 0
    plan: StepPlan = StepPlan(())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainBatch:
        """The batch on ``device``; tensors that were one object stay one object."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TrainBatch:
        """The batch in page-locked memory. ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a batch that another stream made until ``stream`` is done with it."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        done: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = function(tensor)
            return done[id(tensor)]

        groups = [
            replace(
                group,
                student=once(group.student),
                teachers={name: once(view) for name, view in group.teachers.items()},
                shifts={name: once(shift) for name, shift in group.shifts.items()},
                features={
                    name: Features(
                        None if f.summary is None else once(f.summary),
                        None if f.spatial is None else once(f.spatial),
                    )
                    for name, f in group.features.items()
                },
            )
            for group in self.groups
        ]
        return replace(self, groups=groups)


MAX_BAD = 8
"""How many examples of replaced images a batch carries."""
