"""Packed attention over random mixes, and what must hold between runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from packed_cases import (
    DEVICE,
    DTYPES,
    SMALL,
    TALL,
    WIDE,
    assert_right,
    assert_same,
    make_case,
    run_kernel,
)

from fastagglo.kernels.tiles import Tile
from fastagglo.ops.layout import PackedLayout

# In the interpreter a failing example costs seconds, and making it smaller takes hundreds of them.
PHASES = [Phase.explicit, Phase.generate, *([Phase.shrink] if DEVICE == "cuda" else [])]
TILES = st.sampled_from([SMALL, WIDE, TALL, Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)])
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 33, 40, 66]


@given(data=st.data())
@settings(
    max_examples=14 if DEVICE == "cpu" else 100, deadline=None, derandomize=True, phases=PHASES
)
def test_random_mixes(data):
    if data.draw(st.booleans(), "windows"):
        grid = data.draw(st.tuples(st.integers(2, 7), st.integers(2, 7)), "grid")
        whole = PackedLayout.from_lengths([grid[0] * grid[1]])
        lengths = whole.windowed([grid], data.draw(st.integers(3, 5), "window")).layout.lengths
    else:
        lengths = data.draw(st.lists(st.sampled_from(LENGTHS), max_size=3), "lengths")
    extra = data.draw(st.sampled_from([None, 0, 2]), "extra segments")
    case = make_case(
        lengths,
        data.draw(st.integers(1, 2), "heads"),
        8 * data.draw(st.integers(2, 16), "width / 8"),
        spare=data.draw(st.integers(0, 20), "spare"),
        dtype=data.draw(st.sampled_from(DTYPES), "dtype"),
        bias=data.draw(st.booleans(), "bias"),
        scale=data.draw(st.sampled_from([None, 0.3, 0.0, -1.0, 2.0]), "scale"),
        max_segments=None if extra is None else len(lengths) + extra,
        seed=data.draw(st.integers(0, 2**30), "seed"),
    )
    strides = data.draw(st.sampled_from(["own", "fused", "head-major"]), "strides")
    qkv = torch.stack([case.q, case.k, case.v], 1)  # (T, 3, H, D)
    if strides == "head-major":
        qkv = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    if strides != "own":
        case = replace(case, **dict(zip("qkv", qkv.unbind(1), strict=True)))
    fused = data.draw(st.booleans(), "fused")
    bias_grad = data.draw(st.booleans(), "bias_grad")
    tiles = data.draw(st.tuples(TILES, TILES, TILES), "tiles")
    assert_right(case, run_kernel(case, tiles, fused=fused, bias_grad=bias_grad))


@pytest.mark.parametrize("max_segments", [None, 4])
@pytest.mark.parametrize(("lengths", "spare"), [([], 0), ([], 18), ([0, 0], 0), ([0], 2)])
def test_layouts_without_rows(lengths, spare, max_segments):
    """Nothing to launch, or spare rows and dead entries of the work list alone."""
    case = make_case(lengths, 2, spare=spare, max_segments=max_segments)
    for name, result in run_kernel(case).items():
        assert result.shape[0] == spare, name
        assert not result.any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_returns_its_value(dtype):
    case = make_case([1, 1, 1], 2, 24, dtype=dtype, bias=False, spare=0)
    results = run_kernel(case)
    assert torch.equal(results["out"], case.v)
    assert torch.equal(results["v"], case.grad_out)


def test_dead_entries_and_long_tiles_change_no_bit():
    """The same mix with buffers of fixed size, whose tiles have 128 rows and not 64."""
    short = make_case([40, 3, 17], 2)
    fixed = make_case([40, 3, 17], 2, max_segments=9)
    assert (short.layout.tile_rows, fixed.layout.tile_rows) == (64, 128)
    assert not fixed.layout.tiles[-1, :3].any()
    assert_same(run_kernel(fixed, TALL), run_kernel(short, TALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moving_segments_moves_their_results(dtype):
    lengths, order = [4, 33, 17, 1, 20], [2, 4, 0, 3, 1]
    case = make_case(lengths, width=24, dtype=dtype, spare=0)
    ids = case.layout.segment_ids
    rows = torch.cat([torch.where(ids == i)[0] for i in order])
    other = replace(case, **{name: x[rows] for name, x in case.tensors.items()})
    layout = PackedLayout.from_lengths([lengths[i] for i in order], device=DEVICE)
    other = replace(other, layout=layout)
    expected = {name: x[rows] for name, x in run_kernel(case).items()}
    assert_same(run_kernel(other), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal(dtype):
    case = make_case([18, 40], 2, 40, dtype=dtype)
    assert_same(run_kernel(case, TALL), run_kernel(case, TALL))


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_gradient_is_the_same(bias):
    case = make_case([33, 5], 3, 40, dtype=torch.float16, bias=bias)
    assert_same(run_kernel(case, TALL, fused=True), run_kernel(case, TALL))


def test_a_bias_without_gradient_changes_no_other_bit():
    case = make_case([33, 5])
    with_it, without = run_kernel(case), run_kernel(case, bias_grad=False)
    del with_it["key_bias"]
    assert_same(without, with_it)
