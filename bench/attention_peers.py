"""The ways to run attention over a mixed batch: ours, and those that a user has today.

Each peer gets the batch as the student's QKV projection leaves it, one packed (T, 3, H, D) matrix,
and gives packed (T, H, D) rows, which the output projection reads, so that all do the same job.
Only "padded-batch" starts and ends with padded rows: a program that pads from its first layer on.
Index tensors, masks and layouts are made before the clock starts: a batch needs them once, not
once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.attention_cases import Case
from bench.engine import Unavailable
from fastagglo.ops import PackedLayout, packed_attention, use_backend


@dataclass(frozen=True)
class Batch:
    """The inputs of a case, the same for all peers.

    Attributes:
        case: what they are for.
        layout: of the packed rows.
        qkv: (T, 3, H, D), a leaf; its gradient is asked for if ``case.backward``.
        upstream: (T, H, D), the gradient of the output.
        bias: (T,) in the dtype of qkv, or None.
    """

    case: Case
    layout: PackedLayout
    qkv: Tensor
    upstream: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """Random inputs: bfloat16 on CUDA, float32 on a CPU. Always the same for a case."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        layout = PackedLayout.from_lengths(case.mix.lengths, device=device)
        random = torch.Generator(device).manual_seed(0)
        shape = (layout.total, 3, case.heads, case.head_dim)
        qkv = torch.randn(shape, generator=random, device=device, dtype=dtype)
        upstream = torch.randn(qkv[:, 0].shape, generator=random, device=device, dtype=dtype)
        bias = None
        if case.bias:  # the logarithm of how many tokens were merged into each
            sizes = torch.randint(1, 5, shape[:1], generator=random, device=device)
            bias = sizes.log().to(dtype)
        return cls(case, layout, qkv.requires_grad_(case.backward), upstream, bias)


@dataclass(frozen=True)
class Run:
    """A peer made ready for a batch.

    Attributes:
        attend: from ``leaf`` to the attention's output.
        leaf: (rows, 3, H, D).
        upstream: (rows, H, D).
        packed: the packed rows among the peer's own, or None if these are they.
        info: nothing.
    """

    attend: Callable[[Tensor], Tensor]
    leaf: Tensor
    upstream: Tensor
    packed: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        return self.leaf.nbytes

    def __call__(self) -> tuple[Tensor, ...]:
        """What is timed: the output, and the gradient of ``leaf`` where it is asked for."""
        out = self.attend(self.leaf)
        if not self.leaf.requires_grad:
            return (out,)
        return (out, *torch.autograd.grad(out, self.leaf, self.upstream))

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients as packed rows, (T, H D) each."""
        results = [x.detach() if self.packed is None else x.detach()[self.packed] for x in self()]
        found = {"output": results[0].flatten(1)}
        if len(results) > 1:
            parts = zip("qkv", results[1].unbind(1), strict=True)
            found |= {f"gradient of {name}": part.flatten(1) for name, part in parts}
        return found


def _as_packed(batch: Batch, attend: Callable[[Tensor], Tensor]) -> Run:
    return Run(attend, batch.qkv, batch.upstream)


def _fastagglo(batch: Batch) -> Run:
    backend = "triton" if batch.qkv.is_cuda else "torch"

    def attend(qkv: Tensor) -> Tensor:
        with use_backend(backend):
            return packed_attention(*qkv.unbind(1), batch.layout, key_bias=batch.bias)

    return _as_packed(batch, attend)


def _sdpa_over(batch: Batch, stretches: list[tuple[int, int]]) -> Run:
    """SDPA for each stretch of equal segments, as one dense batch."""
    sizes = [segments * rows for segments, rows in stretches]
    masks: list[Tensor | None] = [None] * len(stretches)
    if batch.bias is not None:
        pieces = zip(batch.bias.split(sizes), stretches, strict=True)
        masks = [piece.view(segments, 1, 1, rows) for piece, (segments, rows) in pieces]

    def attend(qkv: Tensor) -> Tensor:
        outs = []
        for piece, (segments, rows), mask in zip(qkv.split(sizes), stretches, masks, strict=True):
            dense = piece.unflatten(0, (segments, rows)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(*dense.unbind(0), attn_mask=mask)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return _as_packed(batch, attend)


def _per_resolution(batch: Batch) -> Run:
    return _sdpa_over(batch, batch.case.mix.dense)


def _per_image(batch: Batch) -> Run:
    return _sdpa_over(batch, batch.case.mix.by_image)


def _padding(batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The padded row of each packed row, and attention from padded rows to padded rows."""
    lengths = torch.tensor(batch.layout.lengths, device=batch.qkv.device)
    count, longest = len(lengths), batch.layout.max_length
    valid = torch.arange(longest, device=lengths.device) < lengths[:, None]
    rows = valid.flatten().nonzero().squeeze(1)
    if batch.bias is None:
        mask = valid  # a key mask, (N, 1, 1, L): nothing of size L x L
    else:
        mask = batch.bias.new_full((count * longest,), -torch.inf)
        mask = mask.index_copy(0, rows, batch.bias).view(count, longest)
    mask = mask[:, None, None]

    def attend(padded: Tensor) -> Tensor:
        dense = padded.unflatten(0, (count, longest)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*dense.unbind(0), attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)

    return rows, attend


