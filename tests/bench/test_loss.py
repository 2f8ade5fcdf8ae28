"""Are the loss's benchmarks what they say, do all peers agree with us, and is a wrong one seen?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import engine, loss_peers
from bench.engine import OURS, ready
from bench.loss import SUITE, compare
from bench.loss_cases import (
    ALL,
    EAGER,
    Case,
    Term,
    cases,
    plain,
    resized,
    shifted,
    teachers,
)
from bench.loss_peers import PEERS, Batch

SMALL = (
    plain(3, 5, 6),
    resized(2, 3, 5, 6),
    shifted(3, 5, 6),
    teachers(2, 4, (4, 6, 5, 3), (4, 6, 8, 10)),
    Case("kinds", 2, (Term("cosine", 5, (3, 4), (3, 4), valid=0.6), Term("angular", 5))),
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_agree_with_us(case: Case) -> None:
    batch = Batch.of(case, "cpu")
    expected = PEERS[OURS][1](batch).results()
    for peer in (OURS, *EAGER):
        run, row, seconds = ready(SUITE, peer, batch, expected)
        total, *gradients = run()
        assert total.ndim == 0
        assert [g.shape for g in gradients] == [x.shape for x in run.leaves]
        assert row["memory_bytes"] >= sum(g.nbytes for g in gradients)
        assert row["input_bytes"] >= sum(x.nbytes for x in batch.predictions + batch.targets)
        assert seconds > 0
        matrices = sum(t.affine for t in case.terms) if peer.startswith("matrix") else 0
        assert len(run.constants) == len(case.terms) + matrices


def test_the_compiled_peer_says_how_long_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    batch = Batch.of(SMALL[0], "cpu")
    assert PEERS["compile"][1](batch).info["compile_seconds"] > 0
    assert PEERS["eager"][1](batch).info == {}


def test_the_matrix_is_a_real_one() -> None:
    """The peer's predictions lie in another basis, and forgetting to turn them back is seen."""
    batch = Batch.of(SMALL[0], "cpu")
    run, own = PEERS["matrix"][1](batch), PEERS[OURS][1](batch).results()
    assert not torch.allclose(run.leaves[0], batch.predictions[0], atol=0.1)
    found = dict(zip(own, run(), strict=True))
    with pytest.raises(AssertionError, match="matrix: gradient of term 0 differs"):
        compare("matrix", found, own, batch)


def test_a_wrong_peer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.of(SMALL[1], "cpu")
    own = PEERS[OURS][1](batch).results()
    compare("p", own, own, batch)
    with pytest.raises(AssertionError, match="p: total differs"):
        compare("p", own | {"total": own["total"] * 1.001}, own, batch)
    wrong = own["gradient of term 0"].clone()
    wrong[-1, -1, -1] *= 1.001  # one token
    with pytest.raises(AssertionError, match="p: gradient of term 0 differs"):
        compare("p", own | {"gradient of term 0": wrong}, own, batch)

    def elsewhere(batch: Batch, i: int) -> Any:
        grid, mask, where = cells(batch, i)
        return grid, mask, where + 0.01

    cells = loss_peers._cells
    monkeypatch.setattr(loss_peers, "_cells", elsewhere)
    batch = Batch.of(shifted(3, 5, 6), "cpu")
    with pytest.raises(AssertionError, match="eager: "):
        ready(SUITE, "eager", batch, PEERS[OURS][1](batch).results())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selections(device: str) -> None:
    for quick in (False, True):
        chosen = cases(device, quick)
        assert len({case.id for case in chosen}) == len(chosen)
        assert {case.name for case in chosen} == {"phi-s", "four-teachers", "resized", "shifted"}
        assert all({"matrix", "eager"} <= set(case.peers) <= set(PEERS) for case in chosen)
        assert {case.size for case in chosen} == {4 if device == "cpu" else 2}
        compiled = sum("compile" in case.peers for case in chosen)
        assert compiled == (0 if quick else 1 if device == "cpu" else len(chosen))
    assert set(cases(device, False)[0].peers) == {*PEERS} - {OURS} == {*ALL}
    peers = {case.id: case.peers for case in cases("cpu", False)}
    assert all(peer in peers[case] for case, peer in SUITE.goals)


def test_the_case_of_the_goals_and_its_bytes() -> None:
    first, second, *_ = cases("cpu", False)
    assert first.id == "phi-s-16"
    assert first.label == "phi-s: 16x27x27x1024 mse affine"
    assert first.facts["bytes"] == 12 * 16 * 27 * 27 * 1024
    assert {t.channels for t in second.terms} == {768, 1024, 1152, 1280}
    assert {t.kind for t in second.terms} == {"mse", "cosine_smooth_l1", "angular", "cosine"}
    # Six bytes for each bf16 element; where the target is larger, two more for each of it.
    assert cases("cuda", False)[0].facts["bytes"] == 6 * 64 * 32 * 32 * 1280
    assert resized(2, 3, 5, 6).facts["bytes"] == 4 * 2 * 6 * (2 * 9 + 25)
    assert resized(2, 3, 5, 6).terms[0].words == "3x3->5x5x6 mse affine"
    assert shifted(2, 5, 6).terms[0].words == "5x5x6 mse affine shifted masked"
    assert Term("angular", 7).words == "7 angular"
