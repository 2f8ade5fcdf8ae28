from __future__ import annotations

import copy
import dataclasses
import itertools
import operator
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


def test_long_segments_first_however_long():
    many = [i % 5 for i in range(200)]
    for lengths in ([1, 2**16, 0, 2**16 + 1, 1], [1, 2**16 - 1, 2**16], many, [*many, 2**16]):
        order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
        segments = PackedLayout.from_lengths(lengths).tiles[:, 3].tolist()
        assert list(dict.fromkeys(segments)) == order


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


# --- windows --------------------------------------------------------------------------------------

GRIDS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)


@given(GRIDS, st.integers(1, 10), st.integers(0, 3), st.none() | st.integers(0, 2))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_windows_against_a_loop(grids, window, spare, more):
    lengths = [h * w for h, w in grids]
    max_segments = None if more is None else len(grids) + more
    layout = PackedLayout.from_lengths(lengths, sum(lengths) + spare, max_segments=max_segments)
    order, sizes, start = [], [], 0
    for h, w in grids:
        for top in range(0, h, window):
            for left in range(0, w, window):
                rows = [
                    start + y * w + x
                    for y in range(top, min(top + window, h))
                    for x in range(left, min(left + window, w))
                ]
                order += rows
                sizes.append(len(rows))
        start += h * w
    order += range(start, layout.capacity)

    windows = layout.windowed(grids, window)
    assert windows.order.tolist() == order
    assert windows.order.dtype == windows.inverse.dtype == torch.int64
    assert windows.order[windows.inverse].tolist() == list(range(layout.capacity))
    assert windows.layout.lengths == tuple(sizes)
    assert (windows.layout.capacity, windows.layout.total) == (layout.capacity, layout.total)
    assert windows.layout.max_segments is None
    if grids:
        again = layout.windowed(np.array(grids), window)
        assert torch.equal(again.order, windows.order)
    fixed = layout.windowed(iter(grids), np.int64(window), max_windows=len(sizes) + 2)
    assert fixed.layout.lengths == (*sizes, 0, 0)
    assert fixed.layout.max_segments == len(sizes) + 2


def test_windows_live_with_the_layout():
    windows = PackedLayout.from_lengths([6], device="meta").windowed([(2, 3)], 2)
    assert {windows.order.device.type, windows.inverse.device.type} == {"meta"}
    assert windows.layout.device.type == "meta"
    with torch.inference_mode():
        windows = PackedLayout.from_lengths([6]).windowed([(2, 3)], 2)
        assert not windows.order.is_inference()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([(2, 3)], 2), ValueError, r"one \(h, w\) for each of 3 segments, got 1"),
        (([(2, 3), (2, 2), (0, 0), (0, 0)], 2), ValueError, r"each of 3 segments, got 4"),
        (([(2, 3), (1, 3)], 2), ValueError, r"grids\[1\] is 1 x 3, but segment 1 has 4 rows"),
        (([(-2, -3), (2, 2)], 2), ValueError, r"grids\[0\] is -2 x -3, but segment 0 has 6 rows"),
        (([(2, 3), (2, 2), (2**32, 2**32)], 2), ValueError, r"grids\[2\] is 4294967296 x"),
        (([(2, 3), (2, 2, 1)], 2), TypeError, r"grids\[1\] must be a pair \(h, w\)"),
        (([(2, 3), 4], 2), TypeError, r"grids\[1\] must be a pair \(h, w\), got 4"),
        (([(2, 3), (2.0, 2)], 2), TypeError, r"h of grids\[1\] must be an integer, got 2.0"),
        ((7, 2), TypeError, r"grids must be pairs \(h, w\), got 7"),
        (([(2, 3), (2, 2)], 0), ValueError, r"window must be at least 1, got 0"),
        (([(2, 3), (2, 2)], 2.0), TypeError, r"window must be an integer, got 2.0"),
        (([(2, 3), (2, 2)], 2, 2), ValueError, r"max_windows must be at least .* 3, got 2"),
    ],
)
def test_windowed_rejects(arguments, error, match):
    layout = PackedLayout.from_lengths([6, 4], max_segments=3)
    with pytest.raises(error, match=match):
        layout.windowed(*arguments[:2], max_windows=(*arguments, None)[2])


# --- jagged nested tensors ------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_nested_there_and_back(lengths, spare):
    layout = PackedLayout.from_lengths(lengths, sum(lengths) + spare)
    x = torch.randn(layout.capacity, 3, requires_grad=True)
    nested = layout.to_nested(x)
    parts = x[: layout.total].split(lengths)
    assert nested.layout == torch.jagged
    assert len(nested.unbind()) == len(lengths)
    assert all(map(torch.equal, nested.unbind(), parts))
    back = PackedLayout.from_nested(nested)
    assert (back.lengths, back.capacity) == (tuple(lengths), layout.total)
    (nested.values() * 2).sum().backward()
    assert x.grad[: layout.total].eq(2).all()
    assert x.grad[layout.total :].eq(0).all()


