"""LayerNorm and GELU in one pass over memory, and their gradients: what stands beside a GEMM.

A program of the LayerNorm kernels holds whole rows. Gradients of parameters are sums over rows:
each program adds up a fixed range of them, and :func:`sum_kernel` adds up the programs', so that
results are bit-equal from run to run.

Letters: M rows, K channels; all arithmetic in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastagglo.kernels.gelu import gelu, gelu_slope
from fastagglo.kernels.merge_move import on_device, stride_in_units

MOST_CHANNELS = 8192  # of a row that the registers of 16 warps hold, with its gradients
PARTS = 528  # programs that share out the rows of a sum, four for each SM of an H100

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def norm_gelu_kernel(
    x, weight, bias, out, mean, rstd, M, row_stride, eps,
    K: tl.constexpr, UNIT: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = gelu((x - mean) * rstd * weight + bias)``; without ``out`` the statistics alone."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < M)[:, None] & (columns < K)
    tile = tl.load(x + (rows * row_stride * UNIT)[:, None] + columns, mask=inside, other=0.0)
    tile = tile.to(tl.float32)
    centre = tl.sum(tile, 1) / K
    tile = tl.where(columns < K, tile - centre[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(tile * tile, 1) / K + eps)
    tl.store(mean + rows, centre, mask=rows < M)
    tl.store(rstd + rows, inverse, mask=rows < M)
    if out is not None:
        tile *= inverse[:, None]
        if weight is not None:
            tile *= tl.load(weight + columns, mask=columns < K, other=0.0).to(tl.float32)
        if bias is not None:
            tile += tl.load(bias + columns, mask=columns < K, other=0.0).to(tl.float32)
        result = gelu(tile, TANH).to(out.dtype.element_ty)
        tl.store(out + (rows * K)[:, None] + columns, result, mask=inside)


@triton.jit
def norm_gelu_backward_kernel(
    grad_out, x, mean, rstd, weight, bias, grad_x, partials,
    M, grad_stride, row_stride, rows_each,
    K: tl.constexpr, GRAD_UNIT: tl.constexpr, UNIT: tl.constexpr, TANH: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of x; partials (2, programs, K) of those of weight and bias."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_each
    columns = tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        scale = tl.load(weight + columns, mask=columns < K, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + columns, mask=columns < K, other=0.0).to(tl.float32)
    weight_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, rows_each, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < K)
        tile = tl.load(x + (rows * row_stride * UNIT)[:, None] + columns, mask=inside, other=0.0)
        grad = tl.load(
            grad_out + (rows * grad_stride * GRAD_UNIT)[:, None] + columns, mask=inside, other=0.0
        ).to(tl.float32)
        centre = tl.load(mean + rows, mask=rows < M, other=0.0)
        inverse = tl.load(rstd + rows, mask=rows < M, other=0.0)
        normal = tl.where(columns < K, tile.to(tl.float32) - centre[:, None], 0.0)
        normal *= inverse[:, None]
        value = normal
        if weight is not None:
            value = value * scale
        if bias is not None:
            value = value + shift
        grad *= gelu_slope(value, TANH)
        if SUMS:
            weight_sums += grad * normal
            bias_sums += grad
        if weight is not None:
            grad *= scale
        along = tl.sum(grad * normal, 1) / K
        level = tl.sum(grad, 1) / K
        result = inverse[:, None] * (grad - level[:, None] - normal * along[:, None])
        result = result.to(grad_x.dtype.element_ty)
        tl.store(grad_x + (rows * K)[:, None] + columns, result, mask=inside)
    if SUMS:
        at = partials + program.to(tl.int64) * K + columns
        tl.store(at, tl.sum(weight_sums, 0)[None, :], mask=columns < K)
        at += tl.num_programs(0).to(tl.int64) * K
        tl.store(at, tl.sum(bias_sums, 0)[None, :], mask=columns < K)


@triton.jit
def gelu_kernel(
    x, out, M, row_stride,
    K: tl.constexpr, UNIT: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = gelu(x)``."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (columns < K)
    tile = tl.load(x + rows * row_stride * UNIT + columns, mask=inside).to(tl.float32)
    tl.store(out + rows * K + columns, gelu(tile, TANH).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    grad_out, x, grad_x, partials, M, grad_stride, row_stride, rows_each,
    K: tl.constexpr, GRAD_UNIT: tl.constexpr, UNIT: tl.constexpr, TANH: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``grad_x = grad_out * gelu'(x)``; partials (row programs, K) of its column sums."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_each
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, rows_each, ROWS):
        rows = (first + step + tl.arange(0, ROWS))[:, None]
        inside = (rows < M) & (columns < K)
        tile = tl.load(x + rows * row_stride * UNIT + columns, mask=inside, other=0.0)
        grad = tl.load(grad_out + rows * grad_stride * GRAD_UNIT + columns, mask=inside, other=0.0)
        grad = grad.to(tl.float32) * gelu_slope(tile.to(tl.float32), TANH)
        if SUMS:
            sums += grad
        tl.store(grad_x + rows * K + columns, grad.to(grad_x.dtype.element_ty), mask=inside)
    if SUMS:
        at = partials + program.to(tl.int64) * K + columns
        tl.store(at, tl.sum(sums, 0)[None, :], mask=columns < K)


@triton.jit
def sum_kernel(
    partials, first, second, parts, size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the parts of (1 or 2, parts, size), in an order that is always the same."""
    which = tl.program_id(1)
    partials += which.to(tl.int64) * parts * size
    out = first
    if which == 1:
        out = second
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(0, parts, ROWS):
        rows = step + tl.arange(0, ROWS)
        inside = (rows < parts)[:, None] & (columns < size)[None, :]
        at = partials + (rows.to(tl.int64) * size)[:, None] + columns[None, :]
        sums += tl.load(at, mask=inside, other=0.0)
    result = tl.sum(sums, 0).to(out.dtype.element_ty)
    tl.store(out + columns, result, mask=columns < size)


