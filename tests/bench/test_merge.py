"""Are merging's benchmarks what they say, does the eager form agree, is a wrong one seen?"""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import engine, merge_peers
from bench.engine import OURS, Results, Unavailable, ready
from bench.measure import peak_memory
from bench.merge import SUITE, WINDOWS, compare
from bench.merge_cases import Case, bridge, cases, halved, layer
from bench.merge_peers import PEERS, Batch, Run
from fastagglo.ops.partition import plan_rounds

SMALL = (
    bridge(2, 12, 24, 16, 3),
    Case("oblong", 2, (6, 9), 20, 13, stride=(3, 3)),
    halved(1, 8, 16),
    layer(2, 5, 2, 9),
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


def prepare(name: str, batch: Batch) -> Run:
    return PEERS[name][1](batch)


def ours(batch: Batch) -> Results:
    return prepare(OURS, batch).results()


def stand_in(metric, w, h, sx, sy, r, no_rand=False, generator=None):
    """tomesd's function as its docstring has it, without the random choice."""
    assert no_rand
    n, rows = len(metric), torch.arange(h * w).view(h, w)
    b = rows[::sy, ::sx].flatten()
    a = rows.flatten()[~torch.isin(rows.flatten(), b)]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    best, into = (unit[:, a] @ unit[:, b].mT).max(-1)
    order = best.argsort(-1, descending=True)
    owner = torch.arange(h * w).repeat(n, 1)  # of each token: where it went
    for i in range(n):
        owner[i, a[order[i, :r]]] = b[into[i, order[i, :r]]]
    left = [torch.cat([a[order[i, r:]], b]) for i in range(n)]

    def merge(x, mode="mean"):
        out = []
        for i in range(n):
            member = (left[i][:, None] == owner[i]).to(x.dtype)
            total = member.sum(1, keepdim=True) if mode == "mean" else 1
            out.append(member @ x[i] / total)
        return torch.stack(out)

    def unmerge(x):
        members = ((left[i] == owner[i][:, None]).to(x.dtype) for i in range(n))
        return torch.stack([member @ x[i] for i, member in enumerate(members)])

    return merge, unmerge


@pytest.fixture
def tomesd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself where it is installed."""
    try:
        import tomesd.merge  # noqa: F401
    except ImportError:
        module = types.ModuleType("tomesd.merge")
        module.bipartite_soft_matching_random2d = stand_in
        monkeypatch.setitem(sys.modules, "tomesd", types.ModuleType("tomesd"))
        monkeypatch.setitem(sys.modules, "tomesd.merge", module)


@pytest.mark.usefixtures("tomesd")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_run_and_who_merges_agrees(case: Case, backward: bool) -> None:
    batch = Batch.of(replace(case, backward=backward), "cpu")
    expected, counts = ours(batch), {}
    for peer in (OURS, *batch.case.peers):
        run, row, seconds = ready(SUITE, peer, batch, expected)
        out, *rest = run()
        counts[peer] = out.shape[1]
        assert out.shape[0] == case.images
        assert row["memory_bytes"] > 0
        assert seconds > 0
        assert bool(run.results()) == (peer not in WINDOWS)
        if backward:
            assert rest[-1].shape == run.batch.x.shape
            assert not rest[-1].requires_grad
        else:
            assert not out.requires_grad
        assert row["input_bytes"] >= run.batch.x.nbytes
    assert counts[OURS] == counts["eager"] == counts.get("tomesd", case.keep) == case.keep
    if "bicubic" in counts:
        assert abs(counts["bicubic"] - case.keep) <= 2
        # A grid of 6 x 9 has windows of 3 x 3 alone: 6 tokens for 13.
        assert 1 / 2.5 <= counts["unshuffle"] / case.keep <= 2.5


def test_tomesd_is_absent_where_it_is_or_its_windows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.of(SMALL[0], "cpu")
    monkeypatch.setitem(sys.modules, "tomesd.merge", None)
    with pytest.raises(Unavailable, match="not installed: pip install tomesd"):
        prepare("tomesd", batch)
    with pytest.raises(Unavailable, match="5 x 5 do not divide a grid of 12 x 12"):
        prepare("tomesd", Batch.of(bridge(2, 12, 24, 16, 5), "cpu"))


def test_every_token_agrees_in_fp64() -> None:
    """Where no similarity is rounded the shares that must agree are the whole."""
    for case in SMALL:
        batch = Batch.of(case, "cpu")
        keys = None if batch.keys is None else batch.keys.double()
        batch = replace(batch, x=batch.x.double(), keys=keys)
        expected, found = ours(batch), prepare("eager", batch).results()
        for name, right in expected.items():
            torch.testing.assert_close(found[name], right, rtol=1e-12, atol=1e-12)


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
    own = ours(batch)
    compare("p", own, own, batch)
    for name in ("tokens", "sizes", "gradient"):
        wrong = own[name].clone()
        wrong[0, :5] *= 1.001  # five of 288 tokens
        with pytest.raises(AssertionError, match=f"p: only .* of its {name} agree"):
            compare("p", own | {name: wrong}, own, batch)
    with pytest.raises(AssertionError, match="p: "):
        compare("p", {}, own, batch)
    low = replace(batch, x=batch.x.bfloat16())
    near, far = ({"tokens": (own["tokens"] + shift).bfloat16()} for shift in (0, 0.2))
    compare("p", near, near, low)
    with pytest.raises(AssertionError, match="off our distance"):
        compare("p", far, near, low)

    def unweighted(batch: Batch) -> Run:
        run = eager(batch)
        return replace(run, merge=lambda x: (2 * (found := run.merge(x))[0], *found[1:]))

    eager = merge_peers._eager
    monkeypatch.setitem(PEERS, "eager", ("eager", unweighted))
    with pytest.raises(AssertionError, match="eager: "):
        ready(SUITE, "eager", batch, own)


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
            assert "eager" in case.peers
            assert set(case.peers) <= set(PEERS)
            assert case.size == (4 if device == "cpu" else 2)
    assert {OURS, *cases(device, False)[0].peers} == set(PEERS)
    peers = {case.id: case.peers for case in cases("cpu", False)}
    assert all(peer in peers[case] for case, peer in SUITE.goals)
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
    found = replace(SMALL[3], backward=True).facts
    assert found["metric"] == "keys of 2 heads, averaged"
    assert found["pass"] == "forward+backward"
    assert found["stride"] is None
    read, written = 26 * (128 + 128), (17 + 26) * 128
    assert found["bytes"] == 4 * 2 * (read + written)
    assert SMALL[0].facts["stride"] == (3, 3)
    assert SMALL[0].facts["flops"] == 2 * 2 * 128 * 16 * 24
    assert SMALL[0].facts["bytes"] == 4 * 2 * 24 * (144 + 16)
