"""Linear layers of the adaptor heads with what surrounds them folded in, and their gradients.

    y = residual + gelu(act(x) @ weight.T + bias)      act(x) = gelu(layer_norm(x)), or parts of it

- :func:`linear`: one launch. LayerNorm is applied as x is read, from statistics that
  :func:`row_statistics` took or :func:`norm_gelu_forward` left.
- :func:`linear_input_grad`, :func:`linear_weight_grad`: the latter computes act(x) anew.
- :func:`grouped_linear`, :func:`grouped_linear_input_grad`: many products in one launch, each of
  its own M, N and K: the summary heads, whose M is the number of images.
- :func:`norm_gelu_forward` and the like, from mlp_pointwise.py: what stands around a product that
  cuBLAS computes. mlp_choice.py says which road to take.

There are no atomics: results are bit-equal from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastagglo.kernels import mlp_table
from fastagglo.kernels.merge_move import STRIDE_UNIT, on_device, stride_in_units
from fastagglo.kernels.mlp_choice import (
    GROUP,
    Cost,
    GemmTile,
    choose,
    gemm_tile,
    pointwise_cost,
    product_cost,
    splits,
)
from fastagglo.kernels.mlp_kernels import grouped_linear_kernel, linear_kernel, weight_grad_kernel
from fastagglo.kernels.mlp_pointwise import (
    check_matrices,
    gelu_backward,
    gelu_forward,
    norm_gelu_backward,
    norm_gelu_forward,
    row_statistics,
    sum_parts,
)
from fastagglo.kernels.mlp_problem import (
    PLAIN,
    Cells,
    Norm,
    Problem,
    Work,
    aligned_rows,
    check_cells,
    checked_norm,
    forward_work,
    grad_work,
)

__all__ = [
    "PLAIN",
    "Cells",
    "Cost",
    "GemmTile",
    "Norm",
    "Problem",
    "choose",
    "gelu_backward",
    "gelu_forward",
    "grouped_linear",
    "grouped_linear_input_grad",
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
    "norm_gelu_backward",
    "norm_gelu_forward",
    "pointwise_cost",
    "product_cost",
    "row_statistics",
]

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# --- one product ----------------------------------------------------------------------------------


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
    gelu_in: bool = False,
    gelu_out: bool = False,
    residual: Tensor | None = None,
    tanh: bool = False,
    keep_pre: bool = False,
    cells: Cells = PLAIN,
    tile: GemmTile | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer with its surroundings; see :class:`Problem` for the arguments.

    Args:
        cells: the result is stored as this shuffle places it, ``upsample**2`` rows for each of x.
        tile: block sizes; None for those of the table.

    Returns:
        (M, N), or (M * upsample**2, N / upsample**2), contiguous in the dtype of ``x``; with
        ``keep_pre`` also (M, N), what comes before ``gelu_out`` and the residual.

    Raises:
        ValueError: a shape, stride or dtype that the kernels cannot take.
    """
    work = forward_work(
        Problem(x, weight, bias, norm, gelu_in, gelu_out, residual, tanh, keep_pre), cells
    )
    _launch(work, tile)
    return work.out if work.pre is None else (work.out, work.pre)


def linear_input_grad(
    grad_y: Tensor,
    weight: Tensor,
    *,
    gelu_of: Tensor | None = None,
    tanh: bool = False,
    cells: Cells = PLAIN,
    tile: GemmTile | None = None,
) -> Tensor:
    """``grad_y @ weight``, times GELU's derivative at ``gelu_of``.

    Args:
        grad_y: (M, N). weight: (N, K). gelu_of: (M, K), or None. Unit last strides, one dtype.
        tanh: GELU's tanh form.
        cells: the shuffle of the forward, in whose places ``grad_y`` is read: then contiguous,
            (M * upsample**2, N / upsample**2).
        tile: block sizes; None for those of the table.

    Returns:
        (M, K) contiguous in the dtype of ``grad_y``.
    """
    work = grad_work(grad_y, weight, gelu_of, tanh, cells)
    _launch(work, tile)
    return work.out


