"""The report of a run: one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import math
import operator
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from fastagglo.errors import UserError, require
from fastagglo.eval.charts import COLOURS, SMOOTHED_FROM, Series, line_chart

Row = Mapping[str, Any]

_MAX_NOTES = 40
_MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
_KINDS = {
    "regions": "the strip of each training photo that no training crop may touch",
    "photos": "photos that training never saw",
}


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``.

    A last line that a kill or a full disk cut short is left out.

    Raises:
        UserError: the file cannot be read, or another line is no JSON object.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"metrics {path}: cannot be read ({error.strerror or error})") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:  # also JSON and Unicode errors
            if number == len(lines):
                break
            raise UserError(
                f"metrics {path}: line {number} of {len(lines)} is no JSON object; the file is "
                "damaged: remove this line"
            ) from error
        rows.append(row)
    return rows


def json_values(value: Any) -> Any:
    """The value in JSON's own types; numbers that are not finite become None.

    Tensors, NumPy arrays and scalars become (nested lists of) numbers, mappings and sequences keep
    their shape, and whatever else there is becomes its text.
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(child) for key, child in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_values(child) for child in value]
    if hasattr(value, "tolist"):
        return json_values(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_report(
    run_dir: Path | str,
    *,
    config: Mapping[str, Any],
    metrics: Sequence[Row],
    heldout: Sequence[Row] | None = None,
    pictures: Sequence[tuple[str, str, Path | str]] = (),
    credits: Sequence[str] = (),
    device: torch.device | str | None = None,
    parameters: int | None = None,
) -> Path:
    """Write ``run_dir/report.html``: styles, charts and pictures are inside, nothing is fetched.

    Any part may be missing, as after an interruption: the page says so in its place.

    Args:
        run_dir: the run's folder, which exists.
        config: the resolved configuration, as plain nested values.
        metrics: rows of ``metrics.jsonl``, see `read_metrics`.
        heldout: held-out rows (`evaluate`) with the ``step`` at which they were taken; those
            among ``metrics`` if not given.
        pictures: title, caption and file of each.
        credits: who made the photos in the pictures, where their licences ask for it.
        device: what the run ran on.
        parameters: number of the student's parameters.

    Returns:
        The page's path.

    Raises:
        UserError: jinja2 is missing, or the page cannot be written.
    """
    jinja2 = require("jinja2", extra="train", purpose="writing the report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("fastagglo.eval").joinpath("report.html").read_text(encoding="utf-8")
    )
    config, metrics, heldout = map(json_values, (config, metrics, heldout))
    train = [row for row in metrics if row.get("kind") == "train"]
    if heldout is None:
        heldout = [row for row in metrics if row.get("kind") == "held_out"]
    tables = _held_out_tables(heldout)
    stages = [row for row in metrics if row.get("kind") == "stage" and row.get("step", 0) > 0]
    marks = [(row["step"], str(row.get("name", ""))) for row in stages]
    svg = jinja2.utils.markupsafe.Markup  # charts escape the names in them
    page = template.render(
        title=Path(str(config.get("recipe", "run"))).stem,
        date=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        facts=_facts(device, parameters),
        tiles=_tiles(config, train, tables),
        loss=_loss_section(config, train, marks, svg),
        speed=_speed_charts(train, marks, svg),
        phases=_phase_shares(train),
        tables=tables,
        pictures=[_picture(*picture) for picture in pictures],
        credits=list(credits) if pictures else [],
        notes=_notes(metrics),
        config=json.dumps(config, indent=2, ensure_ascii=False),
    )
    path = Path(run_dir) / "report.html"
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"report {path}: cannot be written ({error.strerror or error})") from error
    return path


# The parts of the page.


