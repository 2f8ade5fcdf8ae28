"""Values and gradients of packed attention: head dims, dtypes, blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from packed_cases import (
    DTYPES,
    SMALL,
    TALL,
    WIDE,
    Case,
    Results,
    assert_as_exact_as,
    assert_right,
    make_case,
    run_kernel,
    truth_of,
)

from fastagglo.kernels import attention as kernel
from fastagglo.kernels.tiles import Tile


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", range(16, 129, 8))
def test_every_head_dim(width, dtype):
    """With a whole block, one that is cut off, no rows, and one row."""
    heads = 3 if width in (24, 64) else 1
    bias = (width % 16 == 0) == (dtype == torch.float32)
    case = make_case([19, 1, 0, 32], heads, width, dtype=dtype, bias=bias)
    assert_right(case, run_kernel(case, TALL, fused=width % 3 == 0))


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("width", [40, 128])
def test_variants_of_the_generations(width, arch, monkeypatch):
    """Pieces of heads and the way in which row sums are kept differ."""
    monkeypatch.setattr(kernel, "arch_of", lambda x: arch)
    case = make_case([19, 1, 0, 32], width=width)
    assert_right(case, run_kernel(case, TALL))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "tiles",
    [
        (SMALL, WIDE, TALL),
        (WIDE, TALL, SMALL),
        (TALL, SMALL, WIDE),
        (Tile(64, 16, 4, 1), Tile(16, 64, 4, 1), Tile(64, 64, 4, 1)),
    ],
    ids=str,
)
def test_lengths_around_the_blocks(tiles, bias):
    case = make_case([15, 33, 16, 2], bias=bias)
    assert case.layout.tile_rows == 64
    assert_right(case, run_kernel(case, tiles))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tiles",
    [
        (Tile(128, 64, 4, 1), Tile(64, 128, 4, 1), Tile(32, 128, 4, 1)),
        (Tile(64, 64, 4, 1), Tile(128, 32, 4, 1), Tile(128, 128, 4, 1)),
    ],
    ids=str,
)
def test_long_segments(tiles, dtype):
    """Tiles of 128 rows, cut into several programs or none; blocks longer than their segment."""
    case = make_case([7, 131, 70], width=24, dtype=dtype)
    assert case.layout.tile_rows == 128
    assert_right(case, run_kernel(case, tiles))


@pytest.mark.parametrize("tile_rows", [64, 128])
def test_the_tiles_of_the_table(tile_rows):
    case = make_case([tile_rows - 3, 5], width=72, dtype=torch.float16)
    assert case.layout.tile_rows == tile_rows
    assert_right(case, run_kernel(case, None))


def sdpa_per_image(case: Case) -> Results:
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    pieces = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in leaves)).transpose(0, 1)
        for a, b in pairwise(case.layout.cu_seqlens_cpu.tolist())
    ]
    out = torch.cat([*pieces, torch.zeros_like(case.q[case.layout.total :])])
    grads = torch.autograd.grad(out, leaves, case.grad_out)
    return {"out": out.detach(), **dict(zip("qkv", grads, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_pytorch_per_image(dtype):
    case = make_case([65, 40, 1], 2, 80, dtype=dtype, bias=False)
    results = run_kernel(case, Tile(32, 32, 4, 1))
    del results["lse"]
    assert_as_exact_as(sdpa_per_image(case), results, truth_of(case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="rounding to TF32 is the tensor cores'")
@pytest.mark.gpu
def test_tf32_is_taken_only_where_pytorch_allows_it():
    case = make_case([200, 40], 2, 64, bias=False)
    exact = run_kernel(case, None)
    assert_right(case, exact)
    former = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rough = run_kernel(case, None)
    finally:
        torch.backends.cuda.matmul.fp32_precision = former
    error = (rough["out"] - exact["out"]).abs().max().item()
    assert 1e-5 < error < 1e-2


def test_what_the_kernels_cannot_read_is_refused():
    case = make_case([5], width=16, bias=False)
    work = (None, case.layout.tiles, case.layout.tile_rows, 1.0)
    wide = case.q.new_zeros(8, 1, 17)[:, :, :16]
    with pytest.raises(ValueError, match=r"^k must have a unit last stride.*use k\.contiguous"):
        kernel.forward(case.q, wide, case.v, *work)
    with pytest.raises(ValueError, match=r"^q must be bfloat16, float16.*float64 and 16"):
        kernel.forward(*(x.double() for x in (case.q, case.k, case.v)), *work)
    for width in (8, 20, 136):
        x = case.q.new_zeros(8, 8, width)
        with pytest.raises(ValueError, match=f"^q must .*head dim.*{width}$|^q must have a unit"):
            kernel.forward(x, x, x, *work)
