"""Token merging inside a model that is being exported; see ``exporting.py``.

One formula for every size: whether a token is a destination, and whether it is merged, are masks,
so that no shape depends on the tokens and sizes may be symbols.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.ops.partition import MergedTokens

__all__ = ["merge", "merge_round", "strided", "sums", "unmerge"]


def merge(
    x: Tensor,
    keep: int,
    size: Tensor | None,
    metric: Tensor | None,
    partition: str,
    grid: tuple[int, int] | None,
    protect: int,
    stride: tuple[int, int],
) -> MergedTokens:
    """:func:`fastagglo.ops.merge_tokens` of (N, L, C) tokens with checked arguments.

    Raises:
        ValueError: the partition is random: what a seed draws cannot be traced.
    """
    if partition == "random2d":
        raise ValueError(
            "merge_tokens: partition 'random2d' cannot be exported, since its draw from the seed "
            "would not be part of the graph; use 'strided'"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[1]
    own = torch.ones(x.shape[:2], dtype=wide, device=x.device) if size is None else size.to(wide)
    compared = x if metric is None else metric
    compared = compared.detach().to(torch.promote_types(compared.dtype, torch.float32))
    if compared.dim() == 4:
        compared = compared.mean(-2)
    position = torch.arange(length - protect, device=x.device)
    index = torch.arange(length, device=x.device).expand(x.shape[:2])
    left, target = length - protect, keep - protect
    weight, compared = own[:, protect:], compared[:, protect:]
    side, column = grid or (1, left), None
    if partition == "strided":
        rows, columns = (torch.arange(n, device=x.device) for n in side)
        position = rows[:, None].expand(side).flatten()
        column = columns.expand(side).flatten()
    while left > target:
        if partition == "alternate":
            position = torch.arange(left, device=x.device)
            count, chosen = (left + protect) // 2 - protect // 2, (position + protect) % 2 == 1
            least = left - left // 2
        else:
            chosen = strided(position, column, *stride)
            side = -(-side[0] // stride[0]), -(-side[1] // stride[1])
            least = count = side[0] * side[1]
        after = torch.sym_max(least, target)
        moved = merge_round(compared, chosen, count, left - after)
        if column is not None:
            order = _places(chosen, count)
            position, column = position[order] // stride[0], column[order] // stride[1]
        own_index = moved.gather(1, index[:, protect:] - protect) + protect
        index = torch.cat([index[:, :protect], own_index], dim=1)
        if after > target:  # another round, on the means of this one
            total = sums(weight[..., None], moved, after)
            compared = sums(compared * weight[..., None], moved, after) / total
            weight = total[..., 0]
        left = after
    total = sums(own[..., None], index, keep)
    merged = sums(x.to(wide) * own[..., None], index, keep) / total
    rows = torch.arange(x.shape[0], device=x.device)[:, None] * keep
    return MergedTokens(merged.to(x.dtype), total[..., 0], index, None, index + rows)


def unmerge(y: Tensor, merged: MergedTokens) -> Tensor:
    """:func:`fastagglo.ops.unmerge_tokens`."""
    lead = merged.size.dim()
    flat = y.flatten(0, lead - 1)
    flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])  # the row of the slot -1
    return flat[merged.slot]


def strided(row: Tensor, column: Tensor, sy: int | Tensor, sx: int | Tensor) -> Tensor:
    """Whether each cell is the first of its window of (sy, sx) cells."""
    return (row % sy == 0) & (column % sx == 0)


def merge_round(metric: Tensor, chosen: Tensor, most: int, merges: int) -> Tensor:
    """One round of bipartite matching.

    Args:
        metric: (N, L, D), at least fp32.
        chosen: (L,) bool, the destinations; the others are sources.
        most: at least the number of destinations.
        merges: how many sources are merged.

    Returns:
        (N, L) int64: where each token is after the round.
    """
    images, length, _ = metric.shape
    destinations = _places(chosen, most)
    real = torch.arange(most, device=metric.device) < chosen.long().sum()
    unit = F.normalize(metric, dim=-1)
    scores = unit @ unit[:, destinations].mT
    similarity, best = scores.masked_fill(~real, -torch.inf).max(-1)
    similarity = similarity.masked_fill(chosen, -torch.inf)
    # ONNX has no stable sort by name; its own, and PyTorch's on a CPU, put ties in order.
    order = similarity.argsort(dim=-1, descending=True)
    places = torch.arange(length, device=metric.device).expand(images, length)
    rank = torch.zeros_like(order).scatter(1, order, places)
    gone = rank < merges
    moved = torch.cumsum((~gone).long(), 1) - 1
    return torch.where(gone, moved.gather(1, destinations[best]), moved)


def _places(chosen: Tensor, most: int) -> Tensor:
    """The positions (most,) of the chosen tokens, in order, then zeros."""
    rank = torch.cumsum(chosen.long(), 0) - 1
    # What is not chosen is written behind the end.
    rank = torch.where(chosen, rank, most)
    places = torch.arange(chosen.shape[0], device=chosen.device)
    return places.new_zeros(most + 1).scatter(0, rank, places)[:most]


def sums(x: Tensor, slot: Tensor, slots: int) -> Tensor:
    """The sum of the tokens (N, L, C) of each slot, (N, slots, C), as one product."""
    member = slot[:, None] == torch.arange(slots, device=x.device)[:, None]
    return member.to(x.dtype) @ x
