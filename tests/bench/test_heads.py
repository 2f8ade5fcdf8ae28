"""Are the heads' benchmarks what they say, do all peers agree with us, and is a wrong one seen?"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import engine
from bench.engine import OURS, Unavailable, ready
from bench.heads import SUITE, compare
from bench.heads_cases import CUDA, EAGER, Case, cases, passes
from bench.heads_peers import PEERS, Batch

SMALL = (
    Case("plain", 30, 24, ((40, 16), (32, 20))),
    Case("deep", 30, 24, ((40, 16), (40, 16)), blocks=2),
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_peers_agree_with_us(case: Case) -> None:
    batch = Batch.of(case, "cpu")
    expected = PEERS[OURS][1](batch).results()
    assert list(expected)[:3] == ["output 0", "output 1", "gradient of x"]
    for peer in (OURS, *EAGER):
        run, row, seconds = ready(SUITE, peer, batch, expected)
        assert len(run()) == len(case.heads) + 1 + len(run.parameters)
        assert sum(p.numel() for p in run.parameters) == case.parameters
        assert row["memory_bytes"] > row["saved_bytes"] > 0
        assert "compile_seconds" not in row
        assert seconds > 0


def test_the_compiled_peer_says_how_long_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    info = PEERS["compile"][1](Batch.of(SMALL[0], "cpu")).info
    assert info["compile_seconds"] > 0
    assert info["saved_bytes"] > 0


@pytest.mark.parametrize("peer", ["liger", "fla"])
def test_peers_of_cuda_say_so_on_a_cpu(peer: str) -> None:
    with pytest.raises(Unavailable, match="needs CUDA"):
        ready(SUITE, peer, Batch.of(SMALL[0], "cpu"), {})


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_what_is_saved(case: Case) -> None:
    batch = Batch.of(case, "cpu")
    widths = sum(hidden for hidden, _ in case.heads) * (1 + case.blocks)
    statistics = 2 * len(case.heads) * (1 + case.blocks)
    ours, kept, eager = (PEERS[name][1](batch).saved_bytes() for name in (OURS, *EAGER))
    assert ours == 4 * case.tokens * (widths + statistics)
    assert kept == ours + 4 * case.tokens * widths
    assert eager == 4 * case.tokens * (3 * widths + statistics)


def test_a_wrong_peer_is_seen() -> None:
    batch = Batch.of(SMALL[1], "cpu")
    right = PEERS[OURS][1](batch).results()
    for name in right:
        wrong = {key: value.clone() for key, value in right.items()}
        wrong[name].view(-1)[0] += 1e-3 * right[name].norm()
        with pytest.raises(AssertionError, match=f"eager: {name} differs"):
            compare("eager", wrong, right, batch)
        wrong[name] = right[name][None]
        with pytest.raises(AssertionError, match=f"eager: {name} has another shape"):
            compare("eager", wrong, right, batch)
    with pytest.raises(AssertionError, match="eager: "):
        compare("eager", {}, right, batch)


def test_every_layer_is_a_peers_own() -> None:
    """Weights of one peer changed in place change no other's results."""
    batch = Batch.of(SMALL[0], "cpu")
    eager, ours = (PEERS[name][1](batch) for name in ("eager", OURS))
    before = ours.results()
    with torch.no_grad():
        eager.parameters[0].zero_()
    for name, value in ours.results().items():
        assert torch.equal(value, before[name])


def test_costs() -> None:
    case = Case("costs", 10, 3, ((4, 5),), blocks=1, size=2)
    products = 10 * (3 * 4 + 4 * 4 + 4 * 5)
    assert case.flops == 3 * 2 * products
    moved = dict(passes(case))
    assert moved["4 -> 5: product"].bytes == 2 * (10 * 4 + 10 * 5 + 4 * 5 + 5)
    assert moved["4 -> 4: product"].bytes == 2 * (10 * 4 + 2 * 10 * 4 + 4 * 4 + 4)
    parameters = 3 * 4 + 4 + 4 * 4 + 4 + 4 * 5 + 5 + 2 * 2 * 4
    assert case.bytes == 2 * 2 * (10 * 3 + parameters + 10 * 5)
    assert case.facts["flops"] == case.flops
    assert dataclasses.replace(case, size=4).bytes == 2 * case.bytes


def test_cases() -> None:
    (four, _), (gpu, _) = cases("cpu", quick=False), cases("cuda", quick=False)
    assert (four.tokens, four.width, four.size) == (8 * 16 * 16, 768, 4)
    assert (gpu.tokens, gpu.width, gpu.size) == (46_080, 1280, 2)
    for case in (four, gpu):
        assert [out for _, out in case.heads] == [1024, 1152, 1280, 1536]
        assert {OURS, "kept", *case.peers} == set(PEERS)
    assert all(case.peers == CUDA for case in cases("cuda", quick=False))
    for device in ("cpu", "cuda"):
        assert {c.size for c in cases(device, quick=True)} == {4 if device == "cpu" else 2}
        assert "compile" not in {p for case in cases(device, quick=True) for p in case.peers}
    for case, peer in SUITE.goals:
        assert peer in {c.id: c for c in cases("cpu", quick=False)}[case].peers
