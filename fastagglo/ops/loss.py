"""The balanced multi-teacher loss: one pass over predictions and targets, gradient included.

Every term reads its prediction and its target once. Resizing, shift, mask, normalisation, the loss
and its gradient happen in that pass, so that the memory needed beyond the inputs is the gradient
itself. The backward scales that gradient, one factor an image. On CUDA all terms are one launch of
``kernels/loss.py``; in PyTorch they follow one another, block by block (``loss_torch.py``).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastagglo.kernels import loss as kernel
from fastagglo.ops import loss_triton
from fastagglo.ops.backend import resolve
from fastagglo.ops.loss_grids import comparison_grid, grid_of, valid_cells
from fastagglo.ops.loss_torch import TermLoss

__all__ = ["Affine", "LossTerm", "MultiTeacherLoss", "multi_teacher_loss", "term_image_weights"]

KINDS = ("mse", "cosine", "smooth_l1", "cosine_smooth_l1", "angular")
RESIZES = ("larger", "student", "teacher")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Affine:
    """The plain normaliser of targets: ``rotation @ (y - mean) / scale``.

    Attributes:
        mean: ``(C,)``, or 0-d for one number.
        scale: 0-d for one scale (PHI-S, arXiv 2410.01680), or ``(C,)`` for one a channel.
        rotation: ``(C, C)``, or None. "mse" does not see a rotation of both sides, so fold it into
            the head's last layer instead: here it costs a C x C product for every target token.
    """

    mean: Tensor
    scale: Tensor
    rotation: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LossTerm:
    """How one prediction is compared with one target.

    Attributes:
        kind: the loss of a token with prediction x and (normalised) target t, C channels:

            - ``"mse"``: mean over channels of (x - t)^2;
            - ``"cosine"``: 1 - cos(x, t);
            - ``"smooth_l1"``: mean over channels of PyTorch's smooth L1 with ``beta``;
            - ``"cosine_smooth_l1"``: 0.9 cosine + 0.1 smooth_l1 (AM-RADIO, arXiv 2312.06709);
            - ``"angular"``: arccos(cos)^2 / ``dispersion``, cos clamped to +-(1 - 1e-6) and without
              gradient beyond (C-RADIOv4, arXiv 2601.17237).

            If x or t is no longer than 1e-8, cos is 0 and so is its gradient: a vector without
            direction is not turned (the gradient of F.cosine_similarity there, 1e8, overflows
            fp16 and outweighs all other tokens).
        weight: factor of the term in ``total``: a number >= 0, or a tensor with one element, which
            may require a gradient (uncertainty weighting).
        normaliser: None, or an object with the attributes ``mean``, ``scale`` and ``rotation`` of
            :class:`Affine`, applied to the target as it is read; constant.
        beta: >= 0, where smooth L1 turns from square to linear; 0 is L1.
        dispersion: > 0, number or tensor with one element: divides "angular".
        resize: grid on which spatial features are compared: ``"larger"`` (on each axis the larger
            of both), ``"student"`` (the prediction's) or ``"teacher"`` (the target's). A side whose
            grid differs is resized as by ``F.interpolate(mode="bilinear", align_corners=False)``.
        shift: where the target's view starts relative to the prediction's, in cells of the
            prediction's grid: None, ``(dy, dx)``, or a ``(2,)`` or ``(N, 2)`` tensor. Both views
            have the same extent. The comparison grid always lies over the prediction's view, also
            when it has the target's size, and the target is read at the same place of the world:
            row ``i`` of ``rows`` reads ``((i + 0.5) / rows - dy / prediction_rows) * target_rows``,
            counted in cells from the top edge of the target's view, whose own row ``k`` has its
            centre at ``k + 0.5``; columns likewise. Cells whose centre lies outside the target's
            view are not compared; on its very edge they are. Between an edge and the outermost
            centres the outermost cell is read. Whole shifts on equal grids compare exact cells.
        denominator: number >= 0 or tensor with one element that replaces the term's own sum of
            image weights, for sums over resolution groups and ranks (``term_image_weights``);
            constant. 0 stands for "no valid token anywhere".

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside the ranges above.
    """

    kind: str
    weight: float | Tensor = 1.0
    normaliser: Any = None
    beta: float = 2.0
    dispersion: float | Tensor = 1.0
    resize: str = "larger"
    shift: tuple[float, float] | Tensor | None = None
    denominator: float | Tensor | None = None

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("resize", RESIZES)):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, one of {known}; got {value!r}")
            if value not in known:
                nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"unknown {name} {value!r}: did you mean {nearest!r}? It is one of {known}"
                )
        for name in ("weight", "beta", "dispersion", "denominator"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and name != "beta":
                if value.numel() != 1 or not value.dtype.is_floating_point:
                    raise ValueError(
                        f"{name} must be a number or a floating point tensor with one element; got "
                        f"shape {tuple(value.shape)}, {value.dtype}"
                    )
                # Elsewhere a look would wait for the device. NaN is let through to the total.
                looked_at = value.device.type == "cpu" and not torch.compiler.is_compiling()
                if looked_at and not value.isnan():
                    _check_number(name, value.item(), positive=name == "dispersion")
            elif value is not None or name != "denominator":
                _check_number(name, value, positive=name == "dispersion")
        if self.normaliser is not None:
            for name in ("mean", "scale"):
                if not isinstance(getattr(self.normaliser, name, None), Tensor):
                    raise TypeError(
                        "normaliser must have tensors .mean and .scale (and .rotation or None), "
                        f"such as Affine(mean, scale); {name} is missing from {self.normaliser!r}"
                    )
        if self.shift is not None and not isinstance(self.shift, Tensor):
            if not isinstance(self.shift, (tuple, list)) or len(self.shift) != 2:
                raise TypeError(
                    f"shift must be None, (dy, dx) or a (N, 2) tensor; got {self.shift!r}"
                )
            for value in self.shift:
                _check_number("shift", value, negative=True)


class MultiTeacherLoss(NamedTuple):
    """The result of :func:`multi_teacher_loss`; fp32, or fp64 where a prediction is fp64.

    Attributes:
        total: 0-d, sum over terms of ``weight * per_term``.
        per_term: ``(n_terms,)``, without the weights.
        per_image: for each term ``(N,)``, the mean over the image's valid tokens.
        image_weights: for each term ``(N,)``, the square root of the number of valid tokens (1 or 0
            for ``(N, C)`` features): the weight of the image in ``per_term``. No gradient.
    """

    total: Tensor
    per_term: Tensor
    per_image: list[Tensor]
    image_weights: list[Tensor]


def multi_teacher_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    terms: Sequence[LossTerm],
    valid: Sequence[Tensor | None] | None = None,
) -> MultiTeacherLoss:
    """Compare a student's predictions with the features of its teachers.

    For every term: the mean over channels, the mean over each image's valid tokens, then the mean
    over images weighted by the square root of their number of valid tokens (C-RADIOv4, arXiv
    2601.17237), divided by the sum of these weights or by ``term.denominator``. An image without a
    valid token adds 0 and gets a gradient of 0, and so do a term without one and ``N = 0``. A NaN
    that is not masked out reaches ``total``: it is for the caller to see it.

    The gradient of the predictions is computed with the loss and kept until the backward, in their
    dtype (fp32 for fp16); second derivatives are not available. Arithmetic is
    fp32, or fp64 for fp64 predictions, also under autocast. Two runs give the same bits.

    The gradient is kept with every factor of ``total`` in it: ``total.backward()`` scales nothing.
    On CUDA the default is the backend "triton"; fp64 and tokens of more than 8,192 channels take
    the backend "torch". Features are read in place if their channels lie together.

    Args:
        predictions: for each term ``(N, h, w, C)`` or ``(N, C)``, fp16, bf16, fp32 or fp64, any
            strides. Terms may differ in N, grid, C and dtype.
        targets: for each term the teacher's features, same N and C, own grid and dtype. They get
            no gradient, even if they require one.
        terms: for each term its :class:`LossTerm`.
        valid: None, or for each term None or a mask on the target's grid, ``(N, h, w)``, or
            ``(N,)`` for whole images: bool, or numbers of which those above 0.5 are valid. What a
            target holds where it is masked does not matter, NaN included. A resized or shifted cell
            is valid only if all source cells that it mixes are.

    Returns:
        :class:`MultiTeacherLoss`. Everything but ``image_weights`` is differentiable.

    Raises:
        TypeError: an argument or an element of one has the wrong type.
        ValueError: lengths, shapes or devices do not fit; a shift that is not finite.
    """
    for name, value in (("predictions", predictions), ("targets", targets), ("terms", terms)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, one entry a term; got {type(value).__name__}")
    if valid is not None and not isinstance(valid, (list, tuple)):
        raise TypeError(
            f"valid must be None or a list, one entry a term; got {type(valid).__name__}"
        )
    masks = [None] * len(terms) if valid is None else valid
    lengths = (len(predictions), len(targets), len(terms), len(masks))
    if len(set(lengths)) != 1 or not terms:
        raise ValueError(
            "predictions, targets, terms and valid (if given) must have one entry for each term, "
            "at least one; got lengths {}, {}, {} and {}".format(*lengths)
        )
    pairs = [
        _pair(i, *given)
        for i, given in enumerate(zip(predictions, targets, terms, masks, strict=True))
    ]
    device = pairs[0].prediction.device
    reasons = (_why_not_triton(pair, device) for pair in pairs)
    unable = {"triton": next((reason for reason in reasons if reason), None)}
    if resolve("multi_teacher_loss", device, ("torch", "triton"), unable) == "triton":
        losses, per_image, image_weights = _all_at_once(pairs)
    else:
        each = [_one_by_one(pair) for pair in pairs]
        losses, per_image, image_weights = (list(parts) for parts in zip(*each, strict=True))
    wide = torch.float64 if any(x.dtype == torch.float64 for x in losses) else torch.float32
    per_term = torch.stack([x.to(wide) for x in losses])
    weighted = [
        x * (t.weight.reshape(()).to(wide) if isinstance(t.weight, Tensor) else t.weight)
        for x, t in zip(per_term.unbind(), terms, strict=True)
    ]
    return MultiTeacherLoss(torch.stack(weighted).sum(), per_term, per_image, image_weights)


def term_image_weights(
    prediction_shape: Sequence[int],
    target_shape: Sequence[int],
    term: LossTerm,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The ``image_weights`` that :func:`multi_teacher_loss` will give a term, before it is called.

    Their sum over resolution groups and ranks is the term's global ``denominator``.

    Args:
        prediction_shape: ``(N, h, w, C)`` or ``(N, C)``.
        target_shape: the target's, same N and C.
        term: the term; only ``resize`` and ``shift`` count.
        valid: the term's mask, as for :func:`multi_teacher_loss`.
        device: where to compute; default: that of ``valid``, else of a ``shift`` tensor, else CPU.

    Returns:
        ``(N,)`` fp32: square roots of the numbers of valid tokens.

    Raises:
        TypeError, ValueError: as :func:`multi_teacher_loss`.
    """
    _check_shapes("prediction_shape", prediction_shape, "target_shape", target_shape)
    if not isinstance(term, LossTerm):
        raise TypeError(f"term must be a LossTerm; got {type(term).__name__}")
    if device is None:
        device = next((x.device for x in (valid, term.shift) if isinstance(x, Tensor)), "cpu")
    device = torch.device(device)
    mask = _mask("valid", valid, target_shape, device)
    shift = _shift("term.shift", term.shift, prediction_shape, device)
    grid = comparison_grid(prediction_shape, target_shape, term.resize)
    cells = valid_cells(mask, shift, grid_of(prediction_shape), grid_of(target_shape), grid)
    count = torch.full((prediction_shape[0],), float(grid[0] * grid[1]), device=device)
    return (count if cells is None else cells.sum((1, 2)).expand_as(count).to(count)).sqrt()


