"""The spread of a teacher's summary vectors, for the dispersion-balanced angular loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Dispersion(nn.Module):
    """Streaming estimate of ``E[theta(y, mu)^2]``, the mean squared angle to the mean direction.

    C-RADIOv4 (arXiv 2601.17237) divides the squared angle between student and teacher by this
    number, so that a teacher whose summaries lie in a narrow cone weighs as much as one whose
    summaries are spread widely. The angle of a vector is taken to the mean direction as known
    when it comes by, which settles after a few batches.

    Args:
        channels: width of the summary vectors.

    Raises:
        ValueError: ``channels`` is not a positive int.
    """

    count: Tensor
    direction: Tensor
    squared_angles: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels: expected a positive int, got {channels!r}")
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("direction", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("squared_angles", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, summaries: Tensor) -> None:
        """Take in a batch of summary vectors. On a GPU it waits for the device once.

        Args:
            summaries: ``(N, C)``, any floating dtype.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: another shape, or NaN or infinity, with the estimate unchanged.
        """
        if not isinstance(summaries, Tensor) or not summaries.is_floating_point():
            kind = summaries.dtype if isinstance(summaries, Tensor) else type(summaries).__name__
            raise TypeError(f"summaries: expected a floating-point tensor, got {kind}")
        if summaries.dim() != 2 or summaries.shape[1] != len(self.direction):
            raise ValueError(
                f"summaries: expected the shape (N, {len(self.direction)}), got "
                f"{tuple(summaries.shape)}"
            )
        if bad := int((~torch.isfinite(summaries).all(dim=1)).sum()):
            raise ValueError(
                f"summaries: {bad} of {len(summaries)} rows contain NaN or infinity; look for what "
                "made them"
            )
        unit = nn.functional.normalize(summaries.double(), dim=-1)
        self.direction += unit.sum(0)
        cosine = unit @ nn.functional.normalize(self.direction, dim=0)
        self.squared_angles += torch.arccos(cosine.clamp(-1, 1)).square().sum()
        self.count += len(unit)

    def reset(self) -> None:
        """Forget everything, as a new training stage does."""
        for buffer in self.buffers():
            buffer.zero_()

    def merged(self) -> Dispersion:
        """The estimate over all ranks (a copy; this rank's own goes on)."""
        total = Dispersion(len(self.direction)).to(self.count.device)
        total.load_state_dict(self.state_dict())
        if dist.is_initialized():
            for buffer in total.buffers():
                dist.all_reduce(buffer)
        return total

    @property
    def value(self) -> Tensor:
        """The dispersion in rad^2, 0-d float32; 1 before the first update, never below 1e-4."""
        mean = self.squared_angles / self.count.clamp(min=1)
        return torch.where(self.count > 0, mean.clamp(min=1e-4), 1.0).float()
