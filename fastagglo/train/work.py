"""What a step computes, in FLOPs, and the most that the device could compute in the same time.

Only useful work counts: products and convolutions of the model itself. Attention counts by the sum
over segments of rows squared; what is padded or recomputed does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Protocol

import torch

from fastagglo.model import StudentConfig
from fastagglo.model.cost import student_flops

__all__ = ["StudentWork", "measured_peak", "teacher_flops"]

# Sides of the square products that are timed: large enough for the device's best rate.
_SIDE = {"cpu": 768, "cuda": 8192}
_TRIES = 12
_LONGEST = 0.5  # seconds: a CPU without instructions for a type is a hundred times slower


class StudentWork:
    """FLOPs of the student in a training step, forward and backward.

    A backward pass costs twice its forward, less the gradient of the pixels. A frozen trunk has a
    forward only. The average student's trunk counts where it runs.

    Args:
        config: the student.
        average: the average student runs in each step, too.
    """

    def __init__(self, config: StudentConfig, average: bool = False) -> None:
        self.config, self.average = config, average
        self._image = lru_cache(maxsize=4096)(self._of_image)

    def step(
        self,
        groups: Iterable[tuple[int, int, int]],
        *,
        window: int | None = None,
        frozen: bool = False,
    ) -> int:
        """FLOPs of one forward and backward.

        Args:
            groups: (images, height, width) of each group, in pixels.
            window: patches per side of a ViTDet window, or None.
            frozen: the trunk does not learn.
        """
        return sum(
            count * self._image(height, width, window, frozen) for count, height, width in groups
        )

    def _of_image(self, height: int, width: int, window: int | None, frozen: bool) -> int:
        trunk, heads = student_flops(self.config, height, width, window)
        pixels = 6 * height * width * self.config.width
        learnt = trunk if frozen else 3 * trunk - pixels
        return learnt + 3 * heads + (trunk if self.average else 0)


class Counted(Protocol):
    """What `teacher_flops` asks of a teacher."""

    @property
    def seen(self) -> Mapping[tuple[int, int], int]: ...

    def flops(self, height: int, width: int) -> int | None: ...


def teacher_flops(teachers: Mapping[str, Counted]) -> int:
    """FLOPs of all teachers since they were made, of images that really went through them.

    What came from a feature cache costs nothing, and a mosaic costs its canvases.
    """
    return sum(
        count * (teacher.flops(*size) or 0)
        for teacher in teachers.values()
        for size, count in teacher.seen.items()
    )


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a product of two square matrices: the fastest of some tries.

    Takes a fraction of a second, a little memory, and no random numbers of PyTorch's own
    generators.
    """
    side = _SIDE.get(device.type, 1024)
    made = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=made, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds: list[float] = []
    while len(seconds) < _TRIES and sum(seconds) < _LONGEST:
        _finish(device)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
