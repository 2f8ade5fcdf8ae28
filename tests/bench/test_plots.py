"""The pictures: what they show, that their text is text, and that they are the same every time."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

from bench import intervals, plots, report
from bench.__main__ import SUITES


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLED", 20)


def texts(path: Path) -> list[str]:
    found = ET.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()) for element in found]


@pytest.mark.parametrize("device", ["CPU", "NVIDIA H100 80GB HBM3"])
def test_four_pictures(made_up: ModuleType, tmp_path: Path, device: str) -> None:
    results = report.condense(made_up.raw(cases=3, device=device), "python -m bench")
    drawn = plots.draw(results, tmp_path, "here")
    assert [path.name for path in drawn] == [
        "here-ratios-dark.svg",
        "here-ratios-light.svg",
        "here-roofline-dark.svg",
        "here-roofline-light.svg",
    ]
    assert all(path.stat().st_size <= 300_000 for path in drawn)
    before = [path.read_bytes() for path in drawn]
    assert before[0] != before[1]
    plots.draw(results, tmp_path, "here")
    assert [path.read_bytes() for path in drawn] == before
    ratios, roofs = texts(drawn[0]), texts(drawn[2])
    assert {*SUITES} <= {*ratios}
    assert "eager PHI-S, matrix in fp64" in ratios
    assert "17×" in ratios  # 1 / 0.06
    assert "0.62×" in ratios or "0.63×" in ratios  # 1 / 1.6
    assert {*SUITES} - {"data"} <= {*roofs}
    kind = "float32" if device == "CPU" else "bfloat16"
    rate = "210 GFLOP/s" if device == "CPU" else "800 TFLOP/s"
    assert f"{kind} products: {rate}" in roofs
    title = "AMD EPYC, 2 threads, float32" if device == "CPU" else f"{device}, bfloat16"
    assert f"Roofline: {title}" in roofs


def test_every_suite_has_a_look_of_its_own() -> None:
    assert plots.STYLES.keys() == {*SUITES}
    assert len({*plots.STYLES.values()}) == len(SUITES)
    assert len({marker for _, marker in plots.STYLES.values()}) == len(SUITES)


def test_the_headline(made_up: ModuleType) -> None:
    raw = made_up.raw(("student", "scaling"), cases=8)
    goals = raw["bench"]["suites"]["student"]["goals"]
    goals[0]["case"] = "student-4"
    found = report.condense(raw, "python -m bench")["suites"]
    shown = plots.headline(found["student"])
    labels = [label for label, _ in shown]
    # Those with goals first, the passes with the backward alone, a dozen bars at most.
    assert [label[:9] for label in labels] == ["student 0", "student 2", "student 1", "student 3"]
    assert all(label.endswith("forward + backward") for label in labels)
    assert sum(len(bars) for _, bars in shown) == plots.BARS
    ((label, _),) = plots.headline(found["scaling"])  # the curve's last point
    assert label == "scaling 7, step"


def test_bars_are_theirs_over_ours(made_up: ModuleType) -> None:
    suite = report.condense(made_up.raw(("loss",), cases=1), "python -m bench")["suites"]["loss"]
    ((_, bars),) = plots.headline(suite)
    assert [bar.peer for bar in bars] == list(made_up.PEERS["loss"].values())
    row = suite["duels"][0]["rows"][1]
    low, middle, high = row["ours_over_theirs"]["time"]
    assert bars[0].time == (1 / high, 1 / middle, 1 / low)
    assert bars[0].memory == pytest.approx(3, abs=1e-3)


def test_colours_say_who_is_ahead() -> None:
    theme = plots.THEMES["light"]
    colours = [
        plots.Bar("x", time, None).colour(theme)
        for time in ((1.1, 1.2, 1.3), (0.7, 0.8, 0.9), (0.9, 1.1, 1.3))
    ]
    assert colours == [theme.ahead, theme.behind, theme.even]


def test_long_names_are_cut() -> None:
    assert plots._cut("one, two", 8) == "one, two"
    assert plots._cut("one, two", 6) == "one…"


def test_columns_are_about_equally_tall() -> None:
    assert plots._columns({"a": 1.0}) == [["a"]]
    assert plots._columns({"a": 3.0, "b": 1.0, "c": 1.0, "d": 1.0}) == [["a"], ["b", "c", "d"]]


def test_numbers_in_words() -> None:
    assert [plots.times(x) for x in (0.0612, 0.994, 0.996, 2, 9.96, 16.4)] == [
        "0.06×",
        "0.99×",
        "1.0×",
        "2.0×",
        "10×",
        "16×",
    ]


def test_a_run_without_peers_or_counts_draws_what_there_is(
    made_up: ModuleType, tmp_path: Path
) -> None:
    results = report.condense(made_up.raw(("data",), cases=2), "python -m bench")
    assert [path.name for path in plots.draw(results, tmp_path, "cpu")] == [
        "cpu-ratios-dark.svg",
        "cpu-ratios-light.svg",
    ]
    results = report.condense(made_up.raw(()), "python -m bench")
    assert plots.draw(results, tmp_path, "cpu") == []
