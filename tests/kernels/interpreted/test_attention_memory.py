"""What packed attention reads and writes: strides, poisoned neighbours, addresses beyond 2**31."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from huge_tensors import untouched
from packed_cases import (
    DEVICE,
    DTYPES,
    NAN,
    TALL,
    Case,
    assert_same,
    make_case,
    run_kernel,
)

from fastagglo.kernels import attention as kernel
from fastagglo.ops import use_backend
from fastagglo.ops.attention import packed_attention
from fastagglo.ops.layout import PackedLayout

# --- strides: memory of NaN, and the view of it that holds the inputs


def _fused(T, H, D, like):
    return like.new_full((T, 3, H, D), NAN).unbind(1)


def _head_major(T, H, D, like):
    return [like.new_full((H, T, D), NAN).transpose(0, 1) for _ in range(3)]


def _every_other_row(T, H, D, like):
    return [like.new_full((2 * T, H, D), NAN)[::2] for _ in range(3)]


def _gaps(T, H, D, like):
    """Rows, heads and columns of NaN on all sides."""
    return [like.new_full((T + 2, H + 2, D + 8), NAN)[1:-1, 1:-1, :D] for _ in range(3)]


def _unlike(T, H, D, like):
    return _fused(T, H, D, like)[0], _head_major(T, H, D, like)[1], _gaps(T, H, D, like)[2]


@pytest.mark.parametrize("width", [16, 24, 72])
@pytest.mark.parametrize("place", [_fused, _head_major, _every_other_row, _gaps, _unlike])
def test_strides_are_read_in_place(place, width):
    case = make_case([21, 5], 2, width, dtype=torch.float16, bias=False)
    views = place(*case.q.shape, case.q)
    for view, x in zip(views, (case.q, case.k, case.v), strict=True):
        view.copy_(x)
        assert kernel.readable(view)
    q, k, v = views
    assert_same(run_kernel(replace(case, q=q, k=k, v=v)), run_kernel(case))


def test_repeated_rows_and_heads():
    """Strides of zero, as of keys that all heads share."""
    case = make_case([21, 5], 2, spare=0)
    shared = {"k": case.k[:, :1].expand(-1, 2, -1), "v": case.v[:1].expand(26, -1, -1)}
    expected = run_kernel(replace(case, **{name: x.contiguous() for name, x in shared.items()}))
    assert_same(run_kernel(replace(case, **shared)), expected)


# --- neighbours


def surrounded(x: torch.Tensor, rows: slice, head: int, margin: tuple[int, ...]) -> torch.Tensor:
    """These rows of one head of x, in memory that holds NaN otherwise, so far out on each side."""
    memory = x.new_full([n + 2 * m for n, m in zip(x.shape, margin, strict=True)], NAN)
    view = memory[tuple(slice(m, m + n) for n, m in zip(x.shape, margin, strict=True))]
    view[rows, head] = x[rows, head]
    return view


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 72])
def test_poisoned_neighbours_change_no_bit(width, dtype, bias):
    """Other segments, other heads and whatever else lies beside a head of a segment."""
    case = make_case([18, 20, 1], 2, width, dtype=dtype, bias=bias)
    clean = run_kernel(case, TALL)
    margins = dict.fromkeys("qkv", (1, 1, 8)) | {"key_bias": (1, 1), "grad_out": (1, 0, 0)}
    for head, (a, b) in enumerate([(18, 38), (0, 18)]):
        rows = slice(a, b)
        poisoned = {
            name: surrounded(x, rows, head, margins[name]) for name, x in case.tensors.items()
        }
        # Which checks, too, that the NaN of no segment's rows stays there.
        results = run_kernel(replace(case, **poisoned), TALL)
        for name, x in clean.items():
            assert torch.equal(results[name][rows, head], x[rows, head]), name


# --- addresses


@pytest.fixture
def _memory_starts_as_it_is() -> None:
    torch.use_deterministic_algorithms(False)  # which would fill huge tensors with NaN


@pytest.mark.usefixtures("_memory_starts_as_it_is")
def test_rows_beyond_2_31_elements():
    """A row stride just below what the kernels take; the last segment begins beyond 2**31."""
    lengths, stride = [230, 40], 2**24 - 8
    case = make_case(lengths, dtype=torch.float16, spare=0)
    start = 230
    tiles = case.layout.tiles[case.layout.tiles[:, 3] == 1]
    assert start * stride > 2**31
    assert tiles.shape[0] == 1
    views = {}
    for name in ("q", "k", "v"):
        buffer = untouched(270 * stride, dtype=torch.float16, device=DEVICE)
        views[name] = buffer.as_strided(case.q.shape, (stride, 16, 1))
        views[name][start:] = getattr(case, name)[start:]
        assert kernel.readable(views[name])
    # The bias' rows may be any distance apart: here a step of 16 keys is beyond 2**31 by itself.
    far = 2**28 if DEVICE == "cpu" else 2**24
    bias = untouched(270 * far, dtype=torch.float32, device=DEVICE)
    views["key_bias"] = bias.as_strided((270, 1), (far, 1))
    views["key_bias"][start:] = case.key_bias[start:]
    results = run_tiles(replace(case, **views), tiles)
    expected = run_tiles(case, tiles)
    for name in expected:
        assert torch.equal(results[name][start:], expected[name][start:]), name


@pytest.mark.usefixtures("_memory_starts_as_it_is")
def test_heads_beyond_2_31_elements():
    case = make_case([20], 3, dtype=torch.float16, spare=0)
    stride = 2**30 + 2**20
    views = {}
    for name in ("q", "k", "v"):
        buffer = untouched(2 * stride + 20 * 16, dtype=torch.float16, device=DEVICE)
        views[name] = buffer.as_strided(case.q.shape, (16, stride, 1)).copy_(getattr(case, name))
    bias = untouched(2 * stride + 20, dtype=torch.float32, device=DEVICE)
    views["key_bias"] = bias.as_strided((20, 3), (1, stride)).copy_(case.key_bias)
    assert_same(run_kernel(replace(case, **views), TALL), run_kernel(case, TALL))


@pytest.mark.usefixtures("_memory_starts_as_it_is")
@pytest.mark.parametrize("fused", [False, True])
def test_results_beyond_2_31_elements(monkeypatch, fused):
    """So many rows that outputs, log-sums and gradients of all heads but the first lie beyond."""
    heads, width, length = 3, 16, 20
    rows = 2**30 + 2**20 if DEVICE == "cpu" else 2**26
    small = make_case([length], heads, width, dtype=torch.float16, spare=0)
    start = rows - length
    inputs, large = {}, {}
    for name in ("q", "k", "v"):  # overlapping rows, and one head for all, keep the inputs small
        base = torch.randn(length * 8 + width).to(DEVICE, torch.float16)
        inputs[name] = base.as_strided((length, heads, width), (8, 0, 1))
        buffer = untouched(rows * 8 + width, dtype=torch.float16, device=DEVICE)
        buffer[start * 8 :] = base
        large[name] = buffer.as_strided((rows, heads, width), (8, 0, 1))
    small = replace(small, **inputs)
    bias = untouched(heads, rows, dtype=torch.float32, device=DEVICE).T
    bias[start:] = small.key_bias
    upstream = untouched(rows, heads, width, dtype=torch.float16, device=DEVICE)
    upstream[start:] = small.grad_out

    usual = torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, **options):
        if options:  # the interpreter's own
            return usual(self, *shape, dtype=dtype, **options)
        return untouched(*shape, dtype=dtype or self.dtype, device=DEVICE)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: untouched(*x.shape, dtype=x.dtype, device=DEVICE)
    )
    tiles = torch.tensor([[start, length, 0, 0]], dtype=torch.int32, device=DEVICE)
    layout = PackedLayout(
        *(torch.tensor([0, rows], dtype=torch.int32) for _ in range(2)), rows, 64, None
    )
    case = replace(small, **large, key_bias=bias, grad_out=upstream, layout=layout)
    results = run_tiles(case, tiles, fused=fused)
    monkeypatch.undo()
    expected = run_tiles(small, small.layout.tiles, fused=fused)
    assert results["q"].stride(0) * start > 2**31
    for name in expected:
        assert torch.equal(results[name][start:], expected[name]), name


@pytest.mark.usefixtures("_memory_starts_as_it_is")
def test_rows_too_far_apart_for_the_kernels_are_copied():
    case = make_case([3, 2], dtype=torch.float16, bias=False, spare=0)
    buffer = untouched(5 * 2**24, dtype=torch.float16, device=DEVICE)
    q = buffer.as_strided(case.q.shape, (2**24, 16, 1)).copy_(case.q)
    assert not kernel.readable(q)
    with use_backend("triton"):
        results = [packed_attention(x, case.k, case.v, case.layout) for x in (q, case.q)]
    assert torch.equal(*results)


def run_tiles(case: Case, tiles: torch.Tensor, *, fused: bool = False) -> dict[str, torch.Tensor]:
    """The kernels over some entries of the work list alone."""
    inputs = (case.q, case.k, case.v, case.key_bias, tiles, case.layout.tile_rows)
    out, lse = kernel.forward(*inputs, case.scale, tile=TALL)
    options = {"bias_grad": True, "fused": fused, "tile_dq": TALL, "tile_dkv": TALL}
    grads, grad_bias = kernel.backward(case.grad_out, *inputs, out, lse, case.scale, **options)
    q, k, v = grads.unbind(1 if fused else 0)
    return {"out": out, "lse": lse.T, "q": q, "k": k, "v": v, "key_bias": grad_bias.T}
