"""Are the heads' benchmarks what they say, do all peers agree with us, and is a wrong one seen?"""

from __future__ import annotations

import pytest
import torch

from bench import heads, heads_peers
from bench.heads import checked, compare
from bench.heads_cases import Case, cases, facts, passes, peers_of
from bench.heads_peers import PEERS, Batch, prepare

SMALL = (
    Case("plain", 30, 24, ((40, 16), (32, 20))),
    Case("deep", 30, 24, ((40, 16), (40, 16)), blocks=2),
)
EAGER = [name for name in PEERS if name != "compile"]  # which takes its time


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)
    heads.ours.cache_clear()


@pytest.mark.parametrize("peer", EAGER)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_agree_with_us(case: Case, peer: str) -> None:
    run, info, seconds = checked(case, peer)
    assert len(run()) == len(case.heads) + 1 + len(run.parameters)
    assert info["memory_bytes"] > info["saved_bytes"] > 0
    assert seconds > 0


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_what_is_saved(case: Case) -> None:
    batch = Batch.of(case, "cpu")
    widths = sum(hidden for hidden, _ in case.heads) * (1 + case.blocks)
    statistics = 2 * len(case.heads) * (1 + case.blocks)
    ours, kept, eager = (prepare(name, batch).saved_bytes() for name in EAGER)
    assert ours == 4 * case.tokens * (widths + statistics)
    assert kept == ours + 4 * case.tokens * widths
    assert eager == 4 * case.tokens * (3 * widths + statistics)


def test_a_wrong_peer_is_seen() -> None:
    batch = Batch.of(SMALL[1], "cpu")
    right = prepare("fastagglo", batch)()
    for i in range(len(right)):
        wrong = [x.detach().clone() for x in right]
        wrong[i].view(-1)[0] += 1e-3 * right[i].norm()
        with pytest.raises(AssertionError, match=f"eager: result {i} differs"):
            compare("eager", wrong, right)


def test_every_layer_is_a_peers_own() -> None:
    """Weights of one peer changed in place change no other's results."""
    batch = Batch.of(SMALL[0], "cpu")
    eager, ours = prepare("eager", batch), prepare("fastagglo", batch)
    before = [x.detach().clone() for x in ours()]
    with torch.no_grad():
        eager.parameters[0].zero_()
    for one, other in zip(ours(), before, strict=True):
        assert torch.equal(one, other)


def test_costs() -> None:
    case = Case("costs", 10, 3, ((4, 5),), blocks=1)
    products = 10 * (3 * 4 + 4 * 4 + 4 * 5)
    assert case.flops == 3 * 2 * products
    moved = dict(passes(case, 2))
    assert moved["4 -> 5: product"].bytes == 2 * (10 * 4 + 10 * 5 + 4 * 5 + 5)
    assert moved["4 -> 4: product"].bytes == 2 * (10 * 4 + 2 * 10 * 4 + 4 * 4 + 4)
    assert facts(case, 2)["flops"] == case.flops


def test_cases() -> None:
    (four, _), (gpu, _) = cases("cpu", quick=False), cases("cuda", quick=False)
    assert (four.tokens, four.width) == (8 * 16 * 16, 768)
    assert (gpu.tokens, gpu.width) == (46_080, 1280)
    for case in (four, gpu):
        assert [out for _, out in case.heads] == [1024, 1152, 1280, 1536]
    assert set(peers_of(quick=False)) == set(PEERS)
    assert "compile" not in peers_of(quick=True)
    assert heads_peers.PEERS["fastagglo"][0] == "fastagglo"
