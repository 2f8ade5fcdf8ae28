"""Which tokens the kernels merge, and into what, against PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from merge_cases import (
    DEVICE,
    DTYPES,
    NAN,
    PARTITIONS,
    SMALL,
    TALL,
    WIDE,
    Case,
    assert_right,
    check_selection,
    packed_case,
    randn,
    run,
    set_blocks,
)

from fastagglo.kernels import merge as kernel
from fastagglo.kernels import merge_move as move
from fastagglo.kernels.merge_plan import Image, make_plan
from fastagglo.ops import PackedLayout
from fastagglo.ops.partition import plan_rounds


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch)


# --- against PyTorch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("protect", [0, 2])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_packed_images(partition: str, protect: int, dtype: torch.dtype) -> None:
    """Of many lengths, one token and none among them; one keeps all of its tokens."""
    grids = [(4, 9), (1, 1), (0, 0), (3, 5), (2, 1)]
    keeps = [20, 1, 0, 15, 1]
    keeps = [keep and protect + keep for keep in keeps]
    case = packed_case(
        grids, keeps, protect=protect, partition=partition, stride=(2, 3), dtype=dtype, seed=3
    )
    assert_right(case)


@pytest.mark.parametrize("tile", [SMALL, WIDE, TALL], ids=str)
@pytest.mark.parametrize("channels", [1, 16, 33, 40])
def test_blocks_and_their_tails(
    channels: int, tile: kernel.Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_blocks(monkeypatch, tile)
    grids = [(3, 5), (4, 8), (5, 13)]  # alternate: 8 + 7, 16 + 16, 33 + 32
    case = packed_case(grids, [10, 20, 40], channels, sizes=False, seed=channels)
    if channels == 1:  # cosines of 1 and -1: ties alone
        case.x = case.x.sign()
    assert_right(case)


def test_the_blocks_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for dtype in DTYPES:
        x = randn(1, 300, 72, dtype=dtype)
        assert_right(Case(x, 120, {"partition": "strided", "grid": (15, 20), "stride": (1, 3)}))


@pytest.mark.parametrize("keep", [19, 1, [8, 22]])
def test_a_batch(keep: int | list[int]) -> None:
    size = torch.arange(1, 2 * 22 + 1).view(2, 22)
    results = assert_right(Case(randn(2, 22, 12), keep, {"size": size}))
    assert (results.merged.layout is None) == isinstance(keep, int)


def test_batches_without_tokens_or_merges() -> None:
    for x, keep in ((randn(0, 10, 4), 5), (randn(2, 1, 4), 1), (randn(2, 15, 4), 15)):
        results = assert_right(Case(x, keep))
        if len(x):
            assert torch.equal(results.merged.x.cpu(), x)
    none = PackedLayout.from_lengths([], 3)
    results = assert_right(Case(torch.full((3, 4), NAN), [], {"layout": none}))
    assert results.merged.starts.tolist() == [0]
    assert results.merged.order.tolist() == [0, 1, 2]


def test_another_metric_than_the_tokens() -> None:
    """Of another dtype and width, with heads, and not contiguous."""
    x = randn(1, 37, 12)
    heads = randn(1, 37, 3, 24, seed=1, dtype=torch.float16)
    for metric in (heads[:, :, 0], heads, heads.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_right(Case(x, 20, {"metric": metric}))
    assert_right(Case(x.half(), 25, {"metric": heads[:, :, 1].float(), "protect": 1}))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_rounds(partition: str) -> None:
    """Up to four, each of which compares the means of the last; images end at unlike ones."""
    grids, keeps = [(6, 6), (2, 2), (1, 7)], [3, 4, 2]
    case = packed_case(grids, keeps, 16, partition=partition, seed=5, sizes=partition != "strided")
    assert_right(case)


@pytest.mark.parametrize("select_rows", [16, 32])
def test_selection_over_many_blocks(select_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, TALL, select_rows)
    case = packed_case([(6, 15), (5, 5)], [60, 20], 16, protect=1, seed=1)
    case.x = case.x.sign()  # plenty of equal similarities on the way to the threshold
    results = run(case, "triton")
    check_selection(case, results)


@pytest.mark.parametrize("count", [1, 7, 100, 300])
def test_threshold_is_that_of_a_sort(count: int) -> None:
    """The kernel that selects, on similarities of its own: near each other, far apart, equal."""
    generator = random.Random(count)
    tokens = 2 * count
    patterns: list[Callable[[], float]] = [
        lambda: generator.uniform(-1, 1),
        lambda: generator.choice([0.0, -0.0, 0.5, -0.25, 1.0]),
        lambda: 1 - generator.randrange(300) * 2**-24,
        lambda: generator.choice([NAN, -1.0, 1e-30]),
    ]
    for pattern in patterns:
        values = torch.tensor([pattern() for _ in range(count)])
        merges = generator.randint(1, count)
        bits = (values + 0.0).view(torch.int32).long() & 0xFFFFFFFF
        bits = torch.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
        keys = torch.where(values.isnan(), 0, bits)
        stored = torch.where(keys >= 2**31, keys - 2**32, keys).int()
        # The plan's first round, with these similarities in the place of the kernel's.
        round_ = (torch.arange(0, tokens, 2), torch.arange(1, tokens, 2), merges)
        plan = make_plan([Image(tokens, 0, [round_])], (16, 16))
        partners = torch.tensor([1 + 2 * generator.randrange(count) for _ in range(count)]).int()
        index, order = select(plan, stored, partners, tokens)
        rank = values.nan_to_num(nan=-2.0).argsort(descending=True, stable=True)
        gone = sorted((2 * rank[:merges]).tolist())
        left = [token for token in range(tokens) if token not in gone]
        expected = torch.zeros(tokens, dtype=torch.int64)
        expected[left] = torch.arange(len(left))
        expected[gone] = expected[partners[torch.tensor(gone) // 2].long()]
        assert index.tolist() == expected.tolist()
        assert order.tolist() == expected.argsort(stable=True).tolist()


def select(plan, keys, partners, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    class Fixed:
        @staticmethod
        def compare(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
            return keys.to(DEVICE), partners.to(DEVICE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_compare", Fixed.compare)
        metric = torch.zeros(tokens, 1, device=DEVICE)
        index, _, order, _ = kernel.match(metric, None, plan.buffer.to(DEVICE), plan)
    return index.cpu(), order.cpu()


# --- means


def test_long_slots() -> None:
    """All tokens into one slot, whose sizes and rows take several blocks."""
    x = 1 + 0.1 * randn(1, 150, 8)
    size = torch.arange(1.0, 151)[None]
    assert_right(Case(x, 75, {"size": size, "partition": "strided", "grid": (1, 150)}))
    assert_right(Case(x, 1, {"size": size, "stride": (1, 200), "partition": "strided"} | GRID))
    assert_right(Case(x.half(), 3, {"stride": (1, 50), "partition": "strided"} | GRID))


GRID = {"grid": (1, 150)}


def test_lone_tokens_are_copied_to_the_bit() -> None:
    x = randn(1, 40, 20)
    size = torch.full((1, 40), 3.0) / 7
    merged = run(Case(x, 30, {"size": size}), "triton").merged
    lone = merged.size[0, merged.index[0]] == size[0].to(merged.size)
    assert int(lone.sum()) >= 20
    assert torch.equal(merged.x[0, merged.index[0]][lone], x[0].to(merged.x)[lone])


def test_float16_sums_do_not_overflow() -> None:
    x = torch.full((1, 64, 4), 60_000.0, dtype=torch.float16)
    results = run(Case(x, 1), "triton")
    assert results.merged.x.eq(60_000).all()
    assert results.grad_x.isfinite().all()


# --- the launchers


def test_what_the_kernels_cannot_take_is_refused() -> None:
    x = torch.zeros(8, 6, device=DEVICE)
    rounds = plan_rounds(8, 5, "alternate", (0, 0), 0, (2, 2), 0)
    plan = make_plan([Image(8, 0, rounds)], (16, 16))
    buffer = plan.buffer.to(DEVICE)
    with pytest.raises(ValueError, match=r"the plan is for tiles of \(16, 16\) rows"):
        kernel.match(x, None, buffer, plan, tiles=(TALL, SMALL))
    with pytest.raises(ValueError, match=r"unit last stride, got strides \(1, 8\)"):
        kernel.match(x.new_zeros(6, 8).T, None, buffer, plan)
    slots = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="unit last stride"):
        move.gather(x.new_zeros(6, 8).T, slots)
