"""Are the loss's benchmarks what they say, do all peers agree with us, and is a wrong one seen?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loss, loss_peers, plots, report
from bench.attention_peers import Unavailable
from bench.loss import checked, compare, facts
from bench.loss_cases import Case, Term, cases, duels, peers_of, plain, resized, shifted, teachers
from bench.loss_peers import PEERS, Batch, prepare

WORDS = {name: words for name, (words, _) in PEERS.items()}
EAGER = [name for name in PEERS if name != "compile"]  # which takes its time
SMALL = (
    plain(3, 5, 6),
    resized(2, 3, 5, 6),
    shifted(3, 5, 6),
    teachers(2, 4, (4, 6, 5, 3), (4, 6, 8, 10)),
    Case("kinds", 2, (Term("cosine", 5, (3, 4), (3, 4), valid=0.6), Term("angular", 5))),
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)
    loss.ours.cache_clear()


@pytest.mark.parametrize("peer", EAGER)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_agree_with_us(case: Case, peer: str) -> None:
    run, memory, seconds = checked(case, peer)
    total, *gradients = run()
    assert total.ndim == 0
    assert [g.shape for g in gradients] == [x.shape for x in run.leaves]
    assert memory >= sum(g.nbytes for g in gradients)
    assert seconds > 0
    matrices = sum(t.affine for t in case.terms) if peer.startswith("matrix") else 0
    assert len(run.constants) == len(case.terms) + matrices


def test_the_compiled_peer_says_how_long_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    run, _, _ = checked(SMALL[0], "compile")
    assert run.compile_seconds > 0
    assert checked(SMALL[0], "eager")[0].compile_seconds is None


def test_the_matrix_is_a_real_one() -> None:
    """The peer's predictions lie in another basis, and forgetting to turn them back is seen."""
    batch = Batch.of(SMALL[0], "cpu")
    run, own = prepare("matrix", batch), prepare("fastagglo", batch).results()
    assert not torch.allclose(run.leaves[0], batch.predictions[0], atol=0.1)
    with pytest.raises(AssertionError, match="matrix: the gradient of term 0 differs"):
        compare("matrix", list(run()), own)


def test_a_wrong_peer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [x.clone() for x in prepare("fastagglo", Batch.of(SMALL[1], "cpu")).results()]
    compare("p", own, own)
    wrong = [own[0] * 1.001, own[1]]
    with pytest.raises(AssertionError, match="p: the total differs"):
        compare("p", wrong, own)
    wrong = [own[0], own[1].clone()]
    wrong[1][-1, -1, -1] *= 1.001  # one token
    with pytest.raises(AssertionError, match="p: the gradient of term 0 differs"):
        compare("p", wrong, own)

    def elsewhere(batch: Batch, i: int) -> Any:
        grid, mask, where = cells(batch, i)
        return grid, mask, where + 0.01

    cells = loss_peers._cells
    monkeypatch.setattr(loss_peers, "_cells", elsewhere)
    with pytest.raises(AssertionError, match="eager: "):
        checked(shifted(3, 5, 6), "eager")


def test_a_peer_that_fails_is_skipped_without_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler in /usr/bin/c++ here\nand more")

    monkeypatch.setitem(PEERS, "compile", ("compile", fails))
    with pytest.raises(Unavailable, match=r"^RuntimeError: no compiler in c\+\+ here$"):
        checked(SMALL[0], "compile")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selections(device: str) -> None:
    for quick in (False, True):
        chosen = cases(device, quick)
        assert len({(case.name, case.images) for case in chosen}) == len(chosen)
        assert {case.name for case in chosen} == {"phi-s", "four-teachers", "resized", "shifted"}
        fights = duels(device, quick)
        assert len({duel.name for duel in fights}) == len(fights)
        for case in chosen:  # everyone meets us
            names = [name for duel in fights if duel.case == case for name in duel.peers]
            assert sorted(names) == sorted(peers_of(quick)[1:])
    assert set(peers_of(False)) == set(PEERS)
    assert "compile" not in peers_of(True)


