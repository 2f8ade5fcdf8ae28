"""Packed attention in PyTorch alone: the backend "torch".

Each run of segments of one length goes through one dense kernel, as a view, without padding or
masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Elements of one (segments, heads, queries, keys) block of logits in the plain path: 64 MB of fp32.
_BLOCK_ELEMENTS = 2**24


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, their log-sum and the bias."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_cpu: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention within segments.

    Args:
        q, k, v: (T, H, D).
        key_bias: (T, H) in the dtype of the logits, or None.
        cu_seqlens_cpu: (segments + 1,) boundaries.
        scale: factor on ``q @ k``.

    Returns:
        The output (T, H, D) and (H, T): the logarithm of the sum of the exponentiated logits, 0
        where a segment has no key left.
    """
    q, k, v = map(_readable, (q, k, v))
    kernel = _flash_forward if q.device.type == "cpu" else _plain_forward

    def attend(run: _Run) -> tuple[Tensor, Tensor]:
        bias = None if key_bias is None else _dense(key_bias, run)
        return kernel(*(_dense(x, run) for x in (q, k, v)), bias, scale)

    rows, heads, _ = q.shape
    runs = list(_runs(cu_seqlens_cpu))
    with torch.autocast(q.device.type, enabled=False):
        if len(runs) == 1 and runs[0][1] * runs[0][2] == rows:
            # One size of image, the one case that needs no copy.
            out, sums = attend(runs[0])
            return (
                out.transpose(1, 2).flatten(0, 1).contiguous(),
                sums.transpose(0, 1).flatten(1).contiguous(),
            )
        out = q.new_empty(q.shape)
        out[int(cu_seqlens_cpu[-1]) :] = 0
        lse = q.new_zeros(heads, rows, dtype=exact(q.dtype))
        for run in runs:
            for x, result in zip((out, lse.T), attend(run), strict=True):
                _dense(x, run).copy_(result)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_cpu: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`.

    Returns:
        Gradients of q, k and v, (3, T, H, D) or, fused, (T, 3, H, D); and that of key_bias, (H, T),
        or (H, 0) if not asked for.
    """
    grad_out, q, k, v = map(_readable, (grad_out, q, k, v))
    # PyTorch's CPU kernel gives no gradient of its mask.
    flash = q.device.type == "cpu" and not bias_grad
    kernel = _flash_backward if flash else _plain_backward
    rows, heads, width = q.shape
    grads = q.new_empty((rows, 3, heads, width) if fused else (3, rows, heads, width))
    grad_bias = lse.new_empty(heads, rows if bias_grad else 0)
    into = [*grads.unbind(1 if fused else 0)]
    if bias_grad:
        into.append(grad_bias.T)
    total = int(cu_seqlens_cpu[-1])
    for x in into:
        x[total:] = 0
    with torch.autocast(q.device.type, enabled=False):
        for run in _runs(cu_seqlens_cpu):
            bias = None if key_bias is None else _dense(key_bias, run)
            tensors = (_dense(x, run) for x in (grad_out, q, k, v, out, lse.T))
            # The plain kernel gives the bias' gradient whether asked for or not.
            for x, result in zip(into, kernel(*tensors, bias, scale), strict=False):
                _dense(x, run).copy_(result)
    return grads, grad_bias


# --- between packed and dense ---------------------------------------------------------------------

_Run = tuple[int, int, int]  # first row, segments, rows of each segment


def _runs(cu_seqlens_cpu: Tensor) -> Iterator[_Run]:
    row = 0
    for count, length in run_lengths(cu_seqlens_cpu.numpy()):
        yield row, count, length
        row += count * length


def run_lengths(boundaries: np.ndarray) -> Iterator[tuple[int, int]]:
    """(segments, rows of each) of neighbouring segments of equal length: one dense batch each.

    Segments without rows are left out. Equal segments that are not neighbours stay apart: from
    about 64 rows on, gathering q, k and v costs more than another kernel call.
    """
    lengths = np.diff(boundaries)
    lengths = lengths[lengths > 0]
    if lengths.size == 0:
        return
    for first, end in pairwise([0, *np.flatnonzero(np.diff(lengths)) + 1, lengths.size]):
        yield int(end - first), int(lengths[first])


def _readable(x: Tensor) -> Tensor:
    """x itself if BLAS can read each head in place, which it does from views of a fused QKV."""
    unit = x.stride(2) == 1 and x.stride(0) >= x.shape[2]
    return x if unit else x.contiguous()


def _dense(x: Tensor, run: _Run) -> Tensor:
    """View the rows of a run, (T, H) or (T, H, D), as (N, H, L) or (N, H, L, D)."""
    row, count, length = run
    return x.narrow(0, row, count * length).unflatten(0, (count, length)).transpose(1, 2)


# --- dense kernels: (N, H, L, D), lse and bias (N, H, L) ------------------------------------------


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    mask = None if bias is None else bias.unsqueeze(2)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=mask, scale=scale
    )


def _flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = None if bias is None else bias.unsqueeze(2)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
    )


def _query_blocks(q: Tensor) -> Iterator[slice]:
    """Blocks of queries whose logits stay within a fixed size: memory is linear in the length."""
    count, heads, length, _ = q.shape
    step = max(1, _BLOCK_ELEMENTS // (count * heads * length))
    return (slice(start, start + step) for start in range(0, length, step))


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = q @ k.transpose(2, 3) * scale
    return logits if bias is None else logits + bias.unsqueeze(2)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = (x.to(exact(dtype)) for x in (q, k, v))
    outs, lses = [], []
    for rows in _query_blocks(q):
        logits = _logits(q[:, :, rows], k, bias, scale)
        lse = torch.logsumexp(logits, dim=-1)
        lse = lse.masked_fill(lse == -math.inf, 0.0)  # no key left: exp(-inf - 0) is the zero asked
        outs.append(torch.exp(logits - lse.unsqueeze(-1)) @ v)
        lses.append(lse)
    return torch.cat(outs, dim=2).to(dtype), torch.cat(lses, dim=2)


def _plain_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = q.dtype
    grad_out, q, k, v, out = (x.to(lse.dtype) for x in (grad_out, q, k, v, out))
    grad_qs = []
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    grad_bias = torch.zeros_like(lse)
    for rows in _query_blocks(q):
        upstream = grad_out[:, :, rows]
        weights = torch.exp(_logits(q[:, :, rows], k, bias, scale) - lse[:, :, rows, None])
        grad_v += weights.transpose(2, 3) @ upstream
        # Backward of softmax: the row's own sum of (weight * gradient) is <upstream, out>.
        own = (upstream * out[:, :, rows]).sum(-1, keepdim=True)
        grad_logits = weights * (upstream @ v.transpose(2, 3) - own)
        grad_qs.append(grad_logits @ k * scale)
        grad_k += grad_logits.transpose(2, 3) @ q[:, :, rows] * scale
        grad_bias += grad_logits.sum(2)
    grads = (torch.cat(grad_qs, dim=2), grad_k, grad_v)
    return *(grad.to(dtype) for grad in grads), grad_bias
