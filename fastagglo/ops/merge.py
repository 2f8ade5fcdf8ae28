"""Token merging: bipartite soft matching and size-weighted means, without a similarity matrix.

From the papers Token Merging (ToMe, arXiv 2210.09461) and Token Merging for Stable Diffusion
(arXiv 2303.17604). The unprotected tokens of an image are split into sources and destinations;
each source finds its most similar destination; the most similar sources are merged into theirs.

Road: :func:`merge_tokens` checks and picks a backend, ``fastagglo::merge_match`` decides,
``fastagglo::merge_fwd`` and ``merge_bwd`` move tokens and gradients; ``unmerge_fwd`` and
``unmerge_bwd`` go back. Below them lie the Triton kernels of ``kernels/merge.py`` and
``kernels/merge_move.py``, and the PyTorch path of ``merge_torch.py``.
The eager twin is :func:`fastagglo.ops.reference.merge_tokens`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastagglo.kernels import merge as kernel
from fastagglo.kernels import merge_move as move
from fastagglo.kernels.merge_plan import Image, Plan, make_plan
from fastagglo.kernels.tiles import OLDEST_ARCH, capability
from fastagglo.ops import exporting_merge, merge_torch
from fastagglo.ops.backend import resolve
from fastagglo.ops.exporting import exporting
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

_BACKENDS = ("torch", "triton")


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
    matmul precision say, and a token of norm below 1e-12 has similarity 0 to all. Means are taken
    in at least float32. Two runs are bit-equal on the backends ``"torch"`` on the CPU and
    ``"triton"``. Works under ``torch.compile(fullgraph=True)`` for (N, L, C) with one ``keep``.

    The backend ``"triton"``, the default on CUDA, takes bfloat16, float16 and float32; what it does
    not take runs on ``"torch"``, unless it was asked for by name. It launches four kernels a round,
    holds no similarities, and never waits for the device. On ``"torch"`` no block of similarities
    larger than 4 MiB is held (a single row, if that is larger).

    Ties: equal tokens tie on both. ``"torch"`` takes similarities within one step of 2**-24
    (float64: 2**-40) for ties too; on ``"triton"`` those of unlike tokens that are as close may go
    either way, always the same one.

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
    if exporting():
        return _exported(x, keep, size, metric, partition, grid, protect, layout, stride, seed)
    request = check_merge(x, keep, size, metric, partition, grid, protect, layout, stride, seed)
    channels, lead = x.shape[-1], x.shape[:-1]
    compared = x if metric is None else metric
    unable = {"triton": _why_not_triton(x, compared)}
    triton = resolve("merge_tokens", x.device, _BACKENDS, unable) == "triton"
    flat = x.reshape(-1, channels)
    compared = compared.detach()
    if compared.dim() == len(lead) + 2:
        compared = compared.mean(-2, dtype=torch.promote_types(compared.dtype, torch.float32))
    flat_compared = compared.reshape(-1, compared.shape[-1])
    flat_size = size
    if size is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        flat_size = size.detach().reshape(-1).to(wide).contiguous()
    index, slot, order, starts = torch.ops.fastagglo.merge_match(
        flat_compared,
        flat_size,
        request.table(),
        sum(request.keeps),
        partition,
        protect,
        *request.stride,
        seed,
        triton,
    )
    merged, total = _Merge.apply(flat, flat_size, slot, order, starts, triton)
    index, slot = index.view(lead), slot.view(lead)
    if layout is None and len(set(request.keeps)) <= 1:
        # No image at all has no keep of its own: the argument's, if it was one number.
        kept = request.keeps[0] if request.keeps else keep if isinstance(keep, int) else 0
        merged, total = merged.view(lead[0], kept, channels), total.view(lead[0], kept)
        return MergedTokens(merged, total, index, None, slot, order, starts)
    kept_layout = PackedLayout.from_lengths(request.keeps, device=x.device)
    return MergedTokens(merged, total, index, kept_layout, slot, order, starts)


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
    if exporting():
        return exporting_merge.unmerge(y, merged)
    unable = {"triton": _why_not_triton(y)}
    triton = resolve("unmerge_tokens", y.device, _BACKENDS, unable) == "triton"
    trail = y.shape[merged.size.dim() :]
    flat, slot = y.reshape(merged.size.numel(), trail.numel()), merged.slot.reshape(-1)
    order, starts = merged.order, merged.starts
    if order is None or starts is None:
        order, starts = merge_torch.group(slot, len(flat))
    out = _Unmerge.apply(flat, slot, order, starts, triton)
    return out.view(*merged.slot.shape, *trail)


def _exported(
    x: Tensor,
    keep: Keep,
    size: Tensor | None,
    metric: Tensor | None,
    partition: Partition,
    grid: Grid | None,
    protect: int,
    layout: PackedLayout | None,
    stride: tuple[int, int],
    seed: int,
) -> MergedTokens:
    """What an exporter sees of :func:`merge_tokens`."""
    if layout is not None or not isinstance(keep, int | torch.SymInt):
        raise ValueError(
            "merge_tokens: only (N, L, C) tokens with one keep and no layout can be exported"
        )
    # The images are alike, and how many they are may be a symbol: one of them is checked.
    one = (None if t is None else t[:1] for t in (size, metric))
    request = check_merge(x[:1], keep, *one, partition, grid, protect, None, stride, seed)
    cells = request.grids and request.grids[0]
    return exporting_merge.merge(x, keep, size, metric, partition, cells, protect, request.stride)


def _why_not_triton(*tensors: Tensor) -> str | None:
    """What keeps the kernels from a call that is otherwise fine."""
    for x in tensors:
        if not kernel.supports(x.dtype):
            return f"its kernels take bfloat16, float16 and float32, got {x.dtype}"
        if x.is_cuda and capability(x.device.index) < OLDEST_ARCH:
            return f"its kernels need a GPU of compute capability {OLDEST_ARCH / 10} or later"
    return None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        size: Tensor | None,
        slot: Tensor,
        order: Tensor,
        starts: Tensor,
        triton: bool,
    ) -> tuple[Tensor, Tensor]:
        merged, total = torch.ops.fastagglo.merge_fwd(x, size, slot, order, starts, triton)
        ctx.save_for_backward(size, total, slot)
        ctx.triton = triton
        ctx.mark_non_differentiable(total)
        return merged, total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = torch.ops.fastagglo.merge_bwd(grad, *ctx.saved_tensors, ctx.triton)
        return grad_x, *(None,) * 5


class _Unmerge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, y: Tensor, slot: Tensor, order: Tensor, starts: Tensor, triton: bool
    ) -> Tensor:
        ctx.save_for_backward(order, starts)
        ctx.triton = triton
        return torch.ops.fastagglo.unmerge_fwd(y, slot, triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = torch.ops.fastagglo.unmerge_bwd(grad, *ctx.saved_tensors, ctx.triton)
        return grad_y, *(None,) * 4


# --- the ops: T flat tokens, R merged ones ------------------------------------------------------

_library = torch.library.Library("fastagglo", "FRAGMENT")

# size is (T,), None for ones. images is the table of MergeRequest, on the CPU. index and slot, (T,)
# int64, are the slot of each token within its image and among all, -1 for tokens of no image. order
# (T,) int32 holds the tokens by slot, starts (R + 1,) int32 where each slot begins in it. triton:
# whether the kernels do it, or PyTorch.
_library.define(
    "merge_match(Tensor metric, Tensor? size, Tensor images, SymInt rows, str partition, "
    "int protect, int stride_h, int stride_w, int seed, bool triton) "
    "-> (Tensor index, Tensor slot, Tensor order, Tensor starts)"
)
_library.define(
    "merge_fwd(Tensor x, Tensor? size, Tensor slot, Tensor order, Tensor starts, bool triton) "
    "-> (Tensor merged, Tensor total)"
)
_library.define(
    "merge_bwd(Tensor grad, Tensor? size, Tensor total, Tensor slot, bool triton) -> Tensor"
)
_library.define("unmerge_fwd(Tensor y, Tensor slot, bool triton) -> Tensor")
_library.define("unmerge_bwd(Tensor grad, Tensor order, Tensor starts, bool triton) -> Tensor")


@torch.library.register_fake("fastagglo::merge_match")
def _(metric: Tensor, size: Tensor | None, images: Tensor, rows: int, *_: object) -> tuple:
    tokens = metric.shape[0]
    index, slot = (metric.new_empty(tokens, dtype=torch.int64) for _ in range(2))
    order, starts = (metric.new_empty(n, dtype=torch.int32) for n in (tokens, rows + 1))
    return index, slot, order, starts


@torch.library.register_fake("fastagglo::merge_fwd")
def _(
    x: Tensor, size: Tensor | None, slot: Tensor, order: Tensor, starts: Tensor, *_: bool
) -> tuple:
    rows = starts.shape[0] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(rows, x.shape[1]), x.new_empty(rows, dtype=wide)


@torch.library.register_fake("fastagglo::merge_bwd")
def _(grad: Tensor, size: Tensor | None, total: Tensor, slot: Tensor, triton: bool) -> Tensor:
    return grad.new_empty(slot.shape[0], grad.shape[1])


@torch.library.register_fake("fastagglo::unmerge_fwd")
def _(y: Tensor, slot: Tensor, triton: bool) -> Tensor:
    return y.new_empty(slot.shape[0], y.shape[1])


@torch.library.register_fake("fastagglo::unmerge_bwd")
def _(grad: Tensor, order: Tensor, starts: Tensor, triton: bool) -> Tensor:
    return grad.new_empty(starts.shape[0] - 1, grad.shape[1])


@torch.library.impl(_library, "merge_match", "CompositeExplicitAutograd")
def _merge_match(
    metric: Tensor,
    size: Tensor | None,
    images: Tensor,
    rows: int,
    partition: Partition,
    protect: int,
    stride_h: int,
    stride_w: int,
    seed: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = tuple(map(tuple, images.tolist()))
    geometry = (shapes, partition, protect, (stride_h, stride_w), seed)
    if not triton:
        return merge_torch.match(metric, size, _rounds(*geometry))
    metric = _readable(metric)
    tile_rows = tuple(tile.rows for tile in kernel.tiles_for(metric))
    plan = _plan(*geometry, tile_rows, metric.is_cuda)
    if metric.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(plan)
    buffer = plan.buffer.to(metric.device, non_blocking=True)
    return kernel.match(metric, size, buffer, plan)


def _rounds(
    shapes: tuple[tuple[int, int, int, int], ...],
    partition: Partition,
    protect: int,
    stride: tuple[int, int],
    seed: int,
) -> list[tuple[int, int, tuple[Round, ...]]]:
    """Of each image its tokens, how many of them are protected, and its rounds."""
    result = []
    for length, keep, *grid in shapes:
        fixed = min(protect, length)
        rounds = plan_rounds(
            length - fixed, keep - fixed, partition, tuple(grid), fixed, stride, seed
        )
        result.append((length, fixed, rounds))
    return result


@lru_cache(maxsize=64)
def _plan(
    shapes: tuple[tuple[int, int, int, int], ...],
    partition: Partition,
    protect: int,
    stride: tuple[int, int],
    seed: int,
    tile_rows: tuple[int, int],
    pinned: bool,
) -> Plan:
    """What the kernels know of these shapes; from pinned memory a device copies without a wait."""
    images = [Image(*image) for image in _rounds(shapes, partition, protect, stride, seed)]
    plan = make_plan(images, tile_rows)
    return plan._replace(buffer=plan.buffer.pin_memory()) if pinned else plan


# A CUDA graph copies the plan of its capture anew in each replay, so it must stay where it is.
_captured: list[Plan] = []


def _readable(x: Tensor) -> Tensor:
    """x itself if the kernels can read it in place."""
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.impl(_library, "merge_fwd", "CompositeExplicitAutograd")
def _merge_fwd(
    x: Tensor, size: Tensor | None, slot: Tensor, order: Tensor, starts: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    if not triton:
        return merge_torch.merge(x, size, slot, order, starts)
    return move.segment_sum(_readable(x), order, starts, size=size, mean=True)


@torch.library.impl(_library, "merge_bwd", "CompositeExplicitAutograd")
def _merge_bwd(
    grad: Tensor, size: Tensor | None, total: Tensor, slot: Tensor, triton: bool
) -> Tensor:
    if not triton:
        return merge_torch.merge_backward(grad, size, total, slot)
    return move.gather(_readable(grad), slot, size=size, totals=total)


@torch.library.impl(_library, "unmerge_fwd", "CompositeExplicitAutograd")
def _unmerge_fwd(y: Tensor, slot: Tensor, triton: bool) -> Tensor:
    return move.gather(_readable(y), slot) if triton else merge_torch.unmerge(y, slot)


@torch.library.impl(_library, "unmerge_bwd", "CompositeExplicitAutograd")
def _unmerge_bwd(grad: Tensor, order: Tensor, starts: Tensor, triton: bool) -> Tensor:
    if not triton:
        return merge_torch.unmerge_backward(grad, order, starts)
    return move.segment_sum(_readable(grad), order, starts)[0]
