"""Gradients and operators of the fused MLP steps.

What the steps are is said in ``mlp.py``; ``mlp_torch.py`` and ``mlp_triton.py`` compute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastagglo.ops import mlp_torch, mlp_triton


class NormGelu(torch.autograd.Function):
    """Keeps x and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tanh: bool,
        dtype: torch.dtype,
        triton: bool,
    ) -> Tensor:
        y, mean, rstd = torch.ops.fastagglo.norm_gelu_fwd(x, weight, bias, eps, tanh, dtype, triton)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.settings = tanh, eps, triton
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants = list(ctx.needs_input_grad[:3])
        found = torch.ops.fastagglo.norm_gelu_bwd(grad_y, *ctx.saved_tensors, *ctx.settings, wants)
        return *_asked(found, wants), *[None] * 4


class LinearGelu(torch.autograd.Function):
    """Keeps x and what the GELU was given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tanh: bool,
        dtype: torch.dtype,
        triton: bool,
    ) -> Tensor:
        y, pre = torch.ops.fastagglo.linear_gelu_fwd(x, weight, bias, tanh, dtype, triton)
        ctx.save_for_backward(pre, x, weight, bias)
        ctx.settings = tanh, triton
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants = list(ctx.needs_input_grad[:3])
        found = torch.ops.fastagglo.linear_gelu_bwd(
            grad_y, *ctx.saved_tensors, *ctx.settings, wants
        )
        return *_asked(found, wants), *[None] * 3


class NormGeluLinear(torch.autograd.Function):
    """Keeps x, two numbers a row, and the GELU's output if ``keep``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        skip: bool,
        normalise: bool,
        eps: float,
        tanh: bool,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        keep: bool,
        upsample: int,
        width: int,
        triton: bool,
    ) -> Tensor:
        parameters = (norm_weight, norm_bias, weight, bias)
        y, mean, rstd, kept = torch.ops.fastagglo.norm_gelu_linear_fwd(
            *(x, *parameters, residual, skip, normalise, eps, tanh, dtype, out_dtype, keep),
            *(upsample, width, triton),
        )
        ctx.save_for_backward(x, mean, rstd, kept, *parameters)
        ctx.settings = skip, normalise, eps, tanh, dtype, upsample, width, triton
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants = list(ctx.needs_input_grad[:5])
        found: Sequence[Tensor] = [grad_y] * 5
        if any(wants):
            found = torch.ops.fastagglo.norm_gelu_linear_bwd(
                grad_y, *ctx.saved_tensors, *ctx.settings, wants
            )
        residual = grad_y.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None
        return *_asked(found, wants), residual, *[None] * 10


class SharedLinear(torch.autograd.Function):
    """Keeps x. Arguments: x, dtype, number of layers, their weights and their biases."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, count: int, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = list(parameters[:count]), list(parameters[count:])
        found = torch.ops.fastagglo.shared_linear_fwd(x, weights, biases, dtype)
        ctx.save_for_backward(x, *parameters)
        ctx.dtype, ctx.count = dtype, count
        ctx.set_materialize_grads(False)  # no GEMM for an output that nobody used
        if len(found) < count:
            found = found[0].split([len(w) for w in weights], 1)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weights, biases = parameters[: ctx.count], parameters[ctx.count :]
        wants = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        used = [i for i, grad in enumerate(grads) if grad is not None]
        results: list[Tensor | None] = [None] * len(wants)
        if used:
            places = [0, *(1 + i for i in used), *(1 + ctx.count + i for i in used)]
            asked = [wants[i] for i in places]
            found = torch.ops.fastagglo.shared_linear_bwd(
                [grads[i] for i in used],
                x,
                [weights[i] for i in used],
                [biases[i] for i in used],
                ctx.dtype,
                asked,
            )
            for place, gradient in zip(places, _asked(found, asked), strict=True):
                results[place] = gradient
        return results[0], None, None, *results[1:]


def _asked(found: Sequence[Tensor], wants: Sequence[bool]) -> list[Tensor | None]:
    """Operators give empty tensors for gradients that are not wanted."""
    return [gradient if want else None for gradient, want in zip(found, wants, strict=True)]


# --- the operators --------------------------------------------------------------------------------

# x and all that goes with it is (rows, channels). dtype is that of a GEMM's operands. wants says
# which gradients are asked for, in the order of the results; the others come out empty. With an
# upsample beyond 1, y and its gradient are (rows * upsample**2, channels / upsample**2), where a
# pixel shuffle of a grid ``width`` rows wide puts them.
_PARAMETERS = "Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias"
for _name, _schema in {
    "norm_gelu_fwd": "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool tanh, "
    "ScalarType dtype, bool triton) -> (Tensor y, Tensor mean, Tensor rstd)",
    "norm_gelu_bwd": "(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, bool tanh, float eps, bool triton, bool[] wants) -> (Tensor, Tensor, Tensor)",
    "linear_gelu_fwd": "(Tensor x, Tensor weight, Tensor? bias, bool tanh, ScalarType dtype, "
    "bool triton) -> (Tensor y, Tensor pre)",
    "linear_gelu_bwd": "(Tensor grad_y, Tensor pre, Tensor x, Tensor weight, Tensor? bias, "
    "bool tanh, bool triton, bool[] wants) -> (Tensor, Tensor, Tensor)",
    "norm_gelu_linear_fwd": f"(Tensor x, {_PARAMETERS}, Tensor? residual, bool skip, "
    "bool normalise, float eps, bool tanh, ScalarType dtype, ScalarType out_dtype, bool keep, "
    "int upsample, SymInt width, bool triton) -> (Tensor y, Tensor mean, Tensor rstd, Tensor kept)",
    "norm_gelu_linear_bwd": "(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor kept, "
    f"{_PARAMETERS}, bool skip, bool normalise, float eps, bool tanh, ScalarType dtype, "
    "int upsample, SymInt width, bool triton, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "shared_linear_fwd": "(Tensor x, Tensor[] weights, Tensor?[] biases, ScalarType dtype) "
    "-> Tensor[]",
    "shared_linear_bwd": "(Tensor[] grads, Tensor x, Tensor[] weights, Tensor?[] biases, "
    "ScalarType dtype, bool[] wants) -> Tensor[]",
}.items():
    torch.library.define(f"fastagglo::{_name}", _schema)


def _path(triton: bool) -> Any:
    return mlp_triton if triton else mlp_torch


def _given(like: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _shapes(
    like: Tensor, sources: Sequence[Tensor | None], wants: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What gradients of these look like."""
    return tuple(
        like.new_empty(0) if source is None or not want else source.new_empty(source.shape)
        for source, want in zip(sources, wants, strict=True)
    )