def _padded(batch: Batch) -> Run:
    rows, inner = _padding(batch)
    total = batch.layout.num_segments * batch.layout.max_length

    def attend(qkv: Tensor) -> Tensor:
        padded = qkv.new_zeros(total, *qkv.shape[1:]).index_copy_(0, rows, qkv)  # in place: no copy
        return inner(padded).index_select(0, rows)

    return _as_packed(batch, attend)


def _padded_batch(batch: Batch) -> Run:
    rows, attend = _padding(batch)
    total = batch.layout.num_segments * batch.layout.max_length
    leaf, upstream = (
        x.new_zeros(total, *x.shape[1:]).index_copy(0, rows, x)
        for x in (batch.qkv.detach(), batch.upstream)
    )
    return Run(attend, leaf.requires_grad_(batch.case.backward), upstream, rows)


def _flex(batch: Batch) -> Run:
    if batch.case.backward and not batch.qkv.is_cuda:
        raise Unavailable("FlexAttention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment, bias, rows = batch.layout.segment_ids, batch.bias, batch.layout.total

    def same_segment(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return segment[i] == segment[j]

    def with_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[j]

    # Compiled on CUDA: eager, it forms the whole rows x rows mask in integers.
    make = torch.compile(create_block_mask) if batch.qkv.is_cuda else create_block_mask
    mask = make(same_segment, None, None, rows, rows, device=batch.qkv.device.type)
    flex = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.transpose(0, 2).unsqueeze(0).unbind(2)
        score_mod = None if bias is None else with_bias
        return flex(q, k, v, score_mod=score_mod, block_mask=mask)[0].transpose(0, 1)

    return _as_packed(batch, attend)


def _needs_cuda(batch: Batch, who: str) -> None:
    if not batch.qkv.is_cuda:
        raise Unavailable(f"{who} needs CUDA")


def _by(backend: str) -> Callable[[Batch], Run]:
    """SDPA looped per resolution, by one of its backends."""

    def prepare(batch: Batch) -> Run:
        _needs_cuda(batch, f"SDPA's {backend.lower().replace('_', ' ')}")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        run, chosen = _per_resolution(batch), SDPBackend.__members__[backend]

        def attend(qkv: Tensor) -> Tensor:
            with sdpa_kernel(chosen):
                return run.attend(qkv)

        return replace(run, attend=attend)

    return prepare


def _varlen(batch: Batch) -> Run:
    _needs_cuda(batch, "varlen_attn")
    from torch.nn.attention.varlen import varlen_attn

    boundaries, longest = batch.layout.cu_seqlens, batch.layout.max_length

    def attend(qkv: Tensor) -> Tensor:
        return varlen_attn(*qkv.unbind(1), boundaries, boundaries, longest, longest)

    return _as_packed(batch, attend)


def _xformers(batch: Batch) -> Run:
    _needs_cuda(batch, "xformers' attention")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise Unavailable("xformers is not installed: pip install xformers") from None
    mask = batch.layout.to_xformers()

    def attend(qkv: Tensor) -> Tensor:
        return memory_efficient_attention(*qkv.unsqueeze(0).unbind(2), attn_bias=mask)[0]

    return _as_packed(batch, attend)


def _flag_gems(batch: Batch) -> Run:
    _needs_cuda(batch, "flag-gems' attention")
    if batch.case.backward:
        raise Unavailable("flag-gems' packed attention has no backward")
    try:
        from flag_gems.ops.attention import flash_attn_varlen_func
    except ImportError:
        raise Unavailable("flag-gems is not installed: pip install flag-gems") from None
    boundaries, longest = batch.layout.cu_seqlens, batch.layout.max_length

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_q=longest,
            cu_seqlens_q=boundaries,
            max_seqlen_k=longest,
            cu_seqlens_k=boundaries,
        )

    return _as_packed(batch, attend)


PEERS: dict[str, tuple[str, Callable[[Batch], Run]]] = {
    "fastagglo": ("fastagglo", _fastagglo),
    "per-resolution": ("SDPA looped per resolution", _per_resolution),
    "per-image": ("SDPA looped per image", _per_image),
    "padded": ("SDPA padded and masked", _padded),
    "padded-batch": ("SDPA masked, all padded throughout", _padded_batch),
    "flex": ("FlexAttention, document mask", _flex),
    "flash": ("SDPA per resolution, flash", _by("FLASH_ATTENTION")),
    "efficient": ("SDPA per resolution, efficient", _by("EFFICIENT_ATTENTION")),
    "cudnn": ("SDPA per resolution, cuDNN", _by("CUDNN_ATTENTION")),
    "varlen": ("torch varlen_attn", _varlen),
    "xformers": ("xformers BlockDiagonalMask", _xformers),
    "flag-gems": ("flag-gems flash_attn_varlen_func", _flag_gems),
}
"""By name: what it is in words, and what makes it ready for a batch."""
