"""A run from its settings to its folder: what it writes, that it learns, freezing, warm starts."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from fastagglo.data import eval_views
from fastagglo.interop import save_radio
from fastagglo.model import PackedBatch, load_student
from fastagglo.train import load_recipe
from fastagglo.train.telemetry import Telemetry


def rows(folder: Path, kind: str) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [row for row in found if row["kind"] == kind]


def images(count: int = 3, size: int = 64) -> PackedBatch:
    generator = torch.Generator().manual_seed(5)
    return PackedBatch.from_images([torch.rand(count, 3, size, size, generator=generator)])


def weights(trainer, heads: bool) -> dict[str, torch.Tensor]:
    named = trainer.distiller.student.named_parameters()
    return {n: p.detach().clone() for n, p in named if n.startswith("heads.") == heads}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


LITE0 = {"lite0": {"model": "efficientnet-lite0", "layer": "stride16"}}


# The folder of a finished run.


@pytest.fixture(scope="module")
def finished(module_tiny):
    """A run of 60 steps by train.py with everything that a folder can hold."""
    settings = module_tiny.settings(
        {
            "teachers": LITE0,
            "data": {"holdout_photos": 0.2, "holdout_region": 0.3},
            "stages": [
                {
                    "steps": 60,
                    "lr": 3e-3,
                    "warmup_steps": 4,
                    "phi_s_steps": 4,
                    "groups": [{"images": 4, "sizes": [32]}, {"images": 4, "sizes": [64]}],
                }
            ],
            "eval": {"points": 3, "pictures": 2, "photos": 8},
            "log": {"interval": 5, "tensorboard": True, "progress": True},
        }
    )
    folder = module_tiny.folder / "finished"
    outcome = module_tiny.cli("--recipe", module_tiny.recipe(settings), "--out", folder)
    assert (outcome.status, outcome.err) == (0, "")
    return module_tiny.trainer(settings, folder), folder, outcome


def test_what_a_finished_run_says(finished):
    _, folder, outcome = finished
    *lines, last = outcome.out.splitlines()
    assert last == (
        f"finished: see {folder / 'report.html'}; the student is in {folder / 'student'}"
    )
    progress = [line for line in lines if line.startswith("step ") and "images/s" in line]
    assert len(progress) == 12
    for part in ("hog", "lite0", "tokens/s", "data", "teachers", "student", "optimiser", "left"):
        assert part in progress[-1]
    # The figures at start, half-way and end, beside the mean predictor's.
    table = [line for line in lines if "regions" in line and "hog" in line]
    assert len(table) == 2
    assert "step 30" in outcome.out
    assert "mean alone" in outcome.out


def test_what_a_folder_holds(finished):
    _, folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pt",
        "config.toml",
        "metrics.jsonl",
        "pictures",
        "report.html",
        "student",
        "tensorboard",
    }


def test_the_saved_configuration_repeats_the_run(finished):
    trainer, folder, _ = finished
    config = load_recipe(str(folder / "config.toml"))
    mine, theirs = config.to_dict(), trainer.config.to_dict()
    assert {k: v for k, v in mine.items() if k != "recipe"} == {
        k: v for k, v in theirs.items() if k != "recipe"
    }
    # Resolved: settings that the recipe left out are there, where the folder lies is not.
    assert "clip" in (folder / "config.toml").read_text()
    assert str(folder) not in (folder / "config.toml").read_text()


def test_metrics_have_a_row_an_interval_and_figures(finished):
    _, folder, _ = finished
    train = rows(folder, "train")
    assert [row["step"] for row in train] == [*range(4, 60, 5)]
    for row in train:
        assert row["loss"].keys() == {"hog", "lite0"}
        assert row["images_per_second"] * row["seconds"] == pytest.approx(5 * 8)
        # 4 images of 2 x 2 patches and 4 of 4 x 4, each with two CLS and two register tokens.
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(5 * 4 * (8 + 20))
        assert row["phases"].keys() >= {"data", "teachers", "student", "optimiser"}
        assert 0 < sum(row["phases"].values()) <= 1 + 1e-9
    assert [(row["step"], row["name"]) for row in rows(folder, "stage")] == [(0, "main")]
    figures = rows(folder, "held_out")
    assert len(figures) == 3 * 2 * 2 * 2
    assert {(row["step"], row["data"], row["teacher"], row["resolution"]) for row in figures} == {
        (step, data, teacher, size)
        for step in (0, 30, 60)
        for data in ("regions", "photos")
        for teacher in ("hog", "lite0")
        for size in (32, 64)
    }


def test_the_run_learns(finished):
    _, folder, _ = finished
    train = rows(folder, "train")
    for teacher, share in (("hog", 0.95), ("lite0", 0.7)):
        assert train[-1]["loss"][teacher] < share * train[0]["loss"][teacher]
    by_line: dict[tuple[str, int], dict[int, dict]] = {}
    for row in rows(folder, "held_out"):
        if row["data"] == "regions":
            by_line.setdefault((row["teacher"], row["resolution"]), {})[row["step"]] = row
    for line, found in by_line.items():
        assert found[60]["explained"] > found[0]["explained"], line
        # Sixty steps are few for oriented gradients, which end a hair above their mean.
        if line[0] == "lite0":
            assert found[60]["explained"] > found[60]["mean_predictor"] + 0.1, line


def test_tensorboard_has_the_numbers_of_the_rows(finished):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    _, folder, _ = finished
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for teacher in ("hog", "lite0"):
        found = events.Scalars(f"loss/{teacher}")
        expected = [(row["step"], row["loss"][teacher]) for row in rows(folder, "train")]
        assert [event.step for event in found] == [step for step, _ in expected]
        np.testing.assert_allclose([e.value for e in found], [x for _, x in expected], rtol=1e-6)
    assert len(events.Scalars("held_out_explained/regions/hog/64")) == 3


def test_the_exported_student_predicts_in_the_teachers_own_space(finished):
    trainer, folder, _ = finished
    student = load_student(folder / "student").eval()
    distiller = trainer.distiller.eval()
    batch = images()
    with torch.no_grad():
        exported, predicted = student(batch), distiller.predict(batch)
        inside = distiller.student(batch)
    for name in ("hog", "lite0"):
        (ours,), (theirs,) = exported[name].spatial, predicted[name].spatial
        # One matrix product in another order: fp32 rounding of values of this size.
        size = theirs.abs().max()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(size) * 1e-5)
        # The student in training predicts normalised features: the export is not a mere copy.
        assert (inside[name].spatial[0] - theirs).abs().max() > 0.1 * size
    torch.testing.assert_close(exported["lite0"].summary, predicted["lite0"].summary)
    assert exported["hog"].summary is None


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("kind", ["regions", "photos"])
def test_the_figures_are_those_of_the_exported_student(finished, kind, size):
    trainer, folder, _ = finished
    student = load_student(folder / "student").eval()
    source = trainer.data.train if kind == "regions" else trainer.data.held_out
    group = trainer.planner.eval_group(size)
    batches = list(eval_views(source, group, kind, region=0.3, crops=2, limit=8))
    assert batches
    with torch.no_grad():
        for name, teacher in trainer.teachers.items():
            ours = [student(PackedBatch.from_images([b.student]))[name].spatial[0] for b in batches]
            theirs = [teacher(b.teachers[name]).spatial for b in batches]
            prediction = torch.cat([x.flatten(0, 2) for x in ours]).double()
            target = torch.cat([x.flatten(0, 2) for x in theirs]).double()
            error = (prediction - target).square().sum()
            explained = 1 - error / (target - target.mean(0)).square().sum()
            (row,) = (
                row
                for row in rows(folder, "held_out")
                if (row["step"], row["data"]) == (60, kind)
                and (row["teacher"], row["resolution"]) == (name, size)
            )
            assert row["explained"] == pytest.approx(float(explained), abs=1e-4)
            assert row["tokens"] == len(target)


def test_pictures_are_real_pictures(finished):
    from PIL import Image

    _, folder, _ = finished
    found = sorted(path.name for path in (folder / "pictures").iterdir())
    assert found == ["backbone.png", "features-hog.png", "features-lite0.png"]
    for name in found:
        with Image.open(folder / "pictures" / name) as image:
            assert min(image.size) > 100
            assert np.asarray(image.convert("RGB")).std() > 10


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]


def test_the_report_is_one_page_that_needs_nothing_else(finished):
    _, folder, _ = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    parser = _Links()
    parser.feed(page)
    assert all(link.startswith(("data:", "#")) for link in parser.links)
    assert sum(link.startswith("data:image/png;base64,") for link in parser.links) == 3
    assert not {"link", "iframe", "object", "embed"} & set(parser.tags)
    assert not re.search(r"@import|url\((?!['\"]?data:)", page)
    for part in ("hog", "lite0", "regions", "photos", "32", "64", "efficientnet-lite0"):
        assert part in page
    assert "svg" in parser.tags


def test_the_folder_may_move(finished, tmp_path, module_tiny):
    _, folder, _ = finished
    shutil.copytree(folder, tmp_path / "moved")
    outcome = module_tiny.cli("--resume", tmp_path / "moved")
    assert outcome.status == 0
    assert "is finished (60 steps)" in outcome.out


def test_a_run_may_be_replaced_and_only_what_it_wrote_is(tiny):
    _, folder = tiny.trained(tiny.settings())
    (folder / "notes.txt").write_text("mine")
    (folder / "tensorboard").mkdir()
    settings = tiny.settings({"seed": 5, "stages": [{**tiny.settings()["stages"][0], "steps": 2}]})
    outcome = tiny.cli("--recipe", tiny.recipe(settings), "--out", folder, "--overwrite")
    assert (outcome.status, outcome.err) == (0, "")
    assert [row["step"] for row in rows(folder, "train")] == [0, 1]
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "tensorboard").exists()


# A step.


def test_a_step_hands_over_what_the_stream_made(tiny, monkeypatch):
    trainer = tiny.trainer(tiny.everything({"eval": {"points": 0}}))
    seen, averages, drawn = [], [], []
    forward, average = trainer.distiller.forward, trainer.ema.module.forward

    def spy(batch, targets, shifts, **named):
        seen.append((batch, targets, shifts, named))
        drawn.append(torch.initial_seed())
        return forward(batch, targets, shifts, **named)

    def average_spy(batch, **named):
        averages.append((batch, named["window"]))
        return average(batch, **named)

    trainer.distiller.forward, trainer.ema.module.forward = spy, average_spy
    (tiny.folder / "run").mkdir()
    assert trainer.run(tiny.folder / "run")
    assert len(seen) == len(averages) == 16
    # Each micro-step draws position crops, dropped paths and teachers of its own.
    assert len(set(drawn)) == 16
    for micro, (batch, targets, shifts, named) in enumerate(seen):
        expected = trainer.stream[micro]
        assert named["window"] == averages[micro][1] == expected.plan.window
        for index, group in enumerate(expected.groups):
            assert torch.equal(batch.groups[index], group.student)
            assert torch.equal(averages[micro][0].groups[index], group.teachers["ema"])
            assert shifts[index].keys() == group.shifts.keys() == {"hog", "lite0", "ema"}
            assert all(torch.equal(shifts[index][n], shift) for n, shift in group.shifts.items())
            assert torch.equal(named["average_shifts"][index], group.shifts["ema"])
            # Each teacher's features are those of its own view.
            for name, teacher in trainer.teachers.items():
                own = teacher(group.teachers[name]).spatial
                torch.testing.assert_close(
                    targets[index][name].spatial, own, rtol=1e-4, atol=1e-4 * float(own.abs().max())
                )


# Accumulation.


def test_two_micro_steps_see_the_images_of_one_step_and_give_its_gradient(tiny, monkeypatch):
    # Position crops are drawn per micro-step: fixed here, so that the images alone matter.
    monkeypatch.setattr(
        "fastagglo.model.positions.CroppedPositions.crop",
        lambda self, unit, ids, images, generator=None: self._read(
            *_corners(unit * (self.grid - 1), self.grid)
        ),
    )
    found = {}
    for accumulate in (1, 2, 4):
        settings = tiny.settings(
            {
                # Without statistics, which settle on what they have seen so far.
                "teachers": {"hog": {"normaliser": "none"}},
                "optimiser": {"accumulate": accumulate},
                "stages": [{"steps": 1, "groups": [{"images": 4, "sizes": [64]}]}],
            }
        )
        trainer = tiny.trainer(settings)
        gradients = {}

        def keep(trainer=trainer, gradients=gradients):
            named = trainer.distiller.student.named_parameters()
            gradients |= {n: p.grad.clone() for n, p in named if p.grad is not None}

        monkeypatch.setattr(trainer.optimiser, "step", keep)
        folder = tiny.folder / f"accumulate{accumulate}"
        folder.mkdir()
        trainer.run(folder)
        keys = [key for micro in range(accumulate) for key in trainer.stream[micro].keys]
        found[accumulate] = keys, gradients, rows(folder, "train")[0]
    keys, gradients, row = found[1]
    assert len(keys) == 4
    for accumulate in (2, 4):
        others_keys, others, others_row = found[accumulate]
        assert others_keys == keys
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            # Sums over images in another order: fp32 rounding.
            atol = float(gradient.abs().max()) * 1e-4
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=atol)
        assert others_row["loss"]["hog"] == pytest.approx(row["loss"]["hog"], rel=1e-5)
        assert others_row["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert others_row["images_per_second"] * others_row["seconds"] == pytest.approx(4)


def _corners(at, grid):
    from fastagglo.model.positions import corners

    return corners(at, grid)


# Freezing.


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_frozen_trunk_stands_still_while_the_heads_learn(tiny, monkeypatch, name):
    stage = {"lr": 1e-3, "phi_s_steps": 1, "groups": [{"images": 2, "sizes": [32]}]}
    settings = tiny.settings(
        {
            "optimiser": {"name": name, "weight_decay": 0.1},
            "stages": [
                {**stage, "steps": 4, "freeze_trunk_steps": 2},
                {**stage, "steps": 3, "freeze_trunk_steps": 1, "phi_s_steps": 0},
            ],
        }
    )
    trainer = tiny.trainer(settings)
    trunks, heads = [weights(trainer, False)], [weights(trainer, True)]
    report = Telemetry.step

    def step(telemetry, *arguments, **named):
        report(telemetry, *arguments, **named)
        trunks.append(weights(trainer, False))
        heads.append(weights(trainer, True))

    monkeypatch.setattr(Telemetry, "step", step)
    (tiny.folder / "run").mkdir()
    assert trainer.run(tiny.folder / "run")
    assert len(trunks) == 8
    names = set(trunks[0])
    # Steps 0 and 1 of the first stage and step 0 of the second are frozen. In the second stage
    # the optimiser already has momentum to move (and weights to decay), which it must not use.
    still = [moved(a, b) == set() for a, b in itertools.pairwise(trunks)]
    assert still == [True, True, False, False, True, False, False]
    assert moved(trunks[2], trunks[3]) == names
    for before, after in itertools.pairwise(heads):
        assert moved(before, after) == set(before)


# Warm starts.


def warm(tiny, folder: Path, *changes: dict) -> dict:
    """Settings of one step from the student of ``finished``."""
    stage = {"steps": 1, "phi_s_steps": 1, "groups": [{"images": 4, "sizes": [64]}]}
    data = {"holdout_photos": 0.2, "holdout_region": 0.3}
    settings = tiny.settings({"data": data, "stages": [{**stage, "lr": 1e-9}]}, *changes)
    settings["student"]["init"] = str(folder / "student")
    return settings


def test_a_warm_start_begins_where_the_other_run_ended(finished, tiny):
    _, folder, _ = finished
    settings = warm(tiny, folder, {"teachers": LITE0})
    trainer = tiny.trainer(settings)
    batch = images()
    with torch.no_grad():
        theirs = load_student(folder / "student").eval()(batch)
        ours = trainer.distiller.eval().predict(batch)
        for name in ("hog", "lite0"):
            assert torch.equal(ours[name].spatial[0], theirs[name].spatial[0])
        # New statistics change what the heads say inside, not what they say of the teachers: a
        # step at hardly any rate ends with the same student.
        run = tiny.folder / "warm"
        run.mkdir()
    assert trainer.run(run)
    with torch.no_grad():
        after = load_student(run / "student").eval()(batch)
    for name in ("hog", "lite0"):
        expected = theirs[name].spatial[0]
        atol = float(expected.abs().max()) * 1e-4
        torch.testing.assert_close(after[name].spatial[0], expected, rtol=1e-3, atol=atol)

    del settings["student"]["init"]
    _, scratch = tiny.trained(settings, "scratch")
    first, from_scratch = (rows(f, "train")[0]["loss"] for f in (run, scratch))
    for name in ("hog", "lite0"):
        assert first[name] < 0.9 * from_scratch[name]
    (event,) = rows(run, "warm_start")
    assert event["untouched"] == 0
    assert event["skipped"] == 0
    assert event["copied"] > 20


def test_a_warm_start_from_radios_names(finished, tiny):
    _, folder, _ = finished
    theirs = load_student(folder / "student")
    save_radio(theirs, tiny.folder / "radio.safetensors")
    settings = warm(tiny, folder, {"teachers": LITE0})
    student = tiny.trainer(settings).distiller.student.state_dict()
    settings["student"]["init"] = str(tiny.folder / "radio.safetensors")
    trainer = tiny.trainer(settings)
    assert not trainer.warm_start.skipped
    assert moved(trainer.distiller.student.state_dict(), student) == set()


def test_a_warm_start_may_have_other_teachers(finished, tiny):
    _, folder, _ = finished
    new = {"lite1": {"model": "efficientnet-lite1", "layer": "stride16"}}
    settings = warm(tiny, folder, {"teachers": new})
    _, run = tiny.trained(settings, "warm")
    del settings["student"]["init"]
    _, scratch = tiny.trained(settings, "scratch")
    first, from_scratch = (rows(f, "train")[0]["loss"] for f in (run, scratch))
    assert first["hog"] < 0.9 * from_scratch["hog"]
    # A new head starts from the mean of its teacher, like that of a new student.
    assert first["lite1"] < 1.2 * from_scratch["lite1"]
    (event,) = rows(run, "warm_start")
    assert event["untouched"] > 0  # the new head and its CLS token
    assert event["skipped"] > 0  # the head of lite0


def test_a_resumed_run_does_not_start_from_the_other_student_again(
    finished, tiny, interrupt, monkeypatch
):
    _, folder, _ = finished
    start = tiny.folder / "start"
    shutil.copytree(folder / "student", start / "student")
    settings = warm(tiny, start, {"teachers": LITE0})
    settings["stages"] = [{**settings["stages"][0], "steps": 3, "lr": 1e-2}]
    _, reference = tiny.trained(settings, "reference")
    run = tiny.folder / "run"
    run.mkdir()
    interrupt(1)
    assert not tiny.trainer(settings).run(run)
    monkeypatch.undo()
    shutil.rmtree(start)  # a resumed run has no need of it
    assert tiny.trainer(settings, run).run(run)
    assert len(rows(run, "warm_start")) == 1
    ours, theirs = (load_student(f / "student").state_dict() for f in (run, reference))
    assert moved(ours, theirs) == set()
