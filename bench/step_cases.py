"""What the whole training step is measured on: a run's configuration and its teachers."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastagglo.features import Features
from fastagglo.model import StudentConfig
from fastagglo.model.cost import student_flops
from fastagglo.teachers import Teacher
from fastagglo.teachers.base import TeacherSpec
from fastagglo.train.config import GroupSettings, HeadSettings, RunConfig, TeacherSettings
from fastagglo.train.recipe import load_recipe
from fastagglo.train.student import build_student, stated_widths

# The step that is measured first: the one before it would have settled the statistics.
FIRST = 1

PLAIN = ("plain", "plain-fp32", "plain-affine")

# Pixels a cell, and the only input size, of the recipes' teachers, which are not downloaded here.
STAND_INS = {"clip": (14, None), "siglip": (14, None), "dino": (14, None), "sam": (16, 1024)}

# Summary and spatial channels of the demo's teachers, which its recipe leaves to them.
DEMO_WIDTHS = {"lite0": (1280, 112), "lite2": (1280, 48)}


@dataclass(frozen=True)
class Case:
    """A step of a recipe after its statistics are settled.

    Attributes:
        name: in results.
        label: in plots.
        recipe: whose student, optimiser, losses and heads are taken.
        teachers: by name, and the side of their inputs in pixels, or 0 for the recipe's.
        groups: (images, pixels) on one device.
        teachers_of: the recipe that these teachers are in, where it is not the same.
        cached: features are computed before the clock starts; else teachers are part of the step.
        peers: who takes part.
    """

    name: str
    label: str
    recipe: str
    teachers: tuple[tuple[str, int], ...]
    groups: tuple[tuple[int, int], ...]
    teachers_of: str | None = None
    cached: bool = True
    peers: tuple[str, ...] = PLAIN

    @property
    def id(self) -> str:
        return self.name

    @property
    def stand_ins(self) -> bool:
        """Whether features are random, because the teachers would have to be downloaded."""
        return (self.teachers_of or self.recipe) != "demo"

    @property
    def images(self) -> int:
        return sum(count for count, _ in self.groups)

    @property
    def facts(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {
            "label": self.label,
            "pass": "training step",
            "images": self.images,
            "tokens": self.tokens,
            "teachers": "features cached" if self.cached else "in the step",
        }
        return found | {"flops": self.flops} if self.cached else found

    @property
    def tokens(self) -> int:
        """Rows of the student's packed matrix."""
        shape = student_shape(self)
        patch, prefix = shape.patch_size, shape.prefix_tokens
        return sum(count * ((pixels // patch) ** 2 + prefix) for count, pixels in self.groups)

    @property
    def flops(self) -> int:
        """Of the student's forward and backward: three times the forward's products.

        Less those of a gradient of the pixels, which nobody wants.
        """
        shape = student_shape(self)
        pixels = sum(count * side**2 for count, side in self.groups)
        forward = sum(count * sum(student_flops(shape, side, side)) for count, side in self.groups)
        return 3 * forward - 6 * pixels * shape.width

    def config(self) -> RunConfig:
        """The run, without frozen steps, warm-up and evaluations.

        Photographs are the demo's, whatever the recipe.
        """
        demo, base = load_recipe("demo"), load_recipe(self.recipe)
        pool = load_recipe(self.teachers_of or self.recipe).teachers
        stage = replace(
            base.stages[-1],
            phi_s_steps=FIRST,
            freeze_trunk_steps=0,
            warmup_steps=0,
            groups=tuple(GroupSettings(count, (pixels,)) for count, pixels in self.groups),
        )
        return replace(
            base,
            teachers={name: self._teacher(pool[name], side) for name, side in self.teachers},
            stages=(stage,),
            data=demo.data,
            eval=replace(base.eval, points=0, sizes=()),
            log=replace(base.log, progress=False, tensorboard=False),
        )

    def _teacher(self, settings: TeacherSettings, side: int) -> TeacherSettings:
        if side:
            settings = replace(settings, sizes=(side,))
        # Another recipe's heads were made for its student: heads as wide as the student, then. The
        # tokens for each hidden channel, 8 in the demo, are about as many as in the recipes.
        return replace(settings, head=HeadSettings()) if self.teachers_of else settings


@functools.cache
def student_shape(case: Case) -> StudentConfig:
    """The student's configuration, without its weights."""
    config = case.config()
    stated = stated_widths(config)
    widths = {name: DEMO_WIDTHS.get(name, stated[name]) for name in stated}
    with torch.device("meta"):
        return build_student(config, widths).config


def cases(device: str, quick: bool) -> list[Case]:
    """Two of the demo's teachers in the recipes' mixes; on CUDA also the recipes' last stages."""
    if quick:
        groups = ((2, 64), (1, 96))
        return [Case("demo", "demo, tiny", "demo", (("lite0", 0), ("lite2", 0)), groups)]
    mixed = ((12, 96), (8, 128), (4, 192))
    demo = Case("demo", "demo student", "demo", (("lite0", 0), ("lite2", 0)), mixed)
    found = [
        demo,
        replace(demo, name="demo-uncached", label="demo, teachers too", cached=False),
        # The demo with teachers as wide as those of RADIO; clip sees 8 x 8 cells as lite0 does.
        replace(
            demo,
            name="demo-wide",
            label="demo, wide teachers",
            teachers=(("clip", 112), ("dino", 0)),
            teachers_of="radio-v2.5-b",
        ),
        # 1,024 images of 432 px and 128 of 1,024, RADIO's last stage, in a CPU's size.
        replace(
            demo,
            name="radio-mix",
            label="demo student, RADIO's mix",
            groups=((8, 160), (1, 384)),
        ),
    ]
    if device != "cuda":
        return found
    teachers = tuple((name, 0) for name in ("clip", "siglip", "dino", "sam"))
    # Images a GPU: a recipe's 1,024 of 256 px over 32, its 1,024 of 432 and 128 of 1,024 over 128.
    stages = {"256": ((32, 256),), "432+1024": ((8, 432), (1, 1024))}
    found += [
        Case(
            f"{size}-{stage}", f"{size} {stage} px", f"radio-v2.5-{size.lower()}", teachers, groups
        )
        for size in ("B", "L", "H")
        for stage, groups in stages.items()
    ]
    return [replace(case, peers=(*PLAIN, "plain-compile")) for case in found]


class Noise(nn.Module):
    """The tower of a stand-in: features of about the mean and spread of a vision transformer's.

    Each channel has its own, and all share a few directions, so that PHI-S has something to do.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Always the same for a shape of images."""
        spec, count = self.spec, len(images)
        h, w = spec.grid(tuple(images.shape[2:]))
        random = torch.Generator().manual_seed(zlib.crc32(f"{spec.name} {count} {h}".encode()))

        def draw(rows: int, channels: int) -> Tensor:
            fixed = torch.Generator().manual_seed(channels)
            mean, common = torch.randn(2, 8, channels, generator=fixed)
            spread = torch.randn(channels, generator=fixed).mul(0.5).exp()
            values = torch.randn(rows, channels, generator=random) * spread
            values += torch.randn(rows, 8, generator=random) @ common + mean[0]
            return values.to(images.device)

        summary = None if spec.summary is None else draw(count, spec.summary)
        return summary, draw(count * h * w, spec.spatial).view(count, h, w, spec.spatial)


def stand_ins(config: RunConfig, device: torch.device, sample: object = None) -> dict[str, Teacher]:
    """Teachers of a recipe that give noise in their shapes, as `load_teachers` builds real ones."""
    found = {}
    for name, settings in config.teachers.items():
        patch, size = STAND_INS[name]
        summary = settings.summary_width if settings.summary_weight > 0 else None
        spec = TeacherSpec(
            *(name, size, patch, patch, (0.5,) * 3, (0.5,) * 3, summary, settings.spatial_width)
        )
        found[name] = Teacher(spec, Noise(spec)).to(device)
    return found


class Remembered(Teacher):
    """A teacher that has seen all its images: the features of the first call with a shape."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.spec, nn.Identity())
        self.teacher = teacher
        self.kept: dict[tuple[int, ...], Features] = {}
        self.to(teacher.device)

    def forward(self, images: Tensor) -> Features:
        """``images`` must be the same in each call with their shape."""
        shape = tuple(images.shape)
        if shape not in self.kept:
            self.kept[shape] = self.teacher(images)
        return self.kept[shape]
