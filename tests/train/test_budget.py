"""Steps of a fixed number of tokens: what fills them, what they leave alone, one compiled graph."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastagglo.data import TrainBatch
from fastagglo.errors import UserError
from fastagglo.teachers import TeacherSpec
from fastagglo.train import budget
from fastagglo.train.budget import Budget, fill, image_tokens, stage_budgets
from fastagglo.train.schedule import Planner

HOG = {"hog": TeacherSpec("hog", None, 16, 16, (0.0,) * 3, (1.0,) * 3, None, 36)}
# Of the tiny run: 16 + 3 tokens for 64 pixels, 4 + 3 for 32.
MIXED = {
    "stages": [
        {
            "steps": 4,
            "lr": 1e-3,
            "phi_s_steps": 2,
            "freeze_trunk_steps": 1,
            "tokens": 75,
            "groups": [{"images": 2, "sizes": [32, 48]}, {"images": 1, "sizes": [64, 32]}],
        }
    ]
}


class TestFill:
    def test_fills_all_but_less_than_the_shortest(self) -> None:
        random = np.random.default_rng(0)
        for _ in range(500):
            lengths = random.integers(1, 60, random.integers(1, 5)).tolist()
            weights = random.integers(1, 40, len(lengths)).tolist()
            capacity = int(random.integers(max(lengths), 1000))
            counts = fill(lengths, weights, capacity, random)
            used = sum(n * length for n, length in zip(counts, lengths, strict=True))
            assert min(counts) >= 0
            assert sum(counts) >= 1
            assert capacity - min(lengths) < used <= capacity

    def test_is_in_proportion_on_average(self) -> None:
        random = np.random.default_rng(0)
        lengths, weights, capacity = [8, 72, 20], [12, 1, 3], 500
        counts = np.array([fill(lengths, weights, capacity, random) for _ in range(4000)])
        expected = np.array(weights) * capacity / np.dot(weights, lengths)
        # The standard error of a rounding that is up with some probability is at most 0.5 / 63; of
        # the shortest images up to one is lost to the remainder.
        assert abs(counts.mean(axis=0) - expected)[1:] == pytest.approx([0, 0], abs=0.04)
        assert expected[0] - 1 <= counts[:, 0].mean() <= expected[0]

    def test_small_budgets(self) -> None:
        random = np.random.default_rng(0)
        assert fill([7], [3], 7, random) == [1]
        assert all(sum(fill([50, 7], [1, 1000], 50, random)) >= 1 for _ in range(50))


def test_every_rank_and_step_has_the_same_capacity(tiny) -> None:
    config = tiny.config(tiny.settings(MIXED, {"optimiser": {"accumulate": 2}}))
    planner, plans = Planner(config, HOG, 16), []
    assert planner.budgets == [Budget(37, 5)]
    for micro in range(8):
        plan = planner(micro)
        assert (plan.capacity, plan.max_images) == (37, 5)
        used = sum(g.count * image_tokens(config, g.size, 16) for g in plan.groups)
        assert 37 - 19 < used <= 37
        assert 1 <= plan.images <= 5
        assert all(g.count for g in plan.groups)
        plans.append(plan)
    # Image after image.
    starts = [plan.start for plan in plans]
    assert starts == [sum(plan.images for plan in plans[:micro]) for micro in range(8)]
    # Both micro-steps alike, steps not all.
    plans = [replace(plan, start=None) for plan in plans]
    assert plans[::2] == plans[1::2]
    assert len(set(map(repr, plans))) > 1
    one = Planner(tiny.config(tiny.settings(MIXED)), HOG, 16)
    two = Planner(tiny.config(tiny.settings(MIXED)), HOG, 16, world=2)
    assert (one.budgets, two.budgets) == ([Budget(75, 10)], [Budget(37, 5)])


def test_tokens_of_an_image_are_those_of_the_student(tiny) -> None:
    config = tiny.config(tiny.everything())
    student = tiny.trainer(tiny.everything()).distiller.student.config
    assert image_tokens(config, 64, 16) == 4 * 4 + student.prefix_tokens


def test_counts_images_over_ranks_and_stages(tiny) -> None:
    """No image of an epoch comes twice: each rank goes on where the last one ended."""
    counted = {"steps": 2, "groups": [{"images": 5, "sizes": [32]}]}
    stages = [MIXED["stages"][0], counted, MIXED["stages"][0]]
    config = tiny.config(tiny.settings({"stages": stages}))
    ranks = [Planner(config, HOG, 16, world=2, rank=rank) for rank in range(2)]
    expected = 0
    for step in range(10):
        for rank in ranks:
            plan = rank(step)
            assert plan.start == expected
            assert (plan.capacity is None) == (step in (4, 5))
            expected += plan.images
    # A run that goes on there has the same numbers.
    again = Planner(config, HOG, 16, world=2, rank=1)
    assert again(9) == ranks[1](9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 18}, r"stages\.0\.tokens is 18: an image of 64 pixels has 19 tokens; .* 19"),
        ({"tokens": -1}, r"setting stages\.0\.tokens is -1: it must be at least 0"),
    ],
)
def test_refuses(tiny, changes: dict, message: str) -> None:
    stage = {**MIXED["stages"][0], **changes}
    with pytest.raises(UserError, match=message):
        stage_budgets(tiny.config(tiny.settings({"stages": [stage]})), 16, 1)
    share = tiny.config(tiny.settings({"stages": [{**stage, "tokens": 40}]}))
    with pytest.raises(UserError, match=r"give at least 76.*\(4 ranks x micro-steps\)"):
        stage_budgets(share, 16, 4)


def test_compile_needs_tokens(tiny) -> None:
    with pytest.raises(UserError, match=r"stages\.0\.tokens is 0: student\.compile needs"):
        tiny.config(tiny.settings({"student": {"compile": True}}))


def test_loss_and_gradients_are_those_of_the_batch_as_it_is(tiny) -> None:
    """The dummies are outside of attention and loss."""
    settings = tiny.everything(
        {"student": {"drop_path": 0.0}, "distill": {"teacher_drop": 0.0}, "optimiser": {}}
    )
    for stage in settings["stages"]:
        stage["tokens"] = 150
    trainer = tiny.trainer(settings)
    trainer.distiller.double()
    found = []
    for micro in (0, 2, 8):
        batch: TrainBatch = trainer.stream[micro]
        assert batch.plan.capacity == 75
        targets = trainer._targets(batch.groups)
        for given in (batch, _without_capacity(batch)):
            torch.manual_seed(micro)
            trainer.distiller.zero_grad(set_to_none=True)
            output = trainer._forward(given, targets)
            output.total.backward()
            gradients = {n: p.grad for n, p in trainer.distiller.named_parameters()}
            found.append((output.total, output.teachers, gradients))
        # fp64, but for teachers and loss sums in fp32.
        torch.testing.assert_close(found[-1], found[-2], rtol=1e-4, atol=1e-6)


def _without_capacity(batch: TrainBatch) -> TrainBatch:
    return replace(batch, plan=replace(batch.plan, capacity=None, max_images=None))


def test_resumes_exactly(tiny, interrupt, differences) -> None:
    settings = tiny.settings(MIXED)
    whole, _ = tiny.trained(settings, "whole")
    folder = tiny.folder / "parts"
    folder.mkdir()
    interrupt(1)
    first = tiny.trainer(settings)
    assert not first.run(folder)
    rest = tiny.trainer(settings, folder)
    assert rest.step == 2
    assert rest.run(folder)
    state = whole.distiller.student.state_dict()
    assert differences(rest.distiller.student.state_dict(), state) == []


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """torch.compile without the slow part, code generation, that counts its graphs."""
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("aot_eager")
    compiler = functools.partial(torch.compile, backend=counting)
    monkeypatch.setattr(budget.torch, "compile", compiler)
    yield counting
    torch._dynamo.reset()


def test_a_run_compiles_its_student_once(tiny, counter) -> None:
    """Statistics settle on the way; nothing else changes but the mix."""
    stage = {**MIXED["stages"][0], "steps": 12, "freeze_trunk_steps": 0}
    settings = tiny.settings({"stages": [stage]})
    eager, _ = tiny.trained(settings, "eager")
    compiled, _ = tiny.trained(tiny.settings(settings, {"student": {"compile": True}}), "compiled")
    assert counter.frame_count == 1
    plans = [compiled.planner(step) for step in range(12)]
    assert len({tuple((g.size, g.count) for g in plan.groups) for plan in plans}) >= 4
    ours, theirs = (t.distiller.student.state_dict() for t in (compiled, eager))
    for name, value in theirs.items():
        # The same operators; AdamW turns a last bit of a small gradient into more.
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-3)


def test_a_frozen_trunk_and_the_average_are_graphs_of_their_own(tiny, counter) -> None:
    settings = tiny.settings(
        MIXED, {"student": {"compile": True}, "distill": {"ema_decay": 0.9, "mesa_weight": 0.1}}
    )
    tiny.trained(settings)
    assert counter.frame_count == 3
