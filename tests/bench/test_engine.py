"""The one kind of measurement: who takes part, what is compared, and how rounds are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import engine, measure
from bench.engine import OURS, Suite, Unavailable, close, ready
from bench.measure import DeviceClock, Rivals, clock_of, once, peak_memory, repeated, repeats


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEVICE", "cpu")
    monkeypatch.setattr(engine, "CLOCK", clock_of("cpu"))
    monkeypatch.setitem(measure.FLUSHED, "cpu", 1 << 12)
    measure._filler.cache_clear()


@dataclass(frozen=True)
class Case:
    id: str = "one"
    peers: tuple[str, ...] = ("other", "missing", "broken")
    facts: Mapping[str, Any] = field(default_factory=lambda: {"label": "1", "pass": "forward"})


@dataclass(frozen=True)
class Run:
    batch: Tensor
    factor: float
    made: list[str]
    name: str
    input_bytes: int = 12
    info: Mapping[str, Any] = field(default_factory=lambda: {"saved_bytes": 5})

    def __call__(self) -> Tensor:
        self.made.append(self.name)
        return self.batch * self.factor

    def results(self) -> dict[str, Tensor]:
        return {"product": self.batch * self.factor}


def suite_of(made: list[str], other: float = 2.0, ours: Exception | None = None) -> Suite:
    def peer(name: str, factor: float) -> Callable[[Tensor], Run]:
        return lambda batch: Run(batch, factor, made, name)

    def fails(error: Exception) -> Callable[[Tensor], Run]:
        def prepare(batch: Tensor) -> Run:
            raise error

        return prepare

    def compare(peer: str, found: Any, expected: Any, batch: Tensor) -> None:
        close(peer, "product", found["product"], expected["product"], 1e-6)

    missing = Unavailable("missing is not installed: pip install missing")
    broken = NotImplementedError("head dim 72, see /usr/lib/thing/kernel.py\nand more")
    return Suite(
        name="made-up",
        cases=lambda device, quick: [Case()],
        batch=lambda case, device: torch.ones(1024, device=device),
        peers={
            OURS: ("ours", peer(OURS, 2.0) if ours is None else fails(ours)),
            "other": ("another", peer("other", other)),
            "missing": ("not there", fails(missing)),
            "broken": ("raises", fails(broken)),
        },
        compare=compare,
        rows="nothing",
        seconds={"cpu": 1e-3, "cuda": 1e-3},
    )


class Benchmark:
    """What pytest-benchmark does with a target and a setup."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.rounds = 0

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        self.rounds = rounds
        for _ in range(rounds):
            setup()
            target()


def test_a_duel() -> None:
    made: list[str] = []
    benchmark = Benchmark()
    engine.test_duel(Case(), suite_of(made), benchmark, True, None)
    found = benchmark.extra_info
    assert (found["suite"], found["case"]) == ("made-up", "one")
    assert found["facts"] == {"label": "1", "pass": "forward"}
    assert found["absent"] == {
        "missing": "missing is not installed: pip install missing",
        "broken": "NotImplementedError: head dim 72, see kernel.py",  # no paths of this machine
    }
    assert list(found["rows"]) == [OURS, "other"]
    assert len(found["rows"]["other"].pop("seconds")) == benchmark.rounds == 3
    for row in found["rows"].values():  # of ours pytest-benchmark keeps the seconds
        assert row.pop("memory_bytes") == pytest.approx(4096, abs=64)
        assert row == {"input_bytes": 12, "saved_bytes": 5, "repeats": 1}
    assert made == [OURS] * 2 + ["other"] * 2 + ["other", OURS] * 3  # by turns
    assert benchmark.group == "made-up: one"


def test_some_peers_alone_and_more_rounds() -> None:
    benchmark, made = Benchmark(), []
    engine.test_duel(Case(), suite_of(made), benchmark, False, ["missing"])
    assert list(benchmark.extra_info["rows"]) == [OURS]
    assert list(benchmark.extra_info["absent"]) == ["missing"]
    assert 5 <= benchmark.rounds <= 40


def test_a_peer_that_differs_fails_and_of_ours_nothing_is_excused() -> None:
    with pytest.raises(AssertionError, match=r"other: product differs from ours by 0\.05"):
        engine.test_duel(Case(), suite_of([], other=2.1), Benchmark(), True, None)
    with pytest.raises(RuntimeError, match="ours"):
        ready(suite_of([], ours=RuntimeError("ours")), OURS, torch.ones(3), {})


def test_close() -> None:
    right = torch.randn(4, 5, 6, dtype=torch.float64)
    close("p", "x", right.clone(), right, 1e-12)
    for change in (1.001, torch.nan):
        wrong = right.clone()
        wrong[2, 3] *= change  # one row of twenty
        with pytest.raises(AssertionError, match="p: x differs from ours"):
            close("p", "x", wrong, right, 9e-5)
    with pytest.raises(AssertionError, match=r"p: x has shape \(4, 30\), ours \(4, 5, 6\)"):
        close("p", "x", right.flatten(1), right, 1.0)
    close("p", "x", torch.tensor(1.0 + 1e-6), torch.tensor(1.0), 1e-5)
    with pytest.raises(AssertionError):
        close("p", "x", torch.tensor(1.0 + 1e-4), torch.tensor(1.0), 1e-5)
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    close("p", "x", half, half, 0.0)
    close("p", "x", torch.ones(0, 3), torch.ones(0, 3), 0.0)


def test_peak_memory_on_a_cpu() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(1 << 20)  # 4 MiB
        b = a + 1
        del a
        c = torch.empty(1 << 18)
        del b
        return c

    outside = torch.empty(1 << 22)
    for _ in range(2):
        peak, seconds = peak_memory(call, "cpu")
        assert peak == pytest.approx(8 << 20, abs=4096)
        assert seconds > 0
    grown, _ = peak_memory(lambda: outside.view(-1)[:10], "cpu")
    assert grown < 4096


def test_rivals_take_turns() -> None:
    order: list[str] = []
    readings = iter(range(1000))
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rivals = Rivals(calls, "cpu", lambda: float(next(readings)))
    for _ in range(4):
        rivals()
    assert "".join(order) == "abcbcacababc"
    assert rivals.seconds == dict.fromkeys("abc", [1.0] * 4)  # from one reading to the next
    Rivals({}, "cpu", clock_of("cpu"))()


def test_short_calls_are_repeated_on_cuda_alone() -> None:
    assert repeats(1e-5, "cpu") == 1
    assert [repeats(s, "cuda") for s in (1e-9, 1e-4, 1.9e-3, 1.0)] == [50, 20, 2, 1]
    calls: list[int] = []
    repeated(lambda: calls.append(1), 3)()
    assert len(calls) == 3
    assert once(lambda: calls.append(1), "cpu") > 0
    assert len(calls) == 4


def test_a_devices_clock_adds_up_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events as CUDA has them: milliseconds from one to another, once both have happened."""
    now = SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None

        def record(self) -> None:
            self._recorded = now.ms

        def synchronize(self) -> None:
            self.at = self._recorded

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = clock_of("cuda")
    assert isinstance(clock, DeviceClock)
    readings = []
    for ms in (5.0, 7.0, 1007.0, 1007.5):
        now.ms = ms
        readings.append(clock())
    assert readings == pytest.approx([0.0, 0.002, 1.002, 1.0025])
    assert clock_of("cpu") is measure.time.perf_counter
