"""Small Triton kernels that the bench is tested on, and functions that launch them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    """c (M, N) = a (M, k) @ b (k, N): one program, one product a trip."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + (start + depth)[None, :])
        right = tl.load(b + (start + depth)[:, None] * N + columns[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty))


@triton.jit
def _flash_step(
    q, top, total, sums, k, v, start, n, D: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr
):
    keys = start + tl.arange(0, C)
    cells = keys[:, None] * D + tl.arange(0, D)[None, :]
    if MASK:
        k_tile = tl.load(k + cells, mask=keys[:, None] < n, other=0.0)
        v_tile = tl.load(v + cells, mask=keys[:, None] < n, other=0.0)
    else:
        k_tile, v_tile = tl.load(k + cells), tl.load(v + cells)
    logits = tl.dot(q, k_tile.T)
    if MASK:
        logits = tl.where(keys[None, :] < n, logits, float("-inf"))
    largest = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - largest[:, None])
    shrink = tl.exp2(top - largest)
    sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums * shrink[:, None])
    return largest, total * shrink + tl.sum(weights, 1), sums


@triton.jit
def flash(q, k, v, out, n, tail, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Attention over n whole keys, then ``tail`` masked ones: two loops with the same products."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    cells = rows[:, None] * D + tl.arange(0, D)[None, :]
    queries = tl.load(q + cells)
    top = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    sums = tl.zeros((R, D), tl.float32)
    for start in range(n, n + tail, C):
        top, total, sums = _flash_step(queries, top, total, sums, k, v, start, n + tail, D, C, True)
    for start in range(0, n, C):
        top, total, sums = _flash_step(queries, top, total, sums, k, v, start, n, D, C, False)
    tl.store(out + cells, (sums / total[:, None]).to(out.dtype.element_ty))


@triton.autotune([triton.Config({"SIZE": size}) for size in (128, 256)], key=["n"])
@triton.jit
def double(x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + at, 2.0 * tl.load(x + at, mask=at < n), mask=at < n)


def run_matmul(m=128, n=64, k=64, *, dtype=torch.bfloat16, precision=None, device="cpu", **options):
    a = torch.empty(m, 1024, dtype=dtype, device=device)
    b = torch.empty(1024, n, dtype=dtype, device=device)
    c = torch.empty(m, n, dtype=dtype, device=device)
    matmul[(1,)](a, b, c, 1024, M=m, N=n, K=k, PRECISION=precision, **options)


def run_flash(d=64, rows=128, columns=64, *, device="meta", **options):
    # On "meta" tensors have a shape and no memory: 32 GB here.
    q, k, v, out = (torch.empty(1 << 26, d, dtype=torch.bfloat16, device=device) for _ in range(4))

    def grid(meta):
        return (triton.cdiv(1 << 26, meta["R"]),)

    flash[grid](q, k, v, out, 1 << 20, 1000, D=d, R=rows, C=columns, **options)


def run_both():
    run_flash(num_warps=4, num_stages=2)
    run_matmul(num_warps=4)
    run_matmul(num_warps=4)


def run_nothing():
    pass


def run_and_fail():
    run_matmul()
    raise ValueError("the reason\nis the last line")


NUMBER = 3
