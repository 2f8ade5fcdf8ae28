"""Who takes which images: `spread` against properties and brute force, and the planner's use."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from fastagglo.errors import UserError
from fastagglo.train import load_recipe
from fastagglo.train.assignment import idle_share, spread
from fastagglo.train.config import GroupSettings, RunConfig, check_config
from fastagglo.train.plan import Assumptions, make_plan
from fastagglo.train.schedule import Planner, on_all_ranks
from fastagglo.train.teacher_shapes import known_specs


def loads(found: np.ndarray, costs: list[float]) -> np.ndarray:
    return np.asarray(costs) @ found


def random_case(rng: np.random.Generator) -> tuple[list[float], list[int], int]:
    kinds, total = int(rng.integers(1, 4)), int(rng.integers(1, 40))
    costs = rng.uniform(1, 100, kinds).tolist()
    counts = rng.integers(0, 60, kinds)
    counts[0] += max(0, total - counts.sum())
    return costs, counts.tolist(), total


class TestSpread:
    def test_every_image_once_and_no_bin_empty(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(200):
            costs, counts, total = random_case(rng)
            found = spread(costs, counts, [range(total)] * len(costs), total)
            assert found.shape == (len(costs), total)
            assert found.sum(axis=1).tolist() == counts
            assert found.min() >= 0
            assert found.sum(axis=0).min() >= 1
            # A millionth of the largest cost is what whole numbers round to.
            work, slack = loads(found, costs), max(costs) * 1e-6 * sum(counts)
            # No bin has more work than another has with one more of its own smallest images.
            smallest = np.where(found > 0, np.asarray(costs)[:, None], np.inf).min(axis=0)
            assert (work - smallest).max() <= work.min() + slack

    def test_images_stay_in_their_bins(self) -> None:
        rng = np.random.default_rng(1)
        for _ in range(200):
            total = int(rng.integers(2, 20))
            cut = int(rng.integers(1, total))
            bins = [range(cut), range(cut, total), range(total)]
            counts = [int(rng.integers(cut, 40)), int(rng.integers(total - cut, 40)), 7]
            found = spread(rng.uniform(1, 100, 3).tolist(), counts, bins, total)
            assert found.sum(axis=1).tolist() == counts
            assert found[0, cut:].sum() == found[1, :cut].sum() == 0
            assert found.sum(axis=0).min() >= 1

    def test_equal_images_are_divided_as_evenly_as_they_can_be(self) -> None:
        for count, total in itertools.product((7, 8, 23), (1, 3, 7)):
            found = spread([3.7], [count], [range(total)], total)[0]
            assert found.max() - found.min() <= 1
            assert (np.diff(found) <= 0).all()  # the first bins take what is left over

    def test_against_every_assignment(self) -> None:
        """Never above Graham's bound, 4/3 - 1/(3 bins), and as good as the best nearly always."""
        rng = np.random.default_rng(2)
        best = 0
        for _ in range(100):
            total = int(rng.integers(2, 4))
            costs = rng.uniform(1, 10, 3).tolist()
            counts = (rng.integers(0, 3, 3) + np.array([total - 1, 0, 1])).tolist()
            images = [cost for cost, n in zip(costs, counts, strict=True) for _ in range(n)]
            optimum = min(
                np.bincount(places, images, total).max()
                for places in itertools.product(range(total), repeat=len(images))
                if len(set(places)) == total
            )
            found = loads(spread(costs, counts, [range(total)] * 3, total), costs).max()
            assert optimum * (1 - 1e-12) <= found <= optimum * (4 / 3 - 1 / (3 * total)) + 1e-4
            best += found < optimum * 1.0001
        assert best >= 80

    def test_images_of_recipes_leave_little_to_wait_for(self) -> None:
        """Small images fill up what large ones leave: within one small image of each other."""
        costs = [1.0, 137.0]
        found = loads(spread(costs, [4096, 100], [range(64)] * 2, 64), costs)
        assert found.max() - found.min() <= 137.0
        found = loads(spread(costs, [40_960, 100], [range(64)] * 2, 64), costs)
        assert found.max() - found.min() <= 1.0

    def test_a_chain_of_moves_when_the_last_bin_would_be_empty(self) -> None:
        # The dear image goes to bin 0, the cheap ones of bins 0 and 1 to bin 1, bin 2 has its own:
        # only the dear one may go to bin 3, and then a cheap one must take its place.
        bins = [range(4), range(2), [2, 3]]
        assert spread([100.0, 1.0, 2.0], [1, 4, 1], bins, 4).tolist() == [
            [0, 0, 0, 1],
            [1, 3, 0, 0],
            [0, 0, 1, 0],
        ]

    def test_too_few_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match="bin 2 of 3 is left without an image"):
            spread([1.0, 2.0], [1, 1], [range(3)] * 2, 3)
        with pytest.raises(ValueError, match="bin 2 of 3"):
            spread([1.0, 2.0], [5, 1], [range(2), [0]], 3)

    def test_idle_share(self) -> None:
        assert idle_share(np.array([[4.0, 4.0], [1.0, 1.0]])) == 0
        # Of 2 ranks x (4 + 2), 3 + 1 are waited for.
        assert idle_share(np.array([[4.0, 1.0], [1.0, 2.0]])) == pytest.approx(4 / 12)