@torch.library.impl("fastagglo::norm_gelu_fwd", "default")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *arguments, triton = arguments
    return _path(triton).norm_gelu(*arguments)


@torch.library.register_fake("fastagglo::norm_gelu_fwd")
def _(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    stats = (x.new_empty(x.shape[0], dtype=mlp_torch.wider(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape, dtype=others[-2]), *stats


@torch.library.impl("fastagglo::norm_gelu_bwd", "default")
def _(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments, triton, wants = arguments
    return _given(grad_y, _path(triton).norm_gelu_backward(grad_y, *arguments, wants))


@torch.library.register_fake("fastagglo::norm_gelu_bwd")
def _(grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _shapes(grad_y, (x, *others[:2]), others[-1])


@torch.library.impl("fastagglo::linear_gelu_fwd", "default")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *arguments, triton = arguments
    return tuple(_path(triton).linear_gelu(*arguments))


@torch.library.register_fake("fastagglo::linear_gelu_fwd")
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    shape = (x.shape[0], weight.shape[0])
    return tuple(x.new_empty(shape, dtype=others[-2]) for _ in range(2))


@torch.library.impl("fastagglo::linear_gelu_bwd", "default")
def _(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments, triton, wants = arguments
    return _given(grad_y, _path(triton).linear_gelu_backward(grad_y, *arguments, wants))


@torch.library.register_fake("fastagglo::linear_gelu_bwd")
def _(grad_y: Tensor, pre: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _shapes(grad_y, others[:3], others[-1])


@torch.library.impl("fastagglo::norm_gelu_linear_fwd", "default")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, residual, skip = arguments[:6]
    *settings, triton = arguments[6:]
    residual = x if skip else residual
    return _path(triton).norm_gelu_linear(x, *parameters, residual, *settings)


@torch.library.register_fake("fastagglo::norm_gelu_linear_fwd")
def _(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    weight, normalise, (dtype, out_dtype, keep) = others[2], others[6], others[-6:-3]
    rows, wide = x.shape[0], mlp_torch.wider(x.dtype)
    cells = others[-3] ** 2
    y = x.new_empty((rows * cells, weight.shape[0] // cells), dtype=out_dtype)
    stats = (x.new_empty(rows if normalise else 0, dtype=wide) for _ in range(2))
    return y, *stats, x.new_empty((rows if keep else 0, x.shape[1]), dtype=dtype)


@torch.library.impl("fastagglo::norm_gelu_linear_bwd", "default")
def _(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments, triton, wants = arguments
    return _given(grad_y, _path(triton).norm_gelu_linear_backward(grad_y, *arguments, wants))


@torch.library.register_fake("fastagglo::norm_gelu_linear_bwd")
def _(grad_y: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _shapes(grad_y, (x, *others[3:7]), others[-1])


@torch.library.impl("fastagglo::shared_linear_fwd", "default")
def _(*arguments: Any) -> list[Tensor]:
    return mlp_torch.shared_linear(*arguments)


@torch.library.register_fake("fastagglo::shared_linear_fwd")
def _(x: Tensor, weights: list[Tensor], biases: Any, dtype: torch.dtype) -> list[Tensor]:
    widths = [w.shape[0] for w in weights]
    if mlp_torch.joined(x, len(weights)):
        widths = [sum(widths)]
    return [x.new_empty((x.shape[0], width), dtype=dtype) for width in widths]


@torch.library.impl("fastagglo::shared_linear_bwd", "default")
def _(grads: list[Tensor], *arguments: Any) -> list[Tensor]:
    grad_x, weights, biases = mlp_torch.shared_linear_backward(grads, *arguments)
    return list(_given(grads[0], (grad_x, *weights, *biases)))


@torch.library.register_fake("fastagglo::shared_linear_bwd")
def _(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    dtype: torch.dtype,
    wants: list[bool],
) -> list[Tensor]:
    return list(_shapes(grads[0], (x, *weights, *biases), wants))
