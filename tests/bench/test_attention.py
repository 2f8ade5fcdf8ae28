"""Are the benchmarks' batches those of the recipes, and do all peers agree with us on them?"""

from __future__ import annotations

import dataclasses
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from bench import attention_peers, engine
from bench.attention import SUITE, compare
from bench.attention_cases import (
    ALL,
    HIGH_V4,
    LOW_V4,
    MIX,
    PREFIX_V4,
    PREFIX_V25,
    STUDENTS,
    Case,
    Mix,
    cases,
    images_of,
    recipe_mixes,
    uniform,
    windows_of,
)
from bench.attention_peers import PEERS, Batch
from bench.engine import OURS, Results, Unavailable, ready
from fastagglo.model.config import PRESETS
from fastagglo.model.packing import geometry
from fastagglo.train import load_recipe

CPU = torch.device("cpu")
ON_CPU = ("fastagglo", "per-resolution", "per-image", "padded", "padded-batch")
SMALL = Mix("test", ((2, 1, 5), (1, 1, 17), (3, 2, 9)))  # a window pair per image in the last


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


def ours(batch: Batch) -> Results:
    return PEERS[OURS][1](batch).results()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peers_agree_with_us(backward: bool, bias: bool) -> None:
    batch = Batch.of(Case("tiny", SMALL, backward, bias), "cpu")
    expected = ours(batch)
    assert len(expected) == 1 + 3 * backward
    for peer in ON_CPU:
        run, row, seconds = ready(SUITE, peer, batch, expected)
        assert len(run()) == 1 + backward
        assert row["memory_bytes"] >= run.leaf[:, 0].nbytes * (1 + 3 * backward)
        assert row["input_bytes"] >= batch.qkv.nbytes
        assert seconds > 0


