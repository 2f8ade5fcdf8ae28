"""The report page: complete, self-contained, safe and honest; and reading metrics.jsonl."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest

from fastagglo.errors import UserError
from fastagglo.eval import read_metrics, write_report
from fastagglo.eval.charts import Series, line_chart

TEACHERS = ("clip", "dino", "sam")
CONFIG = {
    "recipe": "recipes/my-run.toml",
    "teachers": {name: {"model": f"model of {name}"} for name in TEACHERS},
    "stages": [{"steps": 100}, {"steps": 100}],
}
VOID = {"meta", "br", "img", "line", "hr", "link", "input"}


def train_rows(count=20, teachers=TEACHERS):
    return [
        {
            "kind": "train",
            "step": 10 * i + 9,
            "steps": 10,
            "time": 1.7e9 + 5 * i,
            "seconds": 5.0,
            "loss": {name: 1 / (i + 1 + n) for n, name in enumerate(teachers)},
            "images_per_second": 40.0 + i,
            "tokens_per_second": 3000.0,
            "phases": {"data": 0.05, "teachers": 0.35, "student": 0.5, "optimiser": 0.04},
            "lr": 1e-3,
            "grad_norm": 1.0,
            "skipped": {"corrupt": 2},
            "memory_mb": 2048.0,
        }
        for i in range(count)
    ]


def held_out(explained, step, kind="regions", teacher="clip", resolution=96, mean_predictor=-0.05):
    return {
        "step": step,
        "teacher": teacher,
        "kind": kind,
        "resolution": resolution,
        "explained": explained,
        "mean_predictor": mean_predictor,
        "cosine": 0.731,
        "cosine_mean_predictor": 0.612,
        "tokens": 99,
    }


class Page(HTMLParser):
    """Checks that elements nest, and keeps what the tests ask about."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.alts, self.heads = [], []
        self.feed(text)
        self.close()
        assert self.stack == []
        assert len(self.ids) == len(set(self.ids))
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[a] for a in ("src", "href", "xlink:href", "srcset") if a in values]
        if tag == "img":
            self.alts.append(values.get("alt"))
        if tag == "th":
            self.heads.append(values.get("scope"))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture
def write(tmp_path):
    def _write(**arguments):
        path = write_report(tmp_path, **{"config": CONFIG, "metrics": [], **arguments})
        assert path == tmp_path / "report.html"
        assert [p.name for p in tmp_path.glob("*.partial")] == []
        return Page(path.read_text(encoding="utf-8"))

    return _write


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG not really")
    return ("Features of clip", "What they look like", path)


def full_run():
    return [
        held_out(value, step, kind, teacher, size)
        for step, value in ((0, -0.1), (100, 0.1), (200, 0.2))
        for kind in ("regions", "photos")
        for teacher in TEACHERS
        for size in (96, 432, 1024)
    ]


def test_the_page_has_every_teacher_resolution_and_kind(write, picture):
    page = write(metrics=train_rows(), heldout=full_run(), pictures=[picture], parameters=12345678)
    for word in (*TEACHERS, "96 px", "432 px", "1024 px", "Held-out regions", "Held-out photos"):
        assert word in page.text
    for word in ("my-run", "12.3 M parameters", "torch", "triton", "Python", "−10.0 %", "20.0 %"):
        assert word in page.text
    for word in ("step 0", "step 100", "step 200", "0.731", "0.612", "200"):
        assert word in page.text
    assert "model of dino" in page.text  # the configuration


