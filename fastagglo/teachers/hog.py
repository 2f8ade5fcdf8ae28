"""Histograms of oriented gradients (Dalal and Triggs, 2005): a dense teacher without weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORIENTATIONS = 9
EPS = 1e-5  # of the block norm, as in scikit-image
CLIP = 0.2  # L2-Hys: no bin above this after the first normalisation (Lowe 2004)


def hog(images: Tensor, patch: int = 16) -> Tensor:
    """Histograms of oriented gradients of a batch, one block per patch.

    Each patch is a block of 2 x 2 cells; each cell is a histogram over 9 unsigned orientations,
    weighted by gradient magnitude, of the colour channel with the strongest gradient at each
    pixel; each block is normalised with L2-Hys. It equals ``skimage.feature.hog(image,
    pixels_per_cell=patch // 2, cells_per_block=(2, 2), channel_axis=-1)`` at every second block,
    hence blocks do not overlap. MaskFeat (arXiv 2112.09133) shows that such histograms are as good
    a dense target as deep features.

    Args:
        images: ``(N, C, H, W)`` floating in [0, 1]; ``H`` and ``W`` multiples of ``patch``.
        patch: pixels per patch, even.

    Returns:
        ``(N, H // patch, W // patch, 36)``, channels as (cell row, cell column, orientation), each
        patch of unit length (or zero where the image is flat).
    """
    across = torch.zeros_like(images)
    down = torch.zeros_like(images)
    across[..., 1:-1] = images[..., 2:] - images[..., :-2]
    down[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
    strength = torch.hypot(across, down)
    strength, channel = strength.max(dim=1, keepdim=True)
    across, down = across.gather(1, channel), down.gather(1, channel)

    # Unsigned orientation in [0, 1): opposite gradients are one orientation.
    turn = torch.atan2(down, across) / math.pi
    bins = ((turn - turn.floor()) * ORIENTATIONS).long().clamp_(max=ORIENTATIONS - 1)
    count, _, height, width = images.shape
    votes = images.new_zeros(count, ORIENTATIONS, height, width).scatter_(1, bins, strength)
    cells = F.avg_pool2d(votes, patch // 2)

    blocks = cells.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (N, 9, h, 2, w, 2)
    blocks = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)
    blocks = (blocks / (blocks.square().sum(-1, keepdim=True) + EPS**2).sqrt()).clamp(max=CLIP)
    return blocks / (blocks.square().sum(-1, keepdim=True) + EPS**2).sqrt()


class HogTower(nn.Module):
    """``hog`` as a teacher's tower. Always float32: in half precision small gradients vanish."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, hog(x.float(), self.patch)
