"""Packed attention in plain PyTorch: the executable specification."""

from __future__ import annotations

import torch
from torch import Tensor

from fastagglo.ops.layout import PackedLayout


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention inside each segment; see :func:`fastagglo.ops.packed_attention`.

    Takes and returns what the op does, keeps the softmax in fp32 (fp64 for fp64 inputs), checks
    nothing, and leaves the gradients to autograd.
    """
    _, heads, width = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = width**-0.5 if scale is None else scale
    if key_bias is None:
        key_bias = q.new_zeros(q.shape[0], dtype=exact)
    if key_bias.dim() == 1:
        key_bias = key_bias[:, None].expand(-1, heads)
    key_bias = key_bias.to(exact)

    pieces = []
    start = 0
    for length in layout.lengths:
        rows = slice(start, start + length)
        queries, keys, values = (x[rows].to(exact).transpose(0, 1) for x in (q, k, v))  # (H, L, D)
        logits = queries @ keys.transpose(1, 2) * scale + key_bias[rows].T[:, None]  # (H, L, L)
        # softmax of a row of -inf is NaN, and so is its gradient: such a row never enters it.
        removed = torch.isneginf(logits)
        empty = removed.all(-1, keepdim=True)
        weights = torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(removed, 0.0)
        pieces.append((weights @ values).transpose(0, 1).to(q.dtype))
        start += length
    pieces.append(q.new_zeros(q.shape[0] - start, *q.shape[1:]))
    return torch.cat(pieces)


def packed_attention_qkv(
    qkv: Tensor,
    layout: PackedLayout,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of a fused projection; see :func:`fastagglo.ops.packed_attention_qkv`."""
    return packed_attention(*qkv.unbind(1), layout, key_bias=key_bias, scale=scale)
