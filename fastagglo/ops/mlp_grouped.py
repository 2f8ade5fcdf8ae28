"""One step of many small heads at once: their products in one launch of the grouped kernel.

For the summary heads of all teachers, of which each has as many rows as there are images: alone,
none of them fills a GPU. On the backend "triton" only; elsewhere a head after the other is faster
(``bench/LOG.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastagglo.kernels import mlp as kernel
from fastagglo.ops.mlp import compute_dtype, uses_triton
from fastagglo.ops.mlp_triton import norm_gelu_backward, rows_of, whole


class Step(NamedTuple):
    """One head's share.

    Attributes:
        x: (M, K). norm_weight, norm_bias: (K,), None without a norm. weight: (N, K). bias: (N,).
    """

    x: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor


def worth_grouping(xs: Sequence[Tensor], widest: int) -> bool:
    """Whether heads with these inputs go together.

    Args:
        widest: most channels that any of their layers has.
    """
    if len(xs) < 2 or any(x.dim() != 2 or x.device != xs[0].device for x in xs):
        return False
    dtype = compute_dtype(xs[0])
    rows = max(x.shape[0] for x in xs)
    if any(compute_dtype(x) != dtype for x in xs) or not all(
        uses_triton("AdaptorHeads", x, norm=True, strict=False) for x in xs
    ):
        return False
    return kernel.choose("grouped", rows, widest, widest, dtype) == "triton"


def grouped_step(
    steps: Sequence[Step], eps: Sequence[float], *, activate: bool, skip: bool
) -> list[Tensor]:
    """``[x] + Linear(GELU(LN(x)))`` of each step.

    Args:
        steps: at least one, all on one device.
        eps: of each LayerNorm.
        activate: False leaves LayerNorm and GELU out.
        skip: whether x is added.

    Returns:
        an (M, N) for each step, in its x's dtype or autocast's.
    """
    dtype = compute_dtype(steps[0].x)
    steps = [step._replace(x=step.x.to(dtype)) for step in steps]
    flat = [tensor for column in zip(*steps, strict=True) for tensor in column]
    return list(_GroupedStep.apply(len(steps), list(eps), activate, skip, *flat))


class _GroupedStep(torch.autograd.Function):
    """Keeps x, two numbers a row, and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, count: int, eps: list[float], activate: bool, skip: bool, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        lists = [list(flat[i * count : (i + 1) * count]) for i in range(len(Step._fields))]
        found = torch.ops.fastagglo.grouped_step_fwd(*lists, eps, activate, skip)
        ctx.save_for_backward(*found[count:], *flat)
        ctx.settings = count, activate, skip
        # Else what follows would ask for gradients of heads that are frozen as a whole.
        frozen = [
            y
            for i, y in enumerate(found[:count])
            if not any(t is not None and t.requires_grad for t in flat[i::count])
        ]
        ctx.mark_non_differentiable(*frozen)
        return tuple(found[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, activate, skip = ctx.settings
        saved = ctx.saved_tensors
        lists = [list(saved[i * count : (i + 1) * count]) for i in range(len(saved) // count)]
        wants = list(ctx.needs_input_grad[4:])
        found = torch.ops.fastagglo.grouped_step_bwd(list(grads), *lists, activate, skip, wants)
        return *[None] * 4, *(g if want else None for g, want in zip(found, wants, strict=True))


_PARAMETERS = "Tensor?[] norm_weights, Tensor?[] norm_biases, Tensor[] weights, Tensor[] biases"
# The forward gives the outputs, then means, then inverse deviations (empty without a norm). The
# backward gives gradients in the order of xs and the parameters, empty where wants says no.
torch.library.define(
    "fastagglo::grouped_step_fwd",
    f"(Tensor[] xs, {_PARAMETERS}, float[] eps, bool activate, bool skip) -> Tensor[]",
)
torch.library.define(
    "fastagglo::grouped_step_bwd",
    f"(Tensor[] grads, Tensor[] means, Tensor[] rstds, Tensor[] xs, {_PARAMETERS}, bool activate, "
    "bool skip, bool[] wants) -> Tensor[]",
)


@torch.library.impl("fastagglo::grouped_step_fwd", "default")
def _forward(*arguments: Any) -> list[Tensor]:
    *lists, eps, activate, skip = arguments
    problems, means, rstds = [], [], []
    for step, own_eps in zip(map(Step, *lists), eps, strict=True):
        x = rows_of(step.x)
        mean = rstd = x.new_empty(0, dtype=torch.float32)
        norm = None
        if activate:
            mean, rstd = kernel.row_statistics(x, own_eps)
            norm = (mean, rstd, whole(step.norm_weight), whole(step.norm_bias))
        problems.append(
            kernel.Problem(
                x,
                rows_of(step.weight.to(x.dtype)),
                whole(step.bias),
                norm,
                gelu_in=activate,
                residual=x if skip else None,
            )
        )
        means.append(mean)
        rstds.append(rstd if activate else rstd.clone())
    return [*kernel.grouped_linear(problems), *means, *rstds]


@torch.library.register_fake("fastagglo::grouped_step_fwd")
def _forward_fake(xs: list[Tensor], *others: Any) -> list[Tensor]:
    weights, activate = others[2], others[5]
    outputs = [x.new_empty((x.shape[0], w.shape[0])) for x, w in zip(xs, weights, strict=True)]
    rows = [x.shape[0] if activate else 0 for x in xs]
    stats = [xs[0].new_empty(n, dtype=torch.float32) for n in (*rows, *rows)]
    return [*outputs, *stats]


@torch.library.impl("fastagglo::grouped_step_bwd", "default")
def _backward(*arguments: Any) -> list[Tensor]:
    grads, means, rstds, *lists, activate, skip, wants = arguments
    steps, count = [Step(*step) for step in zip(*lists, strict=True)], len(grads)
    # For each step, of x, norm_weight, norm_bias, weight and bias.
    asked = [wants[i::count] for i in range(count)]
    grads = [rows_of(grad) for grad in grads]
    upstream: dict[int, Tensor] = {}
    inner = [i for i in range(count) if any(asked[i][:3])]
    if inner:
        problems = [(grads[i], rows_of(steps[i].weight.to(grads[i].dtype)), None) for i in inner]
        upstream = dict(zip(inner, kernel.grouped_linear_input_grad(problems), strict=True))
    results: list[list[Tensor | None]] = []
    for i, (step, grad, want) in enumerate(zip(steps, grads, asked, strict=True)):
        x, of_x = rows_of(step.x), upstream.get(i)
        norm = (whole(step.norm_weight), whole(step.norm_bias))
        of_norm: Sequence[Tensor | None] = (None, None)
        if activate and of_x is not None:
            of_x, *of_norm = norm_gelu_backward(
                *(of_x, x, means[i], rstds[i], step.norm_weight, step.norm_bias),
                *(False, 0.0, want[:3]),
            )
        if of_x is not None and want[0] and skip:
            of_x = of_x.add_(grad)
        weight = bias = None
        if want[3]:
            weight, bias = kernel.linear_weight_grad(
                *(grad, x),
                norm=(means[i], rstds[i], *norm) if activate else None,
                gelu_in=activate,
                sums=want[4],
                dtype=step.weight.dtype,
            )
        if want[4]:
            bias = (grad.sum(0, dtype=torch.float32) if bias is None else bias).to(step.bias.dtype)
        results.append([of_x, *of_norm, weight, bias if want[4] else None])
    flat = [results[i][field] for field in range(len(Step._fields)) for i in range(count)]
    return [
        grads[0].new_empty(0) if gradient is None or not want else gradient
        for gradient, want in zip(flat, wants, strict=True)
    ]


@torch.library.register_fake("fastagglo::grouped_step_bwd")
def _backward_fake(grads: list[Tensor], means: Any, rstds: Any, *others: Any) -> list[Tensor]:
    *lists, _, _, wants = others
    sources = [tensor for tensors in lists for tensor in tensors]
    return [
        grads[0].new_empty(0) if source is None or not want else source.new_empty(source.shape)
        for source, want in zip(sources, wants, strict=True)
    ]