# The two roads


class _Pair(NamedTuple):
    """A prediction and its target, checked: 4-D, with what the term says of them as tensors."""

    term: LossTerm
    prediction: Tensor
    target: Tensor
    valid: Tensor | None
    mean: Tensor | None
    scale: Tensor | None
    rotation: Tensor | None
    shift: Tensor | None
    height: int
    width: int

    @property
    def wants_gradient(self) -> bool:
        return self.prediction.requires_grad and torch.is_grad_enabled()


def _pair(i: int, prediction: Tensor, target: Tensor, term: LossTerm, mask: Any) -> _Pair:
    _check_pair(i, prediction, target, term)
    height, width = comparison_grid(prediction.shape, target.shape, term.resize)
    affine = (None, None, None)
    if term.normaliser is not None:
        affine = _affine(f"terms[{i}].normaliser", term.normaliser, prediction)
    return _Pair(
        term,
        prediction if prediction.ndim == 4 else prediction[:, None, None],
        (target if target.ndim == 4 else target[:, None, None]).detach(),
        _mask(f"valid[{i}]", mask, target.shape, prediction.device),
        *affine,
        _shift(f"terms[{i}].shift", term.shift, prediction.shape, prediction.device),
        height,
        width,
    )


def _one_by_one(pair: _Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a term, of its images, and their weights, in PyTorch."""
    term, prediction, target = pair.term, pair.prediction, pair.target
    shapes = grid_of(prediction.shape), grid_of(target.shape), (pair.height, pair.width)
    cells = valid_cells(pair.valid, pair.shift, *shapes)
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    count = prediction.new_full(prediction.shape[:1], float(pair.height * pair.width), dtype=dtype)
    if cells is not None:
        count = cells.sum((1, 2)).expand_as(count).to(dtype)
    weights = count.sqrt()
    denominator = weights.sum() if term.denominator is None else _constant(term.denominator)
    if isinstance(denominator, Tensor):
        denominator = denominator.masked_fill(denominator == 0, 1)
    elif denominator == 0:
        denominator = 1.0
    loss, image = TermLoss.apply(
        prediction,
        (weights / denominator).to(dtype),
        _constant(term.weight),
        _constant(term.dispersion) if term.kind == "angular" else 1.0,
        count,
        (target, cells, pair.mean, pair.scale, pair.rotation, pair.shift),
        term.kind,
        float(term.beta),
        pair.height,
        pair.width,
        pair.wants_gradient,
    )
    return loss, image, weights


def _why_not_triton(pair: _Pair, device: torch.device) -> str | None:
    if pair.prediction.device != device:
        return f"terms on several devices, {device} and {pair.prediction.device}"
    return kernel.unable(pair.prediction, pair.target, pair.height * pair.width)


def _all_at_once(pairs: Sequence[_Pair]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The same of all terms, by the kernels."""
    rows, numbers = [], []
    for pair in pairs:
        term, target, mean, scale = pair.term, pair.target, pair.mean, pair.scale
        if pair.rotation is not None and mean is not None and scale is not None:
            # A C x C product for each token is a GEMM's work. NaN of a masked token stays in it.
            with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
                target = ((target.float() - mean.float()) @ pair.rotation.float().T) / scale.float()
            mean = scale = None
        given = (
            term.weight,
            -1.0 if term.denominator is None else term.denominator,
            term.dispersion if term.kind == "angular" else 1.0,
        )
        tensors = [_constant(v) if isinstance(v, Tensor) else None for v in given]
        rows.append((pair.prediction, target, pair.valid, mean, scale, pair.shift, *tensors))
        numbers += [float(term.beta), *(1.0 if isinstance(v, Tensor) else float(v) for v in given)]
    per_term, per_image, image_weights = loss_triton.all_terms(
        list(zip(*rows, strict=True)),
        [pair.term.kind for pair in pairs],
        numbers,
        [size for pair in pairs for size in (pair.height, pair.width)],
        [pair.wants_gradient for pair in pairs],
    )
    images = [pair.prediction.shape[0] for pair in pairs]
    return list(per_term), list(per_image.split(images)), list(image_weights.split(images))


# Checks


def _check_number(name: str, value: Any, *, positive: bool = False, negative: bool = False) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    # Comparisons rather than math.isfinite, which older torch.compile cannot trace.
    finite = -math.inf < value < math.inf
    if not finite or (not negative and value < 0) or (positive and value == 0):
        wanted = "finite" if negative else "finite and > 0" if positive else "finite and >= 0"
        raise ValueError(f"{name} must be {wanted}; got {value!r}")


def _check_shapes(name: str, shape: Sequence[int], other: str, target: Sequence[int]) -> None:
    for label, value in ((name, shape), (other, target)):
        if len(value) not in (2, 4) or 0 in value[1:]:
            raise ValueError(
                f"{label} must be (N, h, w, C) or (N, C) with a cell and a channel at least; got "
                f"shape {tuple(value)} (patch tokens (N, L, C) must be viewed as their grid)"
            )
    if len(shape) != len(target) or shape[0] != target[0] or shape[-1] != target[-1]:
        raise ValueError(
            f"{name} and {other} must have the same number of images N and channels C, and both a "
            f"grid or none; got shapes {tuple(shape)} and {tuple(target)}"
        )


def _check_pair(i: int, prediction: Any, target: Any, term: Any) -> None:
    for name, value in (("predictions", prediction), ("targets", target)):
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}[{i}] must be an fp16, bf16, fp32 or fp64 tensor; got {got}")
    if not isinstance(term, LossTerm):
        raise TypeError(f"terms[{i}] must be a LossTerm; got {type(term).__name__}")
    _check_shapes(f"predictions[{i}]", prediction.shape, f"targets[{i}]", target.shape)
    _check_device(f"targets[{i}]", target, prediction.device)
    for name in ("weight", "dispersion", "denominator"):
        value = getattr(term, name)
        # One number on the CPU goes along with any device.
        if isinstance(value, Tensor) and value.device.type != "cpu":
            _check_device(f"terms[{i}].{name}", value, prediction.device)


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name} must be on the prediction's device {device}, move it there; it is on "
            f"{value.device}"
        )


