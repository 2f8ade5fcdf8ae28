"""What is measured at several sizes: the work of each point, and the curves that points make.

Each curve names the exponent that its own FLOPs have over the same points: 2 for attention in the
tokens of one image, 1 for it in images, between 1 and 2 for a student in tokens. A time that grows
faster than the FLOPs do loses something with size; one that grows more slowly had costs of a call
to spread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import student_cases
from fastagglo.model.config import PRESETS

PREFIX = student_cases.PREFIX_DEMO


@dataclass(frozen=True)
class Attention:
    """Packed attention, forward: images of so many tokens each, with a student's heads."""

    student: str
    images: int
    tokens: int
    direction: str = "forward"

    @property
    def heads(self) -> tuple[int, int]:
        """(heads, channels of each)."""
        config = PRESETS[self.student]
        return config.num_heads, config.width // config.num_heads

    @property
    def flops(self) -> float:
        return 4.0 * PRESETS[self.student].width * self.images * self.tokens**2

    @property
    def label(self) -> str:
        return f"attention of {self.student}, {self.images} x {self.tokens} tokens"


@dataclass(frozen=True)
class Trunk:
    """A student without heads, forward and backward: (images, patches per side) of each size."""

    student: str
    grids: tuple[tuple[int, int], ...]
    direction: str = "forward+backward"

    @property
    def case(self) -> student_cases.Case:
        """The same batch as the student's benchmarks have it."""
        patch = PRESETS[self.student].patch_size
        images = {grid * patch: count for count, grid in self.grids}
        return student_cases.Case.of("", self.student, images, backward=True, prefix=PREFIX)

    @property
    def tokens(self) -> int:
        return sum(self.case.lengths)

    @property
    def flops(self) -> float:
        return self.case.flops

    @property
    def label(self) -> str:
        return f"student {self.student}, " + " ".join(f"{n}x({g}x{g})" for n, g in self.grids)


@dataclass(frozen=True)
class Heads:
    """The spatial heads of some teachers and the loss, forward and backward: images x side^2 rows
    of ``width`` channels to as many hidden ones and ``out`` of a teacher."""

    teachers: int
    images: int
    side: int
    width: int
    out: int
    direction: str = "forward+backward"

    @property
    def rows(self) -> int:
        return self.images * self.side**2

    @property
    def flops(self) -> float:
        """Three products of each layer."""
        return 6.0 * self.teachers * self.rows * self.width * (self.width + self.out)

    @property
    def label(self) -> str:
        return f"heads and loss of {self.teachers} teachers, {self.rows} x {self.width}"


@dataclass(frozen=True)
class Step:
    """A step of ranks: student with heads, loss, backward, gradients averaged over the ranks.

    Attributes:
        ranks: processes, each with one core or one GPU and images of its own.
        student: the preset.
        images, side: of each rank, and patches per side.
        teachers, out: heads and their channels.
    """

    ranks: int
    student: str
    images: int
    side: int
    teachers: int
    out: int
    direction: str = "forward+backward"

    @property
    def flops(self) -> float:
        """Of one rank, whose heads' first layer is as wide as the student."""
        width = PRESETS[self.student].width
        heads = Heads(self.teachers, self.images, self.side, width, self.out)
        return Trunk(self.student, ((self.images, self.side),)).flops + heads.flops

    @property
    def label(self) -> str:
        pixels = self.side * PRESETS[self.student].patch_size
        return f"{self.ranks} ranks, each {self.images} x {pixels} px, student {self.student}"


Work = Attention | Trunk | Heads | Step


@dataclass(frozen=True)
class Case:
    """A point of a curve.

    Attributes:
        curve: name, for ids.
        series, axis: of the curve in the results.
        x: where the point is on the axis.
        work: what is done.
        expected: the exponent of the curve's FLOPs.
    """

    curve: str
    series: str
    axis: str
    x: int
    work: Work
    expected: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.curve}-{self.x}"

    @property
    def peers(self) -> tuple[str, ...]:
        """None: a curve compares us with ourselves."""
        return ()

    @property
    def facts(self) -> Mapping[str, Any]:
        return {
            "label": self.work.label,
            "pass": self.work.direction,
            "flops": self.work.flops,
            "series": self.series,
            "axis": self.axis,
            "x": self.x,
            "expected_exponent": self.expected,
        }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent of y over x by least squares of their logarithms; 0 for fewer than two x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    x0, y0 = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    spread = sum((x - x0) ** 2 for x, _ in logs)
    return sum((x - x0) * (y - y0) for x, y in logs) / spread if spread else 0.0


def curve(name: str, series: str, axis: str, points: Mapping[int, Work]) -> list[Case]:
    """The cases of a curve, each with the exponent of all."""
    expected = round(slope([(x, work.flops) for x, work in points.items()]), 3)
    return [Case(name, series, axis, x, work, expected) for x, work in points.items()]


