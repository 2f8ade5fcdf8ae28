"""Batches that are not finite: skipped, counted, and a stop after a set number in a row."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.model import load_student


def rows(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def spoil(trainer, steps: set[int], name: str = "hog", value: float = float("nan")) -> None:
    """Let one number of a teacher's features be ``value`` in some steps."""
    teacher = trainer.teachers[name]
    forward = teacher.forward

    def spoilt(images):
        features = forward(images)
        if trainer.step in steps:
            features.spatial[0, 0, 0, 3] = value
        return features

    teacher.forward = spoilt


@pytest.fixture
def states(monkeypatch):
    """Copies of what would be in a checkpoint after each step."""
    found: list[dict] = []

    def keep(state: dict, folder: Path) -> None:
        found.append(copy.deepcopy(state))

    monkeypatch.setattr("fastagglo.train.loop.save_checkpoint", keep)
    return found


PARTS = ("distiller", "optimiser", "ema")


@pytest.fixture
def changed(differences):
    """Where two states differ in what was learned, but for the rate of the step's schedule."""

    def compare(before: dict, after: dict) -> list[str]:
        found = [d for part in PARTS for d in differences(before[part], after[part], part)]
        return [place for place in found if ".lr" not in place]

    return compare


BUSY = {
    "distill": {"ema_decay": 0.9, "balance": "uncertainty"},
    "log": {"checkpoint_every": 1, "max_bad_steps": 3},
}


# Within the fit of the statistics (two steps), at its end, and after it.
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_batch_of_a_teacher_changes_nothing(tiny, states, changed, bad, value):
    trainer = tiny.trainer(tiny.settings(BUSY))
    (tiny.folder / "run").mkdir()
    initial = copy.deepcopy(trainer._state())
    spoil(trainer, {bad}, value=value)
    assert trainer.run(tiny.folder / "run")
    (row,) = rows(tiny.folder / "run", "skipped_step")
    assert row["step"] == bad
    assert row["reason"] == "features of hog are not finite"
    assert [r["step"] for r in rows(tiny.folder / "run", "train")] == [
        step for step in range(4) if step != bad
    ]
    before, after = [initial, *states][bad], states[bad]
    if bad == 1:
        # The fit ends here, on what it has seen: the first batch. Only the basis may change.
        assert after["distiller"]["bases.hog._extra_state"] == {"ready": True, "settled": True}
        for key, value_before in before["distiller"].items():
            if key.startswith(("student.blocks", "fitting.", "balancer.")):
                assert torch.equal(after["distiller"][key], value_before), key
    else:
        assert changed(before, after) == []
    # Then the run goes on learning, with settled statistics and finite weights.
    assert changed(after, states[3])
    assert states[3]["distiller"]["bases.hog._extra_state"]["settled"]
    assert all(p.isfinite().all() for p in trainer.distiller.student.parameters())
    assert states[3]["bad_steps"] == 0


def test_a_loss_that_is_not_finite_changes_nothing(tiny, states, changed):
    trainer = tiny.trainer(tiny.settings(BUSY))
    (tiny.folder / "run").mkdir()
    spoil(trainer, {2}, value=1e30)  # finite, its square is not
    assert trainer.run(tiny.folder / "run")
    (row,) = rows(tiny.folder / "run", "skipped_step")
    assert (row["step"], row["reason"]) == (2, "the loss is not finite")
    assert changed(states[1], states[2]) == []
    assert changed(states[2], states[3])


def test_a_gradient_that_is_not_finite_changes_nothing(tiny, states, changed):
    trainer = tiny.trainer(tiny.settings(BUSY))
    (tiny.folder / "run").mkdir()
    weight = trainer.distiller.student.blocks[0].attn.qkv.weight
    weight.register_hook(lambda g: g * float("inf") if trainer.step == 2 else g)
    assert trainer.run(tiny.folder / "run")
    (row,) = rows(tiny.folder / "run", "skipped_step")
    assert (row["step"], row["reason"]) == (2, "the gradient is not finite")
    assert changed(states[1], states[2]) == []
    assert changed(states[2], states[3])


def test_one_bad_micro_step_skips_the_whole_step(tiny, states, changed):
    settings = tiny.settings(BUSY, {"optimiser": {"accumulate": 2}})
    trainer = tiny.trainer(settings)
    (tiny.folder / "run").mkdir()
    calls = []
    forward = trainer.teachers["hog"].forward

    def second_is_bad(images):
        features = forward(images)
        calls.append(trainer.step)
        if calls.count(2) == 3:  # two sizes a micro-step: the second micro-step of step 2
            features.spatial[:] = float("nan")
        return features

    trainer.teachers["hog"].forward = second_is_bad
    assert trainer.run(tiny.folder / "run")
    assert [row["step"] for row in rows(tiny.folder / "run", "skipped_step")] == [2]
    assert changed(states[1], states[2]) == []


def test_a_bad_step_now_and_then_does_not_stop_the_run(tiny):
    stage = tiny.settings()["stages"][0]
    settings = tiny.settings({"stages": [{**stage, "steps": 9}], "log": {"max_bad_steps": 2}})
    trainer = tiny.trainer(settings)
    (tiny.folder / "run").mkdir()
    spoil(trainer, {2, 4, 6, 8})
    assert trainer.run(tiny.folder / "run")
    assert [row["step"] for row in rows(tiny.folder / "run", "skipped_step")] == [2, 4, 6, 8]


def test_bad_steps_in_a_row_stop_the_run_and_a_mended_teacher_goes_on(tiny):
    stage = tiny.settings()["stages"][0]
    settings = tiny.settings(
        {"stages": [{**stage, "steps": 8}], "log": {"max_bad_steps": 3, "checkpoint_every": 3}}
    )
    _, reference = tiny.trained(settings, "reference")
    trainer = tiny.trainer(settings)
    folder = tiny.folder / "run"
    folder.mkdir()
    spoil(trainer, {3, 4, 5, 6, 7})
    with pytest.raises(UserError) as caught:
        trainer.run(folder)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("step 5", "hog", "not finite", "3 steps in a row", "log.max_bad_steps", "dtype"):
        assert part in line
    assert [row["step"] for row in rows(folder, "skipped_step")] == [3, 4, 5]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3
    assert not (folder / "student").exists()
    # The teacher mended, the run goes on as if nothing had been.
    assert tiny.trainer(settings, folder).run(folder)
    assert rows(folder, "skipped_step") == []
    ours, theirs = (load_student(f / "student").state_dict() for f in (folder, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_teacher_that_is_never_finite_is_named(tiny):
    trainer = tiny.trainer(tiny.settings())
    (tiny.folder / "run").mkdir()
    spoil(trainer, {0, 1, 2, 3})
    with pytest.raises(UserError, match=r"'hog'.*finite.*dtype"):
        trainer.run(tiny.folder / "run")


def test_bad_steps_are_shown(tiny, capsys):
    trainer = tiny.trainer(tiny.settings({"log": {"progress": True}}))
    (tiny.folder / "run").mkdir()
    spoil(trainer, {2})
    assert trainer.run(tiny.folder / "run")
    assert "step 2: skipped step: reason features of hog are not finite" in capsys.readouterr().out
