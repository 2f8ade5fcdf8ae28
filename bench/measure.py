"""Time and peak memory of a call, on CUDA or on a CPU."""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# A round shorter than this on CUDA is mostly launch and wait: it repeats the call.
SHORTEST_ROUND = 2e-3

# Bytes that no cache holds: 2 x the second-level cache of a large GPU, 1.5 x a CPU's third level.
FLUSHED = {"cuda": 1 << 28, "cpu": 3 << 24}

Call = Callable[[], Any]


def finish(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(call: Call, device: str) -> tuple[int, float]:
    """Most bytes that a call holds beyond what was there before it, and the seconds it took.

    On CUDA the caching allocator's own high-water mark. On a CPU PyTorch has none, so the
    profiler's record of each allocation and each release is added up: the same every time, and
    within 1.5 % of the resident high-water mark (VmHWM) where malloc gives back what is freed. It
    does not see what a library takes outside PyTorch's allocator (BLAS packing, some MB at most).
    The result of the call counts: it is dropped only afterwards.
    """
    if device == "cuda":
        finish(device)
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        finish(device)
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        start = time.perf_counter()
        kept = call()
        seconds = time.perf_counter() - start
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    steps = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(steps, key=lambda step: step[0]):
        held += change
        peak = max(peak, held)
    return peak, seconds


class DeviceClock:
    """Seconds of a CUDA device: the difference of two readings is that of two events of its stream.

    So the time of a call is the device's, from its first kernel's launch to its last one's end, as
    ``triton.testing.do_bench`` has it, and not that in which the host notices. A reading waits.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            # From one reading to the next: an event's float32 holds no whole run in microseconds.
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


def clock_of(device: str) -> Callable[[], float]:
    """What all peers of a duel are timed with; it waits for the device."""
    return DeviceClock() if device == "cuda" else time.perf_counter


def once(call: Call, device: str) -> float:
    """Seconds of a single call, the device awaited: a first one compiles."""
    finish(device)
    start = time.perf_counter()
    call()
    finish(device)
    return time.perf_counter() - start


def repeats(seconds: float, device: str) -> int:
    """How often a round repeats a call of this length."""
    if device != "cuda":
        return 1
    return min(50, max(1, math.ceil(SHORTEST_ROUND / seconds)))


def repeated(call: Call, times: int) -> Call:
    """A function that makes the call some times."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


class Rivals:
    """Times some calls by turns, a round at a time; the first one changes from round to round."""

    def __init__(self, calls: Mapping[str, Call], device: str, clock: Callable[[], float]) -> None:
        self._calls = list(calls.items())
        self._device = device
        self._clock = clock
        self._round = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}

    def __call__(self) -> None:
        """One round, and a cache without our inputs for who comes next."""
        first = self._round % max(1, len(self._calls))
        self._round += 1
        for name, call in self._calls[first:] + self._calls[:first]:
            flush(self._device)
            start = self._clock()
            call()
            self.seconds[name].append(self._clock() - start)
        flush(self._device)


@functools.cache
def _filler(device: str) -> Tensor:
    return torch.empty(FLUSHED[device], dtype=torch.uint8, device=device)


def flush(device: str) -> None:
    """Fill the device's caches with something else, and wait."""
    _filler(device).zero_()
    finish(device)
