"""Attention over packed images of any mix of sizes: public function, operators, CPU path.

The road of a call: :func:`packed_attention` checks and picks a backend; ``_PackedAttention`` is its
gradient; ``fastagglo::packed_attention_fwd`` and ``_bwd`` are what a compiler sees; below them each
run of segments of one length goes through one dense kernel, as a view, without padding or masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastagglo.errors import require
from fastagglo.ops.autocast import autocast_enabled
from fastagglo.ops.backend import resolve
from fastagglo.ops.layout import PackedLayout

_BACKENDS = ("torch", "xformers")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Elements of one (segments, heads, queries, keys) block of logits in the plain path: 64 MB of fp32.
_BLOCK_ELEMENTS = 2**24


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each token over the tokens of its own segment.

    For the rows ``a:b`` of each segment, with ``d(x) = x[a:b].transpose(0, 1)``, this is::

        out[a:b] = F.scaled_dot_product_attention(
            d(q), d(k), d(v), attn_mask=d(key_bias)[:, None], scale=scale
        ).transpose(0, 1)

    Nothing of size ``T x T`` is formed. Memory beyond the output is one number per token and head.
    Packing follows NaViT (arXiv 2307.06304), the kernels FlashAttention (arXiv 2205.14135), and
    ``key_bias`` is the proportional attention of ToMe (arXiv 2210.09461) when it is the logarithm
    of the merged tokens' sizes.

    Args:
        q, k, v: ``(T, H, D)`` with ``T == layout.capacity``, float64, float32, bfloat16 or float16,
            all of one dtype and device. Any strides; views of a fused ``(T, 3, H, D)`` projection
            are read in place. Under autocast they are cast to its dtype, as by PyTorch's own
            attention.
        layout: which rows belong together. Rows from ``layout.total`` on belong to no segment: they
            may hold anything, NaN too, come out as zeros and get zero gradients.
        key_bias: ``(T,)`` or ``(T, H)``, any of the dtypes above, added to the logits of each key,
            in float32 (float64 for float64 ``q``). ``-inf`` removes a key, whose ``k`` and ``v``
            must still be finite. Where a whole segment is removed, its rows come out as zeros with
            zero gradients.
        scale: factor on ``q @ k``; default ``D ** -0.5``.

    Returns:
        ``(T, H, D)``, contiguous, in the dtype of ``q`` (autocast's under autocast).

    Differentiable once in ``q``, ``k``, ``v`` and ``key_bias``. Two runs on a CPU are bit-equal.
    The backend ``"xformers"`` (CUDA alone) takes no ``key_bias``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes, devices or dtypes that do not fit each other, or a backend that cannot
            run this call.
        UserError: the backend ``"xformers"`` was asked for and is not installed.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not isinstance(layout, PackedLayout):
        raise TypeError(
            "layout must be a PackedLayout, from PackedLayout.from_lengths; got "
            f"{type(layout).__name__}"
        )
    if autocast_enabled(q.device):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    _check(q, k, v, layout, key_bias)
    if scale is None:
        scale = q.shape[2] ** -0.5
    elif not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")

    if resolve("packed_attention", q.device, _BACKENDS) == "xformers":
        if key_bias is not None:
            raise ValueError(
                "packed_attention: the backend 'xformers' has no per-key bias; leave key_bias out "
                "or use the backend 'torch'"
            )
        return _xformers(q, k, v, layout, float(scale))
    if key_bias is not None:
        key_bias = key_bias.to(_exact(q.dtype))
        if key_bias.dim() == 1:
            key_bias = key_bias[:, None].expand(-1, q.shape[1])
    # torch.compile takes no tensor twice, and attention of x over itself is a fair thing to ask.
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)
    return _PackedAttention.apply(q, k, v, key_bias, layout.cu_seqlens_cpu, float(scale))


def _check(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, key_bias: Tensor | None) -> None:
    if q.dim() != 3 or q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q must be (tokens, heads, head dim), got shape {tuple(q.shape)}")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be float64, float32, bfloat16 or float16, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if q.shape[0] != layout.capacity:
        raise ValueError(
            f"q has {q.shape[0]} tokens, but the layout has a capacity of {layout.capacity}"
        )
    if q.device != layout.device:
        raise ValueError(
            f"layout must be on the device of q, {q.device}, got {layout.device}; "
            f"use layout.to({str(q.device)!r})"
        )
    if key_bias is None:
        return
    if not isinstance(key_bias, Tensor):
        raise TypeError(f"key_bias must be a tensor or None, got {type(key_bias).__name__}")
    if key_bias.dtype not in _DTYPES:
        raise TypeError(
            f"key_bias must be float64, float32, bfloat16 or float16, got {key_bias.dtype}"
        )
    if key_bias.shape not in (q.shape[:1], q.shape[:2]):
        raise ValueError(
            f"key_bias must be (tokens,) or (tokens, heads), {tuple(q.shape[:1])} or "
            f"{tuple(q.shape[:2])}, got {tuple(key_bias.shape)}"
        )
    if key_bias.device != q.device:
        raise ValueError(f"key_bias must be on the device of q, {q.device}, got {key_bias.device}")


class _PackedAttention(torch.autograd.Function):
    """Saves one log-sum per token and head, and makes the weights again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        cu_seqlens_cpu: Tensor,
        scale: float,
    ) -> Tensor:
        out, lse = torch.ops.fastagglo.packed_attention_fwd(
            q, k, v, key_bias, cu_seqlens_cpu, scale
        )
        ctx.save_for_backward(q, k, v, key_bias, cu_seqlens_cpu, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_bias, cu_seqlens_cpu, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        grads = torch.ops.fastagglo.packed_attention_bwd(
            grad_out, q, k, v, key_bias, cu_seqlens_cpu, out, lse, ctx.scale, needed[3]
        )
        asked = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        return *asked, None, None


# --- the operators --------------------------------------------------------------------------------

_library = torch.library.Library("fastagglo", "FRAGMENT")
# The boundaries are a tensor, so that one compiled graph serves every mix, and on the CPU, so that
# the loop over them never waits for a device. lse is (T, H), 0 where a segment has no key left.
# grad_key_bias is (T, H), or (0, H) when not asked for.
_library.define(
    "packed_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, "
    "Tensor cu_seqlens_cpu, float scale) -> (Tensor out, Tensor lse)"
)
_library.define(
    "packed_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? key_bias, "
    "Tensor cu_seqlens_cpu, Tensor out, Tensor lse, float scale, "
    "bool bias_grad) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_key_bias)"
)


@torch.library.register_fake("fastagglo::packed_attention_fwd")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_cpu: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_exact(q.dtype))


