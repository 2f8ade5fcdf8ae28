"""Packed attention on random inputs: the kernels' results, the truth in fp64, and what may differ.

Every case has NaN in the rows of no segment, of all inputs and of the upstream gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastagglo.kernels import attention as kernel
from fastagglo.kernels.tiles import Tile
from fastagglo.ops.backend import INTERPRETED
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.reference.attention import packed_attention as twin

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter multiplies bfloat16 wrongly.
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
NAN = float("nan")
LOG2E = math.log2(math.e)

# Small blocks: several of them, whole and cut off, at lengths that the interpreter can bear.
SMALL = Tile(16, 16, 1, 1)
WIDE = Tile(16, 32, 2, 2)
TALL = Tile(32, 16, 2, 2)

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of the kernels, and the gradient that arrives at their output.

    q, k, v, grad_out: (T, H, D); key_bias: (T, H) fp32 or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    key_bias: Tensor | None
    layout: PackedLayout
    scale: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("q", "k", "v", "grad_out", "key_bias")}
        return {name: x for name, x in found.items() if x is not None}


def make_case(
    lengths: Sequence[int],
    heads: int = 1,
    width: int = 16,
    *,
    spare: int = 3,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    scale: float | None = None,
    max_segments: int | None = None,
    seed: int = 0,
) -> Case:
    """Normal inputs; a fifth of the biases is -inf; the upstream gradient is twice as large."""
    layout = PackedLayout.from_lengths(
        lengths, sum(lengths) + spare, DEVICE, max_segments=max_segments
    )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(layout.capacity, *shape, generator=generator)
        x[layout.total :] = NAN
        return x

    q, k, v, grad_out = (normal(heads, width).to(DEVICE, dtype) for _ in range(4))
    key_bias = None
    if bias:
        key_bias = normal(heads)
        key_bias[torch.rand(key_bias.shape, generator=generator) < 0.2] = -math.inf
        key_bias = key_bias.to(DEVICE)
    scale = width**-0.5 if scale is None else scale
    return Case(q, k, v, 2 * grad_out, key_bias, layout, scale)


def run_kernel(
    case: Case,
    tile: Tile | tuple[Tile, Tile, Tile] | None = SMALL,
    *,
    fused: bool = False,
    bias_grad: bool = True,
) -> Results:
    """What the launchers give, by name; ``tile``: for forward, dQ and dK/dV, or for all of them."""
    tiles = tile if isinstance(tile, tuple) else (tile,) * 3
    q, k, v, key_bias = case.q, case.k, case.v, case.key_bias
    work = (case.layout.tiles, case.layout.tile_rows)
    out, lse = kernel.forward(q, k, v, key_bias, *work, case.scale, tile=tiles[0])
    grads, grad_bias = kernel.backward(
        *(case.grad_out, q, k, v, key_bias, *work, out, lse, case.scale),
        **{"bias_grad": bias_grad, "fused": fused, "tile_dq": tiles[1], "tile_dkv": tiles[2]},
    )
    rows, heads, width = q.shape
    assert grads.shape == ((rows, 3, heads, width) if fused else (3, rows, heads, width))
    assert out.is_contiguous()
    assert grads.is_contiguous()
    assert out.dtype == grads.dtype == q.dtype
    assert lse.dtype == grad_bias.dtype == torch.float32
    results = {"out": out, "lse": lse.T}
    results |= dict(zip("qkv", grads.unbind(1 if fused else 0), strict=True))
    if bias_grad and key_bias is not None:
        results["key_bias"] = grad_bias.T
    else:
        assert grad_bias.shape == (heads, 0)
    for name, x in results.items():
        assert x.shape[:2] == (rows, heads), name
        assert not x[case.layout.total :].any(), f"{name} of rows of no segment"
    return results


def truth_of(case: Case) -> Results:
    """The twin and its autograd in fp64."""
    leaves = {
        name: x.detach().double().requires_grad_()
        for name, x in case.tensors.items()
        if name != "grad_out"
    }
    q, k, v, key_bias = (leaves.get(name) for name in ("q", "k", "v", "key_bias"))
    out = twin(q, k, v, case.layout, key_bias=key_bias, scale=case.scale)
    if out.grad_fn is None:  # no segments at all
        grads = [torch.zeros_like(x) for x in leaves.values()]
    else:
        grads = torch.autograd.grad(out, list(leaves.values()), case.grad_out.double())
    return {
        "out": out.detach(),
        "lse": _lse(case, torch.float64),
        **dict(zip(leaves, grads, strict=True)),
    }


def _lse(case: Case, dtype: torch.dtype) -> Tensor:
    """(T, H): the log-sum to base 2, zero where there is no key."""
    lse = torch.zeros(case.q.shape[:2], dtype=dtype, device=case.q.device)
    for a, b in pairwise(case.layout.cu_seqlens_cpu.tolist()):
        lse[a:b] = torch.logsumexp(_logits(case, slice(a, b), dtype), dim=2).T * LOG2E
    return lse.masked_fill(lse == -math.inf, 0.0)


def _logits(case: Case, rows: slice, dtype: torch.dtype) -> Tensor:
    """(H, L, L) of one segment."""
    q, k = (x[rows].to(dtype).transpose(0, 1) for x in (case.q, case.k))
    logits = q @ k.transpose(1, 2) * case.scale
    if case.key_bias is not None:
        logits += case.key_bias[rows].to(dtype).T[:, None]
    return logits


def flash_of(case: Case) -> Results:
    """Plain PyTorch in the steps, and with the roundings, of any flash kernel, PyTorch's own too.

    Sums are fp32, and the backward makes the weights again from the log-sum that the forward kept
    in fp32. Tensor cores take operands of the inputs' dtype: the weights, and the gradients of the
    logits, are rounded to it before they are multiplied. (FlashAttention-2, arXiv 2307.08691,
    algorithms 1 and 2.)
    """
    dtype = case.q.dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    results = {name: torch.zeros_like(case.q) for name in ("out", *"qkv")}
    results["lse"] = _lse(case, torch.float32)
    results["key_bias"] = torch.zeros_like(results["lse"])
    for a, b in pairwise(case.layout.cu_seqlens_cpu.tolist()):
        rows = slice(a, b)
        if a == b:
            continue
        q, k, v, upstream = (
            x[rows].float().transpose(0, 1) for x in (case.q, case.k, case.v, case.grad_out)
        )
        logits = _logits(case, rows, torch.float32)
        largest = logits.amax(2, keepdim=True)
        largest = largest.masked_fill(largest == -math.inf, 0.0)
        weights = torch.exp(logits - largest)
        sums = weights.sum(2, keepdim=True)
        sums = sums.masked_fill(sums == 0, 1.0)
        out = (rounded(weights) @ v / sums).to(dtype)
        weights = torch.exp(logits - (largest + sums.log()))
        delta = (upstream * out.float()).sum(2, keepdim=True)
        grad_logits = weights * (upstream @ v.transpose(1, 2) - delta)
        grad_v = rounded(weights).transpose(1, 2) @ upstream
        grad_q = rounded(grad_logits) @ k * case.scale
        grad_k = rounded(grad_logits).transpose(1, 2) @ q * case.scale
        for name, x in zip(("out", *"qkv"), (out, grad_q, grad_k, grad_v), strict=True):
            results[name][rows] = x.transpose(0, 1).to(dtype)
        results["key_bias"][rows] = grad_logits.sum(1).T
    return results


def assert_as_exact_as(plain: Results, actual: Results, truth: Results) -> None:
    """The kernels may be about as wrong as PyTorch is in the same dtype, measured against fp64.

    Three times its largest error: sums have another order, and in a row that looks at one key the
    one rounding of its log-sum decides, in which either may have been lucky. Plus one rounding of
    the largest value: four in fp32, where PyTorch never rescales its sums.
    """
    for name, got in actual.items():
        true = truth[name]
        assert got.isfinite().all(), f"{name} is not finite"
        if true.numel() == 0:
            continue
        error, budget = ((x[name].double() - true).abs().max().item() for x in (actual, plain))
        roundings = 4 if got.dtype == torch.float32 else 1
        budget = 3 * budget + roundings * torch.finfo(got.dtype).eps * true.abs().max().item()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def assert_right(case: Case, results: Results) -> None:
    """What the kernels gave for this case is as exact as the same steps in plain PyTorch."""
    assert_as_exact_as(flash_of(case), results, truth_of(case))


def assert_same(actual: Results, expected: Results, rows: Tensor | slice = slice(None)) -> None:
    """Equal to the last bit, in these rows."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name][rows], expected[name][rows]), name
