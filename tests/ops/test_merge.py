"""Which tokens merge, and into what: a loop-by-loop model of the papers, the twin, properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastagglo.ops import merge as op
from fastagglo.ops import merge_torch
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.merge import MergedTokens, merge_tokens, unmerge_tokens
from fastagglo.ops.partition import plan_rounds
from fastagglo.ops.reference import merge as twin

PARTITIONS = ("alternate", "strided", "random2d")
IMPLEMENTATIONS = {"op": op, "twin": twin}
# Relative error of a mean of a few numbers near 1, rounded once to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model(
    x: torch.Tensor,
    keep: int,
    size: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    partition: str = "alternate",
    grid: tuple[int, int] = (0, 0),
    protect: int = 0,
    stride: tuple[int, int] = (2, 2),
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One image (L, C), token by token in float64: features, sizes, slot of each token."""
    values = x.detach().double().numpy()
    weights = np.ones(len(values)) if size is None else size.double().numpy()
    compared = values if metric is None else metric.detach().double().numpy()
    if compared.ndim == 3:
        compared = compared.mean(1)
    # A cluster: original position, members, grid cell, metric, size.
    clusters = []
    for i in range(protect, len(values)):
        cell = divmod(i - protect, grid[1]) if partition != "alternate" else (0, 0)
        clusters.append([i, [i], cell, compared[i], weights[i]])
    number = 0
    while len(clusters) + protect > keep:
        if partition == "random2d":  # the draw itself has its own test
            arguments = (len(values) - protect, keep - protect, partition, grid, protect)
            picks = plan_rounds(*arguments, stride, seed)[number].destinations.tolist()
            chosen = [i in picks for i in range(len(clusters))]
        elif partition == "strided":
            chosen = [c[2][0] % stride[0] == 0 and c[2][1] % stride[1] == 0 for c in clusters]
        else:
            chosen = [(protect + i) % 2 == 1 for i in range(len(clusters))]
        sources = [c for c, d in zip(clusters, chosen, strict=True) if not d]
        destinations = [c for c, d in zip(clusters, chosen, strict=True) if d]
        pairs = []
        for s in sources:
            best, best_similarity = None, -math.inf
            for d in destinations:
                norm = np.linalg.norm(s[3]) * np.linalg.norm(d[3])
                similarity = round(float(s[3] @ d[3] / norm), 10) if norm else 0.0
                if similarity > best_similarity:
                    best, best_similarity = d, similarity
            pairs.append((best_similarity, s, best))
        most = len(clusters) // 2 if partition == "alternate" else len(sources)
        merges = min(most, len(clusters) + protect - keep)
        pairs.sort(key=lambda pair: -pair[0])  # Python's sort keeps the order of ties
        for _, s, d in pairs[:merges]:
            d[1].extend(s[1])
        for _, s, d in pairs[:merges]:
            d[3] = (d[3] * d[4] + s[3] * s[4]) / (d[4] + s[4])
            d[4] += s[4]
            clusters.remove(s)
        for c in clusters:
            c[2] = (c[2][0] // stride[0], c[2][1] // stride[1])
        number += 1
    members = [[i] for i in range(protect)] + [c[1] for c in sorted(clusters, key=lambda c: c[0])]
    slots = [next(k for k, m in enumerate(members) if i in m) for i in range(len(values))]
    totals = np.array([weights[m].sum() for m in members])
    means = np.stack([(values[m] * weights[m][:, None]).sum(0) for m in members])
    return means / totals[:, None], totals, slots


def assert_same(actual: MergedTokens, expected: MergedTokens, dtype: torch.dtype) -> None:
    assert actual.index.tolist() == expected.index.tolist()
    assert actual.slot.tolist() == expected.slot.tolist()
    assert actual.x.dtype == expected.x.dtype == dtype
    assert actual.size.dtype == expected.size.dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.x, expected.x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.size, expected.size)
    assert (actual.layout is None) == (expected.layout is None)
    if actual.layout is not None:
        assert actual.layout.lengths == expected.layout.lengths


