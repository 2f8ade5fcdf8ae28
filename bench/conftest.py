"""What all suites share: options, fixed threads, the bar, and what goes into the raw results."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `pytest` leaves the folder it is run in out, `python -m` does not
    sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402

machine.fix_threads()
COMMIT = machine.commit(ROOT)  # now: a long run may see the next one made
LOAD = os.getloadavg()[0]  # now: what others did before we did anything
START = time.perf_counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny cases, a few rounds: does it run?")
    parser.addoption("--peers", metavar="NAMES", help="only these, comma-separated")
    parser.addoption(
        "--bench-progress", action="store_true", help="a bar or lines in place of pytest's dots"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Raw(), "bench-raw")
    if config.getoption("bench_progress"):
        from bench.progress import Progress

        config.pluginmanager.register(Progress(), "bench-progress")


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Any:
    return request.module.SUITE


@pytest.fixture
def chosen_peers(request: pytest.FixtureRequest) -> list[str] | None:
    given = request.config.getoption("peers")
    return None if given is None else [name for name in given.split(",") if name]


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("quick")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    processor = machine_info.get("cpu", {}).get("brand_raw", "")
    found = machine.describe(processor, COMMIT)
    # Of a minute each: more at the end than our own threads means that others were at work.
    machine_info["bench"] = found | {"load": [round(x, 2) for x in (LOAD, os.getloadavg()[0])]}


class _Raw:
    """Adds to pytest-benchmark's JSON what the suites say of themselves, and what became of them.

    ``bench``: ``suites`` by name with ``peers``, ``rows``, ``notes``, ``goals``, ``seconds``,
    ``skipped`` (test: reason) and ``failed`` (test: reason); ``roofline``; ``seconds``.
    """

    def __init__(self) -> None:
        self.suites: dict[str, dict[str, Any]] = {}
        self.roofline: dict[str, Any] | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            known = getattr(item.module, "SUITE", None)
            found = self._of(item.nodeid)
            if known is not None and not found["peers"]:
                found["peers"] = {name: words for name, (words, _) in known.peers.items()}
                found["rows"] = known.rows
                found["notes"] = dict(known.notes)
                found["goals"] = [
                    {"case": case, "peer": peer}
                    | {key: value for key, value in asdict(goal).items() if value is not None}
                    for (case, peer), goal in known.goals.items()
                ]

        chosen = (session.config.getoption("peers") or "").split(",")
        there = dict.fromkeys(peer for found in self.suites.values() for peer in found["peers"])
        if unknown := [name for name in chosen if name and name not in there]:
            raise pytest.UsageError(
                f"--peers: no peer {unknown[0]!r} in these suites; there is {', '.join(there)}"
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        wanted = session.config.getoption("benchmark_json") and session.items
        if wanted and not session.config.option.collectonly:
            from bench import roofline
            from bench.engine import DEVICE

            self.roofline = roofline.measure(DEVICE, session.config.getoption("quick"))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = self._of(report.nodeid)
        found["seconds"] += report.duration
        test = report.nodeid.partition("::")[2]
        if report.skipped and isinstance(report.longrepr, tuple):
            found["skipped"][test] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            found["failed"][test] = _reason(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._of(report.nodeid)["failed"]["collection"] = _reason(report)

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["bench"] = {
            "suites": self.suites,
            "roofline": self.roofline,
            "seconds": time.perf_counter() - START,
        }

    def _of(self, node: str) -> dict[str, Any]:
        name = Path(node.partition("::")[0]).stem
        fresh = {"peers": {}, "rows": "", "notes": {}, "goals": [], "seconds": 0.0}
        return self.suites.setdefault(name, fresh | {"skipped": {}, "failed": {}})


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """One line, without paths of this machine."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().splitlines() or [""]
    line = lines[0] if crash else lines[-1]
    return re.sub(r"/[\w./+-]+/", "", line)[:300]