@torch.library.register_fake("fastagglo::packed_attention_bwd")
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [q.new_empty(q.shape) for _ in range(3)]
    return *grads, lse.new_empty(lse.shape if bias_grad else (0, q.shape[1]))


@torch.library.impl(_library, "packed_attention_fwd", "CompositeExplicitAutograd")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_cpu: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = map(_readable, (q, k, v))
    kernel = _flash_forward if q.device.type == "cpu" else _plain_forward
    outs, lses = [], []
    with torch.autocast(q.device.type, enabled=False):
        for run in _runs(cu_seqlens_cpu):
            bias = None if key_bias is None else _dense(key_bias, run)
            out, lse = kernel(*(_dense(x, run) for x in (q, k, v)), bias, scale)
            outs.append(_packed(out))
            lses.append(_packed(lse))
    exact = _exact(q.dtype)
    return _join(outs, q.shape, q), _join(lses, q.shape[:2], q.new_empty(0, dtype=exact))


@torch.library.impl(_library, "packed_attention_bwd", "CompositeExplicitAutograd")
def _backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out, q, k, v = map(_readable, (grad_out, q, k, v))
    # PyTorch's CPU kernel gives no gradient of its mask.
    flash = q.device.type == "cpu" and not bias_grad
    kernel = _flash_backward if flash else _plain_backward
    pieces: list[tuple[Tensor, ...]] = []
    with torch.autocast(q.device.type, enabled=False):
        for run in _runs(cu_seqlens_cpu):
            bias = None if key_bias is None else _dense(key_bias, run)
            tensors = (_dense(x, run) for x in (grad_out, q, k, v, out, lse))
            pieces.append(tuple(map(_packed, kernel(*tensors, bias, scale))))
    columns = [list(column) for column in zip(*pieces, strict=True)] or [[], [], [], []]
    grads = [_join(column, q.shape, q) for column in columns[:3]]
    grad_bias = _join(columns[3], q.shape[:2], lse) if bias_grad else lse.new_empty(0, q.shape[1])
    return *grads, grad_bias


# --- between packed and dense ---------------------------------------------------------------------

_Run = tuple[int, int, int]  # first row, segments, rows of each segment


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, their log-sum and the bias."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _runs(cu_seqlens_cpu: Tensor) -> Iterator[_Run]:
    """Neighbouring segments of equal length, taken together: one dense batch each.

    Equal segments that are not neighbours stay apart: from about 64 rows on, gathering q, k and v
    costs more than another kernel call.
    """
    lengths = np.diff(cu_seqlens_cpu.numpy())
    lengths = lengths[lengths > 0]
    if lengths.size == 0:
        return
    row = 0
    for first, end in pairwise([0, *np.flatnonzero(np.diff(lengths)) + 1, lengths.size]):
        count, length = int(end - first), int(lengths[first])
        yield row, count, length
        row += count * length


def _readable(x: Tensor) -> Tensor:
    """x itself if BLAS can read each head in place, which it does from views of a fused QKV."""
    unit = x.stride(2) == 1 and x.stride(0) >= x.shape[2]
    return x if unit else x.contiguous()


def _dense(x: Tensor, run: _Run) -> Tensor:
    """View the rows of a run, (T, H) or (T, H, D), as (N, H, L) or (N, H, L, D)."""
    row, count, length = run
    return x.narrow(0, row, count * length).unflatten(0, (count, length)).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """The inverse of _dense."""
    return x.transpose(1, 2).flatten(0, 1)


def _join(pieces: list[Tensor], shape: torch.Size, like: Tensor) -> Tensor:
    """Put the runs one after the other, and zeros in the rows behind them."""
    padding = shape[0] - sum(piece.shape[0] for piece in pieces)
    if padding or not pieces:
        pieces = [*pieces, like.new_zeros(padding, *shape[1:])]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)


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
    q, k, v = (x.to(_exact(dtype)) for x in (q, k, v))
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


# --- xformers -------------------------------------------------------------------------------------


def _xformers(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    ops = require("xformers.ops", extra="xformers", purpose="the attention backend 'xformers'")
    if layout.total == 0:
        return torch.zeros_like(q)
    q, k, v = (x[: layout.total].unsqueeze(0) for x in (q, k, v))
    out = ops.memory_efficient_attention(q, k, v, attn_bias=layout.to_xformers(), scale=scale)[0]
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, layout.capacity - layout.total))
