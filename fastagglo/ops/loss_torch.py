"""The PyTorch path of the multi-teacher loss: one term, block by block, loss and gradient at once.

What to compute is said in ``loss.py``. This file says how: the geometry of comparison cells, the
losses of a block of tokens, the loop over blocks, and the two operators with their autograd node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

COSINE_SHARE = 0.9  # of cosine_smooth_l1, the rest is smooth L1: AM-RADIO, arXiv 2312.06709
EPS = 1e-8  # a shorter vector has no direction; the eps of F.cosine_similarity
COSINE_LIMIT = 1 - 1e-6  # of "angular": the slope of arccos has no bound at +-1
SNAP = 1e-6  # cells: a sample this close to a cell centre is that cell, whatever rounding says
BLOCK = 1 << 20  # elements, 4 MiB in fp32: long enough to be worth waking a second thread


# Geometry: which cells of the target a comparison cell reads, and whether it is compared


class _Taps(NamedTuple):
    """Linear interpolation along one axis, ``(1 or N, cells)`` each."""

    low: Tensor
    high: Tensor  # equal to low where its weight is zero: a masked neighbour is never touched
    weight: Tensor
    inside: Tensor
    whole: bool = False  # known to be without weights, which spares reading high

    def looked_at(self) -> _Taps:
        """Sets ``whole``, if no device must be waited for."""
        return self._replace(whole=self.weight.device.type == "cpu" and not self.weight.any())


def grid_of(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[1], shape[2]) if len(shape) == 4 else (1, 1)


def comparison_grid(
    prediction_shape: Sequence[int], target_shape: Sequence[int], resize: str
) -> tuple[int, int]:
    prediction, target = grid_of(prediction_shape), grid_of(target_shape)
    if resize == "larger":
        return max(prediction[0], target[0]), max(prediction[1], target[1])
    return prediction if resize == "student" else target


def _taps(cells: int, prediction: int, source: int, shift: Tensor) -> _Taps:
    """How ``cells`` cells over a view of ``prediction`` cells read ``source`` cells, shifted.

    fp64 throughout: an fp32 position at cell 100 is off by more than ``SNAP``.
    """
    centre = torch.arange(cells, dtype=torch.float64, device=shift.device) + 0.5
    place = (centre * (prediction / cells) - shift[:, None]) * (source / prediction)
    inside = (place >= -SNAP) & (place <= source + SNAP)
    place = torch.nan_to_num(place - 0.5).clamp(0, source - 1)
    nearest = place.round()
    place = torch.where((place - nearest).abs() < SNAP, nearest, place)
    low = place.floor()
    weight = place - low
    return _Taps(low.long(), (low + (weight > 0)).long(), weight, inside)


def _target_taps(
    shift: Tensor | None,
    prediction: tuple[int, int],
    target: tuple[int, int],
    grid: tuple[int, int],
    device: torch.device,
) -> list[_Taps] | None:
    """Rows' and columns' taps of the target, or None if the comparison reads it cell by cell."""
    if shift is None:
        if target == grid:
            return None
        shift = torch.zeros(1, 2, dtype=torch.float64, device=device)
    return [_taps(grid[a], prediction[a], target[a], shift[:, a]) for a in (0, 1)]


def valid_cells(
    valid: Tensor | None,
    shift: Tensor | None,
    prediction: tuple[int, int],
    target: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor | None:
    """The comparison cells that count, bool ``(1 or N, rows, columns)``; None if all do."""
    given = valid if valid is not None else shift
    if given is None:
        return None
    taps = _target_taps(shift, prediction, target, grid, given.device)
    if taps is None:
        return valid
    rows, columns = taps
    inside = rows.inside[:, :, None] & columns.inside[:, None, :]
    if valid is None:
        return inside
    image = torch.arange(valid.shape[0], device=valid.device)[:, None]
    cells = valid[image, rows.low] & valid[image, rows.high]
    cells = cells.transpose(1, 2)
    cells = cells[image, columns.low] & cells[image, columns.high]
    return cells.transpose(1, 2) & inside


# The loss of a block of tokens


class _Scratch:
    """Memory that one block after another uses.

    An allocation for each block costs more than its arithmetic: malloc gives large ones back to the
    system at once, and the page faults come anew.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; the next one of this name and dtype overwrites it."""
        size = math.prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, dtype] = self._like.new_empty(size, dtype=dtype)
        return kept[:size].view(shape)


def _token_losses(
    kind: str,
    beta: float,
    x: Tensor,
    t: Tensor,
    scale: Tensor | None,
    loss: Tensor,
    factor: Tensor,
    out: Tensor | None,
    scratch: _Scratch,
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
    images: int, rows: int, columns: int, channels: int, together: bool
) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of their rows: several small images or some rows of one, in order."""
    cells = max(1, BLOCK // channels)
    group = max(1, cells // (rows * columns)) if together else 1
    step = rows if rows * columns <= cells else max(1, cells // columns)
    for image in range(0, images, group):
        for row in range(0, rows, step):
            yield slice(image, min(image + group, images)), slice(row, min(row + step, rows))


def _read(
    name: str,
    features: Tensor,
    taps: list[_Taps] | None,
    images: slice,
    rows: slice,
    dtype: torch.dtype,
    scratch: _Scratch,
) -> Tensor:
    """Comparison cells (n, rows, columns, C) of a block, resampled.

    In the scratch memory ``name``, unless the features themselves are what is asked for.
    """
    features = features[images]
    if taps is None:
        return _as(name, features[:, rows], dtype, scratch)
    for dim, tap in ((1, taps[0]), (2, taps[1])):
        # A shift of its own for each image comes with blocks of one image.
        image = images.start if len(tap.low) > 1 else 0
        part = rows if dim == 1 else slice(None)
        ends = []
        for place, index in ((name, tap.low), (f"{name} high", None if tap.whole else tap.high)):
            if index is None:
                continue
            place, index = place + " rows" * (dim == 1), index[image, part]
            shape = [*features.shape[:dim], len(index), *features.shape[dim + 1 :]]
            cells = scratch(place, shape, features.dtype)
            torch.index_select(features, dim, index, out=cells)
            ends.append(_as(place, cells, dtype, scratch))
        if not tap.whole:
            weight = tap.weight[image, part].to(dtype).reshape(-1, *[1] * (3 - dim))
            torch.lerp(*ends, weight, out=ends[0])
        features = ends[0]
    return features


def _as(name: str, features: Tensor, dtype: torch.dtype, scratch: _Scratch) -> Tensor:
    """Features in a dtype: themselves, or a copy in scratch memory."""
    if features.dtype == dtype:
        return features
    return scratch(name, features.shape, dtype).copy_(features)


def _scatter(
    gradient: Tensor, taps: list[_Taps], rows: slice, out: Tensor, scratch: _Scratch
) -> None:
    """Add the gradient (n, rows, columns, C) of what :func:`_read` read to out (n, h, w, C)."""
    by_row, by_column = taps
    shape = (*gradient.shape[:2], out.shape[2], gradient.shape[3])
    narrow = scratch("narrow", shape, gradient.dtype).zero_()
    for into, source, dim, tap, part in (
        (narrow, gradient, 2, by_column, slice(None)),
        (out, narrow, 1, by_row, rows),
    ):
        if tap.whole:
            into.index_add_(dim, tap.low[0, part], source)
            continue
        weight = tap.weight[0, part].to(gradient.dtype).reshape(-1, *[1] * (3 - dim))
        share = scratch("share", source.shape, source.dtype)
        into.index_add_(dim, tap.low[0, part], torch.mul(source, 1 - weight, out=share))
        into.index_add_(dim, tap.high[0, part], torch.mul(source, weight, out=share))


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
    grid, source, other = (height, width), grid_of(prediction.shape), grid_of(target.shape)
    outside = None if cells is None else ~cells.expand(images, *grid)
    taps_t, taps_x = (
        taps and [tap.looked_at() for tap in taps]
        for taps in (
            _target_taps(shift, source, other, grid, target.device),
            _target_taps(None, source, source, grid, target.device),
        )
    )
    loss = prediction.new_empty(images, *grid, dtype=dtype)
    gradient = _kept_gradient(prediction, with_gradient)
    together = shift is None or len(shift) == 1
    scratch = _Scratch(loss)
    for part, rows in _blocks(images, *grid, channels, together):
        x = _read("x", prediction, taps_x, part, rows, dtype, scratch)
        t = _read("t", target, taps_t, part, rows, dtype, scratch)
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
            if rows.start == 0:
                total = torch.zeros_like(gradient[part], dtype=dtype)
            _scatter(block, taps_x, rows, total, scratch)
            if rows.stop == height:
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
    scratch = _Scratch(factor)
    for part, rows in _blocks(*gradient.shape, together=True):
        block = _as("block", gradient[part, rows], factor.dtype, scratch)
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
