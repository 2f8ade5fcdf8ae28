"""What ``python -m bench`` shows while it runs: a bar on a terminal, else a line for each case."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest


class Progress:
    """A pytest plugin, in place of pytest's own dots; failures are still shown at the end.

    Draws only between tests, so that it takes no time from what is timed.
    """

    def __init__(self) -> None:
        self.total = self.done = 0
        self.began = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def pytest_report_teststatus(self) -> tuple[str, str, str]:
        return "", "", ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        self.began = time.perf_counter()
        self._bar = _rich_bar() if sys.stdout.isatty() else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        try:
            return (yield)
        finally:
            if self._bar is not None:
                self._bar.stop()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=" ".join(_names(nodeid)), refresh=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[pytest.TestReport]:
        report = yield
        if call.when == "call" or report.outcome != "passed":
            self.finished(item, report)
        return report

    def finished(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Say what became of a test."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, refresh=True)
            if report.failed:
                self._bar.console.print(f"{' '.join(_names(item.nodeid))} FAILED", style="bold red")
            return
        suite, case = _names(item.nodeid)
        words = outcome(item, report)
        seconds = time.perf_counter() - self.began
        print(f"[{self.done}/{self.total}] {suite} {case}: {words} [{seconds:.0f} s]", flush=True)


def outcome(item: pytest.Item, report: pytest.TestReport) -> str:
    """Our median time, and its ratio to each peer's; or that there is none."""
    if report.outcome != "passed":
        return report.outcome.upper()
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    rows = getattr(benchmark, "extra_info", {}).get("rows")
    if not rows or benchmark.stats is None:
        return "passed"
    ours, *others = rows
    own = benchmark.stats.stats.data
    seconds = median(own) / rows[ours]["repeats"]
    words = [f"{seconds * 1e3:.4g} ms"]
    for peer in others:
        pairs = zip(own, rows[peer]["seconds"], strict=True)
        ratio = median(a / b for a, b in pairs) * rows[peer]["repeats"] / rows[ours]["repeats"]
        words.append(f"{ratio:.2f}x {peer}")
    return ", ".join(words)


def _names(nodeid: str) -> tuple[str, str]:
    file, _, test = nodeid.partition("::")
    return Path(file).stem, test.partition("[")[2].rstrip("]") or test


def _rich_bar() -> Any:
    """A bar of rich, or None where rich is not installed."""
    try:
        from rich import progress
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.completed:>3.0f}/{task.total:.0f}"),
        progress.BarColumn(bar_width=30),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
        auto_refresh=False,
        transient=True,
    )
