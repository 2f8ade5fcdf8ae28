"""The ops inside a model that is being exported: standard operators, sizes that may be symbols.

While ``torch.export`` traces (for itself, ``torch.onnx`` or AOTInductor) the public ops call these
functions instead of their kernels, so that what comes out runs where fastagglo is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.ops import worklist
from fastagglo.ops.attention_torch import exact, run_lengths
from fastagglo.ops.layout import PackedLayout

__all__ = ["attention", "exporting", "layout_of_runs", "norm_gelu", "norm_gelu_linear"]

Run = tuple[int, int]  # segments, rows of each


def exporting() -> bool:
    """Whether ``torch.export`` is tracing, in this or a surrounding call."""
    return torch.compiler.is_exporting()


def layout_of_runs(runs: Sequence[Run], device: torch.device) -> PackedLayout:
    """The layout of runs of equal segments, made of arithmetic alone.

    Args:
        runs: (segments, rows of each) one after the other; the numbers may be symbols.
        device: where the packed tensors live.
    """
    boundaries, row = [torch.zeros(1, dtype=torch.int32, device=device)], 0
    for count, length in runs:
        ends = torch.arange(1, count + 1, dtype=torch.int32, device=device) * length + row
        boundaries.append(ends)
        row = row + count * length
    edges = torch.cat(boundaries)
    layout = PackedLayout(edges, edges, row, worklist.LONG_TILE, None)
    vars(layout)["runs"] = tuple(runs)
    return layout


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """:func:`fastagglo.ops.packed_attention`: one dense attention per run of equal segments.

    Args:
        q, k, v: (T, H, D).
        layout: which rows belong together; its sizes may be symbols if it is of
            :func:`layout_of_runs`.
        key_bias: (T, H), or None.
        scale: factor on ``q @ k``.

    Returns:
        (T, H, D).
    """
    runs = vars(layout).get("runs")
    if runs is None:
        runs = run_lengths(layout.boundaries)
    wide = exact(q.dtype)
    pieces, row = [], 0
    for count, length in runs:

        def dense(x: Tensor, first: int = row, shape: Run = (count, length)) -> Tensor:
            rows = x.narrow(0, first, shape[0] * shape[1])
            return rows.unflatten(0, shape).transpose(1, 2)

        mask = None if key_bias is None else dense(key_bias)[:, :, None]
        out = F.scaled_dot_product_attention(
            dense(q), dense(k), dense(v), None if mask is None else mask.to(wide), scale=scale
        )
        if mask is not None:  # a segment without a key left is zeros, not NaN
            out = out.masked_fill(torch.isneginf(mask).all(-1, keepdim=True), 0.0)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
        row = row + count * length
    if not pieces:
        return torch.zeros_like(q)
    if "runs" not in vars(layout) and row < layout.capacity:
        pieces.append(q.new_zeros(layout.capacity - row, *q.shape[1:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def norm_gelu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tanh: bool,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm and GELU in at least fp32, rounded once to ``dtype``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    return _gelu(y, tanh).to(dtype)


def norm_gelu_linear(
    x: Tensor,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tanh: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    upsample: int,
) -> Tensor:
    """A step of a head; see ``norm_gelu_linear`` of ``mlp.py``.

    ``norm`` is LayerNorm's (weight, bias, eps), or None where there is none.
    """
    if norm is None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = _gelu(x.to(wide), tanh).to(dtype)
    else:
        x = norm_gelu(x, *norm, tanh, dtype)
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype)).to(out_dtype)
    if residual is not None:
        y = residual.to(out_dtype) + y
    if upsample == 1:
        return y
    cells = y.unflatten(-1, (upsample, upsample, -1)).transpose(-4, -3)
    return cells.flatten(-5, -4).flatten(-3, -2)


def _gelu(x: Tensor, tanh: bool) -> Tensor:
    return F.gelu(x, approximate="tanh" if tanh else "none")
