"""What merging promises others: attention over its tokens, any order, its largest sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastagglo.ops import merge_torch, packed_attention
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.merge import MergedTokens, merge_tokens, unmerge_tokens
from fastagglo.ops.partition import plan_rounds
from fastagglo.ops.reference import merge as twin

PARTITIONS = ("alternate", "strided", "random2d")
HEADS, CHANNELS = 2, 16


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention(
    x: torch.Tensor, layout: PackedLayout, key_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of (T, C) tokens with fixed projections, (T, C)."""
    weights = randn(3, CHANNELS, CHANNELS, seed=7, dtype=x.dtype) / math.sqrt(CHANNELS)
    q, k, v = ((x @ weight).unflatten(1, (HEADS, -1)) for weight in weights)
    return packed_attention(q, k, v, layout, key_bias=key_bias).flatten(1)


# --- proportional attention

# In float32 a sum of 180 terms near 1, each off by a few units of 6e-8.
PRECISION = {torch.float64: 1e-13, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_attention_over_merged_duplicates(partition: str, dtype: torch.dtype) -> None:
    """With the logarithm of their sizes as bias, merged tokens attend as their duplicates did."""
    grids = [(4, 6), (6, 10), (12, 14)]  # packed images of unequal size
    packed = []
    for image, (h, w) in enumerate(grids):
        x = randn(h // 2, w // 2, CHANNELS, seed=image, dtype=dtype)
        packed.append(randn(2, CHANNELS, seed=9, dtype=dtype))  # protected
        if partition == "alternate":
            packed.append(x.flatten(0, 1).repeat_interleave(2, 0).repeat(2, 1))
        else:
            packed.append(x.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten(0, 1))
    x = torch.cat(packed).requires_grad_()
    layout = PackedLayout.from_lengths([2 + h * w for h, w in grids])
    # The first two images as far as their duplicates go, the last one half the way.
    share = 2 if partition == "alternate" else 4
    keeps = [2 + h * w // share for h, w in grids[:2]] + [2 + 12 * 14 * 3 // 4]
    grid = None if partition == "alternate" else grids
    merged = merge_tokens(x, keeps, partition=partition, grid=grid, protect=2, layout=layout)
    assert merged.size.max() >= share

    full = attention(x, layout)
    short = attention(merged.x, merged.layout, merged.size.log())
    tolerance = {"rtol": PRECISION[dtype], "atol": PRECISION[dtype]}
    torch.testing.assert_close(unmerge_tokens(short, merged), full, **tolerance)
    # And it is the bias that does it.
    plain = attention(merged.x, merged.layout)
    assert (unmerge_tokens(plain, merged) - full).abs().max() > 0.01

    # Gradients too, of a loss that takes duplicates for duplicates.
    upstream = unmerge_tokens(randn(*short.shape, seed=3, dtype=dtype), merged)
    (expected,) = torch.autograd.grad(full, x, upstream)
    (found,) = torch.autograd.grad(unmerge_tokens(short, merged), x, upstream)
    torch.testing.assert_close(found, expected, **tolerance)


def test_attention_over_tokens_merged_twice() -> None:
    """Sizes add up over layers: all four of 8 equal tokens go to the lowest of the other four."""
    x = randn(1, 6, CHANNELS, dtype=torch.float64).repeat_interleave(8, 1)
    first = merge_tokens(x, 24)
    assert first.size[0, :8].tolist() == [5, 1, 1, 1] * 2
    second = merge_tokens(first.x, 12, size=first.size)
    third = merge_tokens(second.x, 6, size=second.size)
    assert (third.size == 8).all()
    full = attention(x[0], PackedLayout.from_lengths([48]))
    for merges in ([first], [first, second], [first, second, third]):
        last = merges[-1]
        layout = PackedLayout.from_lengths([last.x.shape[1]])
        out = attention(last.x[0], layout, last.size[0].log())[None]
        for merged in reversed(merges):
            out = unmerge_tokens(out, merged)
        torch.testing.assert_close(out[0], full, rtol=1e-12, atol=1e-12)


# --- duplicates, and images in another order


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cells=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    partition=st.sampled_from(["strided", "random2d"]),
    protect=st.integers(0, 2),
    channels=st.integers(2, 9),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_duplicates_come_back(
    cells: tuple[int, int],
    stride: tuple[int, int],
    partition: str,
    protect: int,
    channels: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """Unmerging merged duplicates is the identity, for every keep that leaves one of each."""
    x = randn(2, *cells, channels, seed=seed)
    x = x.repeat_interleave(stride[0], 1).repeat_interleave(stride[1], 2)
    grid = tuple(x.shape[1:3])
    x = torch.cat([randn(2, protect, channels, seed=seed + 1), x.flatten(1, 2)], 1)
    keep = data.draw(st.integers(protect + math.prod(cells), x.shape[1]))
    merged = merge_tokens(
        x, keep, partition=partition, grid=grid, stride=stride, protect=protect, seed=seed
    )
    assert merged.x.shape == (2, keep, channels)
    # A mean of up to 9 equal numbers, each weighted by 1 / 9.
    torch.testing.assert_close(unmerge_tokens(merged.x, merged), x, rtol=1e-6, atol=0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[torch.Tensor], list, list[int]]:
    """Images (1 + h * w, C), sizes, grids and keeps."""
    grids = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=4))
    seed = draw(st.integers(0, 1000))
    images = [randn(1 + h * w, 3, seed=seed + i).round() for i, (h, w) in enumerate(grids)]
    sizes = [randn(len(x), seed=seed + 50 + i).abs() + 0.5 for i, x in enumerate(images)]
    return images, sizes, grids, [draw(st.integers(2, len(x))) for x in images]


def merge_all(
    images: list[torch.Tensor], sizes: list[torch.Tensor], grids: list, keeps: list[int], how: str
) -> MergedTokens:
    layout = PackedLayout.from_lengths([len(x) for x in images])
    x, size = torch.cat(images), torch.cat(sizes)
    return merge_tokens(
        x, keeps, size=size, grid=grids, partition=how, layout=layout, protect=1, seed=5
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=batches(), partition=st.sampled_from(PARTITIONS), data=st.data())
def test_images_in_another_order(batch: tuple, partition: str, data: st.DataObject) -> None:
    """Permuting the images permutes the results, to the bit."""
    order = data.draw(st.permutations(range(len(batch[0]))))
    straight = merge_all(*batch, partition)
    turned = merge_all(*([part[i] for i in order] for part in batch), partition)
    lengths, keeps = [len(x) for x in batch[0]], batch[3]
    assert turned.layout.lengths == tuple(keeps[i] for i in order)
    for name, counts in (("x", keeps), ("size", keeps), ("index", lengths)):
        parts = getattr(straight, name).split(counts)
        assert torch.equal(getattr(turned, name), torch.cat([parts[i] for i in order])), name


def test_a_batch_in_another_order() -> None:
    x, order = randn(5, 35, 4).round(), [3, 0, 4, 1, 2]
    for partition in PARTITIONS:
        merged, turned = (
            merge_tokens(y, 11, grid=(5, 7), partition=partition) for y in (x, x[order])
        )
        assert torch.equal(turned.x, merged.x[order])
        assert torch.equal(turned.index, merged.index[order])
        assert torch.equal(turned.size, merged.size[order])


# --- sizes that are promised


def test_the_largest_grid() -> None:
    """128 x 128 tokens, the grid of 2,048 px."""
    x = randn(1, 128 * 128, 8)
    for arguments in ({"keep": 256, "stride": (8, 8)}, {"keep": 9000, "stride": (2, 2)}):
        arguments |= {"partition": "strided", "grid": (128, 128)}
        merged = merge_tokens(x, **arguments)
        assert merged.x.shape == (1, arguments["keep"], 8)
        assert merged.size.sum() == 128 * 128
        if arguments["keep"] == 256:  # the twin holds all similarities: 16 MB, not 200
            assert torch.equal(merged.index, twin.merge_tokens(x, **arguments).index)


def test_the_widest_tokens() -> None:
    x = randn(2, 60, 4096)
    assert torch.equal(merge_tokens(x, 20).index, twin.merge_tokens(x, 20).index)


class WidestDouble(TorchDispatchMode):
    """Remembers the bytes of the largest float64 storage that an operator returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tie_is_settled_among_its_rivals(dtype: torch.dtype) -> None:
    """A few ties widen the few tokens that tie, ties everywhere blocks of 4 MiB."""
    x = randn(3200, 512, dtype=dtype)  # 1,600 destinations: 6.5 MB in float64
    x[[0, 2, 4, 2001]] = x[1001].clone()
    rounds = plan_rounds(3200, 1700, "alternate", (0, 0), 0, (2, 2), 0)
    with WidestDouble() as few:
        slot = merge_torch.assign(x, torch.ones(3200), rounds, 0)
    assert (slot[[0, 2, 4]] == slot[1001]).all()
    assert slot[2001] != slot[1001]
    assert 0 < few.bytes < 1 << 19
    with WidestDouble() as all_of_them:
        slot = merge_torch.assign(torch.ones_like(x), torch.ones(3200), rounds, 0)
    assert (slot[:3000:2] == 0).all()
    assert few.bytes < all_of_them.bytes <= 4 << 20
