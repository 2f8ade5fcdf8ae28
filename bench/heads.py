"""The adaptor heads of several teachers over one x, forward and backward, against their peers.

    pytest bench/heads.py               # or `python -m bench heads`, which keeps the results
    pytest bench/heads.py -k "four-heads and not compile"

``test_peer`` times each peer by itself, ``test_duel`` all peers of a case by turns, for ratios.
Before any timing a peer's outputs and gradients are compared with ours. Beside time and peak memory
stands what autograd keeps from the forward to the backward: each block of memory once, without x
and the parameters.

On CUDA: bfloat16. On a CPU: float32, smaller cases, the backend "torch". Compiled code is made anew
in each run, in a folder of its own.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.heads_cases import Case, cases, facts, peers_of
from bench.heads_peers import Batch, Run, prepare
from bench.measure import Call, Rivals, peak_memory, repeated, repeats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Largest difference of an output or a gradient, relative to its norm; bfloat16 rounds each step.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# Seconds for the rounds of one peer.
BUDGET = {"cpu": 5.0, "cuda": 0.3}


@pytest.fixture(scope="module", autouse=True)
def _compiled_anew() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", folder)
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    if "peer" in metafunc.fixturenames:
        pairs = [(case, peer) for case in cases(DEVICE, quick) for peer in peers_of(quick)]
        metafunc.parametrize(("case", "peer"), pairs, ids=[f"{c.name}-{p}" for c, p in pairs])
    else:
        found = cases(DEVICE, quick)
        metafunc.parametrize("case", found, ids=[case.name for case in found])


def test_peer(case: Case, peer: str, benchmark: Any, quick: bool) -> None:
    """One peer on one case, by itself."""
    run, info, seconds = checked(case, peer)
    times = repeats(seconds, DEVICE)
    rounds = 3 if quick else min(40, max(5, int(BUDGET[DEVICE] / (times * seconds))))
    benchmark.group = case.name
    benchmark.extra_info.update(about(case, run), **info, peer=peer, repeats=times)
    benchmark.pedantic(repeated(run, times, DEVICE), rounds=rounds, warmup_rounds=1)


def test_duel(case: Case, benchmark: Any, quick: bool) -> None:
    """Us and our peers by turns; the rivals' times go to ``extra_info``."""
    rivals: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    run, info, seconds = checked(case, "fastagglo")
    times = repeats(seconds, DEVICE)
    for name in peers_of(quick)[1:]:
        other, rivals[name], _ = checked(case, name)
        calls[name] = repeated(other, times, DEVICE)
    turn = Rivals(calls)
    benchmark.group = case.name
    benchmark.extra_info.update(about(case, run), **info, peer="fastagglo", repeats=times)
    # pytest-benchmark calls `setup` before each round of ours: there the others have their turn.
    rounds = 5 if quick else 15 if DEVICE == "cpu" else 30
    benchmark.pedantic(repeated(run, times, DEVICE), setup=turn, rounds=rounds)
    for name, seconds_of_rounds in turn.seconds.items():
        rivals[name]["seconds"] = seconds_of_rounds
    benchmark.extra_info.update(rivals=rivals, absent={})


def about(case: Case, run: Run) -> dict[str, Any]:
    """What ``bench.report`` wants to know of a case."""
    return {"case": case.name, "facts": facts(case, run.batch.x.element_size())}


def checked(case: Case, peer: str) -> tuple[Run, dict[str, Any], float]:
    """A peer that agrees with us, its memory, and about how many seconds a call takes.

    Raises:
        AssertionError: an output or a gradient differs from ours.
    """
    batch, expected = ours(case)
    run = prepare(peer, batch)
    compare(peer, run(), expected)
    memory, seconds = peak_memory(run, DEVICE)
    info = {
        "memory_bytes": memory,
        "input_bytes": run.input_bytes,
        "saved_bytes": run.saved_bytes(),
    }
    if run.compile_seconds is not None:
        info["compile_seconds"] = run.compile_seconds
    return run, info, seconds


@functools.lru_cache(maxsize=1)
def ours(case: Case) -> tuple[Batch, list[Tensor]]:
    """The inputs of a case, and our outputs and gradients."""
    batch = Batch.of(case, DEVICE)
    return batch, [x.detach() for x in prepare("fastagglo", batch)()]


def compare(peer: str, found: list[Tensor], expected: list[Tensor]) -> None:
    """Outputs, then the gradients of x and of each parameter."""
    limit = TOLERANCE[expected[0].dtype]
    for i, (one, right) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == right.shape, f"{peer}: result {i}"
        off = ((one.float() - right.float()).norm() / right.float().norm()).item()
        assert off <= limit, f"{peer}: result {i} differs from ours by {off:.2g} (limit {limit})"
