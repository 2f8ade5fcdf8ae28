"""The balanced multi-teacher loss and its gradient: every term of every teacher in one launch.

Launches, whatever the number of terms: ``count`` (only with masks or shifts), ``weigh``,
``compare``, ``spread`` (only where predictions are resized) and ``collect``; in the backward
``scale``. ``compare`` and ``spread`` run once for all terms of the same dtypes and alignment, which
are usually all. What they do is said in loss_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastagglo.kernels import loss_table
from fastagglo.kernels.loss_geometry import count_kernel, weigh_kernel
from fastagglo.kernels.loss_kernels import (
    collect_kernel,
    compare_kernel,
    scale_kernel,
    spread_kernel,
)

KINDS = ("mse", "smooth_l1", "cosine", "cosine_smooth_l1", "angular")
BY_CHANNEL = ("mse", "smooth_l1")  # these need no whole token at once

# Tokens and channels of a block, and warps: 8 elements a thread. Losses by channel go through a
# token in blocks of a width that wastes little of usual ones; others hold as many blocks of both
# sides as a token has, and more than four are more than the registers hold.
CHANNEL_BLOCK = (4, 256, 4)
BLOCKS = ((4, 256, 4), (2, 512, 4), (2, 1024, 8))
MOST_BLOCKS = 4
MOST_REGISTERS = 255  # without a limit the compiler spills some for a program more in a SM
MOST_CHANNELS = 8192
TOKENS = 16  # of a program: it reads its column of the table once
MOST_TOKENS = 2**31 - 1

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, eq=False)
class Term:
    """One prediction and what it is compared with.

    Attributes:
        prediction: (N, h, w, C). target: (N, h', w', C). Both float16, bfloat16 or float32.
        kind: of :data:`KINDS`.
        rows, columns: the grid on which they are compared.
        valid: (N, h', w') bool of any strides, or None.
        mean, scale: the target's normaliser, (C,) or () fp32, or None.
        shift: (1 or N, 2) fp64, or None.
        beta: of smooth L1.
        weight: of the term in the total. denominator: of its mean over images; None: the sum of
            their weights. dispersion: divides the loss. Numbers, or fp32 tensors with one element.
        wants_gradient: whether to compute the prediction's.
    """

    prediction: Tensor
    target: Tensor
    kind: str
    rows: int
    columns: int
    valid: Tensor | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    beta: float = 2.0
    weight: float | Tensor = 1.0
    denominator: float | Tensor | None = None
    dispersion: float | Tensor = 1.0
    wants_gradient: bool = True

    @property
    def images(self) -> int:
        return self.prediction.shape[0]

    @property
    def tokens(self) -> int:
        return self.images * self.rows * self.columns

    @property
    def resizes_prediction(self) -> bool:
        return tuple(self.prediction.shape[1:3]) != (self.rows, self.columns)

    @property
    def resamples_target(self) -> bool:
        return self.shift is not None or tuple(self.target.shape[1:3]) != (self.rows, self.columns)

    @property
    def is_counted(self) -> bool:
        return self.valid is not None or self.shift is not None


class Losses(NamedTuple):
    """What :func:`forward` returns; I images of all terms, in order; fp32.

    Attributes:
        per_term: (n,). per_image: (I,), means over valid tokens.
        image_weights: (I,), square roots of the numbers of valid tokens.
        shares: (I,), weights over the term's denominator. term_weights: (n,): what
            :func:`backward` wants to know of the gradients.
        gradients: for each term that wants one (N, h, w, C), of ``sum(weight * per_term)``, in the
            prediction's dtype, fp32 for fp16, whose range ends before such numbers begin. A weight
            of 0 counts as 1 here.
    """

    per_term: Tensor
    per_image: Tensor
    image_weights: Tensor
    shares: Tensor
    term_weights: Tensor
    gradients: list[Tensor]


def unable(prediction: Tensor, target: Tensor, cells: int) -> str | None:
    """Why the kernels cannot take a pair, compared on a grid of so many cells; None if they can."""
    for name, x in (("predictions", prediction), ("targets", target)):
        if x.dtype not in _TYPES:
            return f"{name} in {x.dtype}"
    cells = max(cells, prediction.shape[1:-1].numel())
    if prediction.shape[-1] > MOST_CHANNELS:
        return f"{prediction.shape[-1]} channels, more than {MOST_CHANNELS}"
    if prediction.shape[0] * cells > MOST_TOKENS:
        return f"{prediction.shape[0] * cells} tokens in a term, more than {MOST_TOKENS}"
    return None


def traffic(terms: Sequence[Term]) -> int:
    """Bytes of features and of their gradients that :func:`forward` loads and stores.

    Counted by what its programs ask for, of caches or of memory, if every token is valid; those
    that masks and shifts leave out are not read. A plain term moves each element of prediction,
    target and gradient once. A side that is resampled is read in four places a token; a resized
    prediction with its gradient once more, for each cell that a token shares in. A :func:`backward`
    with another factor than the term's weight reads and writes the gradients again.
    """
    total = 0
    for term in terms:
        x, y = term.prediction, term.target
        of_x = x.element_size() * (4 if term.resizes_prediction else 1)
        of_both = of_x + y.element_size() * (4 if term.resamples_target else 1)
        elements = term.tokens * of_both
        if term.wants_gradient:
            kept = torch.float32 if x.dtype == torch.float16 else x.dtype
            elements += _cells(term) * kept.itemsize
            if term.resizes_prediction:
                rows = _shares(term.rows, x.shape[1])
                elements += term.images * rows * _shares(term.columns, x.shape[2]) * of_both
        total += elements * x.shape[3]
    return total


def kept_gradient(prediction: Tensor) -> Tensor:
    """An empty tensor for a gradient; see :class:`Losses`."""
    kept = torch.float32 if prediction.dtype == torch.float16 else prediction.dtype
    return torch.empty(prediction.shape, dtype=kept, device=prediction.device)


def forward(terms: Sequence[Term]) -> Losses:
    """Losses and gradients of terms on one device."""
    terms = [_readable(term) for term in terms]
    like = terms[0].prediction
    images, tokens = [t.images for t in terms], [t.tokens for t in terms]
    gradients = [kept_gradient(t.prediction) if t.wants_gradient else None for t in terms]
    spread = [t.resizes_prediction and t.wants_gradient and t.prediction.numel() > 0 for t in terms]
    coefficients = [n if chosen else 0 for n, chosen in zip(tokens, spread, strict=True)]
    counted = [n if t.is_counted else 0 for n, t in zip(images, terms, strict=True)]

    def fresh(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=like.device)

    per_term, term_weights = fresh(len(terms)), fresh(len(terms))
    counts, weights, shares, factors, per_image = (fresh(sum(images)) for _ in range(5))
    losses, kept = fresh(sum(tokens)), fresh(3 * sum(coefficients))

    base = [_column(t, g) for t, g in zip(terms, gradients, strict=True)]
    for name, sizes in (
        ("first_image", images),
        ("first_token", tokens),
        ("first_coefficient", coefficients),
        ("count_start", counted),
    ):
        _starts(base, name, sizes)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, term in enumerate(terms):
        x, y = term.prediction, term.target
        groups.setdefault((x.dtype, y.dtype, _aligned(term)), []).append(i)
    searched, n = loss_table.padded(len(terms)), len(terms)

    with _on_device(like):
        for i, ((x, t, aligned), members) in enumerate(groups.items()):
            columns = [dict(column) for column in base]
            compared = [-(-tokens[j] // TOKENS) if j in members else 0 for j in range(n)]
            cells = [_cells(terms[j]) if j in members and spread[j] else 0 for j in range(n)]
            _starts(columns, "compare_start", compared)
            _starts(columns, "spread_start", cells)
            table = loss_table.build(columns, like.device)
            if i == 0:
                if sum(counted):
                    count_kernel[(sum(counted),)](table, counts, n, TERMS=searched, BLOCK=1024)
                weigh_kernel[(n,)](
                    table, counts, weights, shares, factors, term_weights, n, BLOCK=256
                )
            settings = {
                "X": _TYPES[x],
                "T": _TYPES[t],
                "G": tl.float32 if x == torch.float16 else _TYPES[x],
                "ALIGNED": aligned,
                "TERMS": searched,
            }
            if sum(compared):
                chosen = [terms[j] for j in members]
                rows, width, warps, chunks = _blocks(chosen)
                compare_kernel[(sum(compared),)](
                    table, factors, losses, kept, n, **settings,
                    TOKENS=TOKENS, ROWS=rows, BLOCK=width, CHUNKS=chunks,
                    RESAMPLE_X=any(t.resizes_prediction for t in chosen),
                    RESAMPLE_T=any(t.resamples_target for t in chosen),
                    num_warps=warps, maxnreg=MOST_REGISTERS,
                )  # fmt: skip
            if sum(cells):
                spread_kernel[(sum(cells),)](
                    table, kept, n, **settings, BLOCK=1024, maxnreg=MOST_REGISTERS
                )
        collect_kernel[(n,)](
            table, counts, shares, losses, per_image, per_term, n,
            IMAGES=16, BLOCK=256, num_warps=8,
        )  # fmt: skip
    wanted = [gradient for gradient in gradients if gradient is not None]
    return Losses(per_term, per_image, weights, shares, term_weights, wanted)


def backward(
    gradients: Sequence[Tensor],
    outs: Sequence[Tensor],
    terms: Sequence[int],
    images: Sequence[int],
    grad_per_term: Tensor,
    grad_per_image: Tensor,
    shares: Tensor,
    term_weights: Tensor,
) -> None:
    """Gradients for what came from above, given those of :func:`forward`.

    Args:
        gradients: what it kept. outs: where to write, in the prediction's dtype; the same tensors
            for a scaling in place, which does not touch them if there is nothing to do.
        terms: of which term each of them is. images: images of each term, of all terms.
        grad_per_term: (n,). grad_per_image: (I,). fp32, contiguous.
        shares, term_weights: what :func:`forward` returned.
    """
    n, block, parts = len(images), 4096, 8
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (gradient, out) in enumerate(zip(gradients, outs, strict=True)):
        if gradient.numel():
            in_place = gradient.data_ptr() == out.data_ptr()
            aligned = gradient[0].numel() % 8 == 0 and not (
                gradient.data_ptr() % 16 or out.data_ptr() % 16
            )
            groups.setdefault((gradient.dtype, out.dtype, in_place, aligned), []).append(i)
    for (kept, wide, in_place, aligned), members in groups.items():
        columns: list[dict[str, int]] = [{} for _ in images]
        _starts(columns, "first_image", images)
        programs = [0] * n
        for i in members:
            gradient, term = gradients[i], terms[i]
            elements = gradient[0].numel()
            columns[term] |= {
                "gradient": gradient.data_ptr(),
                "out": outs[i].data_ptr(),
                "elements": elements,
            }
            programs[term] = images[term] * -(-elements // (parts * block))
        _starts(columns, "scale_start", programs)
        with _on_device(shares):
            scale_kernel[(sum(programs),)](
                loss_table.build(columns, shares.device),
                grad_per_term, grad_per_image, shares, term_weights, n,
                G=_TYPES[kept], OUT=_TYPES[wide], IN_PLACE=in_place, ALIGNED=aligned,
                TERMS=loss_table.padded(n), PARTS=parts, BLOCK=block,
            )  # fmt: skip


def _readable(term: Term) -> Term:
    """The term with unit strides over channels; normalisers and numbers as fp32."""
    x, y = (z if z.stride(3) == 1 else z.contiguous() for z in (term.prediction, term.target))
    changed: dict[str, Any] = {"prediction": x, "target": y}
    for name in ("mean", "scale", "weight", "denominator", "dispersion"):
        value = getattr(term, name)
        if isinstance(value, Tensor):
            value = value.to(torch.float32)
            if name == "mean" or (name == "scale" and value.dim()):
                value = value.expand(x.shape[3]).contiguous()
                value = value.clone() if value.data_ptr() % 16 else value
            changed[name] = value
    return replace(term, **changed)


def _aligned(term: Term) -> bool:
    """Whether all features can be read in steps of 16 bytes; 8 elements, which is more for fp32."""
    return term.prediction.shape[3] % 8 == 0 and all(
        x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
        for x in (term.prediction, term.target)
    )


def _blocks(terms: Sequence[Term]) -> tuple[int, int, int, int]:
    """Rows, channels and warps of a block for terms of one launch, and how many hold a token."""
    channels = max((t.prediction.shape[3] for t in terms if t.kind not in BY_CHANNEL), default=0)
    if not channels:
        return (*CHANNEL_BLOCK, 0)
    fitting = (block for block in BLOCKS if channels <= MOST_BLOCKS * block[1])
    rows, width, warps = next(fitting, BLOCKS[-1])
    return rows, width, warps, -(-channels // width)


def _cells(term: Term) -> int:
    return term.prediction.shape[:3].numel()


def _shares(cells: int, source: int) -> int:
    """Of how many cells of a resized axis ``cells`` take a share; see ``sampling.taps``."""
    place = (torch.arange(cells, dtype=torch.float64) + 0.5) * (source / cells) - 0.5
    place = place.clamp(0, source - 1)
    return cells + int(((place - place.round()).abs() >= 1e-6).sum())


def _column(term: Term, gradient: Tensor | None) -> dict[str, int]:
    """What the table says of a term, but for the places among others."""
    x, y = term.prediction, term.target
    column = {
        "prediction": x.data_ptr(),
        "target": y.data_ptr(),
        "gradient": 0 if gradient is None else gradient.data_ptr(),
        "images": term.images,
        "channels": x.shape[3],
        "rows": term.rows,
        "columns": term.columns,
        "kind": KINDS.index(term.kind),
        "beta_bits": loss_table.bits(term.beta),
    }
    for name, z in (("prediction", x), ("target", y)):
        column |= {f"{name}_rows": z.shape[1], f"{name}_columns": z.shape[2]}
    for name, cells, axis in (("row", term.rows, 1), ("column", term.columns, 2)):
        view, source = x.shape[axis], y.shape[axis]
        if cells and view:
            column[f"{name}_step"] = loss_table.wide_bits(view / cells)
            column[f"{name}_ratio"] = loss_table.wide_bits(source / view)
    for name, z in (("prediction", x), ("target", y), ("valid", term.valid)):
        if z is not None:
            column[name] = z.data_ptr()
            strides = zip(("image", "row", "column"), z.stride(), strict=False)
            column |= {f"{name}_{axis}": stride for axis, stride in strides}
    if term.mean is not None and term.scale is not None:
        column["mean"] = term.mean.data_ptr()
        column["scale" if term.scale.dim() else "one_scale"] = term.scale.data_ptr()
    if term.shift is not None:
        shift = term.shift
        column |= {"shift": shift.data_ptr(), "shift_stride": 2 if len(shift) > 1 else 0}
    for name in ("weight", "denominator", "dispersion"):
        value = getattr(term, name)
        if isinstance(value, Tensor):
            column[name] = value.data_ptr()
        else:  # a negative denominator says that there is none
            column[f"{name}_bits"] = loss_table.bits(-1.0 if value is None else value)
    return column


def _starts(columns: Sequence[dict[str, int]], name: str, sizes: Sequence[int]) -> None:
    """Give each column the sum of the sizes before it."""
    for column, start in zip(columns, accumulate(sizes, initial=0), strict=False):
        column[name] = start


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whichever one holds the tensors.
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
