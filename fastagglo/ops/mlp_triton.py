"""The Triton path of the fused MLP steps: a fused GEMM, or cuBLAS and one pointwise kernel.

What to compute is said in ``mlp.py``; the kernels and the choice between the two roads are those of
``kernels/mlp.py``. Arguments and results are those of the functions of ``mlp_torch.py``. A weight's
gradient is added up in fp32 on either road and comes in the weight's dtype: from the kernel's
accumulators at once, from cuBLAS as ``weight_product`` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.kernels import mlp as kernel
from fastagglo.kernels.mlp_pointwise import MOST_CHANNELS
from fastagglo.kernels.tiles import OLDEST_ARCH, capability
from fastagglo.ops.mlp_torch import runs_of, weight_product

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unable(x: Tensor, norm: bool) -> str | None:
    """What keeps the kernels from a call that is otherwise fine."""
    if x.dtype not in _DTYPES:
        return f"its kernels take bfloat16, float16 and float32, got {x.dtype}"
    if norm and x.shape[-1] > MOST_CHANNELS:
        return f"its kernels normalise up to {MOST_CHANNELS} channels, got {x.shape[-1]}"
    if x.is_cuda and capability(x.device.index) < OLDEST_ARCH:
        return f"its kernels need a GPU of compute capability {OLDEST_ARCH / 10} or later"
    return None


def norm_gelu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tanh: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu(layer_norm(x))`` and the rows' means and inverse deviations."""
    y, mean, rstd = kernel.norm_gelu_forward(rows_of(x), whole(weight), whole(bias), eps, tanh)
    return y.to(dtype), mean, rstd


def norm_gelu_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tanh: bool,
    eps: float,
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias."""
    grad_x, *sums = kernel.norm_gelu_backward(
        *(rows_of(grad_y.to(x.dtype)), rows_of(x), mean, rstd, whole(weight), whole(bias), tanh),
        sums=any(wants[1:3]),
    )
    grads = (
        value.to(parameter.dtype) if parameter is not None and want else None
        for value, parameter, want in zip(sums, (weight, bias), wants[1:3], strict=True)
    )
    return grad_x if wants[0] else None, *grads


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``gelu(linear(x))`` and what the GELU was given."""
    x, weight = rows_of(x.to(dtype)), rows_of(weight.to(dtype))
    if _fused("linear", x, weight):
        bias = whole(bias)
        return kernel.linear(x, weight, bias, gelu_out=True, tanh=tanh, keep_pre=True)
    pre = F.linear(x, weight, None if bias is None else bias.to(dtype))
    return kernel.gelu_forward(pre, tanh), pre