def test_the_page_is_self_contained(write, picture, tmp_path):
    page = write(metrics=train_rows(), heldout=full_run(), pictures=[picture], device="cpu")
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "base"}
    text = (tmp_path / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_is_accessible(write, picture):
    page = write(metrics=train_rows(), heldout=full_run(), pictures=[picture])
    assert ("html", {"lang": "en"}) in page.tags
    assert page.alts == ["Features of clip. What they look like"]
    assert set(page.heads) == {"col", "row", "rowgroup"}
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    charts = [values for tag, values in page.tags if tag == "svg"]
    assert len(charts) == 3
    assert all(values["role"] == "img" for values in charts)


def test_light_and_dark_are_both_there(write, tmp_path):
    write()
    assert "prefers-color-scheme: dark" in (tmp_path / "report.html").read_text()


def test_names_from_outside_are_text(write, tmp_path):
    evil = '<script>alert("x")</script>'
    config = {"recipe": evil, "teachers": {evil: {}}, "note": evil}
    missing = (evil, evil, tmp_path / "none.png")
    page = write(
        config=config,
        metrics=[
            *train_rows(teachers=[evil]),
            {"kind": "stage", "step": 50, "name": evil},
            {"kind": evil, "step": 3, "text": evil},
        ],
        heldout=[held_out(0.1, 0, evil, evil), held_out(0.1, 9, evil, evil)],
        pictures=[missing],
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert(") >= 8


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (
            {"config": {}},
            (
                "No held-out figures",
                "No training step",
                "No throughput",
                "No pictures",
                "no step was skipped",
            ),
        ),
        ({"metrics": train_rows(1)}, ("No held-out figures", "No pictures")),
        ({"metrics": [{"kind": "train", "step": 3}]}, ("No held-out figures", "No training step")),
        ({"heldout": full_run()}, ("No training step", "No throughput")),
    ],
    ids=["nothing", "one row", "an empty row", "held-out rows alone"],
)
def test_what_is_missing_is_said(write, arguments, sentences):
    page = write(**arguments)
    for sentence in sentences:
        assert sentence in page.text


def test_photos_are_credited_where_they_are_shown(write, picture):
    credits = ["china: danielbuechele, CC BY 2.0", "flower: <vultilion>, CC BY 2.0"]
    page = write(pictures=[picture], credits=credits)
    assert "Photos: china: danielbuechele, CC BY 2.0; flower: <vultilion>, CC BY 2.0." in page.text
    assert "china" not in write(credits=credits).text


def test_a_missing_picture_is_said(write, tmp_path, picture):
    page = write(pictures=[picture, ("T", "C", tmp_path / "gone.png")])
    assert "The picture gone.png is missing." in page.text
    assert len(page.alts) == 1


def test_held_out_rows_are_found_among_the_metrics(write):
    rows = [
        {**row, "kind": "held_out", "data": row["kind"]}
        for row in full_run()
        if row["teacher"] == "sam"
    ]
    page = write(metrics=[*train_rows(), *rows])
    assert "Held-out regions" in page.text
    assert "Held-out photos" in page.text
    assert "Held-out held_out" not in page.text


def test_a_student_below_the_mean_predictor_is_marked(write):
    page = write(
        heldout=[
            held_out(-0.30, 0, resolution=96),
            held_out(-0.06, 9, resolution=96),  # better than at the start, yet below
            held_out(0.20, 0, resolution=128),
            held_out(0.10, 9, resolution=128),  # above, yet worse
            held_out(0.00, 0, resolution=192),
            held_out(-0.04, 9, resolution=192),  # below zero, yet above the mean predictor
        ]
    )
    assert page.text.count("not above mean") == 1
    assert "above the mean predictor in 2 of 3 cases and better than at the start in 1 of 3" in (
        page.text
    )
    assert "better by 24.0" in page.text
    assert "worse by 10.0" in page.text
    assert "resolutions differ by 16.0 points" in page.text


def test_of_many_evaluations_start_half_and_end_are_shown(write):
    rows = [held_out(step / 1000, step) for step in range(0, 501, 50)]
    page = write(heldout=[{**row, "cosine": row["explained"]} for row in rows])
    assert "0.000 → 0.250 → 0.500" in page.text
    for step in (0, 250, 500):
        assert f"step {step}" in page.text
    assert "step 200" not in page.text


def test_one_evaluation_is_no_change(write):
    page = write(heldout=[held_out(0.1, 200)])
    assert "Change" not in page.text
    assert "better than" not in page.text
    assert "above the mean predictor in 1 of 1 cases" in page.text


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_figures_that_are_not_finite_are_said(write, nothing):
    rows = [held_out(nothing, step, mean_predictor=nothing) for step in (0, 100, 200)]
    page = write(metrics=train_rows(), heldout=rows)
    assert "in 0 of 0 cases" in page.text
    assert "none" in page.text
    losses = [
        {**row, "loss": {"clip": nothing}, "images_per_second": nothing, "grad_norm": None}
        for row in train_rows()
    ]
    page = write(metrics=losses)
    assert "No training step has been recorded" in page.text


def test_key_numbers(write):
    page = write(metrics=train_rows(), heldout=full_run(), device="cpu")
    for text in (
        "Explained variance, regions 20.0 % mean; −10.0 % at the start",
        "Steps 200 finished",
        "Training time 1 min 40 s",
        "Images per second 49.5 median; 4,950 images seen",
        "Tokens per second 3,000",
        "Peak memory 2.0 GiB",
        "Images left out 2 2 corrupt",
        "cores",
    ):
        assert text in page.text
    # Shares are of the whole time; what no phase accounts for is said.
    for text in ("data 5.0 %", "teachers 35.0 %", "student 50.0 %", "other 6.0 %"):
        assert text in page.text
    assert "Steps 100 of 200" in write(metrics=train_rows(10)).text


def test_events_are_listed_the_last_ones_of_many(write):
    events = [{"kind": "skipped_step", "step": s, "time": 1.0, "reason": "NaN"} for s in range(99)]
    page = write(metrics=events)
    assert "skipped step" in page.text
    assert "reason NaN" in page.text
    assert "59 earlier ones are in metrics.jsonl" in page.text


def test_a_page_that_cannot_be_written_names_its_file(tmp_path):
    with pytest.raises(UserError, match=r"report .*gone/report\.html: cannot be written"):
        write_report(tmp_path / "gone", config=CONFIG, metrics=[])


# Charts.


def points(svg):
    """Coordinates of the last path of a chart, in pieces between gaps."""
    path = re.findall(r' d="([^"]*)"', svg)[-1]
    return [
        [tuple(map(float, p.split())) for p in piece.split("L")] for piece in path.split("M")[1:]
    ]


def test_a_chart_places_its_points():
    (piece,) = points(line_chart([Series("a", [0, 5, 10], [0, 5, 10])], "x"))
    (x0, y0), _, (x1, y1), (x2, y2) = piece
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y2 < y0  # upwards


def test_a_decade_and_more_is_logarithmic():
    svg = line_chart([Series("a", [0, 1, 2], [1, 10, 100])], "x")
    (piece,) = points(svg)
    heights = [y for _, y in piece[1:]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    (piece,) = points(line_chart([Series("a", [0, 1, 2], [1, 10, 100])], "x", from_zero=True))
    heights = [y for _, y in piece[1:]]
    assert heights[1] - heights[2] > 5 * (heights[0] - heights[1])


def test_gaps_and_lone_points_are_drawn():
    pieces = points(line_chart([Series("a", [0, 1, 2, 3], [1, math.nan, 2, 3])], "x"))
    assert [len(piece) for piece in pieces] == [2, 3]


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [-3.0, 2.0], [1e-9, 2e-9], [0.0, 1e9], [3e5, 3e5 + 1]], ids=str
)
def test_any_range_gives_a_chart_within_its_frame(values):
    svg = line_chart([Series("a", list(range(len(values))), values)], "x")
    for piece in points(svg):
        assert all(0 <= x <= 980 and 0 <= y <= 250 for x, y in piece)
    assert 2 <= svg.count('class="grid"') <= 10
    assert line_chart([Series("a", [1.0], [math.nan])], "x") == ""
    assert line_chart([], "x") == ""


def test_long_runs_make_small_charts():
    count = 50_000
    svg = line_chart([Series("a", range(count), [1 / (i + 1) for i in range(count)])], "x")
    assert len(svg) < 40_000


# metrics.jsonl.


def test_a_cut_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"kind": "train", "step": 9}\n{"kind": "é", "step": 19}\n'.encode()
    rows = [{"kind": "train", "step": 9}, {"kind": "é", "step": 19}]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"}")
        assert read_metrics(path) == rows[:lines]
    path.write_bytes(whole + b"\x00\x00\x00")
    assert read_metrics(path) == rows


def test_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 of 3"):
        read_metrics(path)
    path.write_text('{"step": 1}\n[1]\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 of 3"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_written_rows_are_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in train_rows()))
    assert read_metrics(str(path)) == train_rows()
