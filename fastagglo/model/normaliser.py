"""Affine maps that give a backbone's own features zero mean and unit variance in all directions.

A student's feature channels differ in scale by orders of magnitude, which linear probes and
connectors to language models notice. PHI-S of the student's features (arXiv 2410.01680) evens them
out; some RADIO weights bring such maps as buffers, whose names are kept here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BlockNormaliser", "FeatureNormaliser"]


class FeatureNormaliser(nn.Module):
    """``tx @ (x - mean)`` of the last block's patch tokens; the identity at first.

    Args:
        width: channels C.
    """

    mean: Tensor
    tx: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("tx", torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., C) -> (..., C)."""
        return F.linear(x - self.mean, self.tx)


class BlockNormaliser(nn.Module):
    """``alpha_i R_i (x - mean_i)`` of block i's patch tokens; the identity at first.

    Args:
        width: channels C.
        depth: blocks.
        per_layer: a rotation for each block instead of one for all.
    """

    alphas: Tensor
    rotation: Tensor
    means: Tensor

    def __init__(self, width: int, depth: int, per_layer: bool) -> None:
        super().__init__()
        rotation = torch.eye(width)
        self.register_buffer("alphas", torch.ones(depth))
        self.register_buffer("rotation", rotation.repeat(depth, 1, 1) if per_layer else rotation)
        self.register_buffer("means", torch.zeros(depth, width))

    def forward(self, x: Tensor, block: int) -> Tensor:
        """Patch tokens ``x`` (..., C) of one block -> (..., C)."""
        rotation = self.rotation if self.rotation.dim() == 2 else self.rotation[block]
        return self.alphas[block] * F.linear(x - self.means[block], rotation)