def with_images(config: RunConfig, *images: int) -> RunConfig:
    """A recipe's last stage alone, with other numbers of images, in a few steps a stage."""
    groups = tuple(
        dataclasses.replace(group, images=count)
        for group, count in zip(config.stages[-1].groups, images, strict=True)
    )
    stage = dataclasses.replace(config.stages[-1], steps=3, groups=groups)
    return dataclasses.replace(config, stages=(stage, stage))


def plans(config: RunConfig, world: int, micro_step: int) -> list:
    return [
        Planner(config, known_specs(config), 16, world=world, rank=rank)(micro_step)
        for rank in range(world)
    ]


class TestPlanner:
    @pytest.mark.parametrize(("images", "world", "accumulate"), [((13, 3), 5, 1), ((20, 4), 5, 2)])
    def test_each_image_of_a_run_is_seen_once(
        self, images: tuple[int, int], world: int, accumulate: int
    ) -> None:
        config = with_images(load_recipe("c-radio-v4-h"), *images)
        optimiser = dataclasses.replace(config.optimiser, accumulate=accumulate)
        config = dataclasses.replace(config, optimiser=optimiser)
        seen: list[int] = []
        for step in range(6):  # over the border of two stages
            planner = Planner(config, known_specs(config), 16, world=world)
            whole = planner.whole(step)
            assert [group.count for group in whole.groups] == list(images)
            of_size = dict.fromkeys((group.size for group in whole.groups), 0)
            for micro in range(accumulate):
                for plan in plans(config, world, step * accumulate + micro):
                    assert plan.window == whole.window
                    assert plan.images >= 1
                    assert all(group.count >= 1 for group in plan.groups)
                    for group in plan.groups:
                        of_size[group.size] += group.count
                    seen += range(plan.start, plan.start + plan.images)
            assert list(of_size.values()) == list(images)
            assert 0 < whole.idle < 1
        assert seen == list(range(6 * sum(images)))

    def test_equal_shares_are_what_they_always_were(self) -> None:
        """The same number of each group on every rank, ranks of a micro-step side by side."""
        config = load_recipe("c-radio-v4-h")
        config = dataclasses.replace(
            config, optimiser=dataclasses.replace(config.optimiser, accumulate=2)
        )
        step = config.stages[0].steps + 5
        before = 1024 * config.stages[0].steps + 5 * 1152
        whole = Planner(config, known_specs(config), 16, world=4).whole(step)
        assert whole.idle == 0
        for micro in range(2):
            for rank, plan in enumerate(plans(config, 4, 2 * step + micro)):
                expected = [dataclasses.replace(g, count=g.count // 8) for g in whole.groups]
                assert list(plan.groups) == expected
                assert [group.count for group in plan.groups] == [128, 16]
                assert plan.start == before + 144 * (4 * micro + rank)

    def test_work_is_spread_by_cost_and_not_by_count(self) -> None:
        config = with_images(load_recipe("c-radio-v4-h"), 256, 8)
        planner = Planner(config, known_specs(config), 16, world=16)
        counts = planner.whole(0).counts[:, 0]
        assert counts[1].tolist() == [1] * 8 + [0] * 8
        large, small = counts[0, :8], counts[0, 8:]
        assert large.max() < small.min()  # who has a large image has fewer small ones

    def test_all_ranks_and_workers_agree(self) -> None:
        config = with_images(load_recipe("c-radio-v4-h"), 13, 3)
        first, last = (
            Planner(config, known_specs(config), 16, world=5, rank=rank) for rank in (0, 4)
        )
        for step in (4, 0):
            assert np.array_equal(first.whole(step).counts, last.whole(step).counts)

    def test_tokens_are_those_of_all_ranks(self) -> None:
        groups = (GroupSettings(images=3, sizes=(32,)), GroupSettings(images=2, sizes=(64,)))
        config = load_recipe("c-radio-v4-h")
        student = dataclasses.replace(config.student, windows=(2,))
        stage = dataclasses.replace(config.stages[0], groups=groups)
        config = dataclasses.replace(config, stages=(stage,), student=student)
        whole = Planner(config, known_specs(config), 16, world=2).whole(0)
        assert whole.images == 5
        assert whole.tokens(10) == 3 * (4 + 10) + 2 * (16 + 10)


def partitioned(config: RunConfig, *groups: GroupSettings, accumulate: int = 1) -> RunConfig:
    stage = dataclasses.replace(config.stages[-1], steps=3, phi_s_steps=1, groups=groups)
    optimiser = dataclasses.replace(config.optimiser, accumulate=accumulate)
    return dataclasses.replace(config, stages=(stage,), optimiser=optimiser)


SMALL = GroupSettings(images=40, sizes=(256,), ranks=(0, 3), teachers=("siglip2", "dinov3"))
LARGE = GroupSettings(images=6, sizes=(768, 1152), ranks=(4, 6), teachers=("sam3",))
ANYWHERE = GroupSettings(images=6, sizes=(384,))


class TestPartitions:
    def planner(self, *groups: GroupSettings, rank: int = 0, **options: int) -> Planner:
        config = partitioned(load_recipe("c-radio-v4-h"), *groups, **options)
        check_config(config)
        return Planner(config, known_specs(config), 16, 7, rank)

    def test_ranks_have_their_own_images_and_teachers(self) -> None:
        seen: list[int] = []
        for micro in range(2):
            for rank in range(7):
                planner = self.planner(SMALL, LARGE, ANYWHERE, rank=rank, accumulate=2)
                plan = planner(2 + micro)
                seen += range(plan.start, plan.start + plan.images)
                for group in plan.groups:
                    if group.size == 256:
                        assert rank <= 3
                        assert set(group.teachers) == {"siglip2", "dinov3", "ema"}
                    elif group.size > 384:
                        assert rank >= 4
                        assert set(group.teachers) == {"sam3", "ema"}
                    else:
                        assert set(group.teachers) == {"siglip2", "dinov3", "sam3", "ema"}
        assert seen == list(range(52, 104))  # all of the second step's, once
        whole = planner.whole(1)
        assert whole.counts.sum(axis=(1, 2)).tolist() == [40, 6, 6]
        assert np.array_equal(whole.counts[:, 0], whole.counts[:, 1])  # each weighs the same
        assert whole.idle > 0

    def test_a_rank_needs_its_teachers_only(self) -> None:
        found = [self.planner(SMALL, LARGE, rank=rank).teachers_of_rank() for rank in (3, 4)]
        assert found == [{"siglip2", "dinov3"}, {"sam3"}]

    def test_a_rank_in_no_range_is_refused(self) -> None:
        far = dataclasses.replace(LARGE, ranks=(5, 6))
        with pytest.raises(UserError, match=r"stages\.0\.groups: rank 4 of 7 is in no group's"):
            self.planner(SMALL, far)

    def test_too_few_images_for_a_range_are_refused(self) -> None:
        few = dataclasses.replace(LARGE, images=2)
        with pytest.raises(UserError, match=r"stages\.0\.groups: too few images for the ranks"):
            self.planner(SMALL, few)
        self.planner(SMALL, few, ANYWHERE)  # others may fill up

    def test_a_plan_knows_of_them(self) -> None:
        config = partitioned(load_recipe("c-radio-v4-h"), SMALL, LARGE)
        alike = on_all_ranks(config)
        plans = [make_plan(c, 7, "h100", Assumptions()).stages[0] for c in (config, alike)]
        sam = [next(t.flops for t in plan.teachers if t.name == "sam3") for plan in plans]
        every = make_plan(
            partitioned(config, *(dataclasses.replace(g, teachers=None) for g in (SMALL, LARGE))),
            7,
            "h100",
            Assumptions(),
        ).stages[0]
        assert sam[0] == sam[1] < next(t.flops for t in every.teachers if t.name == "sam3")
        # Large images on three of seven ranks: two each, and the others wait.
        assert plans[0].memory["activations"] > plans[1].memory["activations"]
        assert plans[0].seconds["uneven ranks"] > plans[1].seconds["uneven ranks"]
