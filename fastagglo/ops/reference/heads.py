"""The executable specification of :mod:`fastagglo.ops.heads`, in plain ``nn.functional`` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastagglo.ops.heads import AdaptorMLP

__all__ = ["adaptor_mlp"]


def adaptor_mlp(x: Tensor, head: AdaptorMLP, *, rotation: Tensor | None = None) -> Tensor:
    """Eager twin of :func:`fastagglo.ops.adaptor_mlp`: the rotation multiplies the outputs.

    Args and result are those of the public op.
    """

    def norm_gelu(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
        return F.gelu(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))

    if head.pre_norm is not None:
        x = norm_gelu(x, head.pre_norm[0])
    x = F.linear(x, head.fc1.weight, head.fc1.bias)
    for norm, _, linear in head.blocks:
        x = x + F.linear(norm_gelu(x, norm), linear.weight, linear.bias)
    norm, _, linear = head.final
    x = F.linear(norm_gelu(x, norm), linear.weight, linear.bias)
    u, c = head.upsample, head.out_features
    if u > 1:
        n, h, w, _ = x.shape
        x = x.view(n, h, w, u, u, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h * u, w * u, c)
    # y' = R^T y for each row y is x @ R.
    return x if rotation is None else x @ rotation.to(x.dtype)
