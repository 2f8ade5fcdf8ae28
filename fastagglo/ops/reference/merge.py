"""Token merging as one writes it from the papers: the executable specification of the op.

ToMe (arXiv 2210.09461) and ToMe for Stable Diffusion (arXiv 2303.17604), in plain eager PyTorch:
the whole similarity matrix, a sort, and scatters whose gradients autograd finds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.partition import (
    Grid,
    Keep,
    MergedTokens,
    Partition,
    Round,
    check_merge,
    check_unmerge,
    plan_rounds,
)

__all__ = ["MergedTokens", "merge_tokens", "unmerge_tokens"]


def merge_tokens(
    x: Tensor,
    keep: Keep,
    *,
    size: Tensor | None = None,
    metric: Tensor | None = None,
    partition: Partition = "alternate",
    grid: Grid | None = None,
    protect: int = 0,
    layout: PackedLayout | None = None,
    stride: tuple[int, int] = (2, 2),
    seed: int = 0,
) -> MergedTokens:
    """The eager twin of :func:`fastagglo.ops.merge_tokens`: same arguments, result and errors.

    It holds the (N, sources, destinations) similarities. Ties between tokens whose similarities
    this machine's matrix product rounds differently may go to another position than the op's.
    """
    request = check_merge(x, keep, size, metric, partition, grid, protect, layout, stride, seed)
    wide = torch.promote_types(x.dtype, torch.float32)
    metric = x.detach() if metric is None else metric.detach()
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    if metric.dim() == x.dim() + 1:
        metric = metric.mean(-2)
    size = torch.ones(x.shape[:-1], device=x.device) if size is None else size.detach()
    size = size.to(wide)

    def merge(images: slice, tokens: slice, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Merge (n, length, C) tokens that share one keep and one grid."""
        at = (images, tokens) if layout is None else (None, tokens)
        length, kept = request.lengths[image], request.keeps[image]
        fixed = min(protect, length)
        cells = request.grids[image] if request.grids else (0, 0)
        rounds = plan_rounds(
            length - fixed, kept - fixed, partition, cells, fixed, request.stride, seed
        )
        _check(x[at], size[at], metric[at])
        slot = _match(metric[at], size[at], rounds, fixed)
        total = _scatter(size[at][..., None], slot, kept)
        share = size[at][..., None] / total.gather(1, slot[..., None])
        return _scatter(x[at].to(wide) * share, slot, kept).to(x.dtype), total[..., 0], slot

    if layout is None and len(set(request.keeps)) == len(set(request.grids or (0,))) == 1:
        merged, total, index = merge(slice(None), slice(None), 0)
        rows = torch.arange(len(x), device=x.device)[:, None] * merged.shape[1]
        return MergedTokens(merged, total, index, None, index + rows)

    index = torch.full(x.shape[:-1], -1, dtype=torch.int64, device=x.device)
    slot = index.clone()
    merged, total = [x.new_zeros(0, x.shape[-1])], [size.new_zeros(0)]
    start = row = 0
    for image, (length, kept) in enumerate(zip(request.lengths, request.keeps, strict=True)):
        tokens = slice(None) if layout is None else slice(start, start + length)
        at = (image, tokens) if layout is None else tokens
        part, part_total, part_index = merge(slice(image, image + 1), tokens, image)
        merged.append(part[0])
        total.append(part_total[0])
        index[at] = part_index[0]
        slot[at] = part_index[0] + row
        start, row = start + length, row + kept
    if layout is None and len(set(request.keeps)) <= 1:
        shape = (len(x), request.keeps[0] if request.keeps else int(keep))
        packed = torch.cat(merged).view(*shape, x.shape[-1]), torch.cat(total).view(shape)
        return MergedTokens(*packed, index, None, slot)
    kept_layout = PackedLayout.from_lengths(request.keeps, device=x.device)
    return MergedTokens(torch.cat(merged), torch.cat(total), index, kept_layout, slot)


def unmerge_tokens(y: Tensor, merged: MergedTokens) -> Tensor:
    """The eager twin of :func:`fastagglo.ops.unmerge_tokens`."""
    check_unmerge(y, merged)
    lead = merged.size.dim()
    flat = y.reshape(merged.size.numel(), *y.shape[lead:])
    none = flat.new_zeros(1, *y.shape[lead:])  # the row of the slot -1
    return torch.cat([flat, none])[merged.slot]


def _match(metric: Tensor, size: Tensor, rounds: tuple[Round, ...], protect: int) -> Tensor:
    """Slot (n, L) of each token after the rounds."""
    images, length, _ = metric.shape
    slot = torch.arange(length, device=metric.device).repeat(images, 1)
    metric, size = metric[:, protect:], size[:, protect:, None]
    for number, (sources, destinations, merges) in enumerate(rounds, start=1):
        sources, destinations = sources.to(metric.device), destinations.to(metric.device)
        unit = F.normalize(metric, dim=-1)
        with torch.autocast(metric.device.type, enabled=False):
            scores = unit[:, sources] @ unit[:, destinations].transpose(1, 2)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        similarity, best = scores.max(-1)
        chosen = similarity.argsort(dim=-1, descending=True, stable=True)[:, :merges]
        gone, into = sources[chosen], destinations[best.gather(1, chosen)]
        stays = torch.ones_like(metric[..., 0], dtype=torch.bool).scatter(1, gone, False)
        moved = stays.cumsum(1) - 1
        moved = moved.scatter(1, gone, moved.gather(1, into))
        slot[:, protect:] = moved.gather(1, slot[:, protect:] - protect) + protect
        if number == len(rounds):
            break
        kept = metric.shape[1] - merges
        total = _scatter(size, moved, kept)
        metric = _scatter(metric * size / total.gather(1, moved[..., None]), moved, kept)
        size = total
    return slot


def _scatter(x: Tensor, slot: Tensor, kept: int) -> Tensor:
    """Sum (n, L, C) tokens into their slots: (n, kept, C)."""
    out = x.new_zeros(x.shape[0], kept, x.shape[2])
    return out.scatter_add(1, slot[..., None].expand_as(x), x)


def _check(x: Tensor, size: Tensor, metric: Tensor) -> None:
    if x.device.type != "cpu":
        return
    if not (x.isfinite().all() and metric.isfinite().all()):
        raise ValueError("merge_tokens: x or metric has NaN or infinity")
    if not (size.isfinite().all() and (size > 0).all()):
        raise ValueError("merge_tokens: size must be positive and finite")
