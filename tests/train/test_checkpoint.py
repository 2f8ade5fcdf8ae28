"""Exact resume, and checkpoints that are complete or absent."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.model import load_student
from fastagglo.train.checkpoint import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
# What a run says about itself and the machine; everything else in a row must repeat.
MEASURED = (
    *("time", "seconds", "images_per_second", "tokens_per_second", "phases", "memory_mb"),
    *("overhead", "data_wait_ms", "tflops", "mfu", "peak_tflops"),
)

# A process of its own stands still at the end of a step until the test lets it go on.
HOLD = """
import time
from pathlib import Path
from fastagglo.train.telemetry import Telemetry
report = Telemetry.step
def step(telemetry, step, *args, **named):
    report(telemetry, step, *args, **named)
    if step == {step}:
        (Path({folder!r}) / "reached").touch()
        deadline = time.monotonic() + 100
        while not (Path({folder!r}) / "go").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
Telemetry.step = step
"""


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


def state(folder: Path, *leave_out: str) -> dict:
    found = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {key: value for key, value in found.items() if key not in ("config", *leave_out)}


@pytest.fixture
def assert_same_run(differences):
    """Every bit of two runs is the same: state, rows and exported student."""

    def check(folder: Path, reference: Path) -> None:
        assert differences(state(folder), state(reference)) == []
        assert rows(folder) == rows(reference)
        ours, theirs = (load_student(f / "student").state_dict() for f in (folder, reference))
        assert differences(ours, theirs) == []

    return check


# The whole run with all that has state or draws random numbers.


@pytest.fixture(scope="module")
def whole(module_tiny):
    """An uninterrupted run of everything: its trainer and folder."""
    return module_tiny.trained(module_tiny.everything())


def test_the_reference_run_uses_every_feature(whole):
    trainer, folder = whole
    batches = [trainer.stream[micro] for micro in range(16)]
    steps = batches[::2]
    assert {batch.plan.window for batch in steps} == {None, 2}
    assert {g.size for b in steps for g in b.plan.groups} == {32, 48, 64}
    assert {g.teachers["lite0"] for b in steps for g in b.plan.groups} == {48, 64}
    assert any(s.any() for b in batches for g in b.groups for s in g.shifts.values())
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    # The balancer learns, the statistics of the second stage are in use, the average follows.
    assert saved["distiller"]["balancer.log_variance"].abs().min() > 0
    # The second stage fitted anew: two steps of 2 images of 4 x 4 cells and 2 of 2 x 2 or 3 x 3.
    assert 2 * (32 + 8) <= saved["distiller"]["fitting.hog.count"] <= 2 * (32 + 18)
    assert saved["distiller"]["bases.lite0._extra_state"] == {"ready": True, "settled": True}
    assert saved["distiller"]["dispersion_lite0"] != 1
    assert saved["ema"]["n_averaged"] == 8
    average = saved["ema"]["module.blocks.0.attn.qkv.weight"]
    assert not torch.equal(average, saved["distiller"]["student.blocks.0.attn.qkv.weight"])
    exported = load_student(folder / "student-average")
    assert torch.equal(exported.blocks[0].attn.qkv.weight, average)
    train = [row for row in rows(folder) if row["kind"] == "train"]
    assert [row["step"] for row in train] == [*range(8)]
    assert all({"hog", "lite0", "mesa"} == row["loss"].keys() for row in train)
    assert {r["step"] for r in rows(folder) if r["kind"] == "held_out"} == {0, 4, 8}


@pytest.mark.parametrize(
    "off",
    [
        {"student": {"drop_path": 0.0}},
        {"student": {"window_probability": 0.0}},
        {"distill": {"teacher_drop": 0.0}},
        {"distill": {"shift_std": 0.0}},
        {"distill": {"mesa_weight": 0.0}},
        {"distill": {"balance": "fixed"}},
        {"optimiser": {"accumulate": 1}},
        {"optimiser": {"layer_decay": 1.0}},
        {"seed": 4},
    ],
    ids=lambda off: json.dumps(off).translate(str.maketrans("", "", '{}" ')),
)
def test_each_feature_changes_the_run(whole, tiny, off, differences):
    _, reference = whole
    quick = {"eval": {"points": 0}}
    _, folder = tiny.trained(tiny.everything(quick, off))
    assert differences(state(folder, "optimiser", "ema"), state(reference, "optimiser", "ema"))


def test_figures_and_workers_leave_the_run_as_it_is(whole, tiny, differences):
    _, reference = whole
    change = {"eval": {"points": 0}, "data": {"workers": 1}, "log": {"interval": 3}}
    _, folder = tiny.trained(tiny.everything(change))
    assert differences(state(folder), state(reference)) == []


@pytest.mark.parametrize("last", [0, 1, 3, 4, 6])
def test_a_stopped_run_goes_on_bit_for_bit(
    whole, tiny, interrupt, monkeypatch, last, assert_same_run
):
    _, reference = whole
    settings = tiny.everything()
    folder = tiny.folder / "run"
    folder.mkdir()
    with monkeypatch.context():
        interrupt(last)
        trainer = tiny.trainer(settings)
        assert not trainer.run(folder)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == last + 1
    assert not (folder / "student").exists()
    monkeypatch.undo()
    torch.rand(7)  # whatever else has drawn numbers meanwhile
    resumed = tiny.trainer(settings, folder)
    assert resumed.step == last + 1
    assert resumed.run(folder)
    assert_same_run(folder, reference)


@pytest.mark.parametrize(("balance", "precision"), [("adaloss", "fp32"), ("ratio", "bf16")])
def test_lamb_and_running_loss_means_go_on_bit_for_bit(
    tiny, interrupt, monkeypatch, balance, precision, assert_same_run
):
    change = {
        "optimiser": {"name": "lamb", "precision": precision},
        "distill": {"balance": balance},
        "eval": {"points": 0},
    }
    settings = tiny.everything(change)
    _, reference = tiny.trained(settings, "reference")
    folder = tiny.folder / "run"
    folder.mkdir()
    interrupt(2)
    assert not tiny.trainer(settings).run(folder)
    monkeypatch.undo()
    assert tiny.trainer(settings, folder).run(folder)
    assert_same_run(folder, reference)


def test_counts_of_skipped_images_go_on(tiny, interrupt, monkeypatch):
    photos = tiny.folder / "photos"
    photos.mkdir()
    for number, path in enumerate(sorted(tiny.photos.iterdir())):
        (photos / path.name).write_bytes(b"broken" if number < 3 else path.read_bytes())
    settings = tiny.settings({"data": {"images": [str(photos)]}})
    _, reference = tiny.trained(settings, "reference")
    folder = tiny.folder / "run"
    folder.mkdir()
    interrupt(2)
    tiny.trainer(settings).run(folder)
    monkeypatch.undo()
    assert tiny.trainer(settings, folder).run(folder)
    assert rows(folder) == rows(reference)
    counts = [row["skipped"]["corrupt"] for row in rows(folder) if row["kind"] == "train"]
    assert counts[2] > 0
    assert counts[3] >= counts[2]


# Real processes.


def held_process(tiny, step: int):
    """A process of train.py that stands still at the end of ``step``, and its run's folder."""
    recipe, folder = tiny.recipe(tiny.everything()), tiny.folder / "run"
    process = tiny.process(
        "--recipe", recipe, "--out", folder, before=HOLD.format(step=step, folder=str(tiny.folder))
    )
    deadline = time.monotonic() + 100
    while not (tiny.folder / "reached").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the run did not get to step {step}: {process.communicate()}")
        time.sleep(0.02)
    return process, folder


