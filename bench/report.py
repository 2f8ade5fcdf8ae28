"""From pytest-benchmark's JSON to the one that is kept: small, with no path or host name in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import intervals
from bench.roofline import roofs

LARGEST = 200_000  # bytes of a result file, as long as that leaves so many rounds of each peer:
FEWEST = 10
OWN = {"memory_bytes", "input_bytes", "seconds", "repeats"}  # of a raw row, with keys of their own

NOTES = {
    "duels": "all peers of a case by turns in each round, fastagglo first in the list",
    "ms": "[low, median, high] of a call: the median of the rounds and its 95 % bootstrap "
    "interval, widened where rounds are few",
    "samples_ms": "of each round, per call; repeats: calls of a round",
    "memory_mb": "most memory beyond the inputs during a call, results included; 1 MB = 1e6 bytes",
    "ours_over_theirs": "time: median of the rounds' own ratios and its 95 % bootstrap interval; "
    "memory: ratio of memory_mb; memory_with_inputs: of memory_mb + input_mb",
    "tflops": "1e12 of a case's flops a second at the median; gb_s: 1e9 of its bytes",
    "roof": "the least time that a case's flops and bytes take at the rates under roofline, and "
    "which of the two it is; of_roofline: that over the median time",
    "roofline": "of this run: a plain copy, bytes read and written; square products by type",
    "goal": "what we mean to reach on a CPU: ours over theirs, at most",
    "fits": "exponent of the median time over x, log-log least squares, 95 % bootstrap interval",
}


def condense(raw: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The kept results.

    Args:
        raw: what pytest-benchmark wrote, with what ``bench/conftest.py`` adds; each benchmark's
            ``extra_info`` is that of ``bench.engine.test_duel``.
        command: that makes them again.
    """
    machine, bench = raw["machine_info"]["bench"], raw["bench"]
    device = "cpu" if machine["device"] == "CPU" else "cuda"
    roofline = bench["roofline"]
    suites = {}
    for name, suite in bench["suites"].items():
        entries = [e for e in raw["benchmarks"] if e["extra_info"].get("suite") == name]
        goals = {(g["case"], g["peer"]): _without(g, "case", "peer") for g in suite["goals"]}
        suites[name] = {
            "peers": suite["peers"],
            "rows": suite["rows"],
            "notes": {_key(key): words for key, words in suite["notes"].items()},
            "seconds": _short(suite["seconds"]),
            "skipped": _skipped(suite["skipped"]),
            "failed": [{"test": test, "why": why} for test, why in suite["failed"].items()],
            "cases": {e["extra_info"]["case"]: e["extra_info"]["facts"] for e in entries},
            "duels": [
                _duel(
                    e["extra_info"],
                    e["stats"]["data"],
                    roofs(e["extra_info"]["facts"], roofline, device),
                    goals if device == "cpu" else {},
                )
                for e in entries
            ],
        }
        if found := _fits(entries):
            suites[name]["fits"] = found
    return {
        "command": command,
        "machine": machine,
        "roofline": {
            "copy_gb_s": _short(roofline["copy_gb_s"]),
            "matmul_tflops": {k: _short(v) for k, v in roofline["matmul_tflops"].items()},
        },
        "seconds": _short(bench["seconds"]),
        "notes": NOTES,
        "suites": suites,
    }


def _skipped(reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    first = {reason: test for test, reason in reversed(reasons.items())}
    counts = Counter(reasons.values())
    return [{"reason": r, "tests": n, "first": first[r]} for r, n in counts.items()]


def _duel(
    info: Mapping[str, Any],
    own: Sequence[float],
    roof: tuple[float, str] | None,
    goals: Mapping[tuple[str, str], Mapping[str, float]],
) -> dict[str, Any]:
    duel: dict[str, Any] = {"case": info["case"], "absent": info["absent"]}
    if roof:
        duel["roof"] = {"ms": _short(roof[0] * 1e3), "limit": roof[1]}
    (first, ours), *others = info["rows"].items()
    samples = np.array(own) / ours["repeats"]
    duel["rows"] = [_row(first, ours, samples, info["facts"], roof)]
    for peer, theirs in others:
        other = np.array(theirs["seconds"]) / theirs["repeats"]
        row = _row(peer, theirs, other, info["facts"], roof)
        row["ours_over_theirs"] = _ratios(ours, theirs, samples / other)
        if goal := goals.get((info["case"], peer)):
            row["goal"] = dict(goal)
        duel["rows"].append(row)
    return duel


def _row(
    peer: str,
    raw: Mapping[str, Any],
    seconds: np.ndarray,
    facts: Mapping[str, Any],
    roof: tuple[float, str] | None,
) -> dict[str, Any]:
    middle = float(np.median(seconds))
    row: dict[str, Any] = {
        "peer": peer,
        "ms": [_short(1e3 * x) for x in intervals.median_interval(seconds)],
        "memory_mb": _short(raw["memory_bytes"] / 1e6),
        "input_mb": _short(raw["input_bytes"] / 1e6),
    }
    if "flops" in facts:
        row["tflops"] = _short(facts["flops"] / middle / 1e12)
    if "bytes" in facts:
        row["gb_s"] = _short(facts["bytes"] / middle / 1e9)
    if roof:
        row["of_roofline"] = _short(roof[0] / middle)
    for key, value in raw.items():
        if key not in OWN:
            row[_key(key)] = _short(value / 1e6 if key.endswith("_bytes") else value)
    return row | {"repeats": raw["repeats"], "samples_ms": [_short(1e3 * x) for x in seconds]}


def _ratios(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], times: np.ndarray
) -> dict[str, Any]:
    found: dict[str, Any] = {"time": [_short(x) for x in intervals.median_interval(times)]}
    pairs = {
        "memory": [row["memory_bytes"] for row in (ours, theirs)],
        "memory_with_inputs": [row["memory_bytes"] + row["input_bytes"] for row in (ours, theirs)],
        "saved": [row.get("saved_bytes") for row in (ours, theirs)],
    }
    for key, (own, other) in pairs.items():
        if own is not None and other:
            found[key] = _short(own / other)
    return found


