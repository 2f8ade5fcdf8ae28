from __future__ import annotations

import copy
import dataclasses
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from fastagglo.errors import UserError
from fastagglo.ops import layout as layout_module
from fastagglo.ops import worklist
from fastagglo.ops.layout import PackedLayout


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_against_a_loop(lengths, spare):
    layout = PackedLayout.from_lengths(lengths, sum(lengths) + spare)
    ids = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * spare
    assert layout.segment_ids.tolist() == ids
    assert layout.segment_ids.dtype == torch.int32
    assert layout.lengths == tuple(lengths)
    assert layout.total == sum(lengths)
    assert layout.capacity == sum(lengths) + spare
    assert layout.num_segments == len(lengths)
    assert layout.max_length == max(lengths, default=0)
    boundaries = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for tensor in (layout.cu_seqlens, layout.cu_seqlens_cpu):
        assert tensor.tolist() == boundaries
        assert tensor.dtype == torch.int32
    again = PackedLayout.from_cu_seqlens(layout.cu_seqlens, layout.capacity)
    assert (again.lengths, again.capacity) == (layout.lengths, layout.capacity)


@pytest.mark.parametrize(
    "lengths",
    [
        (3, 4),
        iter([3, 4]),
        [np.int32(3), torch.tensor(4)],
        np.array([3, 4], dtype=np.uint8),
        torch.tensor([3, 4]),
        torch.tensor([0, 3, 0, 4], dtype=torch.int16)[1::2],
    ],
    ids=["tuple", "iterator", "scalars", "array", "tensor", "strided"],
)
def test_kinds_of_integers(lengths):
    layout = PackedLayout.from_lengths(lengths, np.int64(9))
    assert layout.lengths == (3, 4)
    assert type(layout.capacity) is int
    assert all(type(length) is int for length in layout.lengths)


def test_frozen_and_not_tied_to_its_input():
    lengths = torch.tensor([3, 4])
    layout = PackedLayout.from_lengths(lengths)
    lengths[0] = 9
    assert layout.lengths == (3, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.capacity = 12
    for clone in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert (clone.lengths, clone.capacity) == ((3, 4), 7)
    assert repr(layout) == "PackedLayout(2 segments [3, 4], 7 of 7 rows, device='cpu')"


def test_devices():
    layout = PackedLayout.from_lengths([3, 4], 8)
    assert layout.to("cpu") is layout
    assert layout.segment_ids is layout.segment_ids
    assert layout.cu_seqlens is not layout.cu_seqlens_cpu  # see _build
    moved = layout.to("meta")
    assert moved.device.type == moved.segment_ids.device.type == "meta"
    assert moved.cu_seqlens_cpu.device.type == "cpu"
    assert moved.lengths == (3, 4)
    assert moved.to("cpu").cu_seqlens.tolist() == [0, 3, 7]
    assert PackedLayout.from_lengths([1], device="meta").device.type == "meta"
    with torch.device("meta"):
        assert PackedLayout.from_lengths([1]).device.type == "meta"
        assert PackedLayout.from_lengths([1], device="cpu").device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([3, -1],), ValueError, r"negative, got -1 at position 1"),
        (([3, 4], 6), ValueError, r"capacity must hold all segments: 7 rows, got capacity 6"),
        (([3], -1), ValueError, r"got capacity -1"),
        (([3], 2.5), TypeError, r"capacity must be an integer, got 2.5"),
        (([3, 4.0],), TypeError, r"lengths\[1\] must be an integer, got 4.0"),
        (([True],), TypeError, r"lengths\[0\] must be an integer, got True"),
        ((7,), TypeError, r"sequence of integers, got 7"),
        (("34",), TypeError, r"sequence of integers, got '34'"),
        ((torch.ones(2),), TypeError, r"1-D and of an integer dtype.*float32"),
        ((torch.ones(2, dtype=torch.bool),), TypeError, r"integer dtype.*bool"),
        ((torch.ones(2, 1, dtype=torch.int32),), TypeError, r"1-D.*\(2, 1\)"),
        ((torch.tensor(3),), TypeError, r"1-D.*\(\)"),
        (([2**31],), ValueError, r"fit int32 \(at most 2147483647\), got 2147483648"),
        (([2**70],), ValueError, r"fit int32"),
        (([2**30, 2**30],), ValueError, r"at most 2147483647 rows \(int32\), got 2147483648"),
        (([3], 2**31), ValueError, r"at most 2147483647 rows"),
        (([3, 4], 7, None, 1), ValueError, r"max_segments must be at least .* 2, got 1"),
        (([], 7, None, -1), ValueError, r"max_segments must be at least .* 0, got -1"),
        (([3, 4], 7, None, 2.0), TypeError, r"max_segments must be an integer, got 2.0"),
    ],
)
def test_from_lengths_rejects(arguments, error, match):
    with pytest.raises(error, match=match):
        PackedLayout.from_lengths(*arguments[:3], max_segments=(*arguments, None, None, None)[3])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([],), ValueError, r"start with 0, got no boundaries"),
        (([1, 3],), ValueError, r"start with 0, got 1"),
        (([0, 4, 3],), ValueError, r"not decrease, got 4 then 3 at position 2"),
        (([0, 4], 3), ValueError, r"4 rows, got capacity 3"),
        (([0, 2**31],), ValueError, r"at most 2147483647 rows"),
        ((torch.zeros(2),), TypeError, r"cu_seqlens must be 1-D and of an integer dtype"),
    ],
)
def test_from_cu_seqlens_rejects(arguments, error, match):
    with pytest.raises(error, match=match):
        PackedLayout.from_cu_seqlens(*arguments)


