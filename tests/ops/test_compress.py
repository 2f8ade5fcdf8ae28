"""A fixed number of tokens from any grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastagglo.compress import CompressedTokens, _stride, compress
from fastagglo.features import Features

GRIDS = [(8, 8), (16, 16), (27, 27), (72, 72), (9, 31), (1, 1000), (31, 9)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_consistent(result: CompressedTokens, features: list[torch.Tensor], tokens: int) -> None:
    """Every patch of every image is accounted for in the mean it went to."""
    images = [image for group in features for image in group]
    channels = images[0].shape[-1]
    assert result.tokens.shape == (len(images), tokens, channels)
    assert result.mask.shape == result.size.shape == (len(images), tokens)
    assert result.mask.dtype == torch.bool
    assert len(result.index) == len(images)
    for n, image in enumerate(images):
        kept = min(tokens, image.shape[0] * image.shape[1])
        assert result.mask[n].tolist() == [True] * kept + [False] * (tokens - kept)
        assert (result.tokens[n, kept:] == 0).all()
        assert (result.size[n, kept:] == 0).all()
        assert result.index[n].shape == image.shape[:2]
        slots = result.index[n].flatten()
        assert torch.equal(result.size[n], torch.bincount(slots, minlength=tokens).float())
        assert (result.size[n, :kept] > 0).all()
        sums = torch.zeros(tokens, channels).index_add(0, slots, image.flatten(0, 1))
        torch.testing.assert_close(
            result.tokens[n] * result.size[n, :, None], sums, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("tokens", [256, 196, 64])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid(grid: tuple[int, int], tokens: int) -> None:
    x = randn(2, *grid, 8)
    result = compress(x, tokens)
    assert_consistent(result, [x], tokens)
    if grid[0] * grid[1] <= tokens:
        kept = grid[0] * grid[1]
        assert torch.equal(result.tokens[:, :kept], x.flatten(1, 2))
        assert (result.size[:, :kept] == 1).all()


@pytest.mark.parametrize("tokens", [256, 196, 64, 1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_come_closest_from_below(grid: tuple[int, int], tokens: int) -> None:
    kept = min(tokens, grid[0] * grid[1])
    sy, sx = _stride(*grid, kept)
    sides = range(1, max(grid) + 1)
    counts = [
        math.ceil(grid[0] / y) * math.ceil(grid[1] / x)
        for y in sides
        for x in range((y + 1) // 2, 2 * y + 1)
    ]
    assert sy <= 2 * sx
    assert sx <= 2 * sy
    assert math.ceil(grid[0] / sy) * math.ceil(grid[1] / sx) == max(
        count for count in counts if count <= kept
    )


def test_known_windows() -> None:
    assert _stride(16, 16, 64) == (2, 2)
    assert _stride(32, 32, 256) == (2, 2)
    assert _stride(72, 72, 256) == (5, 5)
    assert _stride(27, 27, 196) == (2, 2)
    assert _stride(10, 10, 100) == (1, 1)


def test_windows_average_where_patches_repeat() -> None:
    # A picture of flat 2 x 2 patches shrinks to one token per patch, whatever the order of merging.
    cells = randn(1, 8, 8, 16)
    result = compress(cells.repeat_interleave(2, 1).repeat_interleave(2, 2), 64)
    torch.testing.assert_close(result.tokens, cells.flatten(1, 2), rtol=0, atol=0)
    assert (result.size == 4).all()


@pytest.mark.parametrize("partition", ["alternate", "strided", "random2d"])
def test_groups_of_several_resolutions(partition: str) -> None:
    groups = [randn(2, 20, 13, 4), randn(1, 5, 5, 4, seed=1), randn(0, 9, 9, 4), randn(1, 8, 8, 4)]
    features = Features(summary=None, spatial=groups)
    result = compress(features, 64, partition=partition)
    assert_consistent(result, groups, 64)
    listed = compress(groups, 64, partition=partition)
    assert torch.equal(listed.tokens, result.tokens)
    alone = compress(groups[0][1:], 64, partition=partition)
    assert torch.equal(alone.tokens[0], result.tokens[1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    tokens=st.integers(1, 90),
    partition=st.sampled_from(["alternate", "strided", "random2d"]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_grid_any_count(
    images: int, grid: tuple[int, int], tokens: int, partition: str, ties: bool, seed: int
) -> None:
    x = randn(images, *grid, 3, seed=seed)
    x = x.round() if ties else x
    result = compress(x, tokens, partition=partition, seed=seed)
    assert_consistent(result, [x], tokens)
    if math.prod(grid) <= tokens:  # passed through: in their order, to the bit
        assert torch.equal(result.tokens[result.mask].view(x.flatten(1, 2).shape), x.flatten(1, 2))
        assert torch.equal(result.index[0].flatten(), torch.arange(math.prod(grid)))
    turned = compress(x.flip(0), tokens, partition=partition, seed=seed)
    assert torch.equal(turned.tokens, result.tokens.flip(0))
    assert torch.equal(turned.size, result.size.flip(0))


def test_padding_is_masked_from_attention() -> None:
    """The bias of proportional attention is -inf in the padding: it takes no part."""
    x = randn(2, 5, 7, 8)
    padded, exact = compress(x, 50), compress(x, 35)
    q = randn(2, 4, 8, seed=1)
    outs = [
        (q @ part.tokens.mT + part.size.log()[:, None]).softmax(-1) @ part.tokens
        for part in (padded, exact)
    ]
    torch.testing.assert_close(*outs)


def test_seed() -> None:
    x = randn(1, 20, 20, 4)
    draws = [compress(x, 64, partition="random2d", seed=s).tokens for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_valid_rectangles() -> None:
    x = randn(3, 12, 10, 4)
    valid = torch.zeros(3, 12, 10, dtype=torch.bool)
    valid[0, :9, :7] = True
    valid[1, 2:12, 4:6] = True
    x = torch.where(valid[..., None], x, torch.nan).requires_grad_()
    result = compress(x, 32, valid=valid)
    for n, (rows, columns) in enumerate([(slice(9), slice(7)), (slice(2, 12), slice(4, 6))]):
        alone = compress(x[n : n + 1, rows, columns], 32)
        assert torch.equal(result.tokens[n], alone.tokens[0])
        assert torch.equal(result.size[n], alone.size[0])
        assert torch.equal(result.index[n][rows, columns], alone.index[0])
        assert (result.index[n][~valid[n]] == -1).all()
    assert not result.mask[2].any()
    assert (result.tokens[2] == 0).all()
    result.tokens.sum().backward()
    assert (x.grad[~valid] == 0).all()
    assert (x.grad[valid] > 0).all()
    mixed = compress([randn(1, 9, 9, 4), x], 32, valid=[None, valid])
    assert torch.equal(mixed.tokens[1:], result.tokens)
    none = compress(randn(0, 4, 4, 3), 8, valid=torch.ones(0, 4, 4, dtype=torch.bool))
    assert none.tokens.shape == (0, 8, 3)
    assert none.mask.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    result = compress(randn(2, 9, 9, 4).to(dtype), 20)
    assert result.tokens.dtype == dtype
    assert result.size.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (result.size.sum(1) == 81).all()


def test_gradcheck() -> None:
    x = randn(2, 3, 4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: compress(x, 5).tokens, (x,))
    assert torch.autograd.gradcheck(lambda x: compress(x, 14).tokens, (x,))
    assert not compress(x.detach(), 7).tokens.requires_grad


def test_empty_grid_is_all_padding() -> None:
    result = compress(randn(2, 0, 5, 3), 4)
    assert result.tokens.shape == (2, 4, 3)
    assert not result.mask.any()


X = randn(2, 6, 6, 4)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "no spatial part", {"features": Features(summary=X[:, 0, 0], spatial=None)}),
        (TypeError, "features must be Features", {"features": "pixels"}),
        (TypeError, "features must be Features", {"features": [X, None]}),
        (ValueError, "empty", {"features": []}),
        (ValueError, r"\(N, h, w, C\), got \(6, 6, 4\)", {"features": X[0]}),
        (ValueError, "same channels", {"features": [X, X[..., :3]]}),
        (ValueError, "same channels", {"features": [X, X.half()]}),
        (TypeError, "float16.*int64", {"features": X.long()}),
        (ValueError, "at least 1, got 0", {"tokens": 0}),
        (TypeError, "tokens must be an int", {"tokens": 2.0}),
        (ValueError, "partition must be one of", {"partition": "odd"}),
        (ValueError, "NaN", {"features": X * torch.nan}),
        (TypeError, "bool", {"valid": torch.ones(2, 6, 6)}),
        (TypeError, "valid must be a bool tensor .*got int", {"valid": 3}),
        (ValueError, r"must be \(2, 6, 6\)", {"valid": torch.ones(2, 6, 5, dtype=torch.bool)}),
        (ValueError, "one entry per group", {"features": [X, X], "valid": [None]}),
        (ValueError, "rectangle", {"valid": torch.eye(6).bool().expand(2, 6, 6)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(error: type[Exception], text: str, arguments: dict) -> None:
    with pytest.raises(error, match=text):
        compress(**{"features": X, "tokens": 16, **arguments})
