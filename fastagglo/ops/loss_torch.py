"""The PyTorch path of the multi-teacher loss: one term, block by block, loss and gradient at once.

What to compute is said in ``loss.py``, where a comparison cell reads in ``loss_grids.py``. This
file has the losses of a block of tokens, the loop over blocks, and the two operators with their
autograd node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastagglo.ops.loss_grids import (
    Resampling,
    Scratch,
    Whole,
    grid_of,
    in_dtype,
    read,
    scatter,
    target_taps,
)

COSINE_SHARE = 0.9  # of cosine_smooth_l1, the rest is smooth L1: AM-RADIO, arXiv 2312.06709
EPS = 1e-8  # a shorter vector has no direction; the eps of F.cosine_similarity
COSINE_LIMIT = 1 - 1e-6  # of "angular": the slope of arccos has no bound at +-1
BLOCK = 1 << 20  # elements, 4 MiB in fp32: long enough to be worth waking a second thread
RESIZED = 8  # blocks: the largest image that is resized whole rather than row by row


# The loss of a block of tokens


def _token_losses(
    kind: str,
    beta: float,
    x: Tensor,
    t: Tensor,
    scale: Tensor | None,
    loss: Tensor,
    factor: Tensor,
    out: Tensor | None,
    scratch: Scratch,
) -> None:
    """Write the losses (T,) of predictions x and targets t * scale, (T, C), and x's gradients.

    The gradients are multiplied by factor (T,). x is only read, and so is t if scale is None; else
    t is overwritten. All but out (or None, if no gradient is wanted) share one dtype.
    """
    channels = x.shape[1]
    if kind == "mse":
        # Where its dtype allows it, the result itself holds the difference: less to write to.
        in_place = out is not None and out.dtype == x.dtype
        work = out if in_place else scratch("work", x.shape, x.dtype)
        if scale is None:
            torch.sub(x, t, out=work)
        else:
            torch.addcmul(x, t, scale, value=-1, out=work)
        torch.linalg.vector_norm(work, dim=1, out=loss)
        loss.square_().div_(channels)
        if out is not None:
            _into(out, torch.mul, work, factor.mul(2 / channels)[:, None], work=work)
        return
    work = scratch("work", x.shape, x.dtype)
    if scale is not None:
        t.mul_(scale)
    slope = None  # of smooth L1 in each channel
    if kind in ("smooth_l1", "cosine_smooth_l1"):
        slope = scratch("slope", x.shape, x.dtype)
        torch.sub(x, t, out=work)
        if beta == 0:
            torch.sign(work, out=slope)
            torch.mean(work.abs_(), 1, out=loss)
        else:
            # With c = clamp(d, -beta, beta) both branches are c (d - c / 2) / beta.
            torch.clamp(work, -beta, beta, out=slope)
            torch.mean(work.sub_(slope, alpha=0.5).mul_(slope), 1, out=loss)
            loss.div_(beta)
            slope.div_(beta)
        if kind == "smooth_l1":
            if out is not None:
                _into(out, torch.mul, slope, factor.div(channels)[:, None], work=work)
            return
    norm_x, norm_t = (torch.linalg.vector_norm(v, dim=1) for v in (x, t))
    no_direction = (norm_x <= EPS) | (norm_t <= EPS)
    no_direction &= ~(norm_x + norm_t).isnan()  # NaN is not to be hidden
    scale_x, scale_t = norm_x.reciprocal_(), norm_t.reciprocal_()
    cosine = torch.mul(x, t, out=work).sum(1).mul_(scale_x).mul_(scale_t)
    cosine.masked_fill_(no_direction, 0).clamp_(-1, 1)
    if kind == "cosine":
        torch.sub(1, cosine, out=loss)
        d_cosine = torch.full_like(cosine, -1)
    elif kind == "cosine_smooth_l1":
        loss.mul_(1 - COSINE_SHARE).add_((1 - cosine).mul_(COSINE_SHARE))
        d_cosine = torch.full_like(cosine, -COSINE_SHARE)
    else:
        limited = cosine.clamp(-COSINE_LIMIT, COSINE_LIMIT)
        angle = limited.acos()
        torch.square(angle, out=loss)
        d_cosine = angle.mul(-2).div_(((1 - limited) * (1 + limited)).sqrt_())
        d_cosine.masked_fill_(cosine.abs() > COSINE_LIMIT, 0)
    if out is None:
        return
    # d cos / dx = (t / |t| - cos x / |x|) / |x|
    of_t = d_cosine.mul_(scale_x).mul_(factor)
    of_x = (of_t * cosine).mul_(scale_x).neg_().masked_fill_(no_direction, 0)
    of_t.mul_(scale_t).masked_fill_(no_direction, 0)
    torch.mul(x, of_x[:, None], out=work)
    if slope is None:
        _into(out, torch.addcmul, work, t, of_t[:, None], work=work)
    else:
        work.addcmul_(t, of_t[:, None])
        of_slope = factor.mul((1 - COSINE_SHARE) / channels)[:, None]
        _into(out, torch.addcmul, work, slope, of_slope, work=work)


def _into(out: Tensor, op: Any, *operands: Any, work: Tensor, **more: Any) -> None:
    """out = op(...), by way of work (which may be an operand) if out has another dtype.

    PyTorch itself would do that with an allocation.
    """
    if out.dtype == work.dtype:
        op(*operands, out=out, **more)
    else:
        out.copy_(op(*operands, out=work, **more))


# The loop over blocks


def _blocks(
    images: int, rows: int, columns: int, channels: int, together: bool, whole: bool = False
) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of their rows: several small images or some rows of one, in order.

    Args:
        images, rows, columns, channels: of all.
        together: whether a block may have several images.
        whole: an image is never cut, however large.
    """
    cells = max(1, BLOCK // channels)
    group = max(1, cells // (rows * columns)) if together else 1
    step = rows if whole or rows * columns <= cells else max(1, cells // columns)
    for image in range(0, images, group):
        for row in range(0, rows, step):
            yield slice(image, min(image + group, images)), slice(row, min(row + step, rows))


def _resampling(
    features: Tensor,
    prediction: tuple[int, int],
    grid: tuple[int, int],
    shift: Tensor | None,
    masked: bool,
) -> Resampling | None:
    """How features, whose grid may be another, are read; None if cell by cell."""
    source, channels = grid_of(features.shape), features.shape[3]
    if shift is None and source == grid:
        return None
    largest = max(grid[0] * grid[1], source[0] * source[1]) * channels
    # Beside its speed: a masked neighbour of weight 0 would be touched, and on CUDA the gradient's
    # sums would come in any order.
    plain = shift is None and not masked and features.device.type == "cpu"
    if plain and largest <= RESIZED * BLOCK:
        return Whole(grid)
    taps = target_taps(shift, prediction, source, grid, features.device)
    return taps and [tap.looked_at() for tap in taps]


def _term_loss(
    prediction: Tensor,
    target: Tensor,
    cells: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    rotation: Tensor | None,
    shift: Tensor | None,
    count: Tensor,
    factor: Tensor,
    kind: str,
    beta: float,
    height: int,
    width: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Mean losses of the images (N,), and the gradients of the tokens' losses times factor (N,).

    ``cells``: which comparison cells count, as :func:`valid_cells` says; ``count``: how many.
    """
    images, channels = prediction.shape[0], prediction.shape[3]
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    if mean is not None:
        mean, scale = mean.to(dtype), scale.double().reciprocal().to(dtype)
        rotation = None if rotation is None else rotation.to(dtype)
    grid, source = (height, width), grid_of(prediction.shape)
    outside = None if cells is None else ~cells.expand(images, *grid)
    taps_x = _resampling(prediction, source, grid, None, cells is not None)
    taps_t = _resampling(target, source, grid, shift, cells is not None)
    loss = prediction.new_empty(images, *grid, dtype=dtype)
    gradient = _kept_gradient(prediction, with_gradient)
    together = shift is None or len(shift) == 1
    scratch = Scratch(loss)
    whole = isinstance(taps_x, Whole) or isinstance(taps_t, Whole)
    for part, rows in _blocks(images, *grid, channels, together, whole):
        x = read("x", prediction, taps_x, part, rows, dtype, scratch)
        t = read("t", target, taps_t, part, rows, dtype, scratch)
        if mean is not None:
            t = torch.sub(t, mean, out=scratch("t", t.shape, dtype))
            if rotation is not None:
                with torch.autocast(t.device.type, enabled=False):
                    t = torch.matmul(t, rotation.T, out=scratch("rotated", t.shape, dtype))
        block = None
        if with_gradient:
            block = gradient[part, rows]
            if taps_x is not None:
                block = scratch("gradient", x.shape, dtype)
        _token_losses(
            kind,
            beta,
            x.reshape(-1, channels),
            t.reshape(-1, channels),
            scale,
            loss[part, rows].view(-1),
            factor[part, None, None].expand(x.shape[:3]).reshape(-1),
            None if block is None else block.view(-1, channels),
            scratch,
        )
        if block is None:
            continue
        if outside is not None:
            _clear(block, outside[part, rows])
        if taps_x is not None:
            total = gradient[part]
            if gradient.dtype != dtype:
                total = scratch("total", total.shape, dtype)
            scatter(block, taps_x, rows, total, scratch)
            if gradient.dtype != dtype and rows.stop == height:
                gradient[part] = total
    if outside is not None:
        loss.masked_fill_(outside, 0)
    return loss.sum((1, 2)) / count.clamp(min=1), gradient


def _clear(block: Tensor, cells: Tensor) -> None:
    """Set cells of (n, rows, columns, C) to zero, whatever they hold."""
    if block.device.type == "cpu":  # takes time for these cells alone; elsewhere it would wait
        block.view(-1, block.shape[3]).index_fill_(0, cells.flatten().nonzero()[:, 0], 0)
    else:
        block.masked_fill_(cells[..., None], 0)


def _kept_gradient(prediction: Tensor, with_gradient: bool) -> Tensor:
    """An empty tensor for the gradients of the tokens' losses.

    It has the prediction's dtype, but fp32 for fp16: these gradients are 1e-6 or so, and loss
    scaling, which is how fp16 training lives with that, comes with the backward.
    """
    return prediction.new_empty(
        prediction.shape if with_gradient else 0,
        dtype=torch.float32 if prediction.dtype == torch.float16 else prediction.dtype,
    )


def _scale_gradient(gradient: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Write the gradient of images (N, h, w, C) times their factors (N,)."""
    factor = factor[:, None, None, None]
    if factor.dtype == out.dtype == gradient.dtype:
        return torch.mul(gradient, factor, out=out)
    scratch = Scratch(factor)
    for part, rows in _blocks(*gradient.shape, together=True):
        block = in_dtype("block", gradient[part, rows], factor.dtype, scratch)
        work = scratch("block", block.shape, factor.dtype)
        _into(out[part, rows], torch.mul, block, factor[part], work=work)
    return out


# The operators


torch.library.define(
    "fastagglo::term_loss",
    "(Tensor prediction, Tensor target, Tensor? cells, Tensor? mean, Tensor? scale, "
    "Tensor? rotation, Tensor? shift, Tensor count, Tensor factor, str kind, float beta, "
    "SymInt height, SymInt width, bool with_gradient) -> (Tensor, Tensor)",
)
torch.library.define(
    "fastagglo::term_loss_backward", "(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor"
)
torch.library.impl("fastagglo::term_loss", "default", _term_loss)


@torch.library.impl("fastagglo::term_loss_backward", "default")
def _term_loss_backward(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return _scale_gradient(gradient, factor, torch.empty_like(gradient, dtype=dtype))


@torch.library.register_fake("fastagglo::term_loss")
def _term_loss_fake(prediction: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
    with_gradient = others[-1]
    per_image = prediction.new_empty(
        prediction.shape[0], dtype=torch.promote_types(prediction.dtype, torch.float32)
    )
    return per_image, _kept_gradient(prediction, with_gradient)


@torch.library.register_fake("fastagglo::term_loss_backward")
def _term_loss_backward_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


# Whether the graph that runs now will run again (retain_graph); the question that AOTAutograd asks
# before it lets a backward reuse the memory of saved tensors. Without an answer, suppose it will.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class TermLoss(torch.autograd.Function):
    """A term's loss and its images', (N,).

    Args:
        prediction: the only one that gets a gradient; the others follow as the operator's.
        share: (N,), what an image counts for in the term.
        weight: the term's weight in the total, a number or one element.
        dispersion: the losses are divided by it, likewise.
        count: (N,), valid cells.
        arguments: the operator's.
    """

    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, share: Tensor, weight: Any, dispersion: Any, count: Tensor,
        features: Sequence[Tensor | None], *arguments: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # The total does not see a term of weight 0, but something else may.
        if isinstance(weight, Tensor):
            held = share * weight.masked_fill(weight == 0, 1)
        else:
            held = share * (weight or 1.0)
        held = held.to(share.dtype)
        factor = (held / dispersion / count.clamp(min=1)).to(share.dtype)
        per_image, gradient = torch.ops.fastagglo.term_loss(
            prediction, *features, count, factor, *arguments
        )
        per_image = (per_image / dispersion).to(share.dtype)
        ctx.dtype = prediction.dtype
        ctx.save_for_backward(gradient, share, held)
        return (per_image * share).sum(), per_image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, per_term: Tensor, per_image: Tensor) -> tuple[Tensor | None, ...]:
        gradient, share, held = ctx.saved_tensors
        wanted = per_term * share + per_image
        same = (wanted == held) | (held == 0)  # no share: no valid token, a gradient of zeros
        factor = torch.where(same, 1, wanted / held)
        again = torch.compiler.is_compiling() or graph_is_kept()
        if again or gradient.dtype != ctx.dtype:
            gradient = torch.ops.fastagglo.term_loss_backward(gradient, factor, ctx.dtype)
        # Nobody will read the kept gradient again: it may become the result.
        elif gradient.device.type != "cpu" or not same.all():  # elsewhere a look would wait
            _scale_gradient(gradient, factor, gradient)
        return gradient, *[None] * 10
