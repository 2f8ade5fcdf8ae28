"""Two result files: a slower op is found, noise is not, and a slower machine is no regression."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench import compare, intervals, report


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESAMPLED", 4000)
    monkeypatch.setattr(intervals, "RESAMPLED", 10)  # of a file's own intervals, not looked at here


def results(made_up: ModuleType, *names: str, **options: Any) -> dict[str, Any]:
    return report.condense(made_up.raw(names or ("loss", "heads"), **options), "python -m bench")


def test_a_tenth_slower_is_found(made_up: ModuleType) -> None:
    before = results(made_up, seed=1, noise=0.03)
    found = compare.compare(before, results(made_up, seed=2, noise=0.03, ours=1.1))
    assert len(found.changes) == 6
    assert found.regressions == found.changes
    for change in found.changes:
        assert change.relative is not None
        assert change.relative[0] < 1.1 < change.relative[2]
        assert change.own[0] < 1.1 < change.own[2]
        assert change.memory == 1
    assert found.warnings == found.only == []
    text = compare.table(found)
    assert "6 regressions, 0 improvements, 0 unchanged" in text
    assert "to compile" in text


def test_one_slow_case_among_others(made_up: ModuleType) -> None:
    before, after = results(made_up, seed=1), results(made_up, seed=2)
    row = after["suites"]["heads"]["duels"][1]["rows"][0]
    row["samples_ms"] = [1.2 * x for x in row["samples_ms"]]
    found = compare.compare(before, after)
    assert [(change.suite, change.case) for change in found.regressions] == [("heads", "heads-1")]
    assert found.changes[0].case == "heads-1"  # the worst first


def test_a_tenth_faster_is_an_improvement(made_up: ModuleType) -> None:
    before = results(made_up, seed=1, noise=0.03)
    found = compare.compare(before, results(made_up, seed=2, noise=0.03, ours=0.9))
    assert [change.verdict for change in found.changes] == ["improvement"] * 6


@pytest.mark.parametrize("rounds", [5, 20])
def test_noise_is_not_flagged(made_up: ModuleType, rounds: int) -> None:
    tables = 15
    flagged = 0
    for seed in range(tables):
        pair = (
            results(made_up, rounds=rounds, noise=0.1, seed=100 * k + seed, cases=2) for k in (1, 2)
        )
        flagged += bool(compare.compare(*pair).regressions)
    assert flagged <= 2  # 95 % for a table as a whole, and half of what is flagged is faster


def test_a_slower_machine_is_no_regression(made_up: ModuleType) -> None:
    before = results(made_up, seed=1)
    found = compare.compare(before, results(made_up, seed=2, machine=1.5))
    assert found.regressions == []
    assert all(change.own[0] > 1.2 for change in found.changes)
    hidden = compare.compare(before, results(made_up, seed=2, machine=0.85, ours=1.2))
    assert len(hidden.regressions) == 6


def test_without_common_peers_our_own_time_counts(made_up: ModuleType) -> None:
    before, after = (results(made_up, seed=1, ours=factor) for factor in (1, 1.2))
    for suite in after["suites"].values():
        for duel in suite["duels"]:
            del duel["rows"][1:]
    found = compare.compare(before, after)
    assert len(found.regressions) == 6
    assert found.changes[0].relative is None
    assert "no peers in both" in compare.table(found)


def test_a_small_change_does_not_count_however_sure(made_up: ModuleType) -> None:
    before = results(made_up, seed=1, noise=1e-4)
    found = compare.compare(before, results(made_up, seed=2, noise=1e-4, ours=1.02))
    assert {change.verdict for change in found.changes} == {"unchanged"}
    assert all(change.own[0] > 1 for change in found.changes)


def test_more_memory_is_a_regression(made_up: ModuleType) -> None:
    before, after = results(made_up, seed=1), results(made_up, seed=1)
    after["suites"]["loss"]["duels"][0]["rows"][0]["memory_mb"] *= 1.05
    after["suites"]["loss"]["duels"][1]["rows"][0]["memory_mb"] *= 1.02
    (change,) = compare.compare(before, after).regressions
    assert (change.case, change.memory) == ("loss-0", 1.05)


def test_one_round_says_nothing(made_up: ModuleType) -> None:
    before = results(made_up, seed=1, rounds=1)
    found = compare.compare(before, results(made_up, seed=2, rounds=1, ours=3.0))
    assert found.regressions == []


def test_runs_that_were_not_made_alike(made_up: ModuleType) -> None:
    before, after = results(made_up, "loss", "heads"), results(made_up, "loss", "merge")
    after["machine"] |= {"threads": 4, "commit": "def5678"}
    after["machine"]["versions"] = {"torch": "2.15.0", "timm": "1.0"}
    after["command"] = "python -m bench --quick"
    found = compare.compare(before, after)
    text = "\n".join(found.warnings)
    assert "threads differs: 2 before, 4 after" in text
    assert "commit differs: abc1234 before, def5678 after" in text
    assert "torch differs: 2.14.1 before, 2.15.0 after" in text
    assert "timm differs: absent before, 1.0 after" in text
    assert "after: a run with --quick" in text
    assert "only before: heads heads-0" in found.only
    assert "only after: merge merge-2" in found.only
    assert {change.suite for change in found.changes} == {"loss"}
    alone = compare.compare(results(made_up, "loss"), results(made_up, "heads"))
    assert compare.table(alone).endswith("no case is in both files")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ('{"name": "loss", "rows": []}', "is not a result file"),
        ("[]", "is not a result file"),
        ('{"suites": {"a": {"duels": [{"case": "b", "rows": []}]}}}', "is not a result file"),
    ],
)
def test_other_files_are_errors(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(compare.Unreadable, match=words):
        compare.load(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(compare.Unreadable, match="cannot read"):
        compare.load(tmp_path / "none.json")


def test_a_file_that_was_written_is_read(made_up: ModuleType, tmp_path: Path) -> None:
    found = results(made_up)
    report.write(found, tmp_path / "a.json")
    assert compare.load(tmp_path / "a.json") == json.loads(json.dumps(found))