# --- the choice, the means and the order


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("protect", [0, 1, 3])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 9), (3, 1)], ids=str)
def test_model_of_the_papers(which: str, partition: str, protect: int, grid: tuple) -> None:
    free = grid[0] * grid[1]
    x = randn(protect + free, 5, dtype=torch.float64)
    size = torch.arange(1.0, len(x) + 1)
    metric = randn(len(x), 2, 3, seed=1, dtype=torch.float64)
    for kept in sorted({1, 2, free // 5 + 1, free // 2, free - free // 4, free - 1, free} - {0}):
        arguments = {"partition": partition, "protect": protect, "stride": (2, 3), "seed": 11}
        merged = IMPLEMENTATIONS[which].merge_tokens(
            x[None],
            protect + kept,
            size=size[None],
            metric=metric[None],
            grid=grid,
            **arguments,
        )
        means, totals, slots = model(x, protect + kept, size, metric, grid=grid, **arguments)
        assert merged.index[0].tolist() == slots
        np.testing.assert_allclose(merged.x[0].numpy(), means, rtol=1e-12)
        np.testing.assert_array_equal(merged.size[0].numpy(), totals)


def test_by_hand() -> None:
    # Sources 0, 2, 4; destinations 1, 3. 4 is 3 itself, 2 is nearer to 1 than 0 is.
    x = torch.tensor([[1.0, 0], [1, 1], [2, 3], [-1, 0], [-3, 0]])
    merged = merge_tokens(x[None], 3, size=torch.tensor([[1, 2, 6, 1, 1]]))
    assert merged.index.tolist() == [[0, 1, 1, 2, 2]]
    assert merged.x.tolist() == [[[1, 0], [1.75, 2.5], [-2, 0]]]
    assert merged.size.tolist() == [[1, 8, 2]]
    assert merged.size.dtype == torch.float32
    assert merged.layout is None


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (7, 5), (2, 9)], ids=str)
def test_random_destinations(grid: tuple[int, int]) -> None:
    def draw(seed: int) -> list[int]:
        (only,) = plan_rounds(
            math.prod(grid), math.prod(grid) - 1, "random2d", grid, 0, (2, 3), seed
        )
        assert sorted(only.sources.tolist() + only.destinations.tolist()) == list(
            range(math.prod(grid))
        )
        return only.destinations.tolist()

    windows = {(y // 2, x // 3) for y in range(grid[0]) for x in range(grid[1])}
    drawn = [draw(seed) for seed in range(60)]
    for picks in drawn:
        cells = [divmod(pick, grid[1]) for pick in picks]
        assert len(picks) == len(windows)
        assert {(y // 2, x // 3) for y, x in cells} == windows
    # In 60 draws each of at most 6 cells of a window comes up (a miss: 6 * (5/6)**60 = 1e-4).
    assert {pick for picks in drawn for pick in picks} == set(range(math.prod(grid)))
    assert draw(3) == drawn[3]


def test_seed_changes_random2d_alone() -> None:
    x = randn(1, 64, 8)
    for partition in PARTITIONS:
        results = [merge_tokens(x, 40, partition=partition, grid=(8, 8), seed=s) for s in (1, 2)]
        assert torch.equal(results[0].index, results[1].index) == (partition != "random2d")


# --- ties


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_ties_go_to_the_lowest_position(which: str) -> None:
    x = torch.ones(1, 10, 4)
    merged = IMPLEMENTATIONS[which].merge_tokens(x, 7)
    # Sources 0, 2, 4 go, all to the first destination, at position 1.
    assert merged.index.tolist() == [[0, 0, 0, 1, 0, 2, 3, 4, 5, 6]]
    assert merged.size.tolist() == [[4, 1, 1, 1, 1, 1, 1]]
    zeros = IMPLEMENTATIONS[which].merge_tokens(torch.zeros(1, 10, 4), 7)
    assert torch.equal(zeros.index, merged.index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("sources", "destinations"), [(33, 17), (77, 5), (129, 129), (40, 200)])
def test_ties_do_not_hang_on_the_matrix_product(
    sources: int, destinations: int, dtype: torch.dtype
) -> None:
    # BLAS sums the edge of a matrix in another order than its middle, and differs in the last bit.
    for channels in (16, 100, 384):
        metric = torch.cat(
            [
                randn(sources, channels, seed=channels).abs(),
                randn(1, channels, seed=1).abs().expand(destinations, -1),
            ]
        ).to(dtype)
        where = torch.arange(sources + destinations)
        similarity, best = merge_torch._best_destinations(metric, where[:sources], where[sources:])
        assert best.eq(0).all()
        # And the other way round: equal sources, so equal similarities to whatever they pick.
        similarity, best = merge_torch._best_destinations(metric, where[sources:], where[:sources])
        assert best.eq(best[0]).all()
        similarity += torch.linspace(0, 1e-7 if dtype != torch.float64 else 1e-15, destinations)
        chosen = merge_torch._most_similar(
            metric, similarity, where[sources:], where[:sources][best], 3
        )
        assert sorted(chosen.tolist()) == [0, 1, 2]


def test_near_ties_are_settled_in_higher_precision() -> None:
    # The second destination is nearer by a few units of float32's last place, less than the error
    # of a float32 product of 4,000 terms.
    images = 40
    source, noise = randn(images, 4000), randn(images, 4000, seed=1)
    x = torch.stack([source, source + 3.0e-3 * noise, -source, source - 2.9e-3 * noise], 1)
    truth = torch.nn.functional.cosine_similarity(x.double(), x[:, :1].double(), dim=-1)
    assert (truth[:, 3] - truth[:, 1] > 1.2e-7).all()
    assert (truth[:, 3] - truth[:, 1] < 6e-7).all()
    assert merge_tokens(x, 3).index.tolist() == [[2, 0, 1, 2]] * images


# --- properties


@st.composite
def requests(draw: st.DrawFn) -> tuple[torch.Tensor, int, dict]:
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    protect = draw(st.integers(0, 3))
    length = protect + grid[0] * grid[1]
    images, seed = draw(st.integers(1, 3)), draw(st.integers(0, 10_000))
    x = randn(images, length, draw(st.integers(1, 9)), seed=seed)
    if draw(st.booleans()):
        x = x.round()  # plenty of ties, zeros and duplicates
    size = torch.randint(1, 5, (images, length)) if draw(st.booleans()) else None
    arguments = {
        "partition": draw(st.sampled_from(PARTITIONS)),
        "grid": grid,
        "protect": protect,
        "stride": draw(st.tuples(st.integers(2, 3), st.integers(2, 3))),
        "seed": seed,
    }
    return x, draw(st.integers(protect + 1, length)), {"size": size, **arguments}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(requests())
def test_properties(request: tuple[torch.Tensor, int, dict]) -> None:
    x, keep, arguments = request
    images, length, channels = x.shape
    size = torch.ones(images, length) if arguments["size"] is None else arguments["size"].float()
    protect = arguments["protect"]
    merged = merge_tokens(x, keep, **arguments)
    assert merged.x.shape == (images, keep, channels)
    assert merged.size.shape == (images, keep)
    # Sizes and weighted sums are conserved, image by image.
    assert torch.equal(merged.size.sum(1), size.sum(1))
    torch.testing.assert_close(
        (merged.x * merged.size[..., None]).sum(1),
        (x * size[..., None]).sum(1),
        rtol=1e-5,
        atol=1e-4,
    )
    # Every slot is taken, in the order of its survivor, which is one of its tokens.
    for image in range(images):
        assert set(merged.index[image].tolist()) == set(range(keep))
    # Protected tokens: first, bit for bit, and alone in their slots.
    assert torch.equal(merged.x[:, :protect], x[:, :protect])
    assert (merged.index[:, :protect] == torch.arange(protect)).all()
    assert (merged.index[:, protect:] >= protect).all()
    # Lone tokens are copied bit for bit.
    alone = merged.size[torch.arange(images)[:, None], merged.index] == size
    assert torch.equal(unmerge_tokens(merged.x, merged)[alone], x[alone])
    # Images do not see each other.
    for image in range(images):
        one = slice(image, image + 1)
        own = {**arguments, "size": None if arguments["size"] is None else size[one]}
        single = merge_tokens(x[one], keep, **own)
        assert torch.equal(single.x, merged.x[one])
        assert torch.equal(single.index, merged.index[one])
    # What is merged once more composes.
    again = merge_tokens(merged.x, protect + 1, size=merged.size, protect=protect)
    torch.testing.assert_close(
        again.x[:, protect],
        (x * size[..., None])[:, protect:].sum(1) / size[:, protect:].sum(1, keepdim=True),
        rtol=1e-5,
        atol=1e-4,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(requests())
def test_model_on_ties(request: tuple[torch.Tensor, int, dict]) -> None:
    x, keep, arguments = request
    merged = merge_tokens(x.double(), keep, **arguments)
    sizes = arguments.pop("size")
    for image in range(len(x)):
        own = None if sizes is None else sizes[image]
        means, totals, slots = model(x[image], keep, own, **arguments)
        assert merged.index[image].tolist() == slots
        np.testing.assert_allclose(merged.x[image].numpy(), means, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(merged.size[image].numpy(), totals)


def test_two_merges_are_one_with_accumulated_sizes() -> None:
    x = randn(2, 49, 6, dtype=torch.float64)
    first = merge_tokens(x, 30)
    second = merge_tokens(first.x, 12, size=first.size)
    index = second.index.gather(1, first.index)
    counts = torch.zeros(2, 12, dtype=torch.float64).scatter_add(
        1, index, torch.ones(2, 49).double()
    )
    sums = torch.zeros(2, 12, 6, dtype=torch.float64)
    sums = sums.scatter_add(1, index[..., None].expand_as(x), x)
    torch.testing.assert_close(second.size, counts)
    torch.testing.assert_close(second.x, sums / counts[..., None])
    torch.testing.assert_close(
        unmerge_tokens(unmerge_tokens(second.x, second), first),
        second.x.gather(1, index[..., None].expand_as(x)),
    )


@pytest.mark.parametrize("partition", PARTITIONS)
def test_merging_duplicates_loses_nothing(partition: str) -> None:
    x = randn(2, 16, 12)
    if partition == "alternate":
        doubled = x.repeat_interleave(2, 1)
        grid = None
    else:
        x = x.view(2, 4, 4, 12)
        doubled = x.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        grid = (8, 8)
    merged = merge_tokens(doubled, 16, partition=partition, grid=grid)
    assert torch.equal(unmerge_tokens(merged.x, merged), doubled)
    # Proportional attention over merged duplicates is attention over the duplicates.
    q = randn(2, 5, 12, seed=1)
    full = (q @ doubled.mT).softmax(-1) @ doubled
    short = (q @ merged.x.mT + merged.size.log()[:, None]).softmax(-1) @ merged.x
    torch.testing.assert_close(short, full, rtol=1e-5, atol=1e-6)


# --- shapes, dtypes and layouts


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_twin(dtype: torch.dtype, partition: str) -> None:
    x = randn(3, 2 + 99, 24, dtype=dtype)
    size = torch.randint(1, 9, (3, 101), generator=torch.Generator().manual_seed(1))
    metric = randn(3, 101, 2, 16, seed=2, dtype=dtype)
    arguments = {"partition": partition, "grid": (9, 11), "protect": 2, "seed": 5}
    for keep in (101, 90, 51, 33, 7, 3, [3, 60, 101]):
        for own in ({}, {"size": size}, {"size": size.to(dtype), "metric": metric}):
            actual = merge_tokens(x, keep, **arguments, **own)
            expected = twin.merge_tokens(x, keep, **arguments, **own)
            assert_same(actual, expected, dtype)
            y = randn(*actual.x.shape[:-1], 2, 3, dtype=dtype)
            torch.testing.assert_close(
                unmerge_tokens(y, actual), twin.unmerge_tokens(y, expected), rtol=0, atol=0
            )


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_packed_is_each_image(which: str, partition: str) -> None:
    tokens = IMPLEMENTATIONS[which]
    grids = [(4, 5), (0, 3), (8, 3), (1, 7)]
    lengths = [1 + 20, 0, 1 + 24, 1 + 7]
    keeps = [9, 0, 25, 2]
    layout = PackedLayout.from_lengths(lengths, capacity=60)
    x = randn(60, 6)
    x[layout.total :] = torch.nan  # no image's
    size = torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.5
    size[layout.total :] = 0
    arguments = {"partition": partition, "protect": 1, "seed": 3}
    merged = tokens.merge_tokens(x, keeps, size=size, layout=layout, grid=grids, **arguments)
    assert merged.layout.lengths == tuple(keeps)
    assert merged.x.shape == (36, 6)
    y = randn(36, 4)
    spread = tokens.unmerge_tokens(y, merged)
    assert (merged.index[layout.total :] == -1).all()
    assert (spread[layout.total :] == 0).all()
    start = row = 0
    for length, keep, grid in zip(lengths, keeps, grids, strict=True):
        rows, slots = slice(start, start + length), slice(row, row + keep)
        if length:
            one = tokens.merge_tokens(
                x[None, rows], keep, size=size[None, rows], grid=grid, **arguments
            )
            assert torch.equal(merged.x[slots], one.x[0])
            assert torch.equal(merged.size[slots], one.size[0])
            assert torch.equal(merged.index[rows], one.index[0])
            assert torch.equal(spread[rows], y[slots][merged.index[rows]])
        start, row = start + length, row + keep


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_differing_keeps_are_packed(which: str) -> None:
    x = randn(3, 12, 4)
    merged = IMPLEMENTATIONS[which].merge_tokens(x, [12, 3, 7])
    assert merged.layout.lengths == (12, 3, 7)
    assert merged.index.shape == (3, 12)
    assert torch.equal(merged.x[:12], x[0])
    torch.testing.assert_close(merged.x[12:15], merge_tokens(x[1:2], 3).x[0])
    assert IMPLEMENTATIONS[which].unmerge_tokens(merged.x, merged).shape == x.shape
    assert IMPLEMENTATIONS[which].merge_tokens(x, torch.tensor([5, 5, 5])).layout is None


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_empty(which: str) -> None:
    tokens = IMPLEMENTATIONS[which]
    none = tokens.merge_tokens(torch.zeros(0, 10, 4), 5)
    assert none.x.shape == (0, 5, 4)
    assert tokens.unmerge_tokens(none.x, none).shape == (0, 10, 4)
    packed = tokens.merge_tokens(torch.zeros(3, 4), [], layout=PackedLayout.from_lengths([], 3))
    assert packed.x.shape == (0, 4)
    assert tokens.unmerge_tokens(packed.x, packed).tolist() == torch.zeros(3, 4).tolist()
    one = tokens.merge_tokens(torch.ones(2, 1, 4), 1)
    assert one.x.tolist() == torch.ones(2, 1, 4).tolist()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_keeping_all_is_the_identity(partition: str) -> None:
    x = randn(2, 15, 4)
    merged = merge_tokens(x, 15, partition=partition, grid=(3, 5))
    assert torch.equal(merged.x, x)
    assert merged.x.data_ptr() != x.data_ptr()
    assert torch.equal(merged.index, torch.arange(15).expand(2, 15))


def test_strides_of_memory_do_not_matter() -> None:
    x = randn(2, 6, 30).mT  # (2, 30, 6), as from a convolution
    wide = randn(2, 30, 12)
    size = torch.randint(1, 4, (30, 2)).mT
    for view in (x, wide[..., ::2], wide[:, :, 6:]):
        actual = merge_tokens(view, 11, size=size)
        assert_same(actual, merge_tokens(view.contiguous(), 11, size=size), torch.float32)
    merged = merge_tokens(x, 11)
    y = randn(2, 3, 11).mT.requires_grad_()
    spread = unmerge_tokens(y, merged)
    assert torch.equal(spread, unmerge_tokens(y.contiguous(), merged))
    spread.backward(randn(2, 3, 30).mT)
    assert y.grad.shape == y.shape


def test_unmerge_takes_any_trailing_shape() -> None:
    merged = merge_tokens(randn(2, 10, 4), 6)
    for trail in ((), (1,), (3, 5)):
        assert unmerge_tokens(randn(2, 6, *trail), merged).shape == (2, 10, *trail)
    assert torch.equal(unmerge_tokens(merged.size, merged), merged.size.gather(1, merged.index))
