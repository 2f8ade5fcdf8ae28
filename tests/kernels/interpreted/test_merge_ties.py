"""Token merging where similarities are equal or NaN, in any company, again and again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from merge_cases import (
    DTYPES,
    NAN,
    Case,
    assert_right,
    assert_same,
    check_selection,
    packed_case,
    randn,
    run,
    set_blocks,
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch)


def test_equal_tokens_go_by_position() -> None:
    for x in (torch.ones(1, 40, 20), torch.zeros(1, 40, 20), randn(1, 1, 20).expand(1, 40, 20)):
        results = assert_right(Case(x, 30))
        # Sources 0, 2, ..., 18 go, all to the first destination, at position 1.
        assert results.merged.size.tolist() == [[11.0] + 29 * [1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 100, 384])
def test_ties_do_not_hang_on_the_place_in_a_block(channels: int, dtype: torch.dtype) -> None:
    """Equal destinations in every place of a block and in several blocks: the first is taken."""
    sources = randn(20, channels, seed=channels, dtype=dtype)
    for copies in (1, 3):
        # Destinations d, e, d, e, ... : each source has its choice among equal ones.
        kinds = randn(copies, channels, seed=9, dtype=dtype)
        x = torch.stack([sources, kinds[torch.arange(20) % copies]], 1).view(1, 40, channels)
        results = run(Case(x, 20), "triton")
        assert results.merged.index[0, ::2].max() < copies
        # And equal sources have equal similarities, so that of a kind the first ones go.
        x = torch.stack([kinds[torch.arange(20) % copies], sources], 1).view(1, 40, channels)
        merged = run(Case(x, 33), "triton").merged
        gone = (merged.size[0, merged.index[0, ::2]].cpu() > 1).nonzero()[:, 0]
        assert len(gone) == 7
        for kind in range(copies):
            members = gone[gone % copies == kind] // copies
            assert members.tolist() == list(range(len(members)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_pairs_have_a_similarity_of_one(dtype: torch.dtype) -> None:
    """Unlike pairs of equal tokens tie, as their cosines round to unlike numbers near 1."""
    x = randn(1, 30, 50, dtype=dtype).repeat_interleave(2, 1)
    results = assert_right(Case(x, 49))
    assert results.merged.size.tolist() == [11 * [2.0] + 38 * [1.0]]
    # The opposite of a destination is the last to go.
    x = x.detach().clone()
    x[0, 0] *= -1
    assert_right(Case(x, 49))


@pytest.mark.parametrize("scale", [1e-9, 1e-13, 1e15])
def test_magnitude_does_not_matter_but_for_tiny_tokens(scale: float) -> None:
    x = randn(1, 60, 8)
    results = assert_right(Case(x, 40))
    scaled = run(Case(x * scale, 40), "triton")
    same = torch.equal(results.merged.index, scaled.merged.index)
    assert same == (scale != 1e-13)
    if not same:  # no similarity at all
        ones = run(Case(torch.ones_like(x), 40), "triton")
        assert torch.equal(ones.merged.index, scaled.merged.index)


# --- NaN, neighbours, repetition


def test_nan_tokens_stay_alone() -> None:
    x = randn(1, 80, 8)
    bad = [3, 8, 21, 77]  # three destinations, one source
    x[0, bad] = NAN
    x[0, 30] = torch.inf
    results = run(Case(x, 50), "triton")
    merged = results.merged
    assert merged.size[0, merged.index[0, [*bad, 30]]].tolist() == 5 * [1.0]
    assert int(merged.x.isnan().any(-1).sum()) == 4
    check_selection(Case(x, 50), results)
    # The others merge as if the destinations were not there.
    plain = x.clone()
    plain[0, [*bad, 30]] = -1e-20
    expected = run(Case(plain, 50), "triton")
    assert torch.equal(merged.index, expected.merged.index)
    # Where all sources must go, the bad ones go too, the last of them.
    for keep, sizes in ((42, [False, False]), (41, [True, False]), (40, [True, True])):
        forced = run(Case(x, keep), "triton").merged
        assert (forced.size[0, forced.index[0, [8, 30]]] > 1).tolist() == sizes
    # All destinations NaN: there is nothing else to merge into.
    x[:, 1::2] = NAN
    assert run(Case(x, 60), "triton").merged.size[0, 0] == 1 + 20


def test_images_do_not_see_each_other() -> None:
    grids, keeps = [(5, 5), (3, 7)], [14, 12]
    case = packed_case(grids, keeps, dtype=torch.float16, protect=1, partition="strided")
    whole = run(case, "triton")
    start = row = 0
    for length, kept in zip(case.options["layout"].lengths, keeps, strict=True):
        rows, slots = slice(start, start + length), slice(row, row + kept)
        poisoned = torch.full_like(case.x, NAN)
        poisoned[rows] = case.x[rows]
        results = run(replace(case, x=poisoned), "triton")
        assert torch.equal(results.merged.index[rows], whole.merged.index[rows])
        assert torch.equal(results.merged.x[slots], whole.merged.x[slots])
        assert torch.equal(results.back[rows], whole.back[rows])
        assert torch.equal(results.grad_x[rows], whole.grad_x[rows])
        start, row = start + length, row + kept


def test_the_batch_does_not_matter() -> None:
    x = randn(3, 35, 24, dtype=torch.float16)
    whole = run(Case(x, 19), "triton")
    for image in range(3):
        one = run(Case(x[image : image + 1], 19), "triton")
        assert torch.equal(one.merged.x[0], whole.merged.x[image])
        assert torch.equal(one.merged.index[0], whole.merged.index[image])
    order = [2, 0, 1]
    moved = run(Case(x[order], 19), "triton")
    assert torch.equal(moved.merged.x, whole.merged.x[order])


def test_two_runs_are_bit_equal() -> None:
    case = packed_case([(7, 9), (4, 5)], [20, 10], 24, protect=1)
    assert_same(run(case, "triton"), run(case, "triton"))