def test_largest_layout_needs_no_rows_in_memory():
    layout = PackedLayout.from_lengths([2**30, 2**30 - 1])
    assert layout.total == 2**31 - 1
    assert layout.num_tiles == 2**24
    layout = PackedLayout.from_lengths([2**30], 2**31 - 1, max_segments=9)
    assert layout.num_tiles == 2**24


# --- the work list --------------------------------------------------------------------------------

LENGTHS = st.lists(
    st.sampled_from([0, 0, 1, 2, 63, 64, 65, 127, 128, 129, 256, 300]) | st.integers(0, 300),
    max_size=8,
)


@given(LENGTHS, st.sampled_from([0, 1, 64, 65, 200]), st.none() | st.integers(0, 5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_tiles_against_a_loop(lengths, spare, more):
    capacity = sum(lengths) + spare
    max_segments = None if more is None else len(lengths) + more
    layout = PackedLayout.from_lengths(lengths, capacity, max_segments=max_segments)
    rows = 64 if more is None and max(lengths, default=0) <= 64 else 128
    assert layout.tile_rows == rows

    stretches = [(sum(lengths[:i]), length, i) for i, length in enumerate(lengths)]
    stretches.sort(key=lambda stretch: -stretch[1])
    stretches.append((sum(lengths), spare, -1))
    expected = [
        [start, length, first, i]
        for start, length, i in stretches
        for first in range(0, length, rows)
    ]
    assert layout.num_tiles == len(expected)
    if more is not None:
        size = worklist.max_tiles(capacity, max_segments)
        assert len(expected) <= size
        expected += [[0, 0, 0, -1]] * (size - len(expected))
        assert layout.lengths == (*lengths, *[0] * more)
        assert layout.num_segments == max_segments
        assert layout.cu_seqlens.tolist()[len(lengths) :] == [sum(lengths)] * (more + 1)
    assert layout.tiles.tolist() == expected
    assert layout.tiles.shape == (len(expected), 4)
    assert layout.tiles.dtype == torch.int32
    assert layout.tiles.is_contiguous()
    assert layout.tiles is layout.tiles


@given(st.integers(0, 2000), st.integers(0, 12))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_room_for_tiles_is_tight(capacity, segments):
    # One row for all but one of the stretches, the spare rows too; the rest of the rows together.
    ones = min(segments, max(capacity - 1, 0))
    layout = PackedLayout.from_lengths([1] * ones, capacity, max_segments=segments)
    assert layout.num_tiles == worklist.max_tiles(capacity, segments) == len(layout.tiles)


def test_tiles_at_the_ends_of_int32():
    lengths = [2**31 - 1 - 3 * 2**20, 2**20, 2**20]
    tiles = PackedLayout.from_lengths(lengths, 2**31 - 1).tiles
    assert len(tiles) == 2**24
    last = 2**31 - 3 * 2**20 - 128
    assert tiles[2**24 - 3 * 2**13 - 1].tolist() == [0, lengths[0], last, 0]
    assert tiles[-1].tolist() == [2**31 - 1 - 2**20, 2**20, 2**20 - 128, -1]


def test_tiles_are_made_with_a_layout_of_a_gpu(monkeypatch):
    assert "tiles" not in vars(PackedLayout.from_lengths([3], device="meta"))
    monkeypatch.setattr(layout_module, "_KERNEL_DEVICES", ("meta",))
    layout = PackedLayout.from_lengths([3], max_segments=2)
    assert "tiles" not in vars(layout)
    for made in (
        layout.to("meta"),
        PackedLayout.from_lengths([3], device="meta", max_segments=2),
        PackedLayout.from_cu_seqlens([0, 3], device="meta", max_segments=2),
    ):
        assert vars(made)["tiles"].shape == layout.tiles.shape
        assert vars(made)["tiles"].device.type == "meta"
        assert torch.equal(made.to("cpu").tiles, layout.tiles)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_making_a_layout_does_not_wait_for_the_gpu():
    expected = PackedLayout.from_lengths(range(300), max_segments=310)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = PackedLayout.from_lengths(range(300), device="cuda", max_segments=310)
        moved = expected.to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for layout in (made, moved):
        assert torch.equal(vars(layout)["tiles"].cpu(), expected.tiles)
        assert torch.equal(layout.cu_seqlens.cpu(), expected.cu_seqlens)


def test_tiles_made_in_inference_can_be_saved_for_a_backward():
    layout = PackedLayout.from_lengths([3])
    with torch.inference_mode():
        assert not layout.tiles.is_inference()


@pytest.mark.parametrize("max_segments", [None, 400])
def test_tiles_in_a_compiled_graph(max_segments):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(x, layout):
        return x[:1] + layout.tiles.sum() + layout.tile_rows

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    frames = []
    x = torch.ones(3)
    for mix in ([300, 4], [200, 5, 9, 9], [1000, 900], [129] + [1] * 300, [800, 0, 3]):
        layout = PackedLayout.from_lengths(mix, 2000, max_segments=max_segments)
        _ = layout.tiles
        assert compiled(x, layout) == function(x, layout)
        frames.append(counter.frame_count)
    # The first change of the number of tiles makes that one dimension dynamic.
    assert frames == ([1, 2, 2, 2, 2] if max_segments is None else [1] * 5)


def test_xformers_masks():
    pytest.importorskip("xformers")
    layout = PackedLayout.from_lengths([3, 0, 4], 9)
    mask = layout.to_xformers()
    allowed = mask.materialize((7, 7)) == 0
    ids = layout.segment_ids[:7]
    assert torch.equal(allowed, ids[:, None] == ids)
    back = PackedLayout.from_xformers(mask, capacity=9)
    assert (back.lengths, back.capacity) == ((3, 4), 9)
    with pytest.raises(ValueError, match="without any"):
        PackedLayout.from_lengths([0]).to_xformers()


def test_xformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", None)
    with pytest.raises(UserError, match=r'pip install "fastagglo\[xformers\]"'):
        PackedLayout.from_lengths([3]).to_xformers()