def test_nested_as_pytorch_makes_them():
    parts = [torch.randn(n, 2, 4) for n in (3, 0, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    layout = PackedLayout.from_nested(nested)
    assert (layout.lengths, layout.capacity) == ((3, 0, 5), 8)
    spare = torch.nested.nested_tensor_from_jagged(torch.randn(11, 4), nested.offsets())
    assert PackedLayout.from_nested(spare).capacity == 11
    assert torch.equal(layout.to_nested(nested.values())[2], parts[2])
    # Its longest segment is known without reading the device's numbers, which "meta" has not.
    unread = layout.to("meta").to_nested(torch.empty(8, 2, 4, device="meta"))
    assert unread.to_padded_tensor(0.0).shape == (3, 5, 2, 4)
    no_segments = PackedLayout.from_lengths([], 2).to_nested(torch.ones(2, 3))
    assert no_segments.shape[0] == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_rejects():
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    holes = torch.nested.narrow(
        torch.randn(2, 6, 4), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged
    )
    strided = torch.nested.nested_tensor([torch.randn(3, 4)])
    for x, error, match in (
        (nested.transpose(1, 2), ValueError, r"ragged in dimension 1.*got dimension 2"),
        (holes, ValueError, r"no holes.*call x.contiguous\(\) first"),
        (strided, TypeError, r"layout=torch.jagged, got a nested tensor of layout torch.strided"),
        (torch.randn(3, 4), TypeError, r"layout=torch.jagged, got a tensor of layout torch.str"),
        ([3, 4], TypeError, r"layout=torch.jagged, got list"),
    ):
        with pytest.raises(error, match=match):
            PackedLayout.from_nested(x)
    assert PackedLayout.from_nested(holes.contiguous()).lengths == (2, 3)
    layout = PackedLayout.from_nested(nested)
    for x, error, match in (
        (torch.randn(7, 4), ValueError, r"8 rows, the layout's capacity, got shape \(7, 4\)"),
        (torch.tensor(1.0), ValueError, r"8 rows, the layout's capacity, got shape \(\)"),
        (torch.randn(8, 4, device="meta"), ValueError, r"layout's device, cpu, got meta"),
        ([3], TypeError, r"x must be a tensor, got list"),
    ):
        with pytest.raises(error, match=match):
            layout.to_nested(x)


# --- one layout's buffers with another's numbers --------------------------------------------------


@given(st.data(), st.integers(0, 600), st.integers(0, 6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_copy_against_a_fresh_layout(data, capacity, max_segments):
    def draw():
        cuts = st.lists(st.integers(0, capacity), min_size=1, max_size=max_segments + 1)
        cuts = sorted(data.draw(cuts))
        return [b - a for a, b in itertools.pairwise(cuts)]

    target, source = (
        PackedLayout.from_lengths(draw(), capacity, max_segments=max_segments) for _ in range(2)
    )
    buffers = target.cu_seqlens, target.cu_seqlens_cpu
    if data.draw(st.booleans()):
        buffers += (target.tiles,)
    for name in ("lengths", "total", "max_length", "segment_ids", "num_tiles"):
        getattr(target, name)
    assert target.copy_(source) is target
    now = (target.cu_seqlens, target.cu_seqlens_cpu, target.tiles)[: len(buffers)]
    assert all(map(operator.is_, now, buffers))
    assert_same(target, source)


def assert_same(found, expected):
    for name in ("cu_seqlens", "cu_seqlens_cpu", "tiles", "segment_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("lengths", "total", "max_length", "num_tiles", "capacity", "max_segments"):
        assert getattr(found, name) == getattr(expected, name), name


def test_a_copy_leaves_other_layouts_alone():
    source = PackedLayout.from_lengths([200, 3], 300, max_segments=4)
    target = PackedLayout.from_lengths([1, 2, 3], 300, max_segments=4)
    _ = source.tiles, target.tiles
    moved, clone = target.to("meta"), copy.deepcopy(target)
    target.copy_(source)
    target.copy_(target)
    target.copy_(source.to("meta"))
    assert_same(target, source)
    for other in (moved.to("cpu"), clone, pickle.loads(pickle.dumps(clone))):
        assert_same(other, PackedLayout.from_lengths([1, 2, 3], 300, max_segments=4))
    target.copy_(clone)
    assert_same(target, clone)
    assert source.lengths == (200, 3, 0, 0)
    with torch.inference_mode():
        made = PackedLayout.from_lengths([9], 300, max_segments=4)
    assert made.copy_(source).lengths == source.lengths


def test_copy_without_fixed_buffers():
    target, source = PackedLayout.from_lengths([300, 4]), PackedLayout.from_lengths([4, 300])
    assert_same(target.copy_(source), source)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ([3, 4], TypeError, r"source must be a PackedLayout, got list"),
        (PackedLayout.from_lengths([300], 301), ValueError, r"the capacity .*, 300, got 301"),
        (PackedLayout.from_lengths([299, 1]), ValueError, r"the num_segments .*, 1, got 2"),
        (PackedLayout.from_lengths([60], 300), ValueError, r"the tile_rows .*, 128, got 64"),
        (PackedLayout.from_lengths([129], 300), ValueError, r"the len\(tiles\) .*, 3, got 4"),
    ],
)
def test_copy_rejects(source, error, match):
    layout = PackedLayout.from_lengths([300])
    _ = layout.tiles
    with pytest.raises(error, match=match):
        layout.copy_(source)
    assert layout.lengths == (300,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_follows_a_copy():
    layout = PackedLayout.from_lengths([300, 5], 400, "cuda", max_segments=6)
    total = torch.zeros(4, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.sum(layout.tiles, 0, out=total)
    with torch.cuda.graph(graph):
        torch.sum(layout.tiles, 0, out=total)
    for lengths in ([400], [1, 2, 3, 4, 5, 6]):
        source = PackedLayout.from_lengths(lengths, 400, max_segments=6)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layout.copy_(source)
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert total.tolist() == source.tiles.sum(0).tolist()
        assert layout.lengths == source.lengths