def _fits(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The exponents of all curves that have two points or more, of us and of each peer."""
    curves: dict[tuple[str, str, str], list[tuple[float, np.ndarray]]] = {}
    for entry in entries:
        info = entry["extra_info"]
        if {"series", "axis", "x"} <= info["facts"].keys():
            for number, (peer, row) in enumerate(info["rows"].items()):
                key = (info["facts"]["series"], info["facts"]["axis"], peer)
                taken = row["seconds"] if number else entry["stats"]["data"]
                point = (info["facts"]["x"], np.array(taken) / row["repeats"])
                curves.setdefault(key, []).append(point)
    found = []
    for (series, axis, peer), points in curves.items():
        if len({x for x, _ in points}) > 1:
            low, middle, high = (_short(x) for x in intervals.exponent(points))
            fit = {"series": series, "axis": axis, "peer": peer, "points": len(points)}
            found.append(fit | {"exponent": middle, "low": low, "high": high})
    return found


def _key(key: str) -> str:
    return key.removesuffix("_bytes") + "_mb" if key.endswith("_bytes") else key


def _without(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def _short(value: Any) -> Any:
    """Four digits: more are noise."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(results: dict[str, Any], path: Path) -> int:
    """JSON with a line for each row and each case, which a diff can show.

    Where that takes more than ``LARGEST`` bytes, every second round of the longest lists of samples
    is left out, again and again, until it fits or none is longer than twice ``FEWEST``, with which
    two files can still be compared; ``notes`` then says so. Medians and intervals stay those of all
    rounds.

    Returns:
        The number of bytes written.
    """
    text = _text(results)
    while len(text.encode()) > LARGEST:
        rows = [r for s in results["suites"].values() for d in s["duels"] for r in d["rows"]]
        longest = max((len(row["samples_ms"]) for row in rows), default=0)
        if longest < 2 * FEWEST:
            break
        for row in rows:
            if len(row["samples_ms"]) == longest:
                row["samples_ms"] = row["samples_ms"][::2]
        results["notes"] = results["notes"] | {
            "samples_left_out": "of long lists of samples_ms, so that the file stays small"
        }
        text = _text(results)
    path.write_text(text)
    return len(text.encode())


def _text(results: Mapping[str, Any]) -> str:
    parts = [
        f" {_line(key)}: " + json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\n ")
        for key, value in results.items()
        if key != "suites"
    ]
    suites = (f"  {_line(name)}: {_suite(suite)}" for name, suite in results["suites"].items())
    parts.append(' "suites": {\n' + ",\n".join(suites) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _suite(suite: Mapping[str, Any]) -> str:
    parts = []
    for key, value in suite.items():
        if key == "duels":
            duels = []
            for duel in value:
                head = _line(_without(duel, "rows"))[:-1]
                rows = ",\n".join("     " + _line(row) for row in duel["rows"])
                duels.append(f'    {head}, "rows": [\n{rows}]}}')
            text = "[\n" + ",\n".join(duels) + "]" if duels else "[]"
        elif key in ("cases", "peers", "notes") and value:
            lines = (f"    {_line(name)}: {_line(item)}" for name, item in value.items())
            text = "{\n" + ",\n".join(lines) + "}"
        elif key in ("fits", "failed", "skipped") and value:
            text = "[\n" + ",\n".join("    " + _line(item) for item in value) + "]"
        else:
            text = _line(value)
        parts.append(f"   {_line(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
