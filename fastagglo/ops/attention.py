"""Attention over packed images of any mix of sizes: public functions and operators.

The road of a call: :func:`packed_attention` checks and picks a backend; ``_PackedAttention`` is its
gradient; ``fastagglo::packed_attention_fwd`` and ``_bwd`` are what a compiler sees; below them lie
the Triton kernels of ``kernels/attention.py`` and the PyTorch path of ``attention_torch.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastagglo.errors import require
from fastagglo.kernels import attention as kernel
from fastagglo.kernels.tiles import OLDEST_ARCH, capability
from fastagglo.ops import attention_torch
from fastagglo.ops.autocast import autocast_enabled
from fastagglo.ops.backend import resolve
from fastagglo.ops.exporting import attention as exported_attention
from fastagglo.ops.exporting import exporting
from fastagglo.ops.layout import PackedLayout

_BACKENDS = ("torch", "triton", "xformers")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

    Differentiable once in ``q``, ``k``, ``v`` and ``key_bias``. Two runs are bit-equal on the
    backends ``"torch"`` on a CPU and ``"triton"``. The latter, the default on CUDA, takes bfloat16,
    float16 and float32 and head dims of 16, 24, ..., 128; what it does not take runs on
    ``"torch"``, unless it was asked for by name. float32 is multiplied in full, or in TF32 where
    ``torch.backends.cuda.matmul.fp32_precision`` says so. ``"xformers"`` (CUDA alone) takes no
    ``key_bias``. Where q, k and v are views of one projection, :func:`packed_attention_qkv` saves
    the backward a copy.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: shapes, devices or dtypes that do not fit each other, or a backend that cannot
            run this call.
        UserError: the backend ``"xformers"`` was asked for and is not installed.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    # torch.compile takes no tensor twice, and attention of x over itself is a fair thing to ask.
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)
    return _attend((q, k, v), layout, key_bias, scale)


def packed_attention_qkv(
    qkv: Tensor,
    layout: PackedLayout,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`packed_attention` of one fused projection.

    The same as ``packed_attention(*qkv.unbind(1), layout, ...)``, but the backward writes one fused
    gradient, where autograd would stack three.

    Args:
        qkv: ``(T, 3, H, D)``: queries, keys and values of each token.
        layout, key_bias, scale: as in :func:`packed_attention`, whose errors are the same too.

    Returns:
        ``(T, H, D)``.
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a tensor, got {type(qkv).__name__}")
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (tokens, 3, heads, head dim), got shape {tuple(qkv.shape)}")
    return _attend((qkv,), layout, key_bias, scale)


def _attend(
    qkv: tuple[Tensor, ...], layout: PackedLayout, key_bias: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of (q, k, v), or of a single fused tensor."""
    if not isinstance(layout, PackedLayout):
        raise TypeError(
            "layout must be a PackedLayout, from PackedLayout.from_lengths; got "
            f"{type(layout).__name__}"
        )
    if autocast_enabled(qkv[0].device):
        dtype = torch.get_autocast_dtype(qkv[0].device.type)
        qkv = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in qkv)
    q, k, v = _three(qkv)
    _check(q, k, v, layout, key_bias)
    if scale is None:
        scale = q.shape[2] ** -0.5
    elif not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")

    if exporting():
        if key_bias is not None and key_bias.dim() == 1:
            key_bias = key_bias[:, None].expand(-1, q.shape[1])
        return exported_attention(q, k, v, layout, key_bias, float(scale))
    backend = resolve("packed_attention", q.device, _BACKENDS, {"triton": _why_not_triton(q)})
    if backend == "xformers":
        if key_bias is not None:
            raise ValueError(
                "packed_attention: the backend 'xformers' has no per-key bias; leave key_bias out "
                "or use the backend 'triton' or 'torch'"
            )
        return _xformers(q, k, v, layout, float(scale))
    if key_bias is not None:
        key_bias = key_bias.to(attention_torch.exact(q.dtype))
        if key_bias.dim() == 1:
            key_bias = key_bias[:, None].expand(-1, q.shape[1])
    if backend == "triton":
        segments, tile_rows = layout.tiles, layout.tile_rows
    else:
        segments, tile_rows = layout.cu_seqlens_cpu, 0
    return _PackedAttention.apply(key_bias, segments, tile_rows, float(scale), *qkv)


