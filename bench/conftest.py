"""What all benchmark files share: options, fixed threads, and the machine in the results."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny cases, a few rounds: does it run?")
    parser.addoption(
        "--peers", metavar="NAMES", help="only these, comma-separated"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Outcomes(), "bench-outcomes")


@pytest.fixture(scope="session", autouse=True)
def _compiled_anew() -> Iterator[None]:
    """What torch.compile takes is measured, so that nothing may lie ready from an earlier run."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", folder)
        yield


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


class _Outcomes:
    """Adds to pytest-benchmark's JSON what was skipped and why, and what failed."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[name] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            self.failed.append(name)

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["bench"] = {"skipped": self.skipped, "failed": self.failed}