def linear_weight_grad(
    grad_y: Tensor,
    x: Tensor,
    *,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
    gelu_in: bool = False,
    tanh: bool = False,
    sums: bool = True,
    dtype: torch.dtype = torch.float32,
    cells: Cells = PLAIN,
    tile: GemmTile | None = None,
) -> tuple[Tensor, Tensor]:
    """``grad_y.T @ act(x)``, and the column sums of ``grad_y``, from one reading of both.

    Args:
        grad_y: (M, N). x: (M, K). Unit last strides, one dtype.
        norm, gelu_in, tanh: of the forward.
        sums: whether to compute the column sums, the bias's gradient.
        dtype: of the weight's gradient; accumulated in fp32 in any case.
        cells: as of :func:`linear_input_grad`.
        tile: block sizes, ``rows`` of N and ``columns`` of K; None for those of the table.

    Returns:
        (N, K) in ``dtype``; (N,) float32, or (0,) if not asked for.
    """
    check_matrices(grad_y=grad_y, x=x)
    if grad_y.shape[0] != x.shape[0] * cells.each or grad_y.dtype != x.dtype:
        raise ValueError(
            f"grad_y must have the {x.shape[0] * cells.each} rows and the dtype {x.dtype} of x, "
            f"got {tuple(grad_y.shape)} and {grad_y.dtype}"
        )
    rows, width = x.shape
    check_cells(cells, rows, grad_y)
    norm = checked_norm(norm, x)
    height = grad_y.shape[1] * cells.each
    span = height // cells.upsample
    out = x.new_empty(height, width, dtype=dtype)
    columns = x.new_empty(height if sums else 0, dtype=torch.float32)
    if not rows or not out.numel():
        return out.zero_(), _column_sums(grad_y, columns, cells)
    shuffled = cells.upsample > 1
    grad_row = span if shuffled else grad_y.stride(0)
    aligned = aligned_rows((span, width, grad_row, x.stride(0)), (grad_y, x))
    tile = tile or gemm_tile("weight", x, norm is not None or gelu_in, aligned)
    tiles = -(-height // tile.rows) * -(-width // tile.columns)
    rows_each = splits(rows, tiles, tile.depth)
    parts = -(-rows // rows_each)
    partials, bias_partials = out, columns
    if parts > 1:
        partials = x.new_empty(1, parts, height * width, dtype=torch.float32)
        bias_partials = x.new_empty(1, parts, columns.numel(), dtype=torch.float32)
    (x_stride, x_unit), n_unit, k_unit = stride_in_units(x), _unit(span), _unit(width)
    grad_unit = _unit(grad_row)
    with on_device(x):
        weight_grad_kernel[(tiles, parts)](
            grad_y, x, *(norm or (None,) * 4), partials, bias_partials,
            rows, span // n_unit, width // k_unit, grad_row // grad_unit, x_stride, rows_each,
            cells.width,
            N_UNIT=n_unit, K_UNIT=k_unit, GRAD_UNIT=grad_unit, X_UNIT=x_unit,
            GELU_IN=gelu_in, TANH=tanh, SUMS=sums,
            DOWN_MASK=height % tile.rows != 0, ACROSS_MASK=width % tile.columns != 0,
            UPSAMPLE=cells.upsample, **_blocks(x, tile),
        )  # fmt: skip
        if parts > 1:
            sum_parts(partials, out)
            if sums:
                sum_parts(bias_partials, columns)
    return out, columns


def _column_sums(grad_y: Tensor, columns: Tensor, cells: Cells) -> Tensor:
    """For a product of nothing, whose kernel is not launched."""
    if columns.numel():
        u, w = cells
        runs = grad_y.unflatten(0, (len(grad_y) // (u * u * w), u, w, u))
        torch.sum(runs, (0, 2), dtype=torch.float32, out=columns.view(u, u, -1))
    return columns


def _launch(work: Work, tile: GemmTile | None) -> None:
    rows, columns, _ = work.sizes
    if not work.out.numel():
        return
    x, weight, extra = work.x, work.weight, work.extra
    kind = "linear" if work.transposed else "input"
    tile = tile or gemm_tile(kind, x, work.prologue, work.aligned)
    (x_row, x_unit), (w_row, w_unit) = stride_in_units(x), stride_in_units(weight)
    extra_row, extra_unit = (0, 1) if extra is None else stride_in_units(extra)
    n_span, k_span = work.spans
    n_unit, k_unit = _unit(n_span), _unit(k_span)
    with on_device(x):
        linear_kernel[(-(-rows // tile.rows) * -(-columns // tile.columns),)](
            x, weight, work.bias, *(work.norm or (None,) * 4), extra, work.out, work.pre,
            rows, n_span // n_unit, k_span // k_unit, x_row, w_row, extra_row, work.cells.width,
            N_UNIT=n_unit, K_UNIT=k_unit, X_UNIT=x_unit, W_UNIT=w_unit, EXTRA_UNIT=extra_unit,
            GELU_IN=work.gelu_in, GELU_OUT=work.gelu_out, SLOPE=work.slope, TANH=work.tanh,
            TRANSPOSED=work.transposed, COLUMN_MASK=columns % tile.columns != 0,
            TAIL=k_span % tile.depth != 0, UPSAMPLE=work.cells.upsample, **_blocks(x, tile),
        )  # fmt: skip


# --- many products --------------------------------------------------------------------------------


def grouped_linear(
    problems: Sequence[Problem], *, tile: GemmTile | None = None
) -> list[Tensor | tuple[Tensor, Tensor]]:
    """:func:`linear` of each problem; one launch for all that are alike but for sizes and values.

    Args:
        problems: on one device.
        tile: block sizes; None for those of the table.
    """
    works = [forward_work(problem) for problem in problems]
    _launch_grouped(works, tile)
    return [work.out if work.pre is None else (work.out, work.pre) for work in works]


def grouped_linear_input_grad(
    problems: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    *,
    tanh: bool = False,
    tile: GemmTile | None = None,
) -> list[Tensor]:
    """:func:`linear_input_grad` of each (grad_y, weight, gelu_of), as :func:`grouped_linear`."""
    works = [grad_work(*problem, tanh) for problem in problems]
    _launch_grouped(works, tile)
    return [work.out for work in works]


def _launch_grouped(works: Sequence[Work], tile: GemmTile | None) -> None:
    groups: dict[tuple[Any, ...], list[tuple[Work, dict[str, int]]]] = {}
    for work in works:
        if work.out.numel():
            key, column = _column(work)
            groups.setdefault(key, []).append((work, column))
    for (*types, unit, gelu_in, gelu_out, slope, tanh, transposed), members in groups.items():
        first = members[0][0]
        block = tile or gemm_tile("grouped", first.x, first.prologue, unit > 1)
        programs = []
        for work, _ in members:
            rows, columns, _ = work.sizes
            programs.append(-(-rows // block.rows) * -(-columns // block.columns))
        table = [
            column | {"start": start}
            for (_, column), start in zip(members, accumulate(programs, initial=0), strict=False)
        ]
        names = ("TYPE", "BIAS", "STATISTIC", "LN_WEIGHT", "LN_BIAS", "EXTRA", "PRE")
        with on_device(first.x):
            grouped_linear_kernel[(sum(programs),)](
                mlp_table.build(table, first.x.device), len(members),
                **{name: _TYPES.get(dtype) for name, dtype in zip(names, types, strict=True)},
                UNIT=unit, GELU_IN=gelu_in, GELU_OUT=gelu_out, SLOPE=slope, TANH=tanh,
                TRANSPOSED=transposed, PROBLEMS=mlp_table.padded(len(members)),
                **_blocks(first.x, block),
            )  # fmt: skip


def _column(work: Work) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What tells launches apart, and what the table says of a problem."""
    norm = work.norm or (None,) * 4
    tensors = dict(zip(("mean", "rstd", "ln_weight", "ln_bias"), norm, strict=True))
    named = ("x", "weight", "bias", "extra", "out", "pre")
    tensors |= {name: getattr(work, name) for name in named}
    there = {name: x for name, x in tensors.items() if x is not None}
    rows, columns, inner = work.sizes
    strides = {"x_row": work.x.stride(0), "w_row": work.weight.stride(0)}
    strides["extra_row"] = 0 if work.extra is None else work.extra.stride(0)
    scaled = {"N": columns, "K": inner} | strides
    unit = STRIDE_UNIT if work.aligned else 1
    column = {name: x.data_ptr() for name, x in there.items()} | {"M": rows}
    column |= {name: size // unit for name, size in scaled.items()}
    names = ("x", "bias", "mean", "ln_weight", "ln_bias", "extra", "pre")
    types = (there[name].dtype if name in there else None for name in names)
    flags = (work.gelu_in, work.gelu_out, work.slope, work.tanh, work.transposed)
    return (*types, unit, *flags), column


def _unit(size: int) -> int:
    return STRIDE_UNIT if size % STRIDE_UNIT == 0 else 1


def _blocks(x: Tensor, tile: GemmTile) -> dict[str, Any]:
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": GROUP,
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
