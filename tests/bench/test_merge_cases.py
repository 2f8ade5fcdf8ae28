"""Are merging's benchmarks what they say, does the eager form agree, is a wrong one seen?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import merge, merge_peers, plots, report
from bench.attention_peers import Unavailable
from bench.measure import peak_memory
from bench.merge import checked, compare, facts
from bench.merge_cases import Case, bridge, cases, halved, layer
from bench.merge_peers import PEERS, Batch, prepare
from fastagglo.ops.partition import plan_rounds

ROOT = Path(__file__).parents[2]
WORDS = {name: words for name, (words, _) in PEERS.items()}
SMALL = (
    bridge(2, 12, 24, 16, 3),
    Case("oblong", 2, (6, 9), 20, 13, stride=(3, 3)),
    halved(1, 8, 16),
    layer(2, 5, 2, 9),
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)
    merge.ours.cache_clear()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_run_and_the_eager_form_agrees(case: Case, backward: bool) -> None:
    case = replace(case, backward=backward)
    counts = {}
    for peer in case.peers:
        run, memory, seconds = checked(case, peer)
        out, *rest = run()
        counts[peer] = out.shape[1]
        assert out.shape[0] == case.images
        assert memory > 0
        assert seconds > 0
        if backward:
            assert rest[-1].shape == run.batch.x.shape
            assert not rest[-1].requires_grad
        else:
            assert not out.requires_grad
        assert run.input_bytes >= run.batch.x.nbytes
    assert counts["fastagglo"] == counts["eager"] == case.keep
    if "bicubic" in counts:
        assert abs(counts["bicubic"] - case.keep) <= 2
        # A grid of 6 x 9 has windows of 3 x 3 alone: 6 tokens for 13.
        assert 1 / 2.5 <= counts["unshuffle"] / case.keep <= 2.5


def test_every_token_agrees_in_fp64() -> None:
    """Where no similarity is rounded the shares that must agree are the whole."""
    for case in SMALL:
        batch = Batch.of(case, "cpu")
        keys = None if batch.keys is None else batch.keys.double()
        batch = replace(batch, x=batch.x.double(), keys=keys)
        ours, theirs = (prepare(name, batch).results() for name in ("fastagglo", "eager"))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_unshuffle_keeps_windows_together() -> None:
    case = bridge(2, 4, 3, 4, 2)
    run = prepare("unshuffle", Batch.of(case, "cpu"))
    (out,) = run()
    cells = run.batch.x.unflatten(1, (4, 4))
    assert torch.equal(out[1, 3].view(2, 2, 3), cells[1, 2:, 2:])
    with pytest.raises(Unavailable, match="5 x 7"):
        prepare("unshuffle", Batch.of(replace(case, grid=(5, 7)), "cpu"))


def test_a_wrong_peer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.of(SMALL[0], "cpu")
    own, x = prepare("fastagglo", batch).results(), batch.x.detach()
    compare("p", own, own, x)
    for number, name in enumerate(("tokens", "sizes", "gradient")):
        wrong = [y.clone() for y in own]
        wrong[number][0, :5] *= 1.001  # five of 288 tokens
        with pytest.raises(AssertionError, match=f"p: only .* of its {name} agree"):
            compare("p", wrong, own, x)
    low = [[y.bfloat16() for y in (own[0] + shift, *own[1:])] for shift in (0, 0.2)]
    compare("p", low[0], low[0], x.bfloat16())
    with pytest.raises(AssertionError, match="off our distance"):
        compare("p", low[1], low[0], x.bfloat16())

    def unweighted(batch: Batch) -> Any:
        run = eager(batch)
        return replace(run, merge=lambda x: (2 * (found := run.merge(x))[0], *found[1:]))

    eager = merge_peers._eager
    monkeypatch.setitem(PEERS, "eager", ("eager", unweighted))
    with pytest.raises(AssertionError, match="eager: "):
        checked(SMALL[0], "eager")


def test_a_peer_that_fails_is_skipped_without_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("nothing in /usr/lib/here at all\nand more")

    monkeypatch.setitem(PEERS, "bicubic", ("bicubic", fails))
    with pytest.raises(Unavailable, match=r"^RuntimeError: nothing in here at all$"):
        checked(SMALL[0], "bicubic")
    monkeypatch.setitem(PEERS, "fastagglo", ("fastagglo", fails))
    with pytest.raises(RuntimeError):  # ours may not
        checked(SMALL[1], "fastagglo")


@pytest.mark.parametrize("name", ["bridge", "half"])
def test_the_memory_that_is_promised(name: str) -> None:
    """72 x 72 x 1280: at most 0.15 of what the eager form takes, and the same at each call."""
    case = next(case for case in cases("cpu", False) if case.name == name)
    batch = Batch.of(case, "cpu")
    batch.x[:, [0, 10]] = batch.x[:, [1]]  # a source with two equal destinations: float64 decides
    prepare("fastagglo", batch)()  # the first call also keeps the geometry for the next one
    ours, again, theirs = (
        peak_memory(prepare(peer, batch), "cpu")[0] for peer in ("fastagglo", "fastagglo", "eager")
    )
    assert ours == again
    assert ours <= 0.15 * theirs


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: on CUDA at least a launch each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.overloadpacket not in (
            torch.ops.aten.new_empty,
            torch.ops.aten.detach,
            torch.ops.aten._unsafe_view,
        )
        return func(*args, **(kwargs or {}))


def test_operators_of_the_eager_form() -> None:
    """Our launches are counted in tests/kernels/test_merge_compiled.py: four."""
    for case in SMALL:
        run = prepare("eager", Batch.of(case, "cpu"))
        with Operators() as operators:
            run()
        assert 20 <= operators.count <= 30, operators.count


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selections(device: str) -> None:
    for quick in (False, True):
        chosen = cases(device, quick)
        assert len({(case.id, case.label) for case in chosen}) == len(chosen)
        assert {case.name for case in chosen} == {"bridge", "half", "layer"}
        for case in chosen:
            assert replace(case, backward=not case.backward) in chosen
            assert set(case.peers) <= set(PEERS)
    assert set(cases(device, False)[0].peers) == set(PEERS)
    assert cases(device, False)[0].label.endswith("x72x72x1280 -> 256")


@pytest.mark.parametrize("case", [*SMALL, *cases("cpu", False), *cases("cuda", False)])
def test_flops_are_those_of_the_first_round(case: Case) -> None:
    free = case.tokens - case.protect
    arguments = (free, case.keep - case.protect, case.partition, case.grid, case.protect)
    (only,) = plan_rounds(*arguments, case.stride, 0)
    assert len(only.destinations) == case.destinations
    pairs = len(only.sources) * len(only.destinations)
    assert case.flops == 2 * case.images * pairs * (64 if case.heads else case.channels)


def test_facts() -> None:
    found = facts(replace(SMALL[3], backward=True))
    assert found["metric"] == "keys of 2 heads, averaged"
    assert found["pass"] == "forward+backward"
    assert found["stride"] is None
    assert facts(SMALL[0])["stride"] == (3, 3)
    assert facts(SMALL[0])["flops"] == 2 * 2 * 128 * 16 * 24


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_by_hand(device: str, tmp_path: Path) -> None:
    entries = []
    for case in cases(device, False):
        common = {"case": case.id, "facts": facts(case), "repeats": 2}
        common |= {"memory_bytes": 1e8, "input_bytes": 1e8}
        stats = {"data": [0.01, 0.02, 0.04]}
        for peer in case.peers:
            entries.append({"extra_info": {**common, "peer": peer}, "stats": stats})
        rival = {"memory_bytes": 8e8, "input_bytes": 1e8, "seconds": [0.04, 0.08, 0.16]}
        rivals = dict.fromkeys(case.peers[1:], rival)
        info = {**common, "peer": "fastagglo", "rivals": rivals, "absent": {}}
        entries.append({"extra_info": info, "stats": stats})
    where = {"device": "CPU", "cpu": "one", "threads": 2, "torch": "2", "commit": "abc1234"}
    outcomes = {"skipped": {}, "failed": []}
    raw = {"benchmarks": entries, "bench": outcomes, "machine_info": {"bench": where}}
    found = report.condense(raw, "merge", "python -m bench merge", WORDS)
    first = cases(device, False)[0]
    assert found["rows"][0]["tflops"] == float(f"{first.flops / 0.01 / 1e12:.4g}")
    text = report.summary(found, {(first.id, "eager"): 1.0}, {(first.id, "eager"): 0.15})
    (line,) = (line for line in text.splitlines() if "target" in line)
    assert line.split()[-6:] == ["0.125", "0.222", "target", "1,", "memory", "0.15"]
    path, picture = tmp_path / "merge.json", tmp_path / "merge.svg"
    report.write(found, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    plots.draw(found, picture)
    drawn = picture.read_text()
    for words in (*WORDS.values(), "Forward: peak memory", "72x72x1280 → 256"):
        assert words == "fastagglo" or words in drawn
    assert picture.stat().st_size <= 300_000


def test_the_command(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "merge", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env=clean | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "merge-cpu.json").read_text()
    assert str(ROOT) not in text
    found = json.loads(text)
    assert found["failed"] == found["skipped"] == []
    assert {row["peer"] for row in found["rows"]} == set(PEERS)
    assert len(found["duels"]) == len(cases("cpu", True))
    assert all(not duel["absent"] for duel in found["duels"])
    assert (tmp_path / "merge-cpu.svg").is_file()
