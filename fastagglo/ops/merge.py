"""Token merging: bipartite soft matching and size-weighted means, without a similarity matrix.

From the papers Token Merging (ToMe, arXiv 2210.09461) and Token Merging for Stable Diffusion
(arXiv 2303.17604). The unprotected tokens of an image are split into sources and destinations;
each source finds its most similar destination; the most similar sources are merged into theirs.

Road: :func:`merge_tokens` checks, ``fastagglo::merge_match`` decides, ``fastagglo::merge_fwd`` and
``fastagglo::merge_bwd`` move tokens and gradients; ``unmerge_fwd`` and ``unmerge_bwd`` go back.
The eager twin is :func:`fastagglo.ops.reference.merge_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastagglo.ops.backend import resolve
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

_BACKENDS = ("torch",)

# Bytes of one block of similarities, and of one block of widened tokens: small enough to stay in a
# CPU's cache, large enough for its matrix product.
_BLOCK_BYTES = 4 << 20

# A matrix product rounds equal pairs of tokens differently at different places of the matrix.
# Similarities closer than _DOUBT are therefore computed again in float64 and compared in steps of
# 1 / _STEPS, which makes a tie a tie: the error of the first product is well under _DOUBT, the
# error of the second well under a step.
_DOUBT = {torch.float32: 4e-6, torch.float64: 4e-12}
_STEPS = {torch.float32: 2.0**24, torch.float64: 2.0**40}


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
    """Merge the most similar tokens of each image until ``keep`` are left.

    Bipartite soft matching (ToMe, arXiv 2210.09461; 2-D partitions: arXiv 2303.17604). In one
    round every source finds the destination of highest cosine similarity, and the sources of
    highest similarity are merged into theirs; a merged token is the mean of its tokens weighted by
    ``size``. Ties go to the lowest position, among destinations and among sources. Where one round
    cannot reach ``keep`` several run, the metric of a merged token being the weighted mean too.
    The result for an image does not depend on the other images of the batch.

    Similarities are compared in float32 (float64 for a float64 metric), whatever autocast or the
    matmul precision say; those within one step of 2**-24 (2**-40) are ties, and a token of norm
    below 1e-12 has similarity 0 to all. Means are taken in at least float32. On the CPU no block
    of similarities larger than 4 MiB is held (a single row, if that is larger), and two runs are
    bit-equal. Works under ``torch.compile(fullgraph=True)`` for (N, L, C) with one ``keep``.

    Args:
        x: tokens, (N, L, C), or packed (T, C) with ``layout``; float16, bfloat16, float32, float64.
        keep: tokens to keep of each image, protected ones included: one int, or one per image.
            From ``protect`` + 1 to L (with a ``stride`` of 1 along a side of the grid, that side
            stays: from ``protect`` + h, + w or + h * w).
        size: how many original tokens each token stands for, (N, L) or (T,), positive, any real
            dtype; default ones. Pass the ``size`` of an earlier merge to compose.
        metric: what is compared: (N, L, D) or (N, L, heads, D), packed (T, D) or (T, heads, D);
            heads (e.g. attention keys) are averaged. Default ``x``.
        partition: ``"alternate"``: tokens at even positions of the sequence are sources, at odd
            ones destinations (protected tokens count in the position), at most half merge a round.
            ``"strided"``: the top left token of each window of ``stride`` cells is a destination.
            ``"random2d"``: one random token of each window, drawn from ``seed``, the same for
            equal grids and on every device. Windows are cut at the edges of the grid.
        grid: (h, w) of the unprotected tokens in row-major order, or one per image; h * w must be
            L - ``protect``. Needed by ``"strided"`` and ``"random2d"``.
        protect: leading tokens (CLS, registers) that stay first, untouched and unmerged.
        layout: layout of packed ``x``; rows beyond its segments are ignored.
        stride: (rows, columns) of a window.
        seed: of ``"random2d"``; pass another one each step for other destinations.

    Returns:
        :class:`MergedTokens` with ``x`` (N, keep, C) for (N, L, C) tokens and a common ``keep``.
        Otherwise (packed tokens, or keeps that differ) ``x`` is packed (sum of keeps, C) and
        ``layout`` says where each image is. Gradients flow through ``x`` alone, not through the
        choice and not to ``size`` or ``metric``.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device, keep, grid or partition; on the CPU also a token or
            metric with NaN or infinity, or a size that is not positive and finite. On a GPU, where
            looking would stall the stream, a token whose similarity is NaN is never a destination
            of choice and is merged only if ``keep`` leaves no other source.
    """
    request = check_merge(x, keep, size, metric, partition, grid, protect, layout, stride, seed)
    resolve("merge_tokens", x.device, _BACKENDS)
    channels, lead = x.shape[-1], x.shape[:-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(-1, channels).contiguous()
    if metric is None:
        flat_metric = flat.detach()
    else:
        flat_metric = metric.detach()
        if metric.dim() == len(lead) + 2:
            flat_metric = flat_metric.mean(
                -2, dtype=torch.promote_types(metric.dtype, torch.float32)
            )
        flat_metric = flat_metric.reshape(-1, flat_metric.shape[-1])
    if size is None:
        flat_size = torch.ones(flat.shape[0], dtype=wide, device=x.device)
    else:
        flat_size = size.detach().reshape(-1).to(wide)
    index, slot = torch.ops.fastagglo.merge_match(
        flat_metric, flat_size, request.table(), partition, protect, *request.stride, seed
    )
    merged, total = _Merge.apply(flat, flat_size, slot, sum(request.keeps))
    index, slot = index.view(lead), slot.view(lead)
    if layout is None and len(set(request.keeps)) <= 1:
        # No image at all has no keep of its own: the argument's, if it was one number.
        kept = request.keeps[0] if request.keeps else keep if isinstance(keep, int) else 0
        merged, total = merged.view(lead[0], kept, channels), total.view(lead[0], kept)
        return MergedTokens(merged, total, index, None, slot)
    kept_layout = PackedLayout.from_lengths(request.keeps, device=x.device)
    return MergedTokens(merged, total, index, kept_layout, slot)


def unmerge_tokens(y: Tensor, merged: MergedTokens) -> Tensor:
    """Give every original token the features of the token it was merged into.

    Args:
        y: (N, keep, ...) or packed (sum of keeps, ...) in the order of ``merged.x``, any trailing
            shape; float16, bfloat16, float32 or float64.
        merged: what :func:`merge_tokens` returned.

    Returns:
        (N, L, ...) or (T, ...) with the dtype of ``y``; rows of a packed input that belong to no
        image are zero. The gradient of ``y`` is the sum over the original tokens of each slot.

    Raises:
        TypeError: ``y`` is not a float tensor, or ``merged`` is not a MergedTokens.
        ValueError: ``y`` does not start with the shape of the merged tokens, or is elsewhere.
    """
    check_unmerge(y, merged)
    resolve("unmerge_tokens", y.device, _BACKENDS)
    trail = y.shape[merged.size.dim() :]
    flat = y.reshape(merged.size.numel(), trail.numel()).contiguous()
    return _Unmerge.apply(flat, merged.slot.reshape(-1)).view(*merged.slot.shape, *trail)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, size: Tensor, slot: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        merged, total = torch.ops.fastagglo.merge_fwd(x, size, slot, rows)
        ctx.save_for_backward(size, total, slot)
        ctx.mark_non_differentiable(total)
        return merged, total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.ops.fastagglo.merge_bwd(grad, *ctx.saved_tensors), None, None, None


class _Unmerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.rows = y.shape[0]
        return torch.ops.fastagglo.unmerge_fwd(y, slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.fastagglo.unmerge_bwd(grad, *ctx.saved_tensors, ctx.rows), None


# --- the ops: T flat tokens, R merged ones; slot (T,) is a row of the merged tokens, -1 for none


_library = torch.library.Library("fastagglo", "FRAGMENT")

_library.define(
    "merge_match(Tensor metric, Tensor size, Tensor images, str partition, int protect, "
    "int stride_h, int stride_w, int seed) -> (Tensor, Tensor)"
)
_library.define("merge_fwd(Tensor x, Tensor size, Tensor slot, SymInt rows) -> (Tensor, Tensor)")
_library.define("merge_bwd(Tensor grad, Tensor size, Tensor total, Tensor slot) -> Tensor")
_library.define("unmerge_fwd(Tensor y, Tensor slot) -> Tensor")
_library.define("unmerge_bwd(Tensor grad, Tensor slot, SymInt rows) -> Tensor")


@torch.library.register_fake("fastagglo::merge_match")
def _merge_match_fake(metric: Tensor, size: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    slot = torch.empty_like(size, dtype=torch.int64)
    return slot, torch.empty_like(slot)


@torch.library.register_fake("fastagglo::merge_fwd")
def _merge_fwd_fake(x: Tensor, size: Tensor, slot: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(rows, x.shape[1]), size.new_empty(rows)


@torch.library.register_fake("fastagglo::merge_bwd")
def _merge_bwd_fake(grad: Tensor, size: Tensor, total: Tensor, slot: Tensor) -> Tensor:
    return grad.new_empty(slot.shape[0], grad.shape[1])


@torch.library.register_fake("fastagglo::unmerge_fwd")
def _unmerge_fwd_fake(y: Tensor, slot: Tensor) -> Tensor:
    return y.new_empty(slot.shape[0], y.shape[1])


@torch.library.register_fake("fastagglo::unmerge_bwd")
def _unmerge_bwd_fake(grad: Tensor, slot: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


@torch.library.impl(_library, "merge_match", "CompositeExplicitAutograd")
def _merge_match(
    metric: Tensor,
    size: Tensor,
    images: Tensor,
    partition: Partition,
    protect: int,
    stride_h: int,
    stride_w: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Slot of each token of (T, D), within its image and among all; images as in MergeRequest."""
    index = torch.full_like(size, -1, dtype=torch.int64)
    slot = index.clone()
    start = row = 0
    with _full_precision(metric.device):
        for image, (length, keep, height, width) in enumerate(images.tolist()):
            tokens = slice(start, start + length)
            fixed = min(protect, length)
            rounds = plan_rounds(
                length - fixed,
                keep - fixed,
                partition,
                (height, width),
                fixed,
                (stride_h, stride_w),
                seed,
            )
            if metric.device.type == "cpu":
                _check_image(metric[tokens], size[tokens], image)
            index[tokens] = _assign(metric[tokens], size[tokens], rounds, fixed)
            slot[tokens] = index[tokens] + row
            start, row = start + length, row + keep
    return index, slot