def mix(student: str, grids: Sequence[int], tokens: int) -> Trunk:
    """As many images of each size as share ``tokens`` evenly among the sizes, at least one."""
    each = tokens / len(grids)
    counts = [max(1, round(each / (grid**2 + PREFIX))) for grid in grids]
    return Trunk(student, tuple(zip(counts, grids, strict=True)))


# Patches per side of the sizes in a mix, by their number, spread around the first one.
MIXES = {1: (8,), 2: (4, 11), 4: (4, 6, 8, 11), 8: (4, 5, 6, 7, 8, 9, 10, 11)}


@dataclass(frozen=True)
class Sizes:
    """What a device is given.

    Attributes:
        attention, student: presets.
        tokens: of one image, for attention. images: of ``tokens_each`` tokens.
        grids: patches per side of ``grid_images`` images.
        student_images: of ``student_grid`` patches per side.
        heads, teachers: one teacher's, and how many of them.
        mix_scale: times the sides of :data:`MIXES`. mix_tokens: of a mix in all.
        resolutions: sizes in a mix.
        step: of one rank.
    """

    attention: str
    tokens: tuple[int, ...]
    images: tuple[int, ...]
    tokens_each: int
    student: str
    grids: tuple[int, ...]
    grid_images: int
    student_images: tuple[int, ...]
    student_grid: int
    heads: Heads
    teachers: tuple[int, ...]
    mix_scale: int
    mix_tokens: int
    resolutions: tuple[int, ...]
    step: Step


SIZES: dict[str, Sizes] = {
    "quick": Sizes(
        "tiny", (32, 64), (1, 2), 32, "tiny", (2, 4), 1, (1, 2), 2,
        Heads(1, 1, 4, 32, 32), (1, 2), 1, 128, (1, 2), Step(1, "tiny", 1, 2, 2, 32),
    ),
    "cpu": Sizes(
        "B", (256, 512, 1024, 2048), (2, 4, 8, 16, 32), 256,
        "tiny", (6, 8, 12, 16, 24), 1, (1, 2, 4, 8), 8,
        Heads(1, 2, 16, 384, 768), (1, 2, 4, 8), 1, 1024, (1, 2, 4, 8),
        Step(1, "tiny", 4, 8, 2, 384),
    ),
    "cuda": Sizes(
        "H", (1024, 2048, 4096, 8192, 16384), (8, 16, 32, 64, 128), 1024,
        "L", (14, 24, 32, 48, 72), 8, (8, 16, 32, 64, 128), 14,
        Heads(1, 64, 27, 1280, 1280), (1, 2, 4, 8), 4, 32768, (1, 2, 4, 8),
        Step(1, "L", 32, 14, 3, 1280),
    ),
}  # fmt: skip


def worlds(device: str, quick: bool = False) -> tuple[int, ...]:
    """Numbers of ranks: powers of two up to the cores or GPUs that are there, at most 8.

    A quick run has one point: it takes seconds to start a rank.
    """
    there = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    return tuple(n for n in ((2,) if quick else (1, 2, 4, 8)) if n <= there)


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on ``"cuda"`` or ``"cpu"``.

    Ranks are left out where there is one GPU or one core.
    """
    s = SIZES["quick" if quick else device]
    mixes = {
        n: mix(s.student, [s.mix_scale * grid for grid in MIXES[n]], s.mix_tokens)
        for n in s.resolutions
    }
    found = [
        *curve(
            "attention-tokens", f"attention of {s.attention}, one image", "tokens",
            {n: Attention(s.attention, 1, n) for n in s.tokens},
        ),
        *curve(
            "attention-images", f"attention of {s.attention}, {s.tokens_each} tokens an image",
            "images", {n: Attention(s.attention, n, s.tokens_each) for n in s.images},
        ),
        *curve(
            "student-tokens", f"student {s.student}, images of one size", "tokens of an image",
            {g**2 + PREFIX: Trunk(s.student, ((s.grid_images, g),)) for g in s.grids},
        ),
        *curve(
            "student-images", f"student {s.student}, {s.student_grid} x {s.student_grid} patches",
            "images", {n: Trunk(s.student, ((n, s.student_grid),)) for n in s.student_images},
        ),
        *curve(
            "teachers", "heads and loss", "teachers",
            {n: replace(s.heads, teachers=n) for n in s.teachers},
        ),
        *curve(
            "resolutions", f"student {s.student}, about {s.mix_tokens} tokens in all",
            "resolutions in a mix", mixes,
        ),
    ]  # fmt: skip
    ranks = worlds(device, quick)
    if max(ranks, default=1) > 1:
        points = {n: replace(s.step, ranks=n) for n in ranks}
        found += curve("ranks", "step of each rank, images with the ranks", "ranks", points)
    return found
