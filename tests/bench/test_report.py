"""The kept results: medians, intervals, rates, roofs, curves, goals, and their size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bench import intervals, report, roofline
from bench.summary import summary


@pytest.fixture
def small() -> dict[str, Any]:
    """Raw results of one case, by hand."""
    ours = {"memory_bytes": 10_000_000, "input_bytes": 5_000_000, "saved_bytes": 1e6, "repeats": 2}
    theirs = ours | {"memory_bytes": 40_000_000, "seconds": [0.8, 0.8, 1.0, 1.2], "repeats": 4}
    info = {
        "suite": "loss",
        "case": "one",
        "facts": {"label": "1", "pass": "forward", "flops": 6e9, "bytes": 2e9, "dtype": "float32"},
        "rows": {
            "fastagglo": ours | {"tokens": 7, "compile_seconds": 1.23456},
            "eager": theirs | {"saved_bytes": 4e6},
        },
        "absent": {"liger": "not installed"},
    }
    suite = {
        "peers": {"fastagglo": "fastagglo", "eager": "Eager", "liger": "Liger"},
        "rows": "label",
        "notes": {"saved_bytes": "kept"},
        "goals": [{"case": "one", "peer": "eager", "time": 1.0, "memory": 0.2}],
        "seconds": 3.14159,
        "skipped": {"a": "no", "b": "no", "c": "never"},
        "failed": {"test_duel[two]": "AssertionError: eager differs"},
    }
    about = {"device": "CPU", "cpu": "A CPU", "threads": 2, "commit": "abc1234"}
    about["versions"] = {"torch": "2.14.1"}
    roofs = {"copy_gb_s": 40.0, "matmul_tflops": {"float32": 0.2}}
    return {
        "machine_info": {"bench": about},
        "bench": {"suites": {"loss": suite}, "roofline": roofs, "seconds": 9.87654},
        "benchmarks": [{"extra_info": info, "stats": {"data": [0.2, 0.4, 0.4, 0.6]}}],
    }


def test_results_by_hand(small: dict[str, Any]) -> None:
    found = report.condense(small, "python -m bench --suite loss")
    suite = found["suites"]["loss"]
    (duel,) = suite["duels"]
    ours, theirs = duel["rows"]
    assert ours["peer"] == "fastagglo"
    assert ours["samples_ms"] == [100, 200, 200, 300]  # two calls a round
    assert ours["ms"][1] == 200
    assert 30 < ours["ms"][0] < 150
    assert 250 < ours["ms"][2] < 1000
    assert (ours["memory_mb"], ours["input_mb"], ours["saved_mb"]) == (10, 5, 1)
    assert (ours["tokens"], ours["compile_seconds"]) == (7, 1.235)
    # 6 GFLOP and 2 GB in 0.2 s; 2 GB take 50 ms at 40 GB/s, 6 GFLOP 30 ms at 200 GFLOP/s.
    assert (ours["tflops"], ours["gb_s"], ours["of_roofline"]) == (0.03, 10, 0.25)
    assert duel["roof"] == {"ms": 50, "limit": "memory"}
    ratio = theirs["ours_over_theirs"]
    assert ratio["time"][1] == 0.9  # of 0.5, 1, 0.8 and 1
    assert (ratio["memory"], ratio["saved"]) == (0.25, 0.25)
    assert ratio["memory_with_inputs"] == 0.3333
    assert theirs["goal"] == {"time": 1.0, "memory": 0.2}
    assert suite["skipped"] == [
        {"reason": "no", "tests": 2, "first": "a"},
        {"reason": "never", "tests": 1, "first": "c"},
    ]
    assert suite["failed"] == [{"test": "test_duel[two]", "why": "AssertionError: eager differs"}]
    assert suite["notes"] == {"saved_mb": "kept"}
    assert "fits" not in suite


def test_what_the_terminal_shows(small: dict[str, Any]) -> None:
    text = summary(report.condense(small, "python -m bench"))
    (line,) = [line for line in text.splitlines() if line.strip().startswith("Eager")]
    assert "0.900 (" in line
    assert "   0.250    0.333" in line
    assert line.endswith("saved 0.250   goal 1: met   memory goal 0.2: missed")
    assert "absent in 1 of 1: Liger: not installed" in text
    assert "skipped 2, first a: no" in text
    assert "FAILED loss test_duel[two]: AssertionError: eager differs" in text
    assert "25 % of the memory roof" in text
    assert "1 of 2 goals met" in text


def test_goals_are_those_of_a_cpu(made_up: ModuleType) -> None:
    found = report.condense(made_up.raw(device="NVIDIA H100 80GB HBM3"), "python -m bench")
    rows = [row for s in found["suites"].values() for duel in s["duels"] for row in duel["rows"]]
    assert not any("goal" in row for row in rows)
    assert "goal" not in summary(found)


def test_curves(made_up: ModuleType) -> None:
    found = report.condense(made_up.raw(("scaling",), cases=5, noise=0.02), "python -m bench")
    fits = {fit["peer"]: fit for fit in found["suites"]["scaling"]["fits"]}
    fit = fits["fastagglo"]  # times double from point to point, as x does
    assert fit["low"] <= 1 <= fit["high"]
    assert fit["high"] - fit["low"] < 0.1
    assert (fit["series"], fit["axis"], fit["points"]) == ("tokens of the step", "tokens", 5)
    assert fits.keys() == {"fastagglo", "plain"}
    assert "tokens of the step: time ~ (tokens)^" in summary(found)
    assert "FLOPs" not in summary(found)
    for facts in found["suites"]["scaling"]["cases"].values():
        facts["expected_exponent"] = 1.24
    assert "; FLOPs: 1.24)" in summary(found)


def test_an_exponent_by_hand() -> None:
    points = [(2.0**n, [3 * 2 ** (1.5 * n)] * 5) for n in range(4)]
    low, middle, high = intervals.exponent(points)
    assert low == pytest.approx(1.5)
    assert middle == pytest.approx(1.5)
    assert high == pytest.approx(1.5)


@pytest.mark.parametrize("rounds", [5, 8, 20])
def test_intervals_cover_the_median(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLED", 300)
    rng = np.random.default_rng(1)
    trials = 300
    inside = 0
    for _ in range(trials):
        samples = np.exp(rng.normal(0, 0.3, rounds))  # skewed, as times are; the median is 1
        low, middle, high = intervals.median_interval(samples)
        assert low <= middle <= high
        inside += low <= 1 <= high
    # 95 % are meant. Three standard deviations of 300 draws are 3.8 %; odd counts get more.
    assert 0.912 <= inside / trials <= 0.995


def test_intervals_shrink_with_the_rounds() -> None:
    rng = np.random.default_rng(2)
    few, many = (np.exp(rng.normal(0, 0.1, n)) for n in (10, 1000))
    width = [high - low for low, _, high in map(intervals.median_interval, (few, many))]
    assert width[1] < width[0] / 4
    assert intervals.median_interval([2.0]) == [2.0, 2.0, 2.0]
    assert intervals.median_interval(many) == intervals.median_interval(many)  # a fixed seed


def test_which_roof_binds() -> None:
    rates = {"copy_gb_s": 10.0, "matmul_tflops": {"float32": 0.1, "bfloat16": 0.4}}
    assert roofline.roofs({"bytes": 1e9, "flops": 1e9}, rates, "cpu") == (0.1, "memory")
    assert roofline.roofs({"bytes": 1e9, "flops": 8e10}, rates, "cpu") == (0.8, "compute")
    assert roofline.roofs({"flops": 8e10}, rates, "cuda") == (0.2, "compute")
    assert roofline.roofs({"flops": 8e10, "dtype": "float32"}, rates, "cuda") == (0.8, "compute")
    assert roofline.roofs({"flops": 8e10, "dtype": "float8"}, rates, "cuda") is None
    assert roofline.roofs({"label": "x"}, rates, "cpu") is None


def test_measured_roofs() -> None:
    found = roofline.measure("cpu", quick=True)
    assert 0.1 < found["copy_gb_s"] < 1e4
    assert found["matmul_tflops"].keys() == {"float32"}
    assert 1e-5 < found["matmul_tflops"]["float32"] < 100


def test_a_file_is_small_and_read_back(
    made_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "RESAMPLED", 20)
    found = report.condense(made_up.raw(cases=6, rounds=40), "python -m bench")
    path = tmp_path / "cpu.json"
    size = report.write(found, path)
    assert size == path.stat().st_size <= report.LARGEST
    assert json.loads(path.read_text()) == found
    # A line for each row: what a diff shows.
    rows = sum(len(duel["rows"]) for s in found["suites"].values() for duel in s["duels"])
    assert sum('"samples_ms"' in line for line in path.read_text().splitlines()) == rows + 1


def test_long_lists_of_samples_are_thinned_alike(
    made_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "RESAMPLED", 20)
    found = report.condense(made_up.raw(cases=10, rounds=100), "python -m bench")
    before = found["suites"]["loss"]["duels"][0]["rows"][0]
    all_of_them, interval = list(before["samples_ms"]), list(before["ms"])
    path = tmp_path / "cpu.json"
    assert report.write(found, path) <= report.LARGEST
    kept = json.loads(path.read_text())
    assert "samples_left_out" in kept["notes"]
    duel = kept["suites"]["loss"]["duels"][0]
    step = math.ceil(len(all_of_them) / len(duel["rows"][0]["samples_ms"]))
    assert step > 1
    assert duel["rows"][0]["samples_ms"] == all_of_them[::step]
    assert duel["rows"][0]["ms"] == interval
    assert len({len(row["samples_ms"]) for row in duel["rows"]}) == 1  # rounds stay paired


def test_what_a_comparison_needs_is_kept_however_large_the_file(
    made_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "RESAMPLED", 20)
    monkeypatch.setattr(report, "LARGEST", 1000)
    for rounds, kept in ((7, 7), (19, 19), (20, 10), (45, 12)):
        found = report.condense(made_up.raw(("loss",), rounds=rounds), "python -m bench")
        report.write(found, tmp_path / "cpu.json")
        duels = json.loads((tmp_path / "cpu.json").read_text())["suites"]["loss"]["duels"]
        assert {len(row["samples_ms"]) for duel in duels for row in duel["rows"]} == {kept}
