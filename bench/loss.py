"""The multi-teacher loss, forward and backward, against every other way to compute it.

    pytest bench/loss.py                # or `python -m bench loss`, which keeps the results
    pytest bench/loss.py -k "phi-s and not compile"

``test_peer`` times each peer by itself, ``test_duel`` all peers of a case by turns, for ratios.
Before any timing a peer's total and its gradients are compared with ours.

On CUDA: bfloat16. On a CPU: float32, smaller cases, the backend "torch". The bytes that nobody can
do without (read x, read y, write dx: 6 for each bfloat16 element where the grids are equal) stand
beside each time, as does the time that a plain copy of as many bytes takes, from a measurement in
the same run. Compiled code is made anew in each run, in a folder of its own.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.attention_peers import Unavailable
from bench.loss_cases import Case, Duel, cases, duels, peers_of
from bench.loss_peers import Batch, Run, prepare
from bench.measure import Call, Rivals, finish, peak_memory, repeated, repeats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Largest difference: of the total relative to it, of a token's gradient relative to its own norm
# and to that of an average token. PHI-S's rotation of bfloat16 predictions rounds them once more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

# Seconds for the rounds of one peer.
BUDGET = {"cpu": 0.6, "cuda": 0.3}

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes, beyond any cache


@pytest.fixture(scope="module", autouse=True)
def _compiled_anew() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", folder)
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    if "peer" in metafunc.fixturenames:
        pairs = [(case, peer) for case in cases(DEVICE, quick) for peer in peers_of(quick)]
        ids = [f"{case.name}-{case.images}-{peer}" for case, peer in pairs]
        metafunc.parametrize(("case", "peer"), pairs, ids=ids)
    else:
        found = duels(DEVICE, quick)
        metafunc.parametrize("duel", found, ids=[duel.name for duel in found])


def test_peer(case: Case, peer: str, benchmark: Any, quick: bool) -> None:
    """One peer on one case, by itself."""
    try:
        run, memory, seconds = checked(case, peer)
    except Unavailable as reason:
        pytest.skip(str(reason))
    times = repeats(seconds, DEVICE)
    rounds = 3 if quick else min(40, max(5, int(BUDGET[DEVICE] / (times * seconds))))
    benchmark.group = f"{case.name}-{case.images}"
    benchmark.extra_info.update(info(case, run, peer, memory, times))
    if run.compile_seconds is not None:
        benchmark.extra_info["compile_seconds"] = run.compile_seconds
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
        rivals[name] = {"memory_bytes": other_memory, "input_bytes": other.input_bytes}
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
        "case": f"{case.name}-{case.images}",
        "facts": facts(case, run.leaves[0].element_size()),
        "peer": peer,
        "repeats": times,
        "memory_bytes": memory,
        "input_bytes": run.input_bytes,
        "copy_bytes_per_second": copy_bandwidth(DEVICE),
    }


def facts(case: Case, element_size: int) -> dict[str, Any]:
    """What the results say of a case."""
    return {
        "label": case.label,
        "images": case.images,
        "terms": [term.words for term in case.terms],
        "pass": "forward+backward",
        "bytes": case.elements * element_size,
    }


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written ones, of a copy on the device: the fastest of 20."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    into = torch.zeros_like(source)
    seconds = []
    for _ in range(23):
        finish(device)
        start = time.perf_counter()
        into.copy_(source)
        finish(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds[3:])


def checked(case: Case, peer: str) -> tuple[Run, int, float]:
    """A peer that agrees with us, its peak memory, and about how many seconds a call takes.

    Raises:
        Unavailable: it cannot run the case.
        AssertionError: its total or a gradient differs from ours.
    """
    batch, expected = ours(case)
    if peer == "fastagglo":
        run = prepare(peer, batch)
        run()  # warms up
        return run, *peak_memory(run, DEVICE)
    try:
        run = prepare(peer, batch)
        compare(peer, run.results(), expected)
        return run, *peak_memory(run, DEVICE)
    except (AssertionError, Unavailable):
        raise
    except Exception as error:  # whatever a library raises for what it cannot do
        line = str(error).strip().partition("\n")[0]
        line = re.sub(r"/[\w./-]+/", "", line)[:160]  # no paths of this machine in the results
        raise Unavailable(f"{type(error).__name__}: {line}") from error


@functools.lru_cache(maxsize=1)
def ours(case: Case) -> tuple[Batch, list[Tensor]]:
    """The inputs of a case, and our total and gradients."""
    batch = Batch.of(case, DEVICE)
    return batch, prepare("fastagglo", batch).results()


def compare(peer: str, found: list[Tensor], expected: list[Tensor]) -> None:
    """Token by token, so that an error at one edge shows."""
    limit = TOLERANCE[expected[1].dtype]
    assert len(found) == len(expected)
    off = abs(found[0].item() / expected[0].item() - 1)
    assert off <= limit, f"{peer}: the total differs from ours by {off:.2g} (limit {limit})"
    for i, (one, right) in enumerate(zip(found[1:], expected[1:], strict=True)):
        a, b = (x.float().flatten(0, -2) for x in (one, right))
        size = b.norm(dim=1)
        size = size.clamp_min(size.square().mean().sqrt())
        worst = ((a - b).norm(dim=1) / size).max().item()
        assert worst <= limit, (
            f"{peer}: the gradient of term {i} differs from ours by {worst:.2g} (limit {limit})"
        )
