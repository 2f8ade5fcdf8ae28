"""What the student is measured on: its sizes, single resolutions, and mixes in one packed batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastagglo.model import StudentConfig
from fastagglo.model.config import preset

STUDENTS = ("B", "L", "SO400M", "H", "g")

# CLS and register tokens of each image: three teachers and four registers in the demo, four and
# four in RADIOv2.5 (arXiv 2412.07679), three and seven in C-RADIOv4 (arXiv 2601.17237).
PREFIX_DEMO, PREFIX_V25, PREFIX_V4 = 7, 8, 10

# Images of each size in pixels. The demo's batch is half a step of its recipe. RADIOv2.5's third
# stage has eight images of 432 px to one of 1024, and the same at three eighths is for a CPU;
# C-RADIOv4 has eight of its low sizes to a high one.
DEMO = {96: 6, 128: 4, 192: 2}
V25 = {432: 8, 1024: 1}
V25_SMALL = {160: 8, 384: 1}
V4 = dict.fromkeys((128, 192, 224, 256, 384, 432), 4) | dict.fromkeys((512, 768, 1152), 1)
TINY = {32: 2, 64: 1}

RESOLUTIONS = (224, 384, 512, 768, 1152)
TOKENS = 8_192
"""Of a batch of one resolution on CUDA, about; at least one image."""


@dataclass(frozen=True)
class Case:
    """One batch for one student.

    Attributes:
        name: of the batch.
        student: a preset of ``fastagglo.model``.
        images: of each size in pixels, which become whole patches.
        backward: forward and backward, or forward alone.
        prefix: CLS and register tokens of an image.
        compiled: with a peer under ``torch.compile``.
    """

    name: str
    student: str
    images: tuple[tuple[int, int], ...]
    backward: bool
    prefix: int = PREFIX_V25
    compiled: bool = False

    @classmethod
    def of(cls, name: str, student: str, images: Mapping[int, int], **other: Any) -> Case:
        """A case of ``images`` of each size."""
        return cls(name, student, tuple(images.items()), **other)

    @property
    def config(self) -> StudentConfig:
        """One CLS token, as every plain ViT has it, and the other prefix tokens as registers."""
        other = {"max_resolution": 512} if self.student == "tiny" else {}  # the demo's
        return preset(self.student, registers=self.prefix - 1, **other)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.student}-{self.direction}"

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(images, patches per side) of each size."""
        patch = self.config.patch_size
        return [(count, round(pixels / patch)) for pixels, count in self.images]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return [grid**2 + self.prefix for count, grid in self.grids for _ in range(count)]

    @property
    def mixed(self) -> bool:
        """Whether there is anything to pad."""
        return len(set(self.lengths)) > 1

    @property
    def peers(self) -> list[str]:
        several = len(self.lengths) > 1
        return [
            *(["per-image"] if several else []),
            "per-resolution",
            *(["padded"] if self.mixed else []),
            *(["compile"] if self.compiled else []),
        ]

    @property
    def flops(self) -> float:
        """Of all products: a backward has two for each one of the forward, but attention's five
        for two, and the patches want no gradient."""
        c = self.config
        tokens, squares = sum(self.lengths), sum(length**2 for length in self.lengths)
        patches = tokens - self.prefix * len(self.lengths)
        embed = 2 * patches * 3 * c.patch_size**2 * c.width
        matrices = 4 * c.width + (3 if c.mlp == "swiglu" else 2) * c.mlp_width
        linear = 2 * tokens * c.width * matrices * c.depth
        attention = 4 * squares * c.width * c.depth
        if not self.backward:
            return float(embed + linear + attention)
        return float(2 * embed + 3 * linear + 3.5 * attention)

    @property
    def facts(self) -> dict[str, Any]:
        patch, grids = self.config.patch_size, self.grids
        batch = " ".join(f"{count}x{grid * patch}px" for count, grid in grids)
        facts = {
            "label": f"{self.student}, {batch}",
            "pass": self.direction,
            "student": self.student,
            "batch": batch,
            "tokens": sum(self.lengths),
            "tokens_padded": max(self.lengths) * len(self.lengths),
            "flops": self.flops,
        }
        if not self.mixed and self.name != "quick":
            series = f"{self.student}, one resolution, {self.direction}: time of {TOKENS} tokens"
            facts |= {"series": series, "axis": "pixels per side", "x": grids[0][1] * patch}
        return facts


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on ``"cuda"`` or ``"cpu"``."""
    if quick:
        return [
            Case.of("quick", "tiny", TINY, backward=b, prefix=PREFIX_DEMO) for b in (False, True)
        ]
    if device == "cpu":
        return [
            Case.of("mix-demo", "tiny", DEMO, backward=True, prefix=PREFIX_DEMO),
            Case.of("mix-radio", "tiny", V25_SMALL, backward=True, prefix=PREFIX_DEMO),
            Case.of("224px", "B", {224: 1}, backward=False),
        ]
    found = []
    for backward in (False, True):
        for student in STUDENTS:
            found += [
                Case.of(
                    f"{pixels}px",
                    student,
                    {pixels: images_of(student, pixels)},
                    backward=backward,
                    compiled=backward and student == "B",
                )
                for pixels in RESOLUTIONS
            ]
            found.append(Case.of("mix-v2.5", student, V25, backward=backward, compiled=backward))
        found += [
            Case.of("mix-v4", student, V4, backward=backward, prefix=PREFIX_V4)
            for student in ("B", "SO400M", "H")
        ]
        found.append(Case.of("mix-demo", "tiny", DEMO, backward=backward, prefix=PREFIX_DEMO))
    return found


def images_of(student: str, pixels: int) -> int:
    """As many images as :data:`TOKENS` hold, at least one."""
    one = Case.of("", student, {pixels: 1}, backward=False)
    return max(1, TOKENS // one.lengths[0])
