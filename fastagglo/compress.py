"""The bridge to a vision-language model: a fixed number of tokens from any resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.features import Features
from fastagglo.ops.exporting import exporting
from fastagglo.ops.exporting_merge import merge_round, strided, sums
from fastagglo.ops.merge import merge_tokens
from fastagglo.ops.partition import Partition

__all__ = ["Compress", "CompressedTokens", "compress"]


@dataclass(frozen=True)
class CompressedTokens:
    """``tokens`` slots for each of ``N`` images.

    Attributes:
        tokens: (N, tokens, C), the features' dtype; zeros where ``mask`` is False.
        mask: (N, tokens) bool: False in the padding of an image that has fewer patches than slots.
        size: (N, tokens) float32 (float64 for float64 features): patches that each token stands
            for, 0 in the padding. ``size.log()`` is the bias of proportional attention.
        index: N tensors (h, w) int64, one per image in the order of ``tokens``: the slot that each
            patch went to, -1 for a patch that is not valid. While a model is exported, when N may
            be a symbol, a tensor (N_i, h_i, w_i) per group instead.
    """

    tokens: Tensor
    mask: Tensor
    size: Tensor
    index: list[Tensor]


def compress(
    features: Features | Tensor | Sequence[Tensor],
    tokens: int = 256,
    *,
    partition: Partition = "strided",
    valid: Tensor | Sequence[Tensor | None] | None = None,
    seed: int = 0,
) -> CompressedTokens:
    """Merge the patches of each image into exactly ``tokens`` tokens.

    Token merging once, at the encoder's output, with the features as metric and destinations
    strided over the grid, keeps more for a language model than pixel unshuffle (RADIOv2.5,
    arXiv 2412.07679). The windows are the nearly square ones (sides within a factor of two) whose
    number comes closest to ``tokens`` from below; every grid is compressed in one round of
    :func:`fastagglo.ops.merge_tokens` (``"alternate"``: as many as it takes).

    Args:
        features: spatial features: :class:`Features`, (N, h, w, C), or a list of groups
            (N_i, h_i, w_i, C) of any resolutions; float16, bfloat16, float32 or float64.
        tokens: slots per image. An image with as many patches is passed through; one with fewer is
            padded.
        partition, seed: see :func:`fastagglo.ops.merge_tokens`.
        valid: bool mask of the patches, (N, h, w), or one or None per group, for images padded to
            a common size: the valid patches of an image must be a rectangle. The others are left
            out, whatever they hold.

    Returns:
        :class:`CompressedTokens`; images of later groups follow those of earlier ones. Gradients
        flow from ``tokens`` to the features.

    In a model that is exported height and width may be symbols: the window is then chosen in the
    graph, and the number of tokens is ``tokens`` whatever comes in.

    Raises:
        TypeError: features or ``valid`` of the wrong kind or dtype, ``tokens`` not an int.
        ValueError: no spatial features, shapes or groups that do not fit, ``tokens`` below 1, an
            unknown partition, valid patches that are no rectangle, on the CPU NaN or infinity;
            while exporting, ``valid`` or a partition other than ``"strided"``.
    """
    groups = _groups(features)
    masks = _masks(valid, groups)
    _check_tokens(tokens)
    tokens = int(tokens)
    if exporting():
        return _exported(groups, tokens, partition, masks)
    parts = []
    index: list[Tensor] = []
    for group, mask in zip(groups, masks, strict=True):
        if mask is None:
            *part, slots = _compress_grid(group, tokens, partition, seed)
            parts.append(part)
            index.extend(slots)
            continue
        # Padding differs from image to image, and so does the grid that is left.
        for image, box in zip(group, mask, strict=True):
            rows, columns = _rectangle(box)
            *part, slots = _compress_grid(image[None, rows, columns], tokens, partition, seed)
            parts.append(part)
            index.append(torch.full_like(box, -1, dtype=torch.int64))
            index[-1][rows, columns] = slots[0]
    # A list without images has parts of its own: (0, tokens, C).
    if not parts:
        parts = [_compress_grid(groups[0][:0], tokens, partition, seed)[:2]]
    merged, size = (torch.cat(part) for part in zip(*parts, strict=True))
    return CompressedTokens(merged, size > 0, size, index)


class Compress(nn.Module):
    """:func:`compress` as a module without parameters: the step between encoder and projector.

    Args:
        tokens: slots per image.
        partition, seed: see :func:`fastagglo.ops.merge_tokens`.

    Raises:
        TypeError: ``tokens`` is not an int.
        ValueError: ``tokens`` below 1, or an unknown partition.
    """

    def __init__(
        self, tokens: int = 256, *, partition: Partition = "strided", seed: int = 0
    ) -> None:
        super().__init__()
        _check_tokens(tokens)
        if partition not in get_args(Partition):
            raise ValueError(
                f"Compress: partition must be one of {', '.join(get_args(Partition))}; got "
                f"{partition!r}"
            )
        self.tokens, self.partition, self.seed = int(tokens), partition, seed

    def forward(
        self,
        features: Features | Tensor | Sequence[Tensor],
        valid: Tensor | Sequence[Tensor | None] | None = None,
    ) -> CompressedTokens:
        """See :func:`compress`, whose arguments, result and errors these are."""
        return compress(
            features, self.tokens, partition=self.partition, valid=valid, seed=self.seed
        )

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, partition={self.partition!r}"


def _check_tokens(tokens: object) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, Integral):
        raise TypeError(f"compress: tokens must be an int, got {type(tokens).__name__}")
    if tokens < 1:
        raise ValueError(f"compress: tokens must be at least 1, got {tokens}")


def _exported(
    groups: list[Tensor], tokens: int, partition: Partition, masks: list[Tensor | None]
) -> CompressedTokens:
    """What an exporter sees: one round whose window is data, so that a graph serves all grids."""
    if partition != "strided":
        raise ValueError(
            f"compress: partition {partition!r} cannot be exported, only 'strided' can"
        )
    if any(mask is not None for mask in masks):
        raise ValueError(
            "compress: valid cannot be exported; give the model images without padding"
        )
    merged, sizes, index = [], [], []
    for x in groups:
        wide = torch.promote_types(x.dtype, torch.float32)
        _, h, w, _ = x.shape
        flat = x.flatten(1, 2).to(wide)
        sy, sx = _exported_stride(h, w, tokens, x.device)
        rows, columns = (torch.arange(side, device=x.device) for side in (h, w))
        chosen = strided(rows[:, None], columns, sy, sx).flatten()
        merges = torch.sym_max(h * w - tokens, 0)
        slot = merge_round(flat.detach(), chosen, tokens, merges)
        size = sums(torch.ones_like(flat[..., :1]), slot, tokens)
        merged.append((sums(flat, slot, tokens) / size.clamp(min=1)).to(x.dtype))
        sizes.append(size[..., 0])
        index.append(slot.unflatten(1, (h, w)))
    size = torch.cat(sizes)
    return CompressedTokens(torch.cat(merged), size > 0, size, index)


def _exported_stride(h: int, w: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`_stride` of ``min(h * w, tokens)`` as (1,) tensors, of sizes that may be symbols."""

    def ceil(a: int | Tensor, b: Tensor | int) -> Tensor:
        return (a + b - 1) // b

    kept = torch.sym_min(h * w, tokens)
    sy = torch.arange(1, torch.sym_max(h, w) + 1, device=device)
    rows = ceil(h, sy)
    columns = kept // rows
    sx = torch.maximum(ceil(w, columns.clamp(min=1)), ceil(sy, 2))
    ratio = torch.maximum(sx / sy, sy / sx).double()
    # The number of windows first, of equal ones the squarest: ratios lie in 1 .. 2.
    score = rows * ceil(w, sx) - ratio / 4
    best = score.masked_fill((columns == 0) | (sx > 2 * sy), -1.0).argmax()[None]
    return sy.index_select(0, best), sx.index_select(0, best)