def _constant(value: float | Tensor) -> float | Tensor:
    return value.detach().reshape(()) if isinstance(value, Tensor) else value


def _affine(name: str, normaliser: Any, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    channels = prediction.shape[-1]
    mean, scale = normaliser.mean, normaliser.scale
    rotation = getattr(normaliser, "rotation", None)
    for field, value in (("mean", mean), ("scale", scale), ("rotation", rotation)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.is_complex():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}.{field} must be a real tensor; got {got}")
        wanted = ((channels, channels),) if field == "rotation" else ((channels,), ())
        if tuple(value.shape) not in wanted:
            raise ValueError(
                f"{name}.{field} must have shape {' or '.join(map(str, wanted))} for predictions "
                f"with {channels} channels; got {tuple(value.shape)}"
            )
        _check_device(f"{name}.{field}", value, prediction.device)
    return mean.detach(), scale.detach(), None if rotation is None else rotation.detach()


def _mask(
    name: str, valid: Any, target_shape: Sequence[int], device: torch.device
) -> Tensor | None:
    """A bool ``(N, h, w)`` mask, or None where all is valid."""
    if valid is None:
        return None
    if not isinstance(valid, Tensor) or valid.dtype.is_complex:
        raise TypeError(f"{name} must be None or a bool or float tensor; got {valid!r}")
    images, grid = target_shape[0], grid_of(target_shape)
    wanted = [(images,)] if len(target_shape) == 2 else [(images, *grid), (images,)]
    if tuple(valid.shape) not in wanted:
        raise ValueError(
            f"{name} must have shape {' or '.join(map(str, wanted))} for a target of shape "
            f"{tuple(target_shape)}; got {tuple(valid.shape)}"
        )
    _check_device(name, valid, device)
    valid = valid if valid.dtype == torch.bool else valid > 0.5
    return valid if valid.ndim == 3 else valid[:, None, None].expand(images, *grid)


def _shift(
    name: str, shift: Any, prediction_shape: Sequence[int], device: torch.device
) -> Tensor | None:
    """An fp64 ``(1, 2)`` or ``(N, 2)`` tensor, or None."""
    if shift is None:
        return None
    images = prediction_shape[0]
    if len(prediction_shape) == 2:
        raise ValueError(
            f"{name} must be None for (N, C) features, which have no grid; got {shift!r}"
        )
    if not isinstance(shift, Tensor):
        shift = torch.tensor(shift, dtype=torch.float64, device=device)
    if shift.is_complex():
        raise TypeError(f"{name} must be real; got {shift.dtype}")
    if tuple(shift.shape) not in ((2,), (images, 2)):
        raise ValueError(f"{name} must have shape (2,) or ({images}, 2); got {tuple(shift.shape)}")
    _check_device(name, shift, device)
    shift = shift.detach().to(torch.float64).reshape(-1, 2)
    # Only where it needs no wait for a device. Elsewhere such a shift leaves nothing to compare.
    if device.type == "cpu" and not torch.compiler.is_compiling() and not shift.isfinite().all():
        raise ValueError(f"{name} must be finite; got {shift}")
    return shift
