"""``python -m bench``: what is measured, what is kept, and that the command runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, plots, report
from bench.attention import facts
from bench.attention_cases import cases, duels, peers_of
from bench.attention_peers import PEERS
from bench.measure import Rivals, peak_memory, repeated, repeats

ROOT = Path(__file__).parents[2]
WORDS = {name: words for name, (words, _) in PEERS.items()}


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
    rivals = Rivals({name: (lambda name=name: order.append(name)) for name in "abc"})
    for _ in range(4):
        rivals()
    assert "".join(order) == "abcbcacababc"
    assert {name: len(times) for name, times in rivals.seconds.items()} == dict.fromkeys("abc", 4)
    Rivals({})()


def test_short_calls_are_repeated_on_cuda_alone() -> None:
    assert repeats(1e-5, "cpu") == 1
    assert [repeats(s, "cuda") for s in (1e-9, 1e-4, 1.9e-3, 1.0)] == [50, 20, 2, 1]
    calls: list[int] = []
    repeated(lambda: calls.append(1), 3, "cpu")()
    assert len(calls) == 3


def entry(info: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
    return {"extra_info": info, "stats": {"data": seconds}}


def information(case: Any, peer: str, **more: Any) -> dict[str, Any]:
    sizes = {"memory_bytes": 123_456_789, "input_bytes": 2_000_000}
    return {"case": case.name, "facts": facts(case), "peer": peer, "repeats": 2, **sizes, **more}


def raw(device: str) -> dict[str, Any]:
    """Made-up results of a whole selection."""
    entries = [
        entry(information(case, peer), [0.123456789, 0.2, 0.4])
        for case in cases(device, False)
        for peer in peers_of(case)
    ]
    for duel in duels(device, False):
        rival = {"memory_bytes": 4e8, "input_bytes": 3e6, "seconds": [0.246913578, 0.4, 0.5]}
        rivals = dict.fromkeys(duel.peers, rival)
        info = information(duel.case, "fastagglo", rivals=rivals, absent={"flex": "not here"})
        entries.append(entry(info, [0.123456789, 0.2, 0.4]))
    where = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.14.1", "commit": "abc1234"}
    outcomes = {"skipped": {"a": "no", "b": "no", "c": "never"}, "failed": ["d"]}
    return {"benchmarks": entries, "bench": outcomes, "machine_info": {"bench": where}}


def test_results_by_hand() -> None:
    found = report.condense(raw("cpu"), "attention", "python -m bench attention", WORDS)
    row = found["rows"][0]
    assert row["peer"] == "fastagglo"
    # Two calls a round: 0.0617, 0.1 and 0.2 s each.
    assert row["ms"] == [77.04, 100.0, 160.0]
    assert row["tflops"] == float(f"{found['cases'][row['case']]['flops'] / 0.1 / 1e12:.4g}")
    assert row["memory_mb"] == 123.5
    assert row["rounds"] == 3
    duel = found["duels"][0]
    assert duel["absent"] == {"flex": "not here"}
    assert [row["peer"] for row in duel["rows"]] == ["fastagglo", "per-image", "per-resolution"]
    ratio = duel["rows"][1]["ours_over_theirs"]
    assert ratio["time"] == [0.5, 0.5, 0.68]  # of the rounds 0.5, 0.5 and 0.8
    assert ratio["memory"] == 0.3086
    assert ratio["memory_with_inputs"] == float(f"{125.456789 / 403:.4g}")
    assert found["skipped"] == [
        {"reason": "no", "tests": 2, "first": "a"},
        {"reason": "never", "tests": 1, "first": "c"},
    ]
    assert found["failed"] == ["d"]

    text = report.summary(found, {("mix", "per-image"): 1.05})
    lines = [line.split() for line in text.splitlines() if "looped per image" in line]
    ratios_shown = ["0.500", "(0.500", "..", "0.680)", "0.309", "0.311"]
    assert lines == [["SDPA", "looped", "per", "image", *ratios_shown, "target", "1.05"]] * 2
    assert "FlexAttention, document mask           absent: not here" in text

    ratios = plots.ratios_of(found)
    key = ("B 12×64, mix (8×64 8×196 4×576 2×1024)", "forward")
    assert ratios[key]["per-image"] == {"time": 2.0, "memory": 1 / 0.3086}
    assert ratios[("B 12×64, 224px (2×204)", "forward")]["per-image"] == {"time": 1, "memory": 1}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_whole_selection_is_small(device: str, tmp_path: Path) -> None:
    found = report.condense(raw(device), "attention", "python -m bench attention", WORDS)
    path = tmp_path / "attention.json"
    report.write(found, path)
    assert json.loads(path.read_text()) == found
    assert path.stat().st_size <= 200_000
    picture = tmp_path / "attention.svg"
    plots.draw(found, picture)
    assert picture.stat().st_size <= 300_000


def test_the_machine_in_words(tmp_path: Path) -> None:
    found = machine.describe("A CPU", "abc1234")
    assert found["cpu"] == "A CPU"
    assert found["commit"] == "abc1234"
    assert found["torch"] == torch.__version__
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


def test_the_command_writes_results_and_a_picture(tmp_path: Path) -> None:
    done = command("attention", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"attention-cpu.json", "attention-cpu.svg"}
    text = (tmp_path / "attention-cpu.json").read_text()
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    found = json.loads(text)
    assert found["command"] == "python -m bench attention --quick"
    assert found["machine"]["device"] == "CPU"
    assert found["machine"]["threads"] == 1
    assert found["failed"] == []
    timed = {row["peer"] for row in found["rows"]}
    assert timed == {"fastagglo", "per-resolution", "per-image", "padded", "padded-batch"}
    assert {item["reason"] for item in found["skipped"]} >= {
        "varlen_attn needs CUDA",
        "xformers' attention needs CUDA",
    }
    for row in found["rows"]:
        low, middle, high = row["ms"]
        assert 0 < low <= middle <= high
        assert row["memory_mb"] > 0
    assert [len(duel["rows"]) for duel in found["duels"]] == [5, 5]
    picture = (tmp_path / "attention-cpu.svg").read_text()
    assert "SDPA looped per image" in picture
    assert "ours / theirs, by turns" in done.stdout


def test_the_command_of_the_loss(tmp_path: Path) -> None:
    done = command("loss", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"loss-cpu.json", "loss-cpu.svg"}
    text = (tmp_path / "loss-cpu.json").read_text()
    assert str(ROOT) not in text
    found = json.loads(text)
    assert found["failed"] == found["skipped"] == []
    assert {row["peer"] for row in found["rows"]} == {
        "fastagglo",
        "matrix",
        "matrix-fp32",
        "eager",
        "twin",
    }
    assert all(row["floor_ms"] > 0 and row["memory_mb"] > 0 for row in found["rows"])
    assert [len(duel["rows"]) for duel in found["duels"]] == [5] * 4
    assert "floor" in done.stdout


def test_an_unknown_name_is_an_error() -> None:
    done = command("attentoin")
    assert done.returncode == 2
    assert "no benchmark attentoin: there is attention, loss, heads, merge" in done.stderr
