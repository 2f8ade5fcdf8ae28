"""Attention of timm's vision transformers, computed by packed attention.

``Attention`` (ViT, DeiT, CLIP, SigLIP, DINOv2, NaFlex), ``AttentionRope`` and ``EvaAttention``
(EVA, DINOv3, PE) and SAM's. What cannot be said to packed attention goes to timm's own code in that
call: a mask over pairs of tokens, a causal mask, dropout of attention weights.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.interop.attend import (
    Segments,
    attend,
    attend_qkv,
    even_layout,
    refuse_segments,
    segments_of,
)
from fastagglo.interop.swap import Swapped, watched

# The widest head of the kernels: beyond it a bias written into the head gains nothing.
WIDEST = 128


class _TimmSelfAttention(Swapped):
    """What the attentions of timm have in common."""

    def _where(self, x: Tensor, mask: Any, options: dict[str, Any]) -> Segments | None:
        """How packed attention sees this call, or None if timm's own code must take it."""
        dropped = self.training and self.attn_drop.p > 0
        if dropped or watched(self.attn_drop) or options.get("is_causal"):
            refuse_segments(mask, "dropout of attention weights, hooks on it or is_causal")
            return None
        return segments_of(x, mask)

    def _output(self, x: Tensor, out: Tensor) -> Tensor:
        """Norm, gate and projection of the attention's (N, L, H, D)."""
        out = out.flatten(2)
        if isinstance(norm := getattr(self, "norm", None), nn.Module):
            out = norm(out)
        if isinstance(gate := getattr(self, "gate", None), nn.Module):
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _normed(self, qkv: Tensor, where: Segments) -> Tensor:
        """Attention of the fused (N, L, 3, H, D), with the norms of queries and keys."""
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            return attend_qkv(qkv, where)
        q, k, v = qkv.unbind(2)
        return attend(self.q_norm(q), self.k_norm(k), v, where)


class TimmAttention(_TimmSelfAttention):
    """``timm.layers.Attention``."""

    def forward(self, x: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        where = self._where(x, attn_mask, options)
        if where is None:
            return super().forward(x, attn_mask=attn_mask, **options)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self._output(x, self._normed(qkv, where))


class TimmRopeAttention(_TimmSelfAttention):
    """``timm.layers.AttentionRope`` and ``timm.models.eva.EvaAttention``."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Any = None, **options: Any
    ) -> Tensor:
        where = self._where(x, attn_mask, options)
        if where is None:
            return super().forward(x, rope=rope, attn_mask=attn_mask, **options)
        if self.qkv is not None:
            qkv = self._fused(x).unflatten(-1, (3, self.num_heads, -1))
            if rope is None:
                return self._output(x, self._normed(qkv, where))
            q, k, v = qkv.unbind(2)
        else:
            keys = getattr(self, "num_kv_heads", self.num_heads)
            q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
            k, v = (y(x).unflatten(-1, (keys, -1)) for y in (self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            prefix = 0 if where.rotate_all else self.num_prefix_tokens
            half = getattr(self, "rotate_half", False)
            q, k = (rotated(y, rope, prefix, half).type_as(v) for y in (q, k))
        if (groups := getattr(self, "num_kv_groups", 1)) > 1:
            k, v = (y.repeat_interleave(groups, dim=2) for y in (k, v))
        return self._output(x, attend(q, k, v, where))

    def _fused(self, x: Tensor) -> Tensor:
        if getattr(self, "q_bias", None) is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if getattr(self, "qkv_bias_separate", False):
            return self.qkv(x) + bias
        return F.linear(x, self.qkv.weight, bias)


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotary embedding of (N, L, H, D), of the tokens behind the first ``prefix``.

    Args:
        rope: (L, 2 D), or (..., H or 1, L, 2 D) as timm broadcasts it over (N, H, L, D).
    """
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    rope = rope.unsqueeze(-2) if rope.dim() == 2 else rope.transpose(-3, -2)
    options = {"half": True} if half else {}
    turned = apply_rot_embed_cat(x[:, prefix:], rope, **options)
    return turned if prefix == 0 else torch.cat((x[:, :prefix].type_as(turned), turned), dim=1)


class SamAttention(Swapped):
    """Attention of Segment Anything's encoder (arXiv 2304.02643), of timm.

    Its bias between tokens is decomposed (arXiv 2112.01526): of the sum ``q · row(y_q - y_k) +
    q · column(x_q - x_k)`` a query has h + w numbers, and a key takes two of them. So it is a
    product too: the queries get these numbers as further channels, the keys say with a one which
    of them they take. A head of 64 in windows of 14 x 14 becomes one of 96, where ``h w x h w``
    biases a head would be written and read. Beyond 128 channels, in a large grid, the model's own
    code runs.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        drop = self.training and self.attn_drop.p > 0
        head = self.qkv.out_features // 3 // self.num_heads
        wide = self.use_rel_pos and widened(head, height, width) > WIDEST
        if drop or wide or self.rope is not None:
            return super().forward(x)
        rows = columns = None
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rel_pos:
            get = sys.modules[self.fastagglo_replaces.__module__].get_rel_pos
            rows, columns = get(height, height, self.rel_pos_h), get(width, width, self.rel_pos_w)
        out = biased_grid_attention(q, k, v, (height, width), rows, columns, self.scale)
        return self.proj_drop(self.proj(out)).view(x.shape)


def widened(head: int, height: int, width: int) -> int:
    """Channels of a head of SAM's attention with its bias over a grid written into it."""
    return -(-(head + height + width) // 8) * 8


def sam_limit(head: int, rel_pos_h: Tensor, rel_pos_w: Tensor) -> str | None:
    """Why an attention of SAM with tables (2 h - 1, D) and (2 w - 1, D) stays, or None."""
    height, width = ((len(x) + 1) // 2 for x in (rel_pos_h, rel_pos_w))
    if (wide := widened(head, height, width)) <= WIDEST:
        return None
    return (
        f"its relative-position bias over {height} x {width} tokens would make a head of {wide} "
        f"channels; the kernels take {WIDEST}"
    )


def biased_grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    rows: Tensor | None,
    columns: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention over grids with a decomposed relative-position bias, see :class:`SamAttention`.

    Args:
        q, k, v: (N, h w, H, D).
        grid: (h, w).
        rows: (h, h, D), for each row of a query and of a key; None: without a bias.
        columns: (w, w, D), likewise.
        scale: factor on ``q @ k``.

    Returns:
        (N, h w, H D).
    """
    where = Segments(even_layout(q))
    if rows is None or columns is None:
        return attend(q, k, v, where, scale).flatten(2)
    height, width = grid
    at = q.unflatten(1, (height, width))
    by_row = torch.einsum("nyxhd,ykd->nyxhk", at, rows.to(q.dtype)).flatten(1, 2)
    by_column = torch.einsum("nyxhd,xkd->nyxhk", at, columns.to(q.dtype)).flatten(1, 2)
    cell = torch.arange(height * width, device=q.device)
    chosen = torch.cat(
        (F.one_hot(cell // width, height), F.one_hot(cell % width, width)), dim=1
    ).to(q.dtype)
    chosen = chosen[None, :, None].expand(*k.shape[:3], -1)
    spare = -(q.shape[-1] + height + width) % 8
    q = torch.cat((q * scale, by_row, by_column), dim=-1)
    out = attend(
        F.pad(q, (0, spare)),
        F.pad(torch.cat((k, chosen), dim=-1), (0, spare)),
        F.pad(v, (0, height + width + spare)),
        where,
        scale=1.0,
    )
    return out[..., : v.shape[-1]].flatten(2)
