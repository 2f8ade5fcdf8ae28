"""Cropped position embeddings: one learned table for every resolution and aspect ratio."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.ops.exporting import exporting

__all__ = ["CroppedPositions", "resize_table"]

# The crop's side as a fraction of the table's, and its aspect ratio: RADIO, arXiv 2312.06709.
MIN_SCALE = math.sqrt(0.1)
MAX_ASPECT = 4 / 3


class CroppedPositions(nn.Module):
    """A (grid, grid) table of position embeddings, read by crop (CPE, arXiv 2312.06709).

    In training each image reads a random crop of the table, so that a position says where a patch
    is within some view rather than how many patches from the border it is, and all resolutions
    train the whole table. In evaluation the table is resized to the image's longer side.

    Reading is a weighted sum of four rows per patch in one ``embedding_bag`` for the whole batch,
    which equals bilinear ``grid_sample`` / ``interpolate`` without a copy of the table per image.

    Args:
        grid: rows and columns of the table.
        width: channels.
    """

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(1, grid * grid, width))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grids: tuple[tuple[int, int, int], ...]) -> Tensor:
        """Evaluation: the table resized to (m, m), m = max(h, w), then its top-left (h, w) window.

        Bilinear, cell centres (``align_corners=False``), no antialiasing: the training crops are
        not antialiased either. The identity when h = w = grid.

        Args:
            grids: (images, h, w) per group, in patches; h and w at most ``grid``.

        Returns:
            (sum of images * h * w, C), at least fp32.
        """
        if exporting():
            return torch.cat([self._window(*grid) for grid in grids])
        index, weight = resize_corners(grids, self.grid, self.table.device)
        return self._read(index, weight)

    def _window(self, images: int, h: int, w: int) -> Tensor:
        """What :meth:`forward` gives for one group, for sizes that may be symbols."""
        table = self.table.view(self.grid, self.grid, -1)
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        scale = self.grid / torch.sym_max(h, w)

        def lines(size: int) -> tuple[Tensor, Tensor, Tensor]:
            at = torch.arange(size, dtype=table.dtype, device=table.device)
            at = ((at + 0.5) * scale - 0.5).clamp(0, self.grid - 1)
            low = at.floor()
            return low.long(), (low.long() + 1).clamp(max=self.grid - 1), at - low

        low, high, share = lines(h)
        rows = torch.lerp(table[low], table[high], share[:, None, None])
        low, high, share = lines(w)
        cells = torch.lerp(rows[:, low], rows[:, high], share[:, None])
        return cells.flatten(0, 1).expand(images, h * w, -1).flatten(0, 1)

    def crop(
        self, unit: Tensor, image_ids: Tensor, images: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Training: one random crop of the table per image.

        The crop's side is a fraction ``s ~ U(sqrt(0.1), 1)`` of the table's, its width to height
        ratio ``a`` is log-uniform in [3/4, 4/3] (sides ``s * sqrt(a)`` and ``s / sqrt(a)``, at
        most 1) and its place is uniform. Patches sample it bilinearly from corner to corner
        (``grid_sample`` with ``align_corners=True``). An oblong image covers the top-left part of
        its crop, as in evaluation, so that its patches stay equally far apart both ways.

        Args:
            unit: (T, 2) row and column of each patch over ``max(h, w) - 1`` of its image.
            image_ids: (T,) the image of each patch.
            images: number of images N.
            generator: source of the (N, 4) uniform numbers; None is torch's global one.

        Returns:
            (T, C), at least fp32.
        """
        uniform = self.draw(images, generator)
        return self._read(*crop_corners(uniform, unit, image_ids, self.grid))

    def draw(self, images: int, generator: torch.Generator | None = None) -> Tensor:
        """The (N, 4) uniform numbers that :meth:`crop` makes crops of."""
        draw_on = self.table.device if generator is None else generator.device
        uniform = torch.rand(images, 4, device=draw_on, generator=generator)
        return uniform.to(self.table.device, non_blocking=True)

    def _read(self, index: Tensor, weight: Tensor) -> Tensor:
        table = self.table[0]
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        weight = weight.to(table.dtype)
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    def extra_repr(self) -> str:
        return f"grid={self.grid}"


def crop_boxes(uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 4) uniform numbers -> (N, 2) start and (N, 2) side (y, x), as fractions of the table."""
    scale = MIN_SCALE + (1 - MIN_SCALE) * uniform[:, 0]
    half_log_aspect = (uniform[:, 1] - 0.5) * math.log(MAX_ASPECT)
    side = torch.stack([scale * (-half_log_aspect).exp(), scale * half_log_aspect.exp()], dim=1)
    side = side.clamp(max=1)
    return uniform[:, 2:] * (1 - side), side


def crop_corners(
    uniform: Tensor, unit: Tensor, image_ids: Tensor, grid: int
) -> tuple[Tensor, Tensor]:
    """What :meth:`CroppedPositions.crop` reads, as `corners` says it, from (N, 4) numbers."""
    start, side = crop_boxes(uniform)
    at = start.index_select(0, image_ids) + side.index_select(0, image_ids) * unit
    return corners(at * (grid - 1), grid)


def corners(at: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """The four table rows around each point and their bilinear weights.

    Args:
        at: (T, 2) row and column, in cells, clamped to 0 .. grid - 1.
        grid: rows and columns of the table.

    Returns:
        index (T, 4) int64 and weight (T, 4) of ``at``'s dtype.
    """
    at = at.clamp(0, grid - 1)
    low = at.floor()
    (fy, fx), (y, x) = (at - low).unbind(1), low.long().unbind(1)
    y1, x1 = (y + 1).clamp(max=grid - 1), (x + 1).clamp(max=grid - 1)
    index = torch.stack([y * grid + x, y * grid + x1, y1 * grid + x, y1 * grid + x1], dim=1)
    weight = torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], dim=1)
    return index, weight


@torch.compiler.disable
@functools.lru_cache(maxsize=64)
def resize_corners(
    grids: tuple[tuple[int, int, int], ...], grid: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What :class:`CroppedPositions` reads in evaluation, as `corners` says it."""
    # Cached tensors must not be inference tensors: a later training step may save them.
    with torch.inference_mode(False):
        indices, weights = [], []
        for images, h, w in grids:
            # fp64, so that h = w = grid gives whole numbers and hence the identity.
            along = torch.arange(max(h, w), dtype=torch.float64, device="cpu")
            along = (along + 0.5) * (grid / max(h, w, 1)) - 0.5
            at = torch.stack(torch.meshgrid(along[:h], along[:w], indexing="ij"), dim=-1)
            index, weight = corners(at.reshape(-1, 2), grid)
            indices.append(index.repeat(images, 1))
            weights.append(weight.repeat(images, 1))
        return torch.cat(indices).to(device), torch.cat(weights).to(device, torch.float32)


def resize_table(table: Tensor, grid: int) -> Tensor:
    """A position table on another grid, bilinear (antialiased when it shrinks): warm starts.

    Args:
        table: (1, old * old, C).
        grid: the new side.

    Returns:
        (1, grid * grid, C), of the same dtype.
    """
    old = math.isqrt(table.shape[1])
    image = table.to(torch.promote_types(table.dtype, torch.float32))
    image = image.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, (grid, grid), mode="bilinear", antialias=grid < old)
    return image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table.dtype)