def test_the_case_of_the_targets_and_its_bytes() -> None:
    first, second, *_ = cases("cpu", False)
    assert first.label == "phi-s: 16x27x27x1024 mse affine"
    assert facts(first, 4)["bytes"] == 12 * 16 * 27 * 27 * 1024
    assert {t.channels for t in second.terms} == {768, 1024, 1152, 1280}
    assert {t.kind for t in second.terms} == {"mse", "cosine_smooth_l1", "angular", "cosine"}
    # Six bytes for each bf16 element; where the target is larger, two more for each of it.
    assert facts(cases("cuda", False)[0], 2)["bytes"] == 6 * 64 * 32 * 32 * 1280
    assert facts(resized(2, 3, 5, 6), 2)["bytes"] == 2 * 2 * 6 * (2 * 9 + 25)
    assert resized(2, 3, 5, 6).terms[0].words == "3x3->5x5x6 mse affine"
    assert shifted(2, 5, 6).terms[0].words == "5x5x6 mse affine shifted masked"
    assert Term("angular", 7).words == "7 angular"


def raw(device: str) -> dict[str, Any]:
    """Made-up results of a whole selection: the copy moves 1 TB/s."""
    entries = []
    for case in cases(device, False):
        common = {"case": f"{case.name}-{case.images}", "facts": facts(case, 2), "repeats": 2}
        common |= {"memory_bytes": 4e8, "input_bytes": 1e8, "copy_bytes_per_second": 1e12}
        stats = {"data": [0.01, 0.02, 0.04]}
        for peer in peers_of(False):
            more = {"compile_seconds": 12.34567} if peer == "compile" else {}
            entries.append({"extra_info": {**common, "peer": peer, **more}, "stats": stats})
        rival = {"memory_bytes": 8e8, "input_bytes": 1e8, "seconds": [0.04, 0.08, 0.16]}
        rivals = dict.fromkeys(peers_of(False)[1:-1], rival)
        info = {**common, "peer": "fastagglo", "rivals": rivals, "absent": {"compile": "no g++"}}
        entries.append({"extra_info": info, "stats": stats})
    where = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.14.1", "commit": "abc1234"}
    outcomes = {"skipped": {}, "failed": []}
    return {"benchmarks": entries, "bench": outcomes, "machine_info": {"bench": where}}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_by_hand(device: str, tmp_path: Path) -> None:
    found = report.condense(raw(device), "loss", "python -m bench loss", WORDS)
    case = cases(device, False)[0]
    row = found["rows"][0]
    floor = case.elements * 2 / 1e12  # seconds
    assert row["copy_gb_s"] == 1000
    assert row["floor_ms"] == float(f"{floor * 1e3:.4g}")
    assert row["of_floor"] == float(f"{floor / 0.01:.4g}")  # two calls a round
    assert "tflops" not in row
    assert [r.get("compile_s") for r in found["rows"][:6]] == [None] * 5 + [12.35]
    ratio = found["duels"][0]["rows"][1]["ours_over_theirs"]
    assert ratio == {"time": [0.25] * 3, "memory": 0.5, "memory_with_inputs": 0.5556}

    name = f"{case.name}-{case.images}"
    text = report.summary(found, {(name, "matrix"): 0.08}, {(name, "matrix"): 0.5})
    (line,) = (line for line in text.splitlines() if "target" in line)
    assert line.split()[-6:] == ["0.500", "0.556", "target", "0.08,", "memory", "0.5"]
    assert f"floor {row['floor_ms']:g} ms at 1000 GB/s" in text
    assert text.count("absent: no g++") == len(cases(device, False))

    key = (case.label, "forward+backward")
    assert plots.ratios_of(found)[key]["matrix"] == {"time": 4.0, "memory": 2.0}
    path, picture = tmp_path / "loss.json", tmp_path / "loss.svg"
    report.write(found, path)
    assert json.loads(path.read_text()) == found
    assert path.stat().st_size <= 200_000
    plots.draw(found, picture)
    assert picture.stat().st_size <= 300_000
    drawn = picture.read_text()
    assert "eager PHI-S, matrix in fp64" in drawn
    assert "Forward: time" not in drawn  # nothing is forward alone


def test_copy_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.COPIED, "cpu", 1 << 22)
    loss.copy_bandwidth.cache_clear()
    assert 1e8 < loss.copy_bandwidth("cpu") < 1e13
    loss.copy_bandwidth.cache_clear()
