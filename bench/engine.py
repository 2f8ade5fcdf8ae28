"""What every suite shares: cases, peers that must agree before they are timed, rounds by turns.

A suite is a file ``bench/<name>.py`` with a :class:`Suite` named ``SUITE`` and one line that makes
pytest find the benchmark here::

    from bench.engine import pytest_generate_tests, test_duel  # noqa: F401

``test_duel`` is the only kind of measurement: in each round all peers of a case run one after the
other, so that a machine that slows down does so for all of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from bench.measure import Rivals, clock_of, peak_memory, repeated, repeats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "fastagglo"
CLOCK = clock_of(DEVICE)

Results = Mapping[str, Tensor]


class Unavailable(Exception):
    """A peer that cannot take part, and why: not installed, or it cannot run the case."""


class Case(Protocol):
    """One thing to measure; hashable.

    Attributes:
        id: for pytest and for the results; unique in its suite.
        peers: who takes part beside us, by name in ``Suite.peers``.
        facts: what the results say of it. ``label`` (for plots) and ``pass`` ("forward",
            "forward+backward" or what else a call does) are needed; ``flops`` and ``bytes``, what
            nobody can do without, give rates and the share of the roofline; ``series``, ``axis``
            and ``x`` make the case a point of a curve whose exponent is fitted.
    """

    @property
    def id(self) -> str: ...

    @property
    def peers(self) -> Sequence[str]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...


class Run(Protocol):
    """A peer made ready for a case: all that a step does not repeat is done.

    Attributes:
        input_bytes: of what it reads that exists before the call, parameters included.
        info: what else the results say of the peer: ``compile_seconds``, ``saved_bytes``, or
            numbers of the suite's own.
    """

    @property
    def input_bytes(self) -> int: ...

    @property
    def info(self) -> Mapping[str, Any]: ...

    def __call__(self) -> Any:
        """What is timed."""

    def results(self) -> Results:
        """What must agree with ours, by name; a call of its own."""


@dataclass(frozen=True)
class Goal:
    """What we mean to reach on a CPU: ours over theirs, at most."""

    time: float | None = None
    memory: float | None = None
    saved: float | None = None


@dataclass(frozen=True)
class Suite:
    """A file's benchmarks.

    Attributes:
        name: of the file.
        cases: for a device, "cuda" or "cpu", and whether it is to be quick (tiny).
        batch: a case's inputs on a device, the same for all peers and in every run.
        peers: by name, us first: in words, and what makes a peer ready for a batch. That raises
            :class:`Unavailable` if it cannot.
        compare: raises AssertionError unless a peer's results (second) agree with ours (third);
            gets the peer's name and the batch besides.
        rows: what the label of a case means, for plots.
        goals: by case and peer.
        notes: what the suite's own keys in the results mean.
        seconds: about how long the rounds of a case may take, by device.
    """

    name: str
    cases: Callable[[str, bool], Sequence[Case]]
    batch: Callable[[Any, str], Any]
    peers: Mapping[str, tuple[str, Callable[[Any], Run]]]
    compare: Callable[[str, Results, Results, Any], None]
    rows: str
    goals: Mapping[tuple[str, str], Goal] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=lambda: {"cpu": 3.0, "cuda": 0.5})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case of the module's suite."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.SUITE.cases(DEVICE, metafunc.config.getoption("quick"))
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.mark.benchmark(timer=CLOCK)
def test_duel(
    case: Case, suite: Suite, benchmark: Any, quick: bool, chosen_peers: Sequence[str] | None
) -> None:
    """Us and our peers by turns; all that is not our own time goes to ``extra_info``."""
    if "torch._dynamo" in sys.modules:  # it falls back to eager after eight shapes of one function
        torch.compiler.reset()
    batch = suite.batch(case, DEVICE)
    peers = [p for p in case.peers if chosen_peers is None or p in chosen_peers]
    expected = suite.peers[OURS][1](batch).results() if peers else {}
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name in (OURS, *peers):
        try:
            runs[name], rows[name], seconds[name] = ready(suite, name, batch, expected)
        except Unavailable as reason:
            absent[name] = str(reason)
    times = {name: repeats(seconds[name], DEVICE) for name in runs}
    calls = {name: repeated(run, times[name]) for name, run in runs.items()}
    ours = calls.pop(OURS)
    turn = Rivals(calls, DEVICE, CLOCK)
    whole = sum(times[name] * seconds[name] for name in runs)
    fewest = 3 if quick or whole > 2 else 5
    rounds = 3 if quick else min(40, max(fewest, int(suite.seconds[DEVICE] / whole)))
    benchmark.group = f"{suite.name}: {case.id}"
    # pytest-benchmark calls `setup` before each round of ours: there the others have their turn.
    benchmark.pedantic(ours, setup=turn, rounds=rounds)
    for name, seconds_of_rounds in turn.seconds.items():
        rows[name]["seconds"] = seconds_of_rounds
    for name, row in rows.items():
        row["repeats"] = times[name]
    benchmark.extra_info.update(
        suite=suite.name, case=case.id, facts=dict(case.facts), rows=rows, absent=absent
    )


def ready(
    suite: Suite, name: str, batch: Any, expected: Results
) -> tuple[Run, dict[str, Any], float]:
    """A peer that agrees with us, what the results say of it, and about how long a call takes.

    Raises:
        Unavailable: it cannot run the case.
        AssertionError: its results differ from ours.
    """
    try:
        run = suite.peers[name][1](batch)
        if name != OURS:
            suite.compare(name, run.results(), expected, batch)
        run()  # warms up
        memory, seconds = peak_memory(run, DEVICE)
    except (AssertionError, Unavailable):
        raise
    except Exception as error:  # whatever a library raises for what it cannot do
        if name == OURS:
            raise
        line = str(error).strip().partition("\n")[0]
        line = re.sub(r"/[\w./-]+/", "", line)[:160]  # no paths of this machine in the results
        raise Unavailable(f"{type(error).__name__}: {line}") from error
    return run, {"memory_bytes": memory, "input_bytes": run.input_bytes} | dict(run.info), seconds


def close(peer: str, name: str, found: Tensor, right: Tensor, limit: float) -> None:
    """Row by row: differences relative to a row's own norm and to that of an average row.

    A row is all but the last dimension. An error in one row shows, however many there are.

    Raises:
        AssertionError: beyond the limit, or another shape.
    """
    assert found.shape == right.shape, (
        f"{peer}: {name} has shape {tuple(found.shape)}, ours {tuple(right.shape)}"
    )
    kind = torch.promote_types(right.dtype, torch.float32)
    a, b = (x.detach().to(kind).reshape(-1, x.shape[-1] if x.ndim else 1) for x in (found, right))
    size = b.norm(dim=1)
    size = size.clamp_min(size.square().mean().sqrt())
    worst = ((a - b).norm(dim=1) / size).max().item() if len(b) else 0.0
    assert worst <= limit, f"{peer}: {name} differs from ours by {worst:.2g} (limit {limit})"
