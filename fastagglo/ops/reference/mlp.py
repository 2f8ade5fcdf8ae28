"""The executable specification of :mod:`fastagglo.ops.mlp`, in plain ``nn.functional`` calls."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["gelu_linear_residual", "layer_norm_gelu", "linear_bias_gelu"]


def layer_norm_gelu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    approximate: str = "none",
) -> Tensor:
    """Eager twin of :func:`fastagglo.ops.layer_norm_gelu`; same arguments and result."""
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps), approximate=approximate)


def linear_bias_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """Eager twin of :func:`fastagglo.ops.linear_bias_gelu`; same arguments and result."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def gelu_linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    approximate: str = "none",
) -> Tensor:
    """Eager twin of :func:`fastagglo.ops.gelu_linear_residual`; same arguments and result."""
    y = F.linear(F.gelu(x, approximate=approximate), weight, bias)
    return y if residual is None else residual + y
