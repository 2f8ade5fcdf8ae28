"""``python -m bench``: what it runs, writes and prints, and what it says to a wrong call."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import bench.__main__ as command_line
from bench import machine, report

ROOT = Path(__file__).parents[2]


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        env=clean | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def wrong(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says to a call that it refuses before it runs anything."""
    with pytest.raises(SystemExit) as stopped:
        command_line.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2].strip()


def test_every_suite_exists() -> None:
    for name in command_line.SUITES:
        assert importlib.import_module(f"bench.{name}").SUITE.name == name


def test_two_suites_in_one_run(tmp_path: Path) -> None:
    done = command("--suite", "loss", "heads", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    (name,) = (name for name in names if name.endswith(".json"))
    assert re.fullmatch(r"cpu-\d{4}-\d\d-\d\d\.json", name)
    pictures = {f"cpu-{k}-{t}.svg" for k in ("ratios", "roofline") for t in ("light", "dark")}
    assert names == {name, *pictures}
    text = (tmp_path / name).read_text()
    for secret in (str(ROOT), str(Path.home()), os.uname().nodename):
        assert secret not in text
        assert not any(secret in (tmp_path / picture).read_text() for picture in pictures)
    found = json.loads(text)
    assert found["command"] == "python -m bench --suite loss,heads --quick"
    assert found["machine"]["device"] == "CPU"
    assert found["machine"]["threads"] == 1
    assert len(found["machine"]["load"]) == 2
    assert found["roofline"]["copy_gb_s"] > 0
    assert found["seconds"] > 0
    assert list(found["suites"]) == ["loss", "heads"]
    for suite in found["suites"].values():
        assert suite["failed"] == suite["skipped"] == []
        assert suite["seconds"] > 0
        assert suite["cases"]
        for duel in suite["duels"]:
            ours, *others = duel["rows"]
            assert ours["peer"] == "fastagglo"
            assert others
            for row in duel["rows"]:
                low, middle, high = row["ms"]
                assert 0 < low <= middle <= high
                assert len(row["samples_ms"]) == 3
                assert row["peer"] in suite["peers"]
            for row in others:
                assert row["ours_over_theirs"]["time"][1] > 0
    lines = done.stdout.splitlines()
    count = sum(len(suite["duels"]) for suite in found["suites"].values())
    progress = [line for line in lines if line.startswith("[")]
    assert len(progress) == count
    assert re.match(rf"\[{count}/{count}\] heads \S+: [\d.]+ ms, [\d.]+x ", progress[-1])
    assert "loss (" in done.stdout
    assert f"wrote {os.path.relpath(tmp_path / name, ROOT)}" in done.stdout


MODULE = """
import torch
from bench.engine import Suite, Unavailable, close, pytest_generate_tests, test_duel


class Case:
    def __init__(self, name):
        self.id = name
        self.peers = ("other",)
        self.facts = {"label": name, "pass": "forward"}


class Run:
    input_bytes, info = 4, {}

    def __init__(self, value):
        self.value = value

    def __call__(self):
        return torch.full((4,), self.value)

    def results(self):
        return {"out": self()}


SUITE = Suite(
    name="scaling",
    cases=lambda device, quick: [Case("right"), Case("wrong")],
    batch=lambda case, device: case,
    peers={
        "fastagglo": ("fastagglo", lambda case: Run(1.0)),
        "other": ("another", lambda case: Run(1.0 if case.id == "right" else 2.0)),
    },
    compare=lambda peer, found, right, batch: close(peer, "out", found["out"], right["out"], 1e-3),
    rows="made up",
)
"""


@pytest.fixture
def own_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of our own, in the folder that the command takes for its own; where to write."""
    here = tmp_path / "bench"
    here.mkdir()
    (here / "scaling.py").write_text(MODULE)
    (here / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    monkeypatch.setattr(command_line, "HERE", here)
    # Under xdist, pytest-benchmark would measure nothing in the command's own pytest either.
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "out"


def test_some_peers_and_cases(own_suite: Path) -> None:
    arguments = ["--quick", "-k", "right", "--peers", "other"]
    assert command_line.main(["scaling", *arguments, "--out", str(own_suite)]) == 0
    (path,) = own_suite.glob("*.json")
    found = json.loads(path.read_text())
    assert found["command"] == " ".join(["python -m bench --suite scaling", *arguments])
    (duel,) = found["suites"]["scaling"]["duels"]
    assert [row["peer"] for row in duel["rows"]] == ["fastagglo", "other"]


def test_what_only_pytest_can_refuse(own_suite: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["scaling", "--quick", "--out", str(own_suite)]
    assert command_line.main([*arguments, "--peers", "othre"]) == 2
    assert "--peers: no peer 'othre' in these suites; there is fast" in capfd.readouterr().err
    assert command_line.main([*arguments, "-k", "nothing"]) == 2
    assert capfd.readouterr().err == "no case of scaling matches -k 'nothing'\n"
    assert list(own_suite.iterdir()) == []


def test_a_peer_that_disagrees_is_a_failure_and_no_number(
    own_suite: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["scaling", "--quick", "--out", str(own_suite)]) == 1
    (path,) = own_suite.glob("*.json")
    suite = json.loads(path.read_text())["suites"]["scaling"]
    assert [duel["case"] for duel in suite["duels"]] == ["right"]
    (failed,) = suite["failed"]
    assert failed["test"] == "test_duel[wrong]"
    assert failed["why"].startswith("AssertionError: other: out differs from ours by 1")
    shown = capfd.readouterr().out
    assert "[2/2] scaling wrong: FAILED" in shown
    assert "FAILED scaling test_duel[wrong]: AssertionError: other: out differs" in shown


def test_wrong_calls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there = ", ".join(command_line.SUITES)
    said = wrong(capsys, "attentoin")
    assert said == f"--suite: no suite 'attentoin' (did you mean 'attention'?); there is {there}"
    assert wrong(capsys, "--suite", "loss,xyz") == f"--suite: no suite 'xyz'; there is {there}"
    assert "unrecognized arguments: --fast" in wrong(capsys, "--fast")
    assert wrong(capsys, "--sweep", "loss") == "--sweep runs no suite: leave out loss"
    said = wrong(capsys, "--compare", "a.json", "b.json", "--peers", "eager")
    assert said == "--compare runs no suite: leave out --peers"
    said = wrong(capsys, "--compare", "a.json", "b.json", "--quick")
    assert said == "--compare only prints: leave out --out and --quick"
    assert "expected 2 arguments" in wrong(capsys, "--compare", "a.json")
    file = tmp_path / "file"
    file.touch()
    assert wrong(capsys, "loss", "--out", file).startswith("--out: cannot make the folder")


def test_a_sweep_needs_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = wrong(capsys, "--sweep")
    assert said.startswith("--sweep times the attention's tiles and needs a CUDA device")
    assert "python -m fastagglo.kernels.inspect attention" in said


def test_a_sweep_runs_the_kernels_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastagglo.kernels import tune

    calls: list[list[str]] = []

    def run(call: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(call)
        return subprocess.CompletedProcess(call, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line.subprocess, "run", run)
    assert command_line.main(["--sweep", "--quick", "--out", str(tmp_path)]) == 0
    assert f"wrote {tmp_path / 'tiles.json'}" in capsys.readouterr().out
    assert calls[0][1:4] == ["-m", "fastagglo.kernels.tune", "--measure"]
    assert calls[0][-1] == str(tmp_path / "tiles.json")
    # The options are those of that command: an unknown architecture is all that it minds.
    options = [text for text in calls[0][3:] if text != "--measure"]
    with pytest.raises(SystemExit):
        tune.main([*options, "--arch", "sm_1"])
    assert "'sm_1' is not known" in capsys.readouterr().err


def test_missing_packages_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = command_line.importlib.util.find_spec
    gone = {"pytest_benchmark", "matplotlib"}
    monkeypatch.setattr(
        command_line.importlib.util,
        "find_spec",
        lambda name, *more: None if name in gone else there(name, *more),
    )
    assert wrong(capsys, "loss") == (
        'pytest-benchmark, matplotlib not installed: pip install -c constraints.txt -e ".[bench]"'
    )


def test_nothing_optional_is_imported_before_it_is_missed() -> None:
    tree = ast.parse((ROOT / "bench" / "__main__.py").read_text())
    names = {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert {str(name).partition(".")[0] for name in names} <= {*sys.stdlib_module_names}


def test_comparing_files(
    made_up: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("before", "after", "slower")}
    for (name, path), factor in zip(paths.items(), (1, 1, 1.1), strict=True):
        raw = made_up.raw(("loss",), seed=len(name), noise=0.03, ours=factor)
        report.write(report.condense(raw, "python -m bench"), path)
    assert command_line.main(["--compare", str(paths["before"]), str(paths["after"])]) == 0
    assert "0 regressions, 0 improvements, 3 unchanged" in capsys.readouterr().out
    assert command_line.main(["--compare", str(paths["before"]), str(paths["slower"])]) == 1
    assert "3 regressions, 0 improvements, 0 unchanged" in capsys.readouterr().out
    assert "cannot read" in wrong(capsys, "--compare", paths["before"], tmp_path / "none.json")
    (tmp_path / "old.json").write_text('{"name": "loss", "duels": []}')
    said = wrong(capsys, "--compare", tmp_path / "old.json", paths["before"])
    assert "is not a result file of this version of `python -m bench`" in said


def test_parts_never_replace_what_is_kept(
    made_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "HERE", tmp_path / "bench")
    monkeypatch.setattr(
        command_line, "_pytest", lambda names, *_: (made_up.raw(tuple(names), cases=1), 0)
    )
    assert command_line.main(["loss", *command_line.SUITES[2:]]) == 0
    assert command_line.main(["loss"]) == 0
    assert command_line.main(["--quick"]) == 0
    assert command_line.main(["--peers", "eager"]) == 0
    assert not (tmp_path / "bench").exists()
    assert (tmp_path / "runs" / "bench" / "cpu-2026-11-25.json").is_file()
    assert command_line.main([]) == 0
    found = json.loads((tmp_path / "bench" / "results" / "cpu-2026-11-25.json").read_text())
    assert list(found["suites"]) == list(command_line.SUITES)
    assert found["command"] == "python -m bench"


def test_the_machine_in_words(tmp_path: Path) -> None:
    found = machine.describe("A CPU", "abc1234")
    assert found["cpu"] == "A CPU"
    assert found["commit"] == "abc1234"
    assert found["threads"] == torch.get_num_threads()
    versions = found["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["flag-gems"] is None or re.match(r"\d", versions["flag-gems"])
    assert {"numpy", "triton", "timm", "webdataset", "torchao", "kornia"} <= versions.keys()
    assert machine.commit(tmp_path) == "unknown"
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", machine.commit(ROOT))


def test_nvml_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.driver_and_clocks() == {
        "driver": None,
        "nvml": "nvidia-ml-py is not installed",
    }
