"""``python -m bench.step``: shares that add up, telemetry by turns, options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import step_profile
from fastagglo.train.recipe import load_recipe

QUICK = [
    *("--threads", "1", "--steps", "2", "--student.depth", "1", "--log.no-tensorboard"),
    *("--log.interval", "1"),
]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    assert step_profile.main([*QUICK, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    share = {name: values[1] for name, values in found["share"].items()}
    assert set(share) == {"data", "teachers", "student", "optimiser", "between", "overhead"}
    # Medians of two rows: their sums need not be exact.
    assert sum(v for n, v in share.items() if n != "overhead") == pytest.approx(1, abs=0.1)
    assert share["overhead"] == pytest.approx(share["data"] + share["between"], abs=0.1)
    assert found["ms"]["student"][1] < found["step_ms"][1]
    assert 0 < found["telemetry"]["own_share"] < 1
    assert found["mfu"] > 0
    text = capsys.readouterr().out
    for words in ("demo on cpu", "overhead", "goal at most 3%", "telemetry on / off", "TFLOP/s"):
        assert words in text


def test_every_step_is_profiled_in_its_steady_state() -> None:
    config = step_profile.settled(load_recipe("demo"), 30)
    assert config.total_steps == 30
    assert config.stages[0].phi_s_steps == 1
    assert config.eval.points == 0


def test_what_is_wrong_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in (
        (["--steps", "0"], "--steps"),
        (["--data.images", "/no/such/folder"], "/no/such/folder"),
    ):
        with pytest.raises(SystemExit):
            step_profile.main([*QUICK, *arguments])
        assert word in capsys.readouterr().err
