"""Are the benchmarks' batches those of the recipes, and do all peers agree with us on them?"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bench import attention, attention_peers
from bench.attention import checked
from bench.attention_cases import (
    HIGH_V4,
    LOW_V4,
    MIX,
    PREFIX_V4,
    PREFIX_V25,
    STUDENTS,
    Case,
    Mix,
    cases,
    duels,
    images_of,
    peers_of,
    recipe_mixes,
    uniform,
    windows_of,
)
from bench.attention_peers import Batch, Unavailable, prepare
from fastagglo.model.packing import geometry
from fastagglo.train import load_recipe

CPU = torch.device("cpu")
ON_CPU = ("fastagglo", "per-resolution", "per-image", "padded", "padded-batch")
SMALL = Mix("test", ((2, 1, 5), (1, 1, 17), (3, 2, 9)))  # a window pair per image in the last


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DEVICE", "cpu")
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)
    attention.ours.cache_clear()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("peer", ON_CPU)
def test_peers_agree_with_us(peer: str, backward: bool, bias: bool) -> None:
    run, memory, seconds = checked(Case("tiny", SMALL, backward, bias), peer)
    assert len(run()) == 1 + backward
    assert memory >= run.leaf[:, 0].nbytes * (1 + 3 * backward)
    assert seconds > 0


@pytest.mark.parametrize("peer", ["per-resolution", "padded", "padded-batch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_peer_that_is_wrong_in_one_key_is_noticed(
    peer: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, right = attention_peers.PEERS[peer]

    def wrong(batch: Batch) -> attention_peers.Run:
        bias = batch.qkv.new_zeros(batch.layout.total)
        bias[-1] = -math.inf
        return right(dataclasses.replace(batch, bias=bias))

    monkeypatch.setitem(attention_peers.PEERS, peer, (words, wrong))
    case = Case("tiny", SMALL, backward)
    with pytest.raises(AssertionError, match=f"{peer}: output differs from ours by"):
        checked(case, peer)


def test_a_wrong_gradient_is_noticed() -> None:
    case = Case("tiny", SMALL, backward=True)
    _, expected = attention.ours(case)
    for name in expected:
        found = {key: value.clone() for key, value in expected.items()}
        found[name][0] *= 1.01
        with pytest.raises(AssertionError, match=f"peer: {name} differs"):
            attention.compare("peer", found, expected)
        found[name][0] = math.nan
        with pytest.raises(AssertionError, match=f"peer: {name} differs"):
            attention.compare("peer", found, expected)


@pytest.mark.parametrize("peer", ["varlen", "xformers"])
def test_peers_of_cuda_say_so_on_a_cpu(peer: str) -> None:
    with pytest.raises(Unavailable, match="needs CUDA"):
        checked(Case("tiny", SMALL, False), peer)
    with pytest.raises(Unavailable, match="no backward on a CPU"):
        checked(Case("tiny", SMALL, True), "flex")


def test_what_a_peer_raises_becomes_the_reason_without_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(batch: Batch) -> attention_peers.Run:
        raise NotImplementedError("head dim 72, see /usr/lib/thing/kernel.py\nand more")

    monkeypatch.setitem(attention_peers.PEERS, "varlen", ("varlen", broken))
    with pytest.raises(Unavailable) as caught:
        checked(Case("tiny", SMALL, False), "varlen")
    assert str(caught.value) == "NotImplementedError: head dim 72, see kernel.py"
    monkeypatch.setitem(attention_peers.PEERS, "fastagglo", ("ours", broken))
    attention.ours.cache_clear()
    with pytest.raises(NotImplementedError):  # of ours nothing is excused
        checked(Case("tiny", SMALL, False), "fastagglo")


def test_batches_are_the_same_for_all_peers_and_runs() -> None:
    case = Case("tiny", SMALL, True, True)
    one, two = Batch.of(case, "cpu"), Batch.of(case, "cpu")
    for name in ("qkv", "upstream", "bias"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert one.bias.unique().numel() == 4
    padded = prepare("padded-batch", one)
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
        names = [case.name for case in chosen]
        assert len(set(names)) == len(names)
        assert {case.bias for case in chosen} == {False, True}
        assert any("-w" in name for name in names)
        assert {case.backward for case in chosen} == {False, True}
        assert all(peers_of(case)[0] == "fastagglo" for case in chosen)
        assert len({duel.name for duel in duels(device, quick)}) == len(duels(device, quick))
        if device == "cpu":  # a laptop's selection: no matrix of more than 0.2 GB
            largest = max(sum(case.mix.lengths) * case.heads * case.head_dim for case in chosen)
            assert largest * 12 < 2e8
        elif not quick:
            assert {case.student for case in chosen} == set(STUDENTS)
            assert {"224px", "432px", "768px", "1152px"} <= {case.mix.name for case in chosen}


def test_who_takes_part() -> None:
    plain, windowed = Case("B", MIX, True), Case("B", windows_of("B", {32: 1}, 8), True)
    assert set(peers_of(plain)) == set(attention_peers.PEERS)
    assert not {"padded", "padded-batch"} & set(peers_of(windowed))  # there is nothing to pad
    assert not {"varlen", "xformers"} & set(peers_of(Case("B", MIX, True, bias=True)))