# --- launchers ------------------------------------------------------------------------------------


def norm_gelu_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    tanh: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu(layer_norm(x))`` in one pass, rounded once.

    Args:
        x: (M, K) with a unit last stride, bfloat16, float16 or float32; K at most 8,192.
        weight, bias: (K,) contiguous, any of these dtypes, or None.
        eps: added to the variance.
        tanh: GELU's tanh form.

    Returns:
        (M, K) contiguous in the dtype of ``x``; mean and 1 / standard deviation of the rows,
        (M,) float32.

    Raises:
        ValueError: a shape, stride or dtype that the kernels cannot take.
    """
    out = x.new_empty(x.shape)
    return out, *_norm(x, weight, bias, out, eps, tanh)


def row_statistics(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """What :func:`norm_gelu_forward` returns beside the result, alone: x is read, nothing else."""
    return _norm(x, None, None, None, eps, False)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    eps: float,
    tanh: bool,
) -> tuple[Tensor, Tensor]:
    check_matrices(x=x)
    rows, channels = x.shape
    _check_channels(channels)
    check_vectors(channels, weight=weight, bias=bias)
    mean = x.new_empty(rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    block, each, warps = _whole_rows(channels, 16)
    stride, unit = stride_in_units(x)
    if x.numel():
        with on_device(x):
            norm_gelu_kernel[(-(-rows // each),)](
                x, weight, bias, out, mean, rstd, rows, stride, eps,
                K=channels, UNIT=unit, TANH=tanh, ROWS=each, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return mean, rstd


def norm_gelu_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tanh: bool = False,
    *,
    sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`norm_gelu_forward`, in one pass over ``grad_y`` and ``x``.

    Args:
        grad_y: (M, K) with a unit last stride.
        x, weight, bias, tanh: of the forward. mean, rstd: what it returned.
        sums: whether to compute the parameters' gradients.

    Returns:
        The gradient of x, contiguous in its dtype; those of weight and bias, (K,) float32, or (0,)
        if not asked for.
    """
    check_matrices(grad_y=grad_y, x=x)
    _check_same(grad_y, x)
    rows, channels = x.shape
    _check_channels(channels)
    check_vectors(channels, weight=weight, bias=bias)
    check_vectors(rows, mean=mean, rstd=rstd)
    grad_x = x.new_empty(x.shape)
    grad_weight, grad_bias = (
        x.new_empty(channels if sums else 0, dtype=torch.float32) for _ in range(2)
    )
    block, each, warps = _whole_rows(channels, 8)
    rows_each = -(-rows // (PARTS * each)) * each
    parts = -(-rows // rows_each) if rows else 0
    partials = x.new_empty((2, parts, channels) if sums else 0, dtype=torch.float32)
    (grad_stride, grad_unit), (stride, unit) = stride_in_units(grad_y), stride_in_units(x)
    if not x.numel():
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    with on_device(x):
        norm_gelu_backward_kernel[(parts,)](
            grad_y, x, mean, rstd, weight, bias, grad_x, partials,
            rows, grad_stride, stride, rows_each,
            K=channels, GRAD_UNIT=grad_unit, UNIT=unit, TANH=tanh,
            SUMS=sums, ROWS=each, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        if sums:
            sum_parts(partials, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias


def gelu_forward(h: Tensor, tanh: bool = False) -> Tensor:
    """``gelu(h)`` of (M, K) with a unit last stride; contiguous, in the dtype of ``h``."""
    check_matrices(h=h)
    rows, channels = h.shape
    out = h.new_empty(h.shape)
    block, each = _blocks(channels)
    stride, unit = stride_in_units(h)
    if h.numel():
        with on_device(h):
            gelu_kernel[(-(-rows // each), -(-channels // block))](
                h, out, rows, stride,
                K=channels, UNIT=unit, TANH=tanh, ROWS=each, BLOCK=block,
            )  # fmt: skip
    return out


def gelu_backward(
    grad_y: Tensor, h: Tensor, tanh: bool = False, *, sums: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`gelu_forward`, and its column sums: the gradient of a bias before it.

    Args:
        grad_y, h: (M, K) with unit last strides. tanh: of the forward.
        sums: whether to compute the column sums.

    Returns:
        (M, K) contiguous in the dtype of ``h``; (K,) float32, or (0,) if not asked for.
    """
    check_matrices(grad_y=grad_y, h=h)
    _check_same(grad_y, h)
    rows, channels = h.shape
    grad_h = h.new_empty(h.shape)
    columns = h.new_empty(channels if sums else 0, dtype=torch.float32)
    if not h.numel():
        return grad_h, columns.zero_()
    block, each = _blocks(channels)
    across = -(-channels // block)
    rows_each = -(-rows // (max(1, 2 * PARTS // across) * each)) * each
    parts = -(-rows // rows_each)
    partials = h.new_empty((1, parts, channels) if sums else 0, dtype=torch.float32)
    (grad_stride, grad_unit), (stride, unit) = stride_in_units(grad_y), stride_in_units(h)
    with on_device(h):
        gelu_backward_kernel[(parts, across)](
            grad_y, h, grad_h, partials, rows, grad_stride, stride, rows_each,
            K=channels, GRAD_UNIT=grad_unit, UNIT=unit, TANH=tanh,
            SUMS=sums, ROWS=each, BLOCK=block,
        )  # fmt: skip
        if sums:
            sum_parts(partials, columns)
    return grad_h, columns


def sum_parts(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Write ``partials[0].sum(0)``, and ``partials[1].sum(0)``.

    Args:
        partials: (1 or 2, parts, n) float32, contiguous.
        first, second: n elements each, contiguous, of any dtype.
    """
    parts, size = partials.shape[1], first.numel()
    grid = (-(-size // 32), 1 if second is None else 2)
    # Never the same tensor twice where there are two: Triton would take them for one.
    second = first if second is None else second
    sum_kernel[grid](partials, first, second, parts, size, ROWS=64, BLOCK=32)


def _whole_rows(channels: int, per_thread: int) -> tuple[int, int, int]:
    """Block of a whole row, rows at once, and warps, with so many elements a thread if it goes."""
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, 128 * per_thread // block)
    return block, rows, min(16, max(1, rows * block // (32 * per_thread)))


def _blocks(channels: int) -> tuple[int, int]:
    """Columns and rows of a block of 2,048 elements."""
    block = min(256, max(16, triton.next_power_of_2(channels)))
    return block, 2048 // block


def check_matrices(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() != 2 or x.dtype not in _DTYPES or (x.stride(1) != 1 and x.shape[1] > 1):
            raise ValueError(
                f"{name} must be a bfloat16, float16 or float32 matrix with a unit last stride, "
                f"got {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}; "
                f"reshape it and use {name}.contiguous()"
            )


def check_vectors(size: int, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and (tuple(x.shape) != (size,) or not x.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous of shape ({size},), got shape {tuple(x.shape)} and "
                f"strides {x.stride()}"
            )


def _check_same(grad: Tensor, x: Tensor) -> None:
    if grad.shape != x.shape:
        raise ValueError(
            f"grad_y must have the shape {tuple(x.shape)} of the input, got {tuple(grad.shape)}"
        )


def _check_channels(channels: int) -> None:
    if not 0 < channels <= MOST_CHANNELS:
        raise ValueError(
            f"rows of 1 to {MOST_CHANNELS} channels can be normalised, got {channels}; "
            "use the backend 'torch'"
        )