def linear_gelu_backward(
    grad_y: Tensor,
    pre: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tanh: bool,
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, of those that are wanted."""
    dtype = pre.dtype
    grad, sums = kernel.gelu_backward(rows_of(grad_y), pre, tanh, sums=wants[2])
    grad_x = grad_weight = None
    if wants[0]:
        grad_x = _input_grad(grad, weight.to(dtype)).to(x.dtype)
    if wants[1]:
        x = rows_of(x.to(dtype))
        if _fused("weight_grad", x, weight):
            grad_weight, _ = kernel.linear_weight_grad(grad, x, sums=False, dtype=weight.dtype)
        else:
            grad_weight = weight_product(grad, x, weight.dtype)
    return grad_x, grad_weight, sums.to(bias.dtype) if wants[2] else None


def norm_gelu_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    normalise: bool,
    eps: float,
    tanh: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    keep: bool,
    upsample: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``residual + linear(gelu(layer_norm(x)))``, statistics, and the GELU's output if kept.

    With ``upsample`` beyond 1, a pixel shuffle follows: the kernel's store does it, and what cuBLAS
    computes is copied once.
    """
    x, weight = rows_of(x), rows_of(weight.to(dtype))
    norms = whole(norm_weight), whole(norm_bias)
    mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    kept = x.new_empty(0, x.shape[1], dtype=dtype)
    alike = x.dtype == dtype and (residual is None or residual.dtype == dtype)
    if alike and not keep and _fused("linear", x, weight):
        if normalise:
            mean, rstd = kernel.row_statistics(x, eps)
        y = kernel.linear(
            *(x, weight, whole(bias)),
            norm=(mean, rstd, *norms) if normalise else None,
            gelu_in=True,
            residual=None if residual is None else rows_of(residual),
            tanh=tanh,
            cells=kernel.Cells(upsample, width),
        )
        return y, mean, rstd, kept
    act, *stats = _activated(x, norms, normalise, eps, tanh)
    mean, rstd = stats or (mean, rstd)
    act = act.to(dtype)
    y = F.linear(act, weight, None if bias is None else bias.to(dtype))
    if residual is not None:
        y = y.add_(residual) if out_dtype == dtype else y + residual
    if upsample > 1:
        shuffled = y.new_empty(y.shape[0] * upsample**2, y.shape[1] // upsample**2)
        runs = runs_of(shuffled, upsample, width)
        runs.copy_(y.view(runs.shape))
        y = shuffled
    return y, mean, rstd, act if keep else kept


def norm_gelu_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    kept: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    skip: bool,
    normalise: bool,
    eps: float,
    tanh: bool,
    dtype: torch.dtype,
    upsample: int,
    width: int,
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, norm_weight, norm_bias, weight and bias, of those that are wanted.

    The kernels read a shuffled gradient where it is; for cuBLAS it is put in order, once.
    """
    x, grad = rows_of(x), rows_of(grad_y.to(dtype))
    cells = kernel.Cells(upsample, width)
    if upsample > 1:
        by_kernel = (
            not want or _fused(op, x, weight)
            for op, want in (("weight_grad", wants[3]), ("input_grad", any(wants[:3])))
        )
        if all(by_kernel) and x.dtype == dtype and not len(kept):
            grad = grad.contiguous()
        else:
            grad = runs_of(grad, upsample, width).reshape(x.shape[0], weight.shape[0])
            cells = kernel.PLAIN
    norms = whole(norm_weight), whole(norm_bias)
    grad_x = grad_weight = grad_bias = None
    of_norm: tuple[Tensor | None, ...] = (None, None)
    if wants[3]:
        if x.dtype == dtype and not len(kept) and _fused("weight_grad", x, weight):
            grad_weight, grad_bias = kernel.linear_weight_grad(
                *(grad, x),
                norm=(mean, rstd, *norms) if normalise else None,
                gelu_in=True,
                tanh=tanh,
                sums=wants[4],
                dtype=weight.dtype,
                cells=cells,
            )
        else:
            act = kept if len(kept) else _activated(x, norms, normalise, eps, tanh)[0]
            grad_weight = weight_product(grad, act.to(dtype), weight.dtype)
    if wants[4]:
        if grad_bias is None:
            grad_bias = runs_of(grad, *cells).sum((0, 1), dtype=torch.float32).flatten()
        grad_bias = grad_bias.to(bias.dtype)
    if any(wants[:3]):
        narrow = weight.to(dtype)
        if normalise:
            upstream = _input_grad(grad, narrow, cells)
            grad_x, *of_norm = norm_gelu_backward(
                *(upstream, x, mean, rstd, norm_weight, norm_bias, tanh, eps, wants[:3])
            )
        elif x.dtype == dtype and _fused("input_grad", x, narrow):
            grad_x = kernel.linear_input_grad(
                grad, rows_of(narrow), gelu_of=x, tanh=tanh, cells=cells
            )
        else:
            upstream = (grad @ narrow).to(x.dtype)
            grad_x, _ = kernel.gelu_backward(upstream, x, tanh, sums=False)
        if grad_x is not None and skip:
            grad_x = grad_x.add_(grad_y)
    return grad_x, *of_norm, grad_weight, grad_bias if wants[4] else None


def _activated(
    x: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    normalise: bool,
    eps: float,
    tanh: bool,
) -> tuple[Tensor, ...]:
    """What a GELU gives, and the statistics of a LayerNorm before it."""
    if normalise:
        return kernel.norm_gelu_forward(x, *norms, eps, tanh)
    return (kernel.gelu_forward(x, tanh),)


def _input_grad(grad: Tensor, weight: Tensor, cells: kernel.Cells = kernel.PLAIN) -> Tensor:
    if cells.upsample > 1 or _fused("input_grad", grad, weight):
        return kernel.linear_input_grad(grad, rows_of(weight), cells=cells)
    return grad @ weight


def _fused(op: str, x: Tensor, weight: Tensor) -> bool:
    n, k = weight.shape
    chosen = kernel.choose(op, x.shape[0], n, k, x.dtype)
    return chosen == "triton" and weight.dtype in _DTYPES


def rows_of(x: Tensor) -> Tensor:
    """x with rows that the kernels can read: a unit last stride, and no row over another."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def whole(x: Tensor | None) -> Tensor | None:
    """A vector that the kernels can read."""
    if x is None:
        return None
    return x.contiguous() if x.dtype in _DTYPES else x.float()