def _compress_grid(
    x: Tensor, tokens: int, partition: Partition, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, h, w, C) -> tokens (N, tokens, C), size (N, tokens), slot of each patch (N, h, w)."""
    images, h, w, channels = x.shape
    kept = min(h * w, tokens)
    merged = merge_tokens(
        x.reshape(images, h * w, channels),
        kept,
        partition=partition,
        grid=(h, w),
        stride=_stride(h, w, kept),
        seed=seed,
    )
    room = tokens - kept
    padded = F.pad(merged.x, (0, 0, 0, room)), F.pad(merged.size, (0, room))
    return *padded, merged.index.view(images, h, w)


def _stride(h: int, w: int, tokens: int) -> tuple[int, int]:
    """The nearly square window whose number of windows comes closest to ``tokens`` from below."""
    best, closest = (1, 1), (0, -math.inf)
    for sy in range(1, max(h, w) + 1 if tokens else 1):
        # For each height the narrowest window that gives few enough of them.
        columns = tokens // math.ceil(h / sy)
        if columns == 0:
            continue
        sx = max(math.ceil(w / columns), math.ceil(sy / 2))
        if sx > 2 * sy:
            continue
        score = (math.ceil(h / sy) * math.ceil(w / sx), -max(sx / sy, sy / sx))
        if score > closest:
            best, closest = (sy, sx), score
    return best


def _groups(features: Features | Tensor | Sequence[Tensor]) -> list[Tensor]:
    spatial = features.spatial if isinstance(features, Features) else features
    if spatial is None:
        raise ValueError("compress: these features have no spatial part, only a summary")
    groups = [spatial] if isinstance(spatial, Tensor) else spatial
    if not isinstance(groups, Sequence) or not all(isinstance(g, Tensor) for g in groups):
        raise TypeError(
            f"compress: features must be Features, a tensor (N, h, w, C) or a list of such, got "
            f"{type(features).__name__}"
        )
    if not groups:
        raise ValueError("compress: the list of features is empty")
    for group in groups:
        if group.dim() != 4:
            raise ValueError(f"compress: features must be (N, h, w, C), got {tuple(group.shape)}")
        if (group.shape[-1], group.dtype, group.device) != (
            groups[0].shape[-1],
            groups[0].dtype,
            groups[0].device,
        ):
            raise ValueError(
                f"compress: all groups must have the same channels, dtype and device; got "
                f"{groups[0].shape[-1]} {groups[0].dtype} {groups[0].device} and "
                f"{group.shape[-1]} {group.dtype} {group.device}"
            )
    return list(groups)


def _masks(
    valid: Tensor | Sequence[Tensor | None] | None, groups: list[Tensor]
) -> list[Tensor | None]:
    if valid is None:
        return [None] * len(groups)
    if not isinstance(valid, Tensor | Sequence):
        raise TypeError(
            f"compress: valid must be a bool tensor (N, h, w), or a list of such, got "
            f"{type(valid).__name__}"
        )
    masks = [valid] if isinstance(valid, Tensor) else list(valid)
    if len(masks) != len(groups):
        raise ValueError(
            f"compress: valid must have one entry per group of features, got {len(masks)} for "
            f"{len(groups)}"
        )
    for mask, group in zip(masks, groups, strict=True):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("compress: valid must be a bool tensor (N, h, w), or a list of such")
        if mask.shape != group.shape[:3]:
            raise ValueError(
                f"compress: valid must be {tuple(group.shape[:3])}, got {tuple(mask.shape)}"
            )
    return masks


def _rectangle(valid: Tensor) -> tuple[slice, slice]:
    """Rows and columns of the rectangle of valid patches; empty slices where there are none."""
    sides = []
    for along in (1, 0):
        used = valid.any(along).nonzero()[:, 0].tolist()
        sides.append(slice(used[0], used[-1] + 1) if used else slice(0, 0))
    rows, columns = sides
    if not bool(valid[rows, columns].all()):
        raise ValueError(
            "compress: the valid patches of each image must fill a rectangle, as in an image that "
            "was padded to a common size"
        )
    return rows, columns