def _why_not_triton(q: Tensor) -> str | None:
    """What keeps the kernels from a call that is otherwise fine."""
    if not kernel.supports(q.dtype, q.shape[2]):
        return (
            "its kernels take bfloat16, float16 and float32 and head dims of 16, 24, ..., 128, got "
            f"{q.dtype} and {q.shape[2]}"
        )
    if q.is_cuda and capability(q.device.index) < OLDEST_ARCH:
        return f"its kernels need a GPU of compute capability {OLDEST_ARCH / 10} or later"
    return None


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
    """Saves one log-sum per token and head, and makes the weights again in the backward.

    Takes q, k and v as three tensors or as one of (T, 3, H, D), and gives as many gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        key_bias: Tensor | None,
        segments: Tensor,
        tile_rows: int,
        scale: float,
        *qkv: Tensor,
    ) -> Tensor:
        q, k, v = _three(qkv)
        out, lse = torch.ops.fastagglo.packed_attention_fwd(
            q, k, v, key_bias, segments, tile_rows, scale
        )
        ctx.save_for_backward(key_bias, segments, out, lse, *qkv)
        ctx.tile_rows, ctx.scale = tile_rows, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        key_bias, segments, out, lse, *qkv = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[0]
        fused = len(qkv) == 1
        grads, grad_bias = torch.ops.fastagglo.packed_attention_bwd(
            grad_out,
            *_three(qkv),
            key_bias,
            segments,
            ctx.tile_rows,
            out,
            lse,
            ctx.scale,
            bias_grad,
            fused,
        )
        split = (grads,) if fused else grads.unbind(0)
        asked = zip(split, ctx.needs_input_grad[4:], strict=True)
        return (
            grad_bias.T if bias_grad else None,
            *(None, None, None),
            *(grad if need else None for grad, need in asked),
        )


def _three(qkv: Sequence[Tensor]) -> Sequence[Tensor]:
    return qkv[0].unbind(1) if len(qkv) == 1 else qkv


# --- the operators --------------------------------------------------------------------------------

_library = torch.library.Library("fastagglo", "FRAGMENT")
# segments is a tensor, so that one compiled graph serves every mix. With tile_rows 0 it holds the
# boundaries, on the CPU, so that the loop over them never waits for a device; else it is the work
# list of the Triton kernels, on the device, so that a CUDA graph can hold the launch.
# lse is (H, T), in whatever form the same backend's backward reads it. grads is (3, T, H, D), or
# (T, 3, H, D) if fused; grad_key_bias is (H, T), or (H, 0) when not asked for.
_library.define(
    "packed_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor segments, "
    "int tile_rows, float scale) -> (Tensor out, Tensor lse)"
)
_library.define(
    "packed_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? key_bias, "
    "Tensor segments, int tile_rows, Tensor out, Tensor lse, float scale, bool bias_grad, "
    "bool fused) -> (Tensor grads, Tensor grad_key_bias)"
)


@torch.library.register_fake("fastagglo::packed_attention_fwd")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    segments: Tensor,
    tile_rows: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, rows), dtype=attention_torch.exact(q.dtype))


@torch.library.register_fake("fastagglo::packed_attention_bwd")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    segments: Tensor,
    tile_rows: int,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    rows, heads, width = q.shape
    shape = (rows, 3, heads, width) if fused else (3, rows, heads, width)
    return q.new_empty(shape), lse.new_empty((heads, rows if bias_grad else 0))


@torch.library.impl(_library, "packed_attention_fwd", "CompositeExplicitAutograd")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    segments: Tensor,
    tile_rows: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if tile_rows == 0:
        _refuse_capture(q)
        return attention_torch.forward(q, k, v, key_bias, segments, scale)
    q, k, v = map(_readable, (q, k, v))
    return kernel.forward(q, k, v, key_bias, segments, tile_rows, scale)


@torch.library.impl(_library, "packed_attention_bwd", "CompositeExplicitAutograd")
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    segments: Tensor,
    tile_rows: int,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    if tile_rows == 0:
        _refuse_capture(q)
        return attention_torch.backward(
            grad_out, q, k, v, key_bias, segments, out, lse, scale, bias_grad, fused
        )
    q, k, v = map(_readable, (q, k, v))
    grad_out = _readable(grad_out.contiguous())
    return kernel.backward(
        *(grad_out, q, k, v, key_bias, segments, tile_rows, out, lse, scale),
        bias_grad=bias_grad,
        fused=fused,
    )


def _refuse_capture(q: Tensor) -> None:
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        hint = _why_not_triton(q) or "use the backend 'triton'"
        raise RuntimeError(
            "packed_attention: the backend 'torch' reads the layout on the host, and a CUDA graph "
            f"would keep this one for ever; {hint}"
        )


def _readable(x: Tensor) -> Tensor:
    """x itself if the kernels can read it in place, as they do a view of a fused projection."""
    if kernel.readable(x):
        return x
    x = x.contiguous()
    return x if kernel.readable(x) else x.clone()  # a contiguous view at an odd address


# --- xformers -------------------------------------------------------------------------------------


def _xformers(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    ops = require("xformers.ops", extra="xformers", purpose="the attention backend 'xformers'")
    if layout.total == 0:
        return torch.zeros_like(q)
    q, k, v = (x[: layout.total].unsqueeze(0) for x in (q, k, v))
    out = ops.memory_efficient_attention(q, k, v, attn_bias=layout.to_xformers(), scale=scale)[0]
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, layout.capacity - layout.total))
