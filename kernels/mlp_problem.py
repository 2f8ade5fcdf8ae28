"""What the kernels of the adaptor heads are told of a product, and what is checked of it first.

Launchers are in mlp.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastagglo.kernels.merge_move import STRIDE_UNIT
from fastagglo.kernels.mlp_pointwise import check_matrices, check_vectors


class Cells(NamedTuple):
    """A pixel shuffle: channels (cell row, cell column, C) of (grid row, grid column) tokens stand
    as rows of C channels, (grid row, cell row, grid column, cell column).

    Attributes:
        upsample: cells of a token on a side.
        width: tokens in a row of the grid, which divides the number of tokens.
    """

    upsample: int
    width: int

    @property
    def each(self) -> int:
        """Cells of a token."""
        return self.upsample**2


PLAIN = Cells(1, 1)


class Norm(NamedTuple):
    """A LayerNorm whose statistics are known.

    Attributes:
        mean, rstd: (M,) float32, as from :func:`row_statistics`.
        weight, bias: (K,) contiguous, of any of the dtypes, or None.
    """

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """Arguments of :func:`linear`.

    Attributes:
        x: (M, K). weight: (N, K). residual: (M, N), or None. All with unit last strides and of one
            dtype, bfloat16, float16 or float32.
        bias: (N,) contiguous, of any of these dtypes, or None.
        norm: LayerNorm of x, a tuple as :class:`Norm`, or None.
        gelu_in: GELU after that. gelu_out: GELU of the product with its bias.
        tanh: GELU's tanh form, for both.
        keep_pre: return what comes before ``gelu_out``, too.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
    gelu_in: bool = False
    gelu_out: bool = False
    residual: Tensor | None = None
    tanh: bool = False
    keep_pre: bool = False


@dataclass(frozen=True, eq=False)
class Work:
    """What a kernel is told of a product: the problem, or that of an input's gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: Norm | None
    extra: Tensor | None
    out: Tensor
    pre: Tensor | None
    gelu_in: bool
    gelu_out: bool
    slope: bool
    tanh: bool
    transposed: bool
    cells: Cells = PLAIN  # of out, or of x where not transposed

    @property
    def sizes(self) -> tuple[int, int, int]:
        if self.transposed:
            return self.x.shape[0], *self.weight.shape
        return self.out.shape[0], *self.weight.shape[::-1]

    @property
    def spans(self) -> tuple[int, int]:
        """Columns and inner size of what is not interrupted by a shuffle."""
        _, columns, inner = self.sizes
        if self.transposed:
            return columns // self.cells.upsample, inner
        return columns, inner // self.cells.upsample

    @property
    def prologue(self) -> bool:
        return self.norm is not None or self.gelu_in

    @property
    def aligned(self) -> bool:
        matrices = [x for x in (self.x, self.weight, self.extra) if x is not None]
        vectors = [self.bias, *(self.norm[2:] if self.norm else ())]
        # A shuffled x has rows of a span.
        first = 0 if self.transposed or self.cells.upsample == 1 else 1
        return aligned_rows(
            (*self.spans, *(x.stride(0) for x in matrices[first:])),
            (*matrices, *(x for x in vectors if x is not None)),
        )


# --- checks ---------------------------------------------------------------------------------------


def forward_work(problem: Problem, cells: Cells = PLAIN) -> Work:
    x, weight, residual = problem.x, problem.weight, problem.residual
    tensors = {"x": x, "weight": weight}
    if residual is not None:
        tensors["residual"] = residual
    check_matrices(**tensors)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be (N, {x.shape[1]}) for x of shape {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    shape = (x.shape[0], weight.shape[0])
    _check_like(x, shape, weight=weight, residual=residual)
    check_vectors(weight.shape[0], bias=problem.bias)
    if shape[1] % cells.each:
        raise ValueError(f"weight must have a multiple of {cells.each} rows, got {shape[1]}")
    out = x.new_empty(shape[0] * cells.each, shape[1] // cells.each)
    check_cells(cells, shape[0], out)
    return Work(
        x=x,
        weight=weight,
        bias=problem.bias,
        norm=checked_norm(problem.norm, x),
        extra=residual,
        out=out,
        pre=x.new_empty(shape) if problem.keep_pre else None,
        gelu_in=problem.gelu_in,
        gelu_out=problem.gelu_out,
        slope=False,
        tanh=problem.tanh,
        transposed=True,
        cells=cells,
    )


def grad_work(
    grad_y: Tensor,
    weight: Tensor,
    gelu_of: Tensor | None,
    tanh: bool,
    cells: Cells = PLAIN,
) -> Work:
    tensors = {"grad_y": grad_y, "weight": weight}
    if gelu_of is not None:
        tensors["gelu_of"] = gelu_of
    check_matrices(**tensors)
    columns = grad_y.shape[1] * cells.each
    if weight.shape[0] != columns:
        raise ValueError(
            f"weight must be ({columns}, K) for grad_y of shape {tuple(grad_y.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    shape = (grad_y.shape[0] // cells.each, weight.shape[1])
    check_cells(cells, shape[0], grad_y)
    _check_like(grad_y, shape, weight=weight, gelu_of=gelu_of)
    return Work(
        x=grad_y,
        weight=weight,
        bias=None,
        norm=None,
        extra=gelu_of,
        out=grad_y.new_empty(shape),
        pre=None,
        gelu_in=False,
        gelu_out=False,
        slope=True,
        tanh=tanh,
        transposed=False,
        cells=cells,
    )


def _check_like(x: Tensor, shape: tuple[int, int], weight: Tensor, **other: Tensor | None) -> None:
    for name, y in {"weight": weight, **other}.items():
        if y is None:
            continue
        if y.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype {x.dtype} of the input, got {y.dtype}")
        if name != "weight" and tuple(y.shape) != shape:
            raise ValueError(f"{name} must be of the result's shape {shape}, got {tuple(y.shape)}")


def check_cells(cells: Cells, tokens: int, shuffled: Tensor) -> None:
    if cells.upsample == 1:
        return
    if cells.upsample < 1 or cells.width < 1 or tokens % cells.width:
        raise ValueError(f"cells: rows of {cells.width} tokens do not make up {tokens}")
    if not shuffled.is_contiguous() or len(shuffled) != tokens * cells.each:
        raise ValueError(
            f"cells: grad_y must be contiguous with {cells.each} rows for each token, got shape "
            f"{tuple(shuffled.shape)} and strides {shuffled.stride()}"
        )


def checked_norm(norm: tuple | None, x: Tensor) -> Norm | None:
    if norm is None:
        return None
    norm = Norm(*norm)
    check_vectors(x.shape[0], mean=norm.mean, rstd=norm.rstd)
    check_vectors(x.shape[1], norm_weight=norm.weight, norm_bias=norm.bias)
    return norm


def aligned_rows(sizes: Iterable[int], tensors: Iterable[Tensor]) -> bool:
    """Whether rows of these sizes and strides begin at 16 bytes, for every dtype."""
    return all(size % STRIDE_UNIT == 0 for size in sizes) and all(
        x.data_ptr() % 16 == 0 for x in tensors
    )
