"""Token merging, forward and backward, against every other way to have fewer tokens.

    pytest bench/merge.py               # or `python -m bench merge`, which keeps the results
    pytest bench/merge.py -k "bridge and not backward"

``test_peer`` times each peer by itself, ``test_duel`` all peers of a case by turns, for ratios.
Before any timing the eager form's merged tokens, sizes and gradients are compared with ours, token
by token; peers that do not merge are there for their time and memory.

On CUDA: bfloat16. On a CPU: float32, smaller batches, the backend "torch". The rate is that of the
product of sources and destinations over the whole time of a peer.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.attention_peers import Unavailable
from bench.measure import Call, Rivals, finish, peak_memory, repeated, repeats
from bench.merge_cases import Case, cases
from bench.merge_peers import Batch, Run, prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Largest difference of two results for a token, relative to an average token's norm, that counts as
# none; and which share of the tokens must agree. A choice between similarities that differ by less
# than they are rounded by may go either way, and bfloat16 similarities of an eager form are rounded
# at 1/256: there only the distance to the original tokens is compared, to 5 %.
TOLERANCE, SHARE, DISTANCE = 1e-4, 0.995, 0.05

# Seconds for the rounds of one peer.
BUDGET = {"cpu": 1.0, "cuda": 0.3}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    found = cases(DEVICE, quick)
    if "peer" in metafunc.fixturenames:
        pairs = [(case, peer) for case in found for peer in case.peers]
        ids = [f"{case.id}-{peer}" for case, peer in pairs]
        metafunc.parametrize(("case", "peer"), pairs, ids=ids)
    else:
        metafunc.parametrize("case", found, ids=[case.id for case in found])


def test_peer(case: Case, peer: str, benchmark: Any, quick: bool) -> None:
    """One peer on one case, by itself."""
    try:
        run, memory, seconds = checked(case, peer)
    except Unavailable as reason:
        pytest.skip(str(reason))
    times = repeats(seconds, DEVICE)
    rounds = 3 if quick else min(40, max(5, int(BUDGET[DEVICE] / (times * seconds))))
    benchmark.group = case.id
    benchmark.extra_info.update(info(case, run, peer, memory, times))
    benchmark.pedantic(repeated(run, times, DEVICE), rounds=rounds, warmup_rounds=1)


def test_duel(case: Case, benchmark: Any, quick: bool) -> None:
    """Us and the others by turns; the rivals' times go to ``extra_info``."""
    absent: dict[str, str] = {}
    rivals: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    run, memory, seconds = checked(case, "fastagglo")
    times = repeats(seconds, DEVICE)
    for name in case.peers[1:]:
        try:
            other, other_memory, _ = checked(case, name)
        except Unavailable as reason:
            absent[name] = str(reason)
            continue
        rivals[name] = {"memory_bytes": other_memory, "input_bytes": other.input_bytes}
        calls[name] = repeated(other, times, DEVICE)
    turn = Rivals(calls)
    benchmark.group = f"{case.id}-vs-all"
    benchmark.extra_info.update(info(case, run, "fastagglo", memory, times))
    # pytest-benchmark calls `setup` before each round of ours: there the others have their turn.
    rounds = 5 if quick else 25
    benchmark.pedantic(repeated(run, times, DEVICE), setup=turn, rounds=rounds)
    for name, seconds_of_rounds in turn.seconds.items():
        rivals[name]["seconds"] = seconds_of_rounds
    benchmark.extra_info.update(rivals=rivals, absent=absent)


def info(case: Case, run: Run, peer: str, memory: int, times: int) -> dict[str, Any]:
    """What ``bench.report`` wants to know of a benchmark."""
    return {
        "case": case.id,
        "facts": facts(case),
        "peer": peer,
        "repeats": times,
        "memory_bytes": memory,
        "input_bytes": run.input_bytes,
    }


def facts(case: Case) -> dict[str, Any]:
    """What the results say of a case."""
    return {
        "label": case.label,
        "partition": case.partition,
        "stride": None if case.partition == "alternate" else case.stride,
        "protect": case.protect,
        "metric": f"keys of {case.heads} heads, averaged" if case.heads else "the tokens",
        "pass": "forward+backward" if case.backward else "forward",
        "flops": case.flops,
    }


def checked(case: Case, peer: str) -> tuple[Run, int, float]:
    """A peer that agrees with us, its peak memory, and about how many seconds a call takes.

    Raises:
        Unavailable: it cannot run the case.
        AssertionError: it merges, and its tokens, sizes or gradients differ from ours.
    """
    batch, expected = ours(case)
    try:
        run = prepare(peer, batch)
        run()  # warms up
        if peer != "fastagglo" and run.merge is not None:
            compare(peer, run.results(), expected, batch.x.detach())
        finish(DEVICE)
        return run, *peak_memory(run, DEVICE)
    except (AssertionError, Unavailable):
        raise
    except Exception as error:  # whatever a library raises for what it cannot do
        if peer == "fastagglo":
            raise
        line = str(error).strip().partition("\n")[0]
        line = re.sub(r"/[\w./-]+/", "", line)[:160]  # no paths of this machine in the results
        raise Unavailable(f"{type(error).__name__}: {line}") from error


@functools.lru_cache(maxsize=1)
def ours(case: Case) -> tuple[Batch, list[Tensor]]:
    """The inputs of a case, and our tokens, sizes and gradients by original token."""
    batch = Batch.of(case, DEVICE)
    return batch, prepare("fastagglo", batch).results()


def compare(peer: str, found: list[Tensor], expected: list[Tensor], x: Tensor) -> None:
    """Token by token, so that a slot that went elsewhere shows."""
    if x.dtype != torch.float32:
        one, right = ((tokens - x).float().square().sum() for tokens in (found[0], expected[0]))
        off = abs(one.item() / right.item() - 1)
        assert off <= DISTANCE, f"{peer}: {off:.2g} off our distance to the tokens ({DISTANCE})"
        return
    for name, a, b in zip(("tokens", "sizes", "gradient"), found, expected, strict=True):
        a, b = (y.flatten(2) if y.ndim == 3 else y[..., None] for y in (a, b))
        size = b.norm(dim=2).square().mean().sqrt()
        share = ((a - b).norm(dim=2) <= TOLERANCE * size).float().mean().item()
        assert share >= SHARE, f"{peer}: only {share:.2%} of its {name} agree with ours ({SHARE})"
