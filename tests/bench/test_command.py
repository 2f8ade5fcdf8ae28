"""``python -m bench``: what is measured, what is kept, and that the command runs."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import machine
from bench.__main__ import SUITES
from bench.measure import Rivals, peak_memory, repeated, repeats

ROOT = Path(__file__).parents[2]


def test_peak_memory_on_a_cpu() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(1 << 20)  # 4 MiB
        b = a + 1
        del a
        c = torch.empty(1 << 18)
        del b
        return c

    outside = torch.empty(1 << 22)
    for _ in range(2):
        peak, seconds = peak_memory(call, "cpu")
        assert peak == pytest.approx(8 << 20, abs=4096)
        assert seconds > 0
    grown, _ = peak_memory(lambda: outside.view(-1)[:10], "cpu")
    assert grown < 4096


def test_rivals_take_turns() -> None:
    order: list[str] = []
    rivals = Rivals(
        {name: (lambda name=name: order.append(name)) for name in "abc"}, "cpu", time.perf_counter
    )
    for _ in range(4):
        rivals()
    assert "".join(order) == "abcbcacababc"
    assert {name: len(times) for name, times in rivals.seconds.items()} == dict.fromkeys("abc", 4)


def test_short_calls_are_repeated_on_cuda_alone() -> None:
    assert repeats(1e-5, "cpu") == 1
    assert [repeats(s, "cuda") for s in (1e-9, 1e-4, 1.9e-3, 1.0)] == [50, 20, 2, 1]
    calls: list[int] = []
    repeated(lambda: calls.append(1), 3)()
    assert len(calls) == 3


def test_the_machine_in_words(tmp_path: Path) -> None:
    found = machine.describe("A CPU", "abc1234")
    assert found["cpu"] == "A CPU"
    assert found["commit"] == "abc1234"
    assert found["threads"] == torch.get_num_threads()
    assert machine.commit(tmp_path) == "unknown"
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", machine.commit(ROOT))


def test_nvml_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.driver_and_clocks() == {
        "driver": None,
        "nvml": "nvidia-ml-py is not installed",
    }


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        env=clean | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_command_writes_results_and_pictures(tmp_path: Path) -> None:
    done = command("--quick", "--suite", "loss", "-k", "phi-s", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    text = path.read_text()
    assert str(ROOT) not in text
    found = json.loads(text)
    assert set(found["suites"]) == {"loss"}
    (duel,) = found["suites"]["loss"]["duels"]
    assert duel["rows"][0]["peer"] == "fastagglo"
    assert all(row["ours_over_theirs"]["time"] for row in duel["rows"][1:])
    assert found["roofline"]["copy_gb_s"] > 0
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".svg"}
    assert "phi-s" in done.stdout


def test_an_unknown_name_is_an_error() -> None:
    done = command("attentoin")
    assert done.returncode == 2
    assert "no suite 'attentoin' (did you mean 'attention'?)" in done.stderr


def test_every_suite_exists() -> None:
    for name in SUITES:
        assert importlib.import_module(f"bench.{name}").SUITE.name == name
