"""Packed attention against every other way to run a mixed batch.

    pytest bench/attention.py            # or `python -m bench attention`, which keeps the results
    pytest bench/attention.py -k "SO400M and varlen"

``test_peer`` times each peer by itself. ``test_duel`` is for ratios: in each round all peers run,
one after the other, so that a machine that slows down does so for all of them. Before any timing a
peer's output, and its gradient, are compared with ours.

On CUDA: bfloat16, whole batches of about 32,000 tokens. On a CPU: float32, small batches, the
backend "torch". FlexAttention compiles some ten seconds for each layout, and on a CPU it has no
backward: there it takes part in the forward duel alone. One call of the QKV-to-output road is
timed, with the device awaited; a round repeats calls that are too short to be timed singly.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.attention_cases import Case, Duel, cases, duels, peers_of
from bench.attention_peers import Batch, Run, Unavailable, prepare
from bench.measure import Call, Rivals, peak_memory, repeated, repeats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Largest difference of a row, relative to its own norm and to that of an average row. Rounding
# stays well below; a key too many or too few does not.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

# Seconds for the rounds of one peer.
BUDGET = {"cpu": 0.4, "cuda": 0.3}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    if "peer" in metafunc.fixturenames:
        pairs = [(case, peer) for case in cases(DEVICE, quick) for peer in peers_of(case)]
        metafunc.parametrize(("case", "peer"), pairs, ids=[f"{c.name}-{p}" for c, p in pairs])
    else:
        found = duels(DEVICE, quick)
        metafunc.parametrize("duel", found, ids=[duel.name for duel in found])


def test_peer(case: Case, peer: str, benchmark: Any, quick: bool) -> None:
    """One peer on one case, by itself."""
    if peer == "flex" and DEVICE == "cpu":
        pytest.skip("FlexAttention on a CPU: no backward, and ten seconds of compiling per layout")
    try:
        run, memory, seconds = checked(case, peer)
    except Unavailable as reason:
        pytest.skip(str(reason))
    times = repeats(seconds, DEVICE)
    rounds = 3 if quick else min(40, max(5, int(BUDGET[DEVICE] / (times * seconds))))
    benchmark.group = case.name
    benchmark.extra_info.update(info(case, run, peer, memory, times))
    benchmark.pedantic(repeated(run, times, DEVICE), rounds=rounds, warmup_rounds=1)


def test_duel(duel: Duel, benchmark: Any) -> None:
    """Us and some peers by turns; the rivals' times go to ``extra_info``."""
    case = duel.case
    absent: dict[str, str] = {}
    rivals: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    run, memory, seconds = checked(case, "fastagglo")
    times = repeats(seconds, DEVICE)
    for name in duel.peers:
        try:
            other, other_memory, _ = checked(case, name)
        except Unavailable as reason:
            absent[name] = str(reason)
            continue
        rivals[name] = {"memory_bytes": other_memory, "input_bytes": other.leaf.nbytes}
        calls[name] = repeated(other, times, DEVICE)
    turn = Rivals(calls)
    benchmark.group = duel.name
    benchmark.extra_info.update(info(case, run, "fastagglo", memory, times))
    # pytest-benchmark calls `setup` before each round of ours: there the others have their turn.
    benchmark.pedantic(repeated(run, times, DEVICE), setup=turn, rounds=duel.rounds)
    for name, seconds_of_rounds in turn.seconds.items():
        rivals[name]["seconds"] = seconds_of_rounds
    benchmark.extra_info.update(rivals=rivals, absent=absent)


def info(case: Case, run: Run, peer: str, memory: int, times: int) -> dict[str, Any]:
    """What ``bench.report`` wants to know of a benchmark."""
    return {
        "case": case.name,
        "facts": facts(case),
        "peer": peer,
        "repeats": times,
        "memory_bytes": memory,
        "input_bytes": run.leaf.nbytes,
    }


def facts(case: Case) -> dict[str, Any]:
    """What the results say of a case."""
    return {
        "student": case.student,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "mix": case.mix.name,
        "batch": case.mix.batch,
        "tokens": sum(case.mix.lengths),
        "pass": case.direction,
        "bias": case.bias,
        "flops": case.flops,
    }


def checked(case: Case, peer: str) -> tuple[Run, int, float]:
    """A peer that agrees with us, its peak memory, and about how many seconds a call takes.

    Raises:
        Unavailable: it cannot run the case.
        AssertionError: its output or its gradient differs from ours.
    """
    batch, expected = ours(case)
    if peer == "fastagglo":
        run = prepare(peer, batch)
        run()  # warms up
        return run, *peak_memory(run, DEVICE)
    try:
        run = prepare(peer, batch)
        compare(peer, packed(run), expected)
        return run, *peak_memory(run, DEVICE)
    except (AssertionError, Unavailable):
        raise
    except Exception as error:  # whatever a library raises for what it cannot do
        line = str(error).strip().partition("\n")[0]
        line = re.sub(r"/[\w./-]+/", "", line)[:160]  # no paths of this machine in the results
        raise Unavailable(f"{type(error).__name__}: {line}") from error


@functools.lru_cache(maxsize=1)
def ours(case: Case) -> tuple[Batch, dict[str, Tensor]]:
    """The inputs of a case, and our output and gradients."""
    batch = Batch.of(case, DEVICE)
    return batch, packed(prepare("fastagglo", batch))


def packed(run: Run) -> dict[str, Tensor]:
    """One run's output and gradients, as packed rows, by name."""
    results = [x.detach() if run.packed is None else x.detach()[run.packed] for x in run()]
    found = {"output": results[0]}
    if len(results) > 1:
        names = ("gradient of q", "gradient of k", "gradient of v")
        found.update(zip(names, results[1].unbind(1), strict=True))
    return found


def compare(peer: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Row by row, so that an error in the shortest segment shows."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        a, b = (x.flatten(1).float() for x in (found[name], right))
        size = b.norm(dim=1)
        size = size.clamp_min(size.square().mean().sqrt())
        worst = ((a - b).norm(dim=1) / size).max().item()
        limit = TOLERANCE[right.dtype]
        assert worst <= limit, f"{peer}: {name} differs from ours by {worst:.2g} (limit {limit})"
