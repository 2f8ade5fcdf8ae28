"""Rows that survive kills and full disks, phases, the display, and no waiting for the device."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.eval import read_metrics
from fastagglo.train.telemetry import PHASES, Telemetry


@pytest.fixture
def make(tmp_path):
    def _make(**arguments):
        options = {"quiet": True, "tensorboard": False, "interval": 5, "total_steps": 20}
        total = (options | arguments).pop("total_steps")
        options = {k: v for k, v in (options | arguments).items() if k != "total_steps"}
        return Telemetry(tmp_path, total, ["clip", "sam"], **options)

    return _make


@pytest.fixture
def metrics(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


def report(telemetry, step, losses=None, **arguments):
    values = {"images": 8, "tokens": 100, "lr": 1e-3, "grad_norm": torch.tensor(2.0)} | arguments
    telemetry.step(step, losses or {"clip": torch.tensor(1.0 + step)}, **values)


def strict_rows(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# Rows.


def test_an_interval_is_one_row_of_averages(make, metrics):
    with make() as telemetry:
        for step in range(10):
            losses = {"clip": torch.tensor(float(step), requires_grad=True), "sam": 0.5}
            if step % 2:
                del losses["sam"]  # a teacher may be absent from a step
            report(
                telemetry,
                step,
                losses,
                grad_norm=torch.tensor(float(step)),
                lr=step / 10,
                skipped={"corrupt": step},
                extra={"ema": torch.tensor(step * 2.0)},
            )
            assert len(metrics.read_text().splitlines()) == (step + 1) // 5
    first, second = strict_rows(metrics)
    assert (first["kind"], first["step"], first["steps"]) == ("train", 4, 5)
    assert first["loss"] == {"clip": 2.0, "sam": 0.5}
    assert second["loss"]["clip"] == second["grad_norm"] == 7.0
    assert second["lr"] == 0.9
    assert second["skipped"] == {"corrupt": 9}
    assert second["extra"] == {"ema": 14.0}
    assert "extra" in first
    assert first["memory_mb"] > 10
    assert abs(first["time"] - time.time()) < 60
    assert first["images_per_second"] == pytest.approx(5 * 8 / first["seconds"])
    assert first["tokens_per_second"] == pytest.approx(5 * 100 / first["seconds"])


def test_the_last_interval_is_written_at_the_end_of_the_run(make, metrics):
    with make(total_steps=7) as telemetry:
        for step in range(7):
            report(telemetry, step)
        assert [row["step"] for row in strict_rows(metrics)] == [4, 6]
    assert [row["steps"] for row in strict_rows(metrics)] == [5, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("x"), RuntimeError("device lost")])
def test_an_interrupted_interval_is_written(make, metrics, error):
    def interrupted():
        with make() as telemetry:
            report(telemetry, 0)
            with telemetry.phase("student"):
                raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        interrupted()
    (row,) = strict_rows(metrics)
    assert row["steps"] == 1


def test_what_is_not_finite_is_null(make, metrics):
    with make() as telemetry:
        for step in range(5):
            loss = math.nan if step == 2 else 1.0
            report(telemetry, step, {"clip": torch.tensor(loss), "sam": math.inf}, grad_norm=None)
        telemetry.event(
            "held_out", step=5, explained=math.nan, nested={"a": [torch.tensor(-math.inf), 1.5]}
        )
    train, event = strict_rows(metrics)
    assert train["loss"] == {"clip": None, "sam": None}
    assert train["grad_norm"] is None
    assert event["explained"] is None
    assert event["nested"] == {"a": [None, 1.5]}


def test_events_are_rows_at_once(make, metrics):
    with make() as telemetry:
        telemetry.event("stage", name="high", index=1)
        report(telemetry, 0)
        telemetry.event("held_out", kind="photos", teacher="clip", explained=np.float32(0.5))
        telemetry.event("warning", file=Path("a/b"), step=7)
        stage, held_out, warning = strict_rows(metrics)
    assert (stage["kind"], stage["name"], stage["step"]) == ("stage", "high", 0)
    # "kind" is taken by the kind of the row.
    assert (held_out["kind"], held_out["data"], held_out["explained"]) == (
        "held_out",
        "photos",
        0.5,
    )
    assert (warning["file"], warning["step"]) == ("a/b", 7)


def test_a_process_that_writes_nothing(make, metrics, tmp_path, capsys):
    with make(enabled=False, quiet=False, tensorboard=True) as telemetry:
        for step in range(20):
            with telemetry.phase("data"):
                report(telemetry, step)
        telemetry.event("stage", name="x")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_use_outside_its_block_is_an_error(make):
    with pytest.raises(RuntimeError, match="must be entered"):
        make().event("stage")
    for name, value in (("interval", 0), ("total_steps", 0), ("start_step", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least .*got {value}"):
            make(**{name: value})


# Resuming.


def test_resuming_drops_the_rows_that_are_made_again(make, metrics):
    with make() as telemetry:
        for step in range(15):
            report(telemetry, step)
            telemetry.event("note", step=step)
    with open(metrics, "a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    with make(start_step=10) as telemetry:
        assert [r["step"] for r in read_metrics(metrics) if r["kind"] == "train"] == [4, 9]
        assert [r["step"] for r in read_metrics(metrics) if r["kind"] == "note"] == [*range(10)]
        for step in range(10, 20):
            report(telemetry, step)
    assert [r["step"] for r in strict_rows(metrics) if r["kind"] == "train"] == [4, 9, 14, 19]
    with make():
        pass  # a new run in an old folder starts afresh
    assert metrics.read_text() == ""


def test_truncation_leaves_the_old_file_or_the_new_one(make, metrics, monkeypatch, tmp_path):
    with make() as telemetry:
        for step in range(15):
            report(telemetry, step)
    before = metrics.read_bytes()

    def killed(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left"):
        make().truncate_after(9)
    assert metrics.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_killed_run_keeps_its_rows(make, metrics):
    child = os.fork()
    if child == 0:
        with make() as telemetry:
            for step in range(13):
                report(telemetry, step)
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert [row["step"] for row in strict_rows(metrics)] == [4, 9]


def test_a_full_disk_names_the_file(make, metrics):
    # A limit on file sizes fails writes as a full disk does: a part is written, then an error.
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        with make() as telemetry:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
            for step in range(1000):
                telemetry.event("note", step=step)

    try:
        with pytest.raises(UserError, match=r"metrics .*metrics\.jsonl: cannot be written.*resume"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    rows = read_metrics(metrics)  # the cut line is left out
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 10


def test_a_row_that_is_cut_by_a_full_disk_is_an_error_at_once(make, metrics):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with make() as telemetry:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                telemetry.event("note", text="x" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert metrics.stat().st_size == 3000
    assert read_metrics(metrics) == []


def test_a_folder_that_is_not_there_names_the_file(make, tmp_path):
    with (
        pytest.raises(UserError, match=r"gone/metrics\.jsonl: cannot be written"),
        Telemetry(tmp_path / "gone", 5, [], quiet=True, tensorboard=False),
    ):
        pass


# Time.


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_phases_are_shares_of_the_interval(make, metrics):
    with make(interval=2) as telemetry:
        for step in range(2):
            for name, seconds in zip(PHASES, (0.01, 0.03, 0.05, 0.0), strict=True):
                with telemetry.phase(name):
                    spin(seconds)
            spin(0.01)
            report(telemetry, step)
    (row,) = strict_rows(metrics)
    assert list(row["phases"]) == list(PHASES)
    assert 0.5 < sum(row["phases"].values()) <= 1
    assert row["phases"]["data"] < row["phases"]["teachers"] < row["phases"]["student"]


def test_overhead_is_all_but_the_work(make, metrics):
    """And the wait for data is a part of it, in milliseconds a step."""
    with make(interval=2) as telemetry:
        for step in range(2):
            for name, seconds in (("data", 0.02), ("student", 0.06)):
                with telemetry.phase(name):
                    spin(seconds)
            spin(0.02)
            report(telemetry, step)
    (row,) = strict_rows(metrics)
    assert row["overhead"] == pytest.approx(1 - row["phases"]["student"])
    assert row["overhead"] > row["phases"]["data"] > 0.02
    assert row["data_wait_ms"] == pytest.approx(1000 * row["phases"]["data"] * row["seconds"] / 2)


def test_flops_are_rates_and_a_share_of_the_peak(make, metrics, capsys):
    with make(interval=2, peak_flops=4e12, quiet=False) as telemetry:
        for step in range(3):
            spin(0.001)
            report(telemetry, step, flops={"student": 3_000_000, "teachers": 1_000_000})
    first, last = strict_rows(metrics)
    assert first["tflops"]["student"] == pytest.approx(6e-6 / first["seconds"])
    assert first["mfu"] == pytest.approx(8e-6 / first["seconds"] / 4)
    assert first["peak_tflops"] == 4
    assert last["tflops"]["teachers"] == pytest.approx(1e-6 / last["seconds"])
    assert "TFLOP/s" in (line := capsys.readouterr().out.splitlines()[0])
    assert "MFU" in line


def test_nested_phases_count_once(make, metrics):
    with make(interval=1) as telemetry:
        with telemetry.phase("student"):
            spin(0.02)
            with telemetry.phase("data"):
                spin(0.06)
            spin(0.02)
        report(telemetry, 0)
    (row,) = strict_rows(metrics)
    assert sum(row["phases"].values()) <= 1
    assert row["phases"]["data"] > row["phases"]["student"] > 0.2


def test_evaluations_do_not_count_as_steps(make, metrics):
    with make(interval=1) as telemetry:
        with telemetry.phase("evaluation"):
            spin(0.2)
        with telemetry.phase("student"):
            spin(0.01)
        report(telemetry, 0)
    (row,) = strict_rows(metrics)
    assert row["seconds"] < 0.1
    assert set(row["phases"]) == {"student"}


class FakeEvent:
    """A CUDA event on a stream whose clock the test sets."""

    clock = 0.0
    recorded = synchronised = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.clock
        FakeEvent.recorded += 1

    def synchronize(self):
        FakeEvent.synchronised += 1

    def elapsed_time(self, end):
        assert FakeEvent.synchronised, "read before it was known to be over"
        return 1000 * (end.at - self.at)


def test_cuda_phases_are_timed_on_the_stream_and_read_once(make, metrics, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    with make(interval=3) as telemetry:
        for step in range(3):
            with telemetry.phase("teachers"):
                FakeEvent.clock += 3.0
            with telemetry.phase("student"):
                FakeEvent.clock += 1.0
            report(telemetry, step)
            assert FakeEvent.synchronised == (1 if step == 2 else 0)
    (row,) = strict_rows(metrics)
    assert FakeEvent.recorded == 12
    # The host's clock says microseconds here: shares still add up to no more than 1.
    assert row["phases"] == pytest.approx({"teachers": 0.75, "student": 0.25})
    assert row["cuda_memory_mb"] == 3


def test_nothing_is_read_from_the_device_before_the_interval_ends(make, metrics):
    """Meta tensors have no values: any attempt to read one raises."""

    def run():
        with make() as telemetry:
            for step in range(4):
                value = torch.empty((), device="meta")
                report(telemetry, step, {"clip": value}, grad_norm=value, extra={"x": value})
            reached.append(metrics.read_text())
            report(telemetry, 4, {"clip": value})

    reached: list[str] = []
    with pytest.raises((NotImplementedError, RuntimeError)):
        run()
    assert reached == [""]


def test_losses_keep_no_graph(make):
    with make() as telemetry:
        weight = torch.ones((), requires_grad=True)
        loss = weight * 2
        report(telemetry, 0, {"clip": loss})
        kept = [v for values in telemetry._values.values() for v in values]
        assert not any(v.requires_grad for v in kept)


def test_a_step_costs_little(make):
    """Under 1 % of a step of 0.3 s, rows included."""
    best = math.inf
    with make(total_steps=10_000) as telemetry:
        for start in range(0, 500, 50):
            began = time.perf_counter()
            for step in range(start, start + 50):
                for name in PHASES:
                    with telemetry.phase(name):
                        pass
                losses = {f"teacher{i}": torch.tensor(0.5) for i in range(6)}
                report(telemetry, step, losses)
            best = min(best, (time.perf_counter() - began) / 50)
    assert best < 0.003


# The display.


def test_without_a_terminal_there_is_a_plain_line_an_interval(make, capsys):
    with make(quiet=False) as telemetry:
        for step in range(10):
            with telemetry.phase("student"):
                spin(0.001)
            report(telemetry, step, {"other": 3.0, "sam": 2.0, "clip": torch.tensor(1.0)})
        telemetry.event("held_out", teacher="clip", explained=0.1)
        telemetry.event("skipped_step", step=9, reason="the loss is not finite")
    text = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in text)
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 5/20 | loss clip 1  sam 2  other 3 | ")
    for word in ("images/s", "tokens/s", "student ", "%", "0:00:0", "left"):
        assert word in lines[0]
    assert lines[2] == "step 9: skipped step: reason the loss is not finite"


def test_quiet_prints_nothing(make, capsys):
    with make(quiet=True) as telemetry:
        for step in range(20):
            report(telemetry, step)
        telemetry.event("skipped_step", reason="x")
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_live_display(make, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with make(quiet=False) as telemetry:
        for step in range(7):
            with telemetry.phase("student"):
                spin(0.001)
            report(telemetry, step, {"clip": 0.25, "sam": math.nan})
        telemetry.event("skipped_step", step=6, reason="[bold]not markup")
    text = terminal.getvalue()
    assert "\x1b[" in text
    for words in ("step 7/20", "35%", "loss clip 0.25  sam nan", "images/s", "student", "left"):
        assert words in text
    assert "[bold]not markup" in text
    assert sys.stdout is terminal  # handed back


def test_a_dumb_terminal_gets_plain_lines(make, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with make(quiet=False) as telemetry:
        for step in range(5):
            report(telemetry, step)
    assert "\x1b" not in terminal.getvalue()


# TensorBoard.


def test_tensorboard_has_the_rows_numbers(make, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make(tensorboard=True) as telemetry:
        for step in range(10):
            with telemetry.phase("student"):
                spin(0.0005)
            report(telemetry, step, {"clip": float(step), "sam": math.nan})
        telemetry.event(
            "held_out", step=10, kind="photos", teacher="clip", resolution=96, explained=0.5
        )
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss/clip")] == [(4, 2.0), (9, 7.0)]
    assert found.Scalars("held_out_explained/photos/clip/96")[0].value == 0.5
    assert 0 < found.Scalars("time/student")[0].value <= 1
    assert "loss/sam" not in found.Tags()["scalars"]