@torch.library.impl(_library, "merge_fwd", "CompositeExplicitAutograd")
def _merge_fwd(x: Tensor, size: Tensor, slot: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Size-weighted means (R, C) and summed sizes (R,)."""
    total = _segment_sum(size[:, None], None, slot, rows, size.dtype)[:, 0].contiguous()
    merged = _segment_sum(x, _share(size, total, slot), slot, rows, x.dtype)
    if x.device.type == "cpu" and not _finite(merged):
        # The metric was fine (it was checked), so this is a token beside it.
        raise ValueError("merge_tokens: x has NaN or infinity; drop or mend those tokens first")
    return merged, total


@torch.library.impl(_library, "merge_bwd", "CompositeExplicitAutograd")
def _merge_bwd(grad: Tensor, size: Tensor, total: Tensor, slot: Tensor) -> Tensor:
    """Gradient of the tokens (T, C): each takes its share of its slot's."""
    return _gather(grad, _share(size, total, slot), slot)


@torch.library.impl(_library, "unmerge_fwd", "CompositeExplicitAutograd")
def _unmerge_fwd(y: Tensor, slot: Tensor) -> Tensor:
    return _gather(y, None, slot)


@torch.library.impl(_library, "unmerge_bwd", "CompositeExplicitAutograd")
def _unmerge_bwd(grad: Tensor, slot: Tensor, rows: int) -> Tensor:
    return _segment_sum(grad, None, slot, rows, grad.dtype)


# --- matching one image


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 may choose the tokens."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _finite(x: Tensor) -> bool:
    # Both ends of the range in one pass and without a mask of x's size.
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def _check_image(metric: Tensor, size: Tensor, image: int) -> None:
    if not _finite(metric):
        token = int((~metric.isfinite()).any(-1).nonzero()[0])
        raise ValueError(
            f"merge_tokens: token {token} of image {image} has NaN or infinity in what is "
            f"compared (metric, by default x); drop or mend such tokens first"
        )
    if not _finite(size) or bool((size <= 0).any()):
        token = int((~(size.isfinite() & (size > 0))).nonzero()[0])
        raise ValueError(
            f"merge_tokens: size must be positive and finite, got {size[token].item()} for token "
            f"{token} of image {image}"
        )


def _assign(metric: Tensor, size: Tensor, rounds: tuple[Round, ...], protect: int) -> Tensor:
    """Slot of each of one image's tokens after the rounds."""
    slot = torch.arange(len(size), device=size.device)
    metric, size = metric[protect:], size[protect:]
    for number, (sources, destinations, merges) in enumerate(rounds, start=1):
        sources, destinations = sources.to(size.device), destinations.to(size.device)
        moved = _play(metric, sources, destinations, merges)
        slot[protect:] = moved[slot[protect:] - protect] + protect
        if number < len(rounds):
            rows = len(size) - merges
            total = _segment_sum(size[:, None], None, moved, rows, size.dtype)[:, 0]
            wide = torch.promote_types(metric.dtype, torch.float32)
            metric = _segment_sum(metric, _share(size, total, moved), moved, rows, wide)
            size = total
    return slot


def _play(metric: Tensor, sources: Tensor, destinations: Tensor, merges: int) -> Tensor:
    """One round: the position after it of each token before it."""
    similarity, best = _best_destinations(metric, sources, destinations)
    partner = destinations[best]
    chosen = slice(None)
    if merges < len(sources):
        chosen = _most_similar(metric, similarity, sources, partner, merges)
    stays = torch.ones(len(metric), dtype=torch.bool, device=metric.device)
    stays[sources[chosen]] = False
    moved = stays.cumsum(0) - 1
    moved[sources[chosen]] = moved[partner[chosen]]
    return moved


def _best_destinations(
    metric: Tensor, sources: Tensor, destinations: Tensor
) -> tuple[Tensor, Tensor]:
    """Highest similarity of each source and the destination that has it, block by block."""
    wide = torch.promote_types(metric.dtype, torch.float32)
    target = _unit(metric[destinations], wide)
    exact_target: Tensor | None = None
    similarity = torch.empty(len(sources), dtype=wide, device=metric.device)
    best = torch.empty_like(sources)
    row_bytes = max(target.shape) * target.element_size()
    for rows in torch.arange(len(sources), device=metric.device).split(_rows(row_bytes)):
        block = _products(_unit(metric[sources[rows]], wide), target)
        similarity[rows], best[rows] = block.max(1)
        second = block.scatter_(1, best[rows, None], -torch.inf).amax(1)
        close = rows[similarity[rows] - second <= _DOUBT[wide]]
        if len(close):
            if exact_target is None:
                exact_target = _unit(metric[destinations], torch.float64)
            exact = _products(_unit(metric[sources[close]], torch.float64), exact_target)
            best[close] = exact.mul_(_STEPS[wide]).round_().argmax(1)
    return similarity, best


def _most_similar(
    metric: Tensor, similarity: Tensor, sources: Tensor, partner: Tensor, count: int
) -> Tensor:
    """Which ``count`` sources have the highest similarity to their partners, ties by position."""
    wide = similarity.dtype
    last = similarity.topk(count).values[-1]
    sure = similarity > last + _DOUBT[wide]
    doubtful = ((similarity >= last - _DOUBT[wide]) & ~sure).nonzero()[:, 0]
    exact = [
        (_unit(metric[sources[rows]], torch.float64) * _unit(metric[partner[rows]], torch.float64))
        .sum(1)
        .mul_(_STEPS[wide])
        .round_()
        for rows in doubtful.split(_rows(metric.shape[1] * 8))
    ]
    order = torch.cat(exact).argsort(descending=True, stable=True)
    sure = sure.nonzero()[:, 0]
    return torch.cat([sure, doubtful[order[: count - len(sure)]]])


def _unit(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return F.normalize(tokens.to(dtype), dim=-1, eps=1e-12)


def _products(a: Tensor, b: Tensor) -> Tensor:
    similarity = a @ b.T
    if similarity.device.type != "cpu":  # there NaN was refused
        similarity.masked_fill_(similarity.isnan(), -torch.inf)
    return similarity


# --- moving tokens


def _rows(row_bytes: int) -> int:
    return max(1, _BLOCK_BYTES // max(row_bytes, 1))


def _share(size: Tensor, total: Tensor, slot: Tensor) -> Tensor:
    """Weight of each token in its slot's mean: exactly 1 for a token alone."""
    return size / total[slot.clamp_min(0)] if len(total) else torch.zeros_like(size)


def _segment_sum(
    x: Tensor, weight: Tensor | None, slot: Tensor, rows: int, dtype: torch.dtype
) -> Tensor:
    """``out[r] = sum of weight[t] * x[t] over the t with slot[t] == r``, (rows, C) in ``dtype``.

    An embedding bag is such a sum over the rows of a table in CSR order: deterministic, and
    without a weighted copy of ``x``. Half precision is widened a block of slots at a time.
    """
    if x.numel() == 0 or rows == 0:
        return torch.zeros(rows, x.shape[1], dtype=dtype, device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    order = slot.argsort(stable=True)[int((slot < 0).sum()) :]
    counts = torch.bincount(slot[order], minlength=rows)
    ends = counts.cumsum(0)
    starts = ends - counts
    if weight is not None:
        weight = weight.to(wide)[order]
    if x.dtype == wide == dtype:
        return F.embedding_bag(order, x, starts, mode="sum", per_sample_weights=weight)
    out = torch.empty(rows, x.shape[1], dtype=dtype, device=x.device)
    step = _rows(len(order) * x.shape[1] * 4 // rows)
    for first in range(0, rows, step):
        bags = slice(first, first + step)
        tokens = slice(int(starts[first]), int(ends[bags][-1]))
        part = x[order[tokens]].to(wide)
        out[bags] = F.embedding_bag(
            torch.arange(len(part), device=x.device),
            part,
            starts[bags] - starts[first],
            mode="sum",
            per_sample_weights=None if weight is None else weight[tokens],
        )
    return out


def _gather(y: Tensor, weight: Tensor | None, slot: Tensor) -> Tensor:
    """``out[t] = weight[t] * y[slot[t]]``, zero where the slot is -1; (T, C) in y's dtype."""
    if y.numel() == 0:
        return y.new_zeros(len(slot), y.shape[1])
    out = y.index_select(0, slot.clamp_min(0))
    if weight is not None:
        for rows in torch.arange(len(slot), device=y.device).split(_rows(y.shape[1] * 4)):
            block = slice(int(rows[0]), int(rows[-1]) + 1)
            out[block] = out[block].to(weight.dtype).mul_(weight[block, None])
    return out.masked_fill_((slot < 0)[:, None], 0.0)