@pytest.mark.parametrize("peer", ["per-resolution", "padded", "padded-batch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_peer_that_is_wrong_in_one_key_is_noticed(
    peer: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, right = PEERS[peer]

    def wrong(batch: Batch) -> attention_peers.Run:
        bias = batch.qkv.new_zeros(batch.layout.total)
        bias[-1] = -math.inf
        return right(dataclasses.replace(batch, bias=bias))

    monkeypatch.setitem(PEERS, peer, (words, wrong))
    batch = Batch.of(Case("tiny", SMALL, backward), "cpu")
    with pytest.raises(AssertionError, match=f"{peer}: output differs from ours by"):
        ready(SUITE, peer, batch, ours(batch))


def test_a_wrong_gradient_is_noticed() -> None:
    batch = Batch.of(Case("tiny", SMALL, backward=True), "cpu")
    expected = ours(batch)
    assert list(expected) == ["output", "gradient of q", "gradient of k", "gradient of v"]
    for name in expected:
        found = {key: value.clone() for key, value in expected.items()}
        for change in (1.01, math.nan):
            found[name][0] *= change
            with pytest.raises(AssertionError, match=f"peer: {name} differs"):
                compare("peer", found, expected, batch)
    with pytest.raises(AssertionError, match="peer: "):
        compare("peer", {"output": expected["output"]}, expected, batch)


def test_peers_of_cuda_say_so_on_a_cpu() -> None:
    batch = Batch.of(Case("tiny", SMALL, False), "cpu")
    for peer in set(ALL) - set(ON_CPU) - {"flex"}:
        with pytest.raises(Unavailable, match="needs CUDA"):
            ready(SUITE, peer, batch, {})
    with pytest.raises(Unavailable, match="no backward on a CPU"):
        ready(SUITE, "flex", Batch.of(Case("tiny", SMALL, True), "cpu"), {})


def test_packed_kernels_get_the_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the peers of CUDA are called with, by stand-ins that compute it on a CPU."""
    batch = Batch.of(Case("tiny", SMALL, False), "cpu")

    def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == int(cu_seq_q.diff().max())
        assert cu_seq_q.dtype == torch.int32
        sizes = cu_seq_q.diff().tolist()
        pieces = (x.split(sizes) for x in (q, k, v))
        outs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one)).transpose(0, 1)
            for one in zip(*pieces, strict=True)
        ]
        return torch.cat(outs)

    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None
    ):
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    gems = types.ModuleType("flag_gems.ops.attention")
    gems.flash_attn_varlen_func = flash_attn_varlen_func
    for name in ("flag_gems", "flag_gems.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flag_gems.ops.attention", gems)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(attention_peers, "_needs_cuda", lambda *_: None)
    expected = ours(batch)
    for peer in ("varlen", "flag-gems", "flash"):
        ready(SUITE, peer, batch, expected)
    with pytest.raises(Unavailable, match="no backward"):
        ready(SUITE, "flag-gems", Batch.of(Case("tiny", SMALL, True), "cpu"), {})
    monkeypatch.setitem(sys.modules, "flag_gems.ops.attention", None)
    with pytest.raises(Unavailable, match="not installed: pip install flag-gems"):
        ready(SUITE, "flag-gems", batch, {})


def test_batches_are_the_same_for_all_peers_and_runs() -> None:
    case = Case("tiny", SMALL, True, True)
    one, two = Batch.of(case, "cpu"), Batch.of(case, "cpu")
    for name in ("qkv", "upstream", "bias"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert one.bias.unique().numel() == 4
    padded = PEERS["padded-batch"][1](one)
    assert padded.leaf.shape == (9 * 17, 3, 3, 64)
    assert torch.equal(padded.leaf[padded.packed], one.qkv)


def test_heads_are_the_students() -> None:
    shapes = {
        name: (Case(name, MIX, False).heads, Case(name, MIX, False).head_dim) for name in STUDENTS
    }
    assert shapes == {
        "B": (12, 64),
        "L": (16, 64),
        "SO400M": (16, 72),
        "H": (16, 80),
        "g": (24, 64),
    }


def test_operations_by_hand() -> None:
    rows = 8 * 64 + 8 * 196 + 4 * 576 + 2 * 1024
    assert Case("B", MIX, False).bytes == 4 * rows * 768 * 4
    assert Case("B", MIX, True, size=2).bytes == 8 * rows * 768 * 2
    squares = 8 * 64**2 + 8 * 196**2 + 4 * 576**2 + 2 * 1024**2
    assert Case("B", MIX, False).flops == 4 * 12 * 64 * squares
    assert Case("B", MIX, True).flops == 14 * 12 * 64 * squares


def test_layouts_are_the_students_own() -> None:
    """Against the geometry that the student itself builds."""
    mix = images_of("H", {224: 2, 512: 1})
    place = geometry(((2, 14, 14), (1, 32, 32)), PREFIX_V25, None, CPU)
    assert tuple(mix.lengths) == place.layout.lengths
    assert mix.name == "224+512px"
    assert images_of("g", {1152: 1}).name == "1148px"
    assert images_of("g", {1152: 1}).lengths == [82 * 82 + PREFIX_V25]

    windows = windows_of("B", {48: 2, 72: 1}, 24)
    place = geometry(((2, 48, 48), (1, 72, 72)), PREFIX_V25, 24, CPU)
    assert tuple(windows.lengths) == place.windows.layout.lengths
    assert windows.by_image == [(4, 576), (4, 576), (9, 576)]
    assert windows.name == "768+1152px-w24"
    with pytest.raises(ValueError, match="window must divide"):
        windows_of("B", {14: 1}, 4)

    assert uniform("B", 224, 1000).lengths == [204] * 4
    assert uniform("B", 1152, 1).lengths == [72 * 72 + PREFIX_V25]


def test_recipe_mixes_are_the_recipes() -> None:
    v25 = load_recipe("radio-v2.5-h")
    assert len(v25.teachers) + v25.student.registers == PREFIX_V25
    wanted = {group.sizes[0]: group.images for group in v25.stages[-1].groups}
    assert wanted == {432: 1024, 1024: 128}
    mix = recipe_mixes("H")[0]
    assert mix.images == ((32, 1, 27**2 + 8), (4, 1, 64**2 + 8))  # 1024 and 128, by 32

    v4 = load_recipe("c-radio-v4-so400m")
    assert len(v4.teachers) + v4.student.registers == PREFIX_V4
    low, high = v4.stages[-1].groups
    assert sorted(LOW_V4) == sorted(low.sizes)
    assert sorted(HIGH_V4) == sorted(high.sizes)
    assert sum(LOW_V4.values()) * high.images == sum(HIGH_V4.values()) * low.images
    (mix,) = recipe_mixes("SO400M")
    assert len(mix.lengths) == 108
    assert all(recipe_mixes(name) for name in STUDENTS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_selections(device: str) -> None:
    for quick in (False, True):
        chosen = cases(device, quick)
        assert len({case.id for case in chosen}) == len(chosen)
        assert {case.bias for case in chosen} == {False, True}
        assert any("-w" in case.id for case in chosen)
        assert {case.backward for case in chosen} == {False, True}
        assert {case.size for case in chosen} == {4 if device == "cpu" else 2}
        for case in chosen:
            assert {"per-resolution", "per-image"} <= set(case.peers) <= set(PEERS)
            assert len(set(case.peers)) == len(case.peers)
            if not case.mix.mixed:  # there is nothing to pad
                assert not {"padded", "padded-batch"} & set(case.peers)
            if case.bias:  # which they do not take
                assert not {"varlen", "xformers", "flag-gems", "flash"} & set(case.peers)
        compiled = [case for case in chosen if "flex" in case.peers]
        if quick:
            assert not compiled
            continue
        assert {PRESETS[case.student].width // case.heads for case in chosen} == {64, 72, 80}
        both = {(case.head_dim, case.backward) for case in chosen if case.mix.mixed}
        assert both == {(dim, backward) for dim in (64, 72, 80) for backward in (False, True)}
        assert {peer for case in chosen for peer in case.peers} == set(ALL) == set(PEERS) - {OURS}
        if device == "cpu":  # a laptop's selection: no matrix of more than 0.2 GB
            largest = max(sum(case.mix.lengths) * case.heads * case.head_dim for case in chosen)
            assert largest * 12 < 2e8
            assert [case.id for case in compiled] == ["B-mix-forward"]
        else:
            assert {case.student for case in chosen} == set(STUDENTS)
            assert {"224px", "432px", "768px", "1152px"} <= {case.mix.name for case in chosen}
    peers = {case.id: case.peers for case in cases("cpu", False)}
    assert all(peer in peers[case] for case, peer in SUITE.goals)


def test_labels() -> None:
    assert Case("B", MIX, True).label == "B 12×64, mix (8×64 8×196 4×576 2×1024)"
    assert Case("B", MIX, True, bias=True).label.endswith(", key_bias")
    assert Case("SO400M", recipe_mixes("SO400M")[0], True).label == "SO400M 16×72, v4-low+high"
    facts = Case("B", MIX, True).facts
    assert facts["pass"] == "forward+backward"
    assert (facts["tokens"], facts["head_dim"]) == (6432, 64)