def _facts(device: torch.device | str | None, parameters: int | None) -> list[tuple[str, str]]:
    facts = [("Device", _device_name(torch.device(device)))] if device is not None else []
    if parameters is not None:
        facts.append(("Student", f"{_amount(parameters)} parameters"))
    facts += [("Python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("triton", "fastagglo"):
        try:
            facts.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            facts.append((package, "not installed"))
    return facts


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the architecture has to do
    return f"{name}, {len(os.sched_getaffinity(0)) if _LINUX else os.cpu_count()} cores"


_LINUX = hasattr(os, "sched_getaffinity")


def _tiles(
    config: Mapping[str, Any], train: Sequence[Row], tables: Sequence[dict]
) -> list[tuple[str, str, str]]:
    """Label, value and a remark of each key number."""
    tiles: list[tuple[str, str, str]] = []
    for table in tables:
        means = [
            statistics.fmean(found)
            for index in range(len(table["steps"]))
            if (found := [v for r in table["rows"] if (v := r["explained"][index]) is not None])
        ]
        if means:
            remark = f"mean; {_percent(means[0])} at the start" if len(means) > 1 else "mean"
            tiles.append((f"Explained variance, {table['kind']}", _percent(means[-1]), remark))
    if not train:
        return tiles
    done = train[-1].get("step", 0) + 1
    total = sum(stage.get("steps", 0) for stage in config.get("stages", ())) or done
    tiles.append(("Steps", f"{done:,}", f"of {total:,}" if done < total else "finished"))
    seconds = [row.get("seconds") or 0.0 for row in train]
    tiles.append(("Training time", _duration(sum(seconds)), "without evaluations"))
    rates = [_number(row.get("images_per_second"), 0.0) for row in train]
    images = sum(map(operator.mul, rates, seconds))
    for label, key, remark in (
        ("Images per second", "images_per_second", f"median; {_amount(round(images))} images seen"),
        ("Tokens per second", "tokens_per_second", "median, of the student"),
    ):
        known = [row[key] for row in train if row.get(key) is not None]
        if known:
            tiles.append((label, _amount(statistics.median(known)), remark))
    for label, key in (("Peak memory", "memory_mb"), ("Peak GPU memory", "cuda_memory_mb")):
        peaks = [row[key] for row in train if row.get(key) is not None]
        if peaks:
            tiles.append((label, f"{max(peaks) / 1024:.1f} GiB", "of one process"))
    skipped = train[-1].get("skipped") or {}
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
    tiles.append(("Images left out", f"{sum(skipped.values()):,}", reasons or "all were usable"))
    return tiles


def _loss_section(
    config: Mapping[str, Any], train: Sequence[Row], marks: Sequence[tuple[float, str]], svg: Any
) -> dict[str, Any]:
    names = list(config.get("teachers", {}))
    names += sorted({name for row in train for name in row.get("loss", {})} - set(names))
    series = []
    for name in names:
        rows = [row for row in train if name in row.get("loss", {})]
        series.append(Series(name, _steps(rows), [_number(row["loss"][name]) for row in rows]))
    legend = []
    for number, line in enumerate(series):
        finite = [y for y in line.y if math.isfinite(y)]
        legend.append(
            {
                "name": line.name,
                "colour": number % COLOURS,
                "first": f"{finite[0]:.4g}" if finite else "none",
                "last": f"{finite[-1]:.4g}" if finite else "none",
            }
        )
    label = f"Training loss of {', '.join(names)} over the steps"
    return {
        "chart": svg(line_chart(series, label, marks=marks)),
        "legend": legend,
        "smooth": any(len(line.x) >= SMOOTHED_FROM for line in series),
    }


def _speed_charts(
    train: Sequence[Row], marks: Sequence[tuple[float, str]], svg: Any
) -> list[tuple[str, Any]]:
    charts = []
    for name, key in (
        ("Images per second", "images_per_second"),
        ("Tokens per second", "tokens_per_second"),
    ):
        line = Series(name, _steps(train), [_number(row.get(key)) for row in train])
        label = f"{name} over the steps"
        charts.append((name, line_chart([line], label, marks=marks, from_zero=True, width=470)))
    return [(name, svg(chart)) for name, chart in charts if chart]


def _steps(rows: Sequence[Row]) -> list[float]:
    return [row.get("step", 0) + 1 for row in rows]  # steps done


def _phase_shares(train: Sequence[Row]) -> list[dict[str, Any]]:
    """Share of the training time of each phase, and what is left over as "other"."""
    seconds: dict[str, float] = {}
    whole = 0.0
    for row in train:
        length = row.get("seconds") or 0.0
        whole += length
        for name, share in (row.get("phases") or {}).items():
            seconds[name] = seconds.get(name, 0.0) + _number(share, 0.0) * length
    if not seconds or whole <= 0:
        return []
    rest = whole - sum(seconds.values())
    if rest > 0:
        seconds["other"] = rest
    return [
        {"name": name, "colour": number % COLOURS, "share": 100 * part / whole}
        for number, (name, part) in enumerate(seconds.items())
    ]


def _held_out_tables(heldout: Sequence[Row]) -> list[dict[str, Any]]:
    """A table for each kind of held-out data: teachers by resolutions, over the evaluations."""
    tables = []
    found: dict[str, list[Row]] = {}
    for row in heldout:
        # In metrics.jsonl, "kind" is the kind of row, and that of the data is "data".
        found.setdefault(str(row.get("data", row.get("kind"))), []).append(row)
    for kind, rows in found.items():
        steps = sorted({row.get("step", 0) for row in rows})
        if len(steps) > 3:
            steps = [steps[0], steps[len(steps) // 2], steps[-1]]
        words = {1: ["only"], 2: ["start", "end"], 3: ["start", "half", "end"]}[len(steps)]
        cells = {(r.get("teacher"), r.get("resolution"), r.get("step", 0)): r for r in rows}
        teachers = list(dict.fromkeys(row.get("teacher") for row in rows))
        body = []
        for teacher in teachers:
            sizes = sorted({r.get("resolution", 0) for r in rows if r.get("teacher") == teacher})
            group = [
                _held_out_row([cells.get((teacher, size, step), {}) for step in steps], size)
                for size in sizes
            ]
            ends = [r["explained"][-1] for r in group if r["explained"][-1] is not None]
            spread = f"{100 * (max(ends) - min(ends)):.1f}" if len(ends) > 1 else None
            group[0] |= {"teacher": teacher, "span": len(group), "spread": spread}
            body += group
        judged = [r for r in body if r["below"] is not None]
        changed = [r for r in body if r["change"] is not None]
        tables.append(
            {
                "kind": kind,
                "meaning": _KINDS.get(kind, ""),
                "steps": list(zip(words, steps, strict=True)),
                "rows": body,
                "above": sum(not r["below"] for r in judged),
                "judged": len(judged),
                "better": sum(r["change"] > 0 for r in changed),
                "changed": len(changed),
            }
        )
    return tables


def _held_out_row(points: Sequence[Row], resolution: int) -> dict[str, Any]:
    explained = [point.get("explained") for point in points]
    first, last = explained[0], explained[-1]
    baseline = points[-1].get("mean_predictor")
    comparable = len(points) > 1 and first is not None and last is not None
    change = 100 * (last - first) if comparable else None
    return {
        "teacher": None,
        "resolution": resolution,
        "explained": explained,
        "texts": [_percent(value) for value in explained],
        "below": None if last is None or baseline is None else last <= baseline,
        "bar": max(0.0, min(100.0, 100 * last)) if last is not None else 0.0,
        "change": change,
        "change_text": "" if change is None else f"{abs(change):.1f}",
        "mean_predictor": _percent(baseline),
        "cosine": " → ".join(_figure(point.get("cosine")) for point in points),
        "cosine_mean_predictor": _figure(points[-1].get("cosine_mean_predictor")),
    }


def _picture(title: str, caption: str, path: Path | str) -> dict[str, str | None]:
    path = Path(path)
    media = _MEDIA_TYPES.get(path.suffix.lower())
    try:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError:
        content = None
    source = f"data:{media};base64,{content}" if media and content else None
    return {"title": title, "caption": caption, "source": source, "file": path.name}


def _notes(metrics: Sequence[Row]) -> dict[str, Any]:
    """What else happened: skipped steps, warnings, stage changes; the last ones of many."""
    rows = [row for row in metrics if row.get("kind") not in ("train", "held_out")]
    shown = []
    for row in rows[-_MAX_NOTES:]:
        fields = {k: v for k, v in row.items() if k not in ("kind", "step", "time")}
        shown.append(
            {
                "step": row.get("step", ""),
                "kind": str(row.get("kind", "note")).replace("_", " "),
                "text": ", ".join(f"{key} {value}" for key, value in fields.items()),
            }
        )
    return {"rows": shown, "hidden": len(rows) - len(shown)}


# Text.


def _number(value: Any, missing: float = math.nan) -> float:
    return missing if value is None else float(value)


def _percent(value: float | None) -> str:
    if value is None:
        return "none"
    # + 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(100 * value, 1) + 0.0:.1f} %".replace("-", "−")


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}".replace("-", "−")


def _amount(value: float) -> str:
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == ' k' else limit):.1f}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