def test_ctrl_c_in_a_process_writes_a_checkpoint_that_goes_on(whole, tiny, assert_same_run):
    _, reference = whole
    process, folder = held_process(tiny, 3)
    process.send_signal(signal.SIGINT)
    (tiny.folder / "go").touch()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out.strip() == f"stopped at step 4: go on with python train.py --resume {folder}"
    assert err == ""
    assert {p.name for p in folder.iterdir()} == {"config.toml", "metrics.jsonl", "checkpoint.pt"}
    outcome = tiny.cli("--resume", folder)
    assert (outcome.status, outcome.err) == (0, "")
    assert_same_run(folder, reference)


def test_a_killed_process_goes_on_from_its_last_checkpoint(whole, tiny, assert_same_run):
    _, reference = whole
    process, folder = held_process(tiny, 4)
    process.kill()
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    # Checkpoints come every 3 steps; rows of later steps are there and will be made again.
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3
    assert rows(folder)[-1]["step"] == 4
    outcome = tiny.cli("--resume", folder)
    assert (outcome.status, outcome.err) == (0, "")
    assert_same_run(folder, reference)


# Ends of runs.


def test_a_finished_run_says_so_and_takes_no_step(tiny):
    trainer, folder = tiny.trained(tiny.settings())
    assert trainer.step == 4
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = tiny.cli("--resume", folder)
    assert (outcome.status, outcome.err) == (0, "")
    assert f"run {folder} is finished (4 steps): see {folder / 'report.html'}" in outcome.out
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_was_killed_while_it_wrote_its_report_is_not_finished(
    tiny, monkeypatch, assert_same_run
):
    settings = tiny.settings({"eval": {"points": 1, "photos": 2}, "data": {"holdout_region": 0.3}})
    _, reference = tiny.trained(settings, "reference")
    folder = tiny.folder / "run"
    folder.mkdir()

    def killed(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastagglo.train.loop.write_outcome", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(settings).run(folder)
    monkeypatch.undo()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4
    outcome = tiny.cli("--resume", folder)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.strip().startswith(f"finished: see {folder / 'report.html'}")
    assert (folder / "report.html").is_file()
    assert_same_run(folder, reference)


def test_ctrl_c_before_the_first_step_leaves_a_run_that_goes_on(tiny, monkeypatch, assert_same_run):
    settings = tiny.settings()
    _, reference = tiny.trained(settings, "reference")
    folder = tiny.folder / "run"
    folder.mkdir()
    trainer = tiny.trainer(settings)
    trainer.stop_requested = True
    assert not trainer.run(folder)
    assert tiny.trainer(settings, folder).run(folder)
    assert_same_run(folder, reference)


# The file.


def test_a_kill_during_the_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = save_checkpoint({"format": 1, "step": 1, "x": torch.arange(9)}, tmp_path)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        # Everything is written but not yet in its place.
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint({"format": 1, "step": 2, "x": torch.zeros(9)}, tmp_path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == before
    # What the kill left behind does no harm.
    save_checkpoint({"format": 1, "step": 3, "config": {}}, tmp_path)
    assert load_checkpoint(tmp_path, CPU)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_holds_tensors_and_plain_values_only(whole):
    trainer, folder = whole
    loaded = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert loaded["config"] == trainer.config.to_dict()
    assert loaded["step"] == 8


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other bytes":
        path.write_bytes(b"not a checkpoint\n" * 100)
    elif how == "a tensor":
        torch.save(torch.zeros(3), path)
    elif how == "another program's":
        torch.save({"model": {"w": torch.zeros(3)}, "epoch": 3}, path)
    else:
        state = torch.load(path, weights_only=True)
        del state["distiller"]["student.patch_embed.weight"]
        torch.save(state, path)


@pytest.mark.parametrize(
    "how", ["cut short", "empty", "other bytes", "a tensor", "another program's", "a weight gone"]
)
def test_a_damaged_checkpoint_is_refused(tiny, interrupt, how):
    folder = tiny.folder / "run"
    folder.mkdir()
    interrupt(1)
    tiny.trainer(tiny.settings()).run(folder)
    damage(folder / "checkpoint.pt", how)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    outcome = tiny.cli("--resume", folder)
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"error: checkpoint {folder / 'checkpoint.pt'}: cannot be read (")
    assert "damaged" in line
    assert "start" in line
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_never_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": 1, "config": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path, CPU)
    assert not (tmp_path / "sprung").exists()


# A checkpoint of two blocks takes 20 MB, all else of the run far less than 1 MB.
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
"""


def test_a_full_disk_leaves_the_last_checkpoint(tiny, interrupt, monkeypatch, assert_same_run):
    settings = tiny.settings({"log": {"checkpoint_every": 1}})
    _, reference = tiny.trained(settings, "reference")
    folder = tiny.folder / "run"
    recipe = tiny.recipe(settings)
    interrupt(1)
    assert tiny.cli("--recipe", recipe, "--out", folder).status == 0
    monkeypatch.undo()
    before = (folder / "checkpoint.pt").read_bytes()
    assert len(before) > 6_000_000

    process = tiny.process("--resume", folder, before=FULL_DISK)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2, (out, err)
    (line,) = err.splitlines()
    assert line.startswith(f"error: checkpoint {folder / 'checkpoint.pt'}: cannot be written (")
    assert "File too large" in line
    assert f"go on with --resume {folder}" in line
    assert "making room" in line
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert {p.name for p in folder.iterdir()} == {"config.toml", "metrics.jsonl", "checkpoint.pt"}

    assert tiny.cli("--resume", folder).status == 0
    assert_same_run(folder, reference)
