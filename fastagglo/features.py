"""What a vision model says about a batch of images: one vector per image and one per patch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of a batch of ``N`` images.

    Attributes:
        summary: ``(N, C)``, one vector per image, or None where the model has none.
        spatial: a teacher gives ``(N, h, w, C)``; a student, whose batch mixes resolutions, gives a
            list with one ``(N_i, h_i, w_i, C)`` per image group. None where there is none.
    """

    summary: Tensor | None
    spatial: Tensor | list[Tensor] | None
