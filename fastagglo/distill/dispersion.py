"""The spread of a teacher's summary vectors, for the dispersion-balanced angular loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    elsewhere: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels: expected a positive int, got {channels!r}")
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("direction", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("squared_angles", torch.zeros((), dtype=torch.float64))
        # What other ranks have added to the direction. A checkpoint holds the sum of all ranks.
        elsewhere = torch.zeros(channels, dtype=torch.float64)
        self.register_buffer("elsewhere", elsewhere, persistent=False)

    @torch.no_grad()
    def update(self, summaries: Tensor, elsewhere: Tensor | None = None) -> None:
        """Take in a batch of summary vectors. On a GPU it waits for the device once.

        Args:
            summaries: ``(N, C)``, any floating dtype.
            elsewhere: ``(C,)`` sum of the unit vectors that other ranks take in meanwhile, so that
                angles are to the direction of all; see :func:`update_together`. None: no others.

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
        if elsewhere is not None:
            self.elsewhere += elsewhere
        cosine = unit @ nn.functional.normalize(self.direction + self.elsewhere, dim=0)
        self.squared_angles += torch.arccos(cosine.clamp(-1, 1)).square().sum()
        self.count += len(unit)

    def reset(self) -> None:
        """Forget everything, as a new training stage does."""
        for buffer in self.buffers():
            buffer.zero_()

    def disown(self) -> None:
        """Forget all but the mean direction, which another rank goes on with."""
        direction = self.direction + self.elsewhere
        self.reset()
        self.elsewhere.copy_(direction)

    def merged(self) -> Dispersion:
        """The estimate over all ranks (a copy; this rank's own goes on)."""
        total = Dispersion(len(self.direction)).to(self.count.device)
        total.load_state_dict(self.state_dict())
        if dist.is_initialized():
            for name in total.state_dict():
                dist.all_reduce(getattr(total, name))
        return total

    @property
    def value(self) -> Tensor:
        """The dispersion in rad^2, 0-d float32; 1 before the first update, never below 1e-4."""
        mean = self.squared_angles / self.count.clamp(min=1)
        return torch.where(self.count > 0, mean.clamp(min=1e-4), 1.0).float()


@torch.no_grad()
def update_together(
    dispersions: Mapping[str, Dispersion], summaries: Mapping[str, Sequence[Tensor]]
) -> None:
    """Take in a batch on every rank as one process would take in all of it. A collective call.

    Args:
        dispersions: the same on every rank, by teacher.
        summaries: for each of them this rank's ``(N_i, C)`` tensors, possibly none.

    Raises:
        TypeError, ValueError: as :meth:`Dispersion.update`.
    """
    batches = {name: torch.cat(list(parts)) for name, parts in summaries.items() if parts}
    if not (dist.is_available() and dist.is_initialized()):
        for name, batch in batches.items():
            dispersions[name].update(batch)
        return
    if not dispersions:
        return
    ours = []
    for name, dispersion in dispersions.items():
        direction = torch.zeros_like(dispersion.direction)
        if name in batches:
            direction += nn.functional.normalize(batches[name].double(), dim=-1).sum(0)
        ours.append(direction)
    together = torch.cat(ours)
    dist.all_reduce(together)
    others = (together - torch.cat(ours)).split([len(part) for part in ours])
    for (name, dispersion), elsewhere in zip(dispersions.items(), others, strict=True):
        dispersion.update(batches.get(name, elsewhere.new_zeros(0, len(elsewhere))), elsewhere)
