"""The Triton path of the multi-teacher loss: operators over lists of terms, and their gradient.

The kernels are ``kernels/loss.py``; what to compute is said in ``loss.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastagglo.kernels import loss as kernel
from fastagglo.ops.loss_torch import graph_is_kept

# Lists of tensors that the operator takes, one entry a term.
_LISTS = (
    *("predictions", "targets", "valid", "mean", "scale", "shift"),
    *("weight", "denominator", "dispersion"),
)


def all_terms(
    lists: Sequence[Sequence[Tensor | None]],
    kinds: Sequence[str],
    numbers: Sequence[float],
    grids: Sequence[int],
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of all terms.

    Args:
        lists: what ``_LISTS`` names, as ``kernels.loss.Term`` takes them; None for numbers.
        kinds: of each term.
        numbers: of each term beta, weight, denominator (-1: none) and dispersion.
        grids: of each term the rows and columns of the comparison.
        wants: whether each prediction gets a gradient.

    Returns:
        per_term (n,), per_image (I,) and, without a gradient, image_weights (I,); fp32.
    """
    kind = [kernel.KINDS.index(name) for name in kinds]
    flat = [x for entries in lists for x in entries]
    if torch.compiler.is_compiling():  # takes no tensor twice, such as one prediction in two terms
        flat = [None if x is None else x.view_as(x) for x in flat]
    return _AllTerms.apply(kind, list(numbers), list(grids), list(wants), *flat)


class _AllTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kinds: Any, numbers: Any, grids: Any, wants: Any, *flat: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(kinds)
        lists = [list(flat[i * n : (i + 1) * n]) for i in range(len(_LISTS))]
        outputs = torch.ops.fastagglo.multi_teacher_loss_fwd(*lists, kinds, numbers, grids, wants)
        per_term, per_image, image_weights, shares, term_weights, gradients = outputs
        ctx.images = [x.shape[0] for x in lists[0]]
        ctx.dtypes = [x.dtype for x in lists[0]]
        ctx.chosen = [i for i in range(n) if wants[i]]
        ctx.arguments = 4 + len(flat)
        ctx.save_for_backward(shares, term_weights, *gradients)
        ctx.mark_non_differentiable(image_weights)
        return per_term, per_image, image_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, per_term: Tensor, per_image: Tensor, _: Tensor) -> tuple[Any, ...]:
        shares, term_weights, *gradients = ctx.saved_tensors
        narrow = [ctx.dtypes[i] == torch.float16 for i in ctx.chosen]
        from_above = per_term.contiguous(), per_image.contiguous(), shares, term_weights
        if torch.compiler.is_compiling() or graph_is_kept() or any(narrow):
            scaled = torch.ops.fastagglo.multi_teacher_loss_bwd(
                gradients, ctx.chosen, ctx.images, narrow, *from_above
            )
        else:
            # Nobody will read the kept gradients again: they may become the result.
            kernel.backward(gradients, gradients, ctx.chosen, ctx.images, *from_above)
            scaled = gradients
        results: list[Any] = [None] * ctx.arguments
        for i, gradient in zip(ctx.chosen, scaled, strict=True):
            results[4 + i] = gradient
        return tuple(results)


torch.library.define(
    "fastagglo::multi_teacher_loss_fwd",
    "(Tensor[] predictions, Tensor[] targets, Tensor?[] valid, Tensor?[] mean, Tensor?[] scale, "
    "Tensor?[] shift, Tensor?[] weight, Tensor?[] denominator, Tensor?[] dispersion, int[] kinds, "
    "float[] numbers, SymInt[] grids, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
torch.library.define(
    "fastagglo::multi_teacher_loss_bwd",
    "(Tensor[] gradients, int[] terms, SymInt[] images, bool[] narrow, Tensor per_term, "
    "Tensor per_image, Tensor shares, Tensor term_weights) -> Tensor[]",
)


@torch.library.impl("fastagglo::multi_teacher_loss_fwd", "default")
def _forward(*arguments: Any) -> tuple[Any, ...]:
    lists, (kinds, numbers, grids, wants) = arguments[: len(_LISTS)], arguments[len(_LISTS) :]
    terms = []
    for i, kind in enumerate(kinds):
        given = [entries[i] for entries in lists]
        beta, *plain = numbers[4 * i : 4 * i + 4]
        device = given[0].device
        for place, number in enumerate(plain, start=6):
            value = given[place]
            if value is None:
                given[place] = None if number < 0 else number
            elif value.device != device:  # one on the CPU, which may be looked at
                given[place] = value.item()
        x, y, valid, mean, scale, shift, weight, denominator, dispersion = given
        terms.append(
            kernel.Term(
                prediction=x,
                target=y,
                kind=kernel.KINDS[kind],
                rows=grids[2 * i],
                columns=grids[2 * i + 1],
                valid=valid,
                mean=mean,
                scale=scale,
                shift=shift,
                beta=beta,
                weight=weight,
                denominator=denominator,
                dispersion=dispersion,
                wants_gradient=wants[i],
            )
        )
    return tuple(kernel.forward(terms))


@torch.library.register_fake("fastagglo::multi_teacher_loss_fwd")
def _forward_fake(*arguments: Any) -> tuple[Any, ...]:
    predictions, wants = arguments[0], arguments[-1]
    like = predictions[0]
    images = sum(x.shape[0] for x in predictions)
    n = len(predictions)
    sizes = (n, images, images, images, n)
    kept = [kernel.kept_gradient(x) for x, want in zip(predictions, wants, strict=True) if want]
    return *(like.new_empty(size, dtype=torch.float32) for size in sizes), kept


def _results(gradients: Sequence[Tensor], narrow: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty_like(x, dtype=torch.float16 if small else x.dtype)
        for x, small in zip(gradients, narrow, strict=True)
    ]


@torch.library.impl("fastagglo::multi_teacher_loss_bwd", "default")
def _backward(gradients: Any, terms: Any, images: Any, narrow: Any, *from_above: Any) -> Any:
    outs = _results(gradients, narrow)
    kernel.backward(gradients, outs, terms, images, *from_above)
    return outs


@torch.library.register_fake("fastagglo::multi_teacher_loss_bwd")
def _backward_fake(gradients: Any, terms: Any, images: Any, narrow: Any, *_: Any) -> Any:
    return _results(gradients, narrow)
