"""From another library's tensors to packed attention: layouts of even batches, masks as biases."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastagglo.ops import PackedLayout, packed_attention, packed_attention_qkv
from fastagglo.ops.exporting import exporting, layout_of_runs
from fastagglo.ops.worklist import LONG_TILE, SHORT_TILE

# Where attention reads a list of tiles: as in fastagglo.ops.layout.
_TILED = ("cuda",)


class Segments(NamedTuple):
    """What packed attention takes beside queries, keys and values.

    Packed and merged tokens take it through a model's blocks where a mask would go.

    Attributes:
        layout: of the rows of a ``(1, T, C)`` or ``(N, L, C)`` batch, taken one after the other.
        key_bias: ``(T,)`` added to the logits of each key, or None.
        rotate_all: rotary embeddings have a row for every token, prefix tokens included.
        keys: where attention leaves its keys ``(N, L, H, D)``, or None.
    """

    layout: PackedLayout
    key_bias: Tensor | None = None
    rotate_all: bool = False
    keys: list[Tensor] | None = None


def even_layout(x: Tensor) -> PackedLayout:
    """The layout of a batch ``(N, L, ...)`` without padding: N segments of L rows.

    Made once for each size and device, and remembered; while a compiler traces, or for tensors
    without data, made anew from arithmetic alone, so that the size may stay symbolic.
    """
    batch, length = x.shape[0], x.shape[1]
    if exporting():
        return layout_of_runs([(batch, length)], x.device)
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return _traced_layout(batch, length, x.device)
    return _kept_layout(batch, length, x.device)


@lru_cache(maxsize=128)
def _kept_layout(batch: int, length: int, device: torch.device) -> PackedLayout:
    return PackedLayout.from_lengths([length] * batch, device=device)


def _traced_layout(batch: int, length: int, device: torch.device) -> PackedLayout:
    on_cpu = torch.arange(batch + 1, dtype=torch.int32, device="cpu") * length
    boundaries = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    rows = SHORT_TILE if length <= SHORT_TILE else LONG_TILE
    layout = PackedLayout(boundaries, on_cpu, batch * length, rows, None)
    if device.type in _TILED:
        vars(layout)["tiles"] = even_tiles(batch, length, rows, device)
    return layout


def even_tiles(batch: int, length: int, rows: int, device: torch.device) -> Tensor:
    """``PackedLayout.tiles`` of N segments of L rows, without a look at the boundaries."""
    each = (length + rows - 1) // rows
    tile = torch.arange(batch * each, dtype=torch.int32, device=device)
    segment = tile // each
    return torch.stack(
        (
            segment * length,
            torch.full_like(tile, length),
            tile % each * rows,
            segment,
        ),
        dim=1,
    )


def mask_bias(mask: Any, x: Tensor) -> Tensor | None:
    """A mask of keys alone as a bias per key; None for any other mask.

    Args:
        mask: ``(1 or N, 1, 1 or L, L)``, bool (True: attend) or added to the logits. What holds for
            every query alike is known by its strides, as ``expand`` leaves them.
        x: the batch ``(N, L, ...)``.

    Returns:
        ``(N * L,)`` float32 (float64 for a float64 mask).
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.requires_grad:
        return None
    batch, length = x.shape[0], x.shape[1]
    images, heads, queries, keys = mask.shape
    if images not in (1, batch) or keys != length:
        return None
    if heads != 1 and mask.stride(1) != 0:
        return None
    if queries != 1 and mask.stride(2) != 0:
        return None
    bias = mask[:, 0, 0]
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, -math.inf)
    elif bias.dtype not in (torch.float64, torch.float32):
        bias = bias.float()
    return bias.expand(batch, length).reshape(batch * length)


def segments_of(x: Tensor, mask: Any) -> Segments | None:
    """What attention over a batch ``(N, L, ...)`` with a mask is, or None if it is not ours."""
    if isinstance(mask, Segments):
        return mask
    if mask is None:
        return Segments(even_layout(x))
    bias = mask_bias(mask, x)
    return None if bias is None else Segments(even_layout(x), bias)


def attend(q: Tensor, k: Tensor, v: Tensor, where: Segments, scale: float | None = None) -> Tensor:
    """Attention of ``(N, L, H, D)`` queries, keys and values, of any strides.

    Returns:
        ``(N, L, H, D)``.
    """
    if where.keys is not None:
        where.keys.append(k)
    rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = packed_attention(*rows, where.layout, key_bias=where.key_bias, scale=scale)
    return out.view(*q.shape[:2], *out.shape[1:])


def attend_qkv(qkv: Tensor, where: Segments) -> Tensor:
    """:func:`attend` of a fused ``(N, L, 3, H, D)`` projection."""
    if where.keys is not None:
        where.keys.append(qkv.select(2, 1))
    out = packed_attention_qkv(qkv.flatten(0, 1), where.layout, key_bias=where.key_bias)
    return out.view(*qkv.shape[:2], *out.shape[1:])


def refuse_segments(mask: Any, why: str) -> None:
    """Packed and merged tokens have no other road.

    Raises:
        ValueError: ``mask`` is one of ours.
    """
    if isinstance(mask, Segments):
        raise ValueError(
            f"packed and merged tokens cannot run with {why}: call model.eval() or set the "
            "dropout to 0"
        )
