"""From pytest-benchmark's JSON to the one that is kept: small, with no path or host name in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUANTILES = (20, 50, 80)

NOTES = {
    "ms": "quantiles 20, 50 and 80 % of the rounds, per call",
    "memory_mb": "most memory beyond the inputs during a call, results included; 1 MB = 1e6 bytes",
    "rows": "each peer timed by itself",
    "duels": "all peers of a duel run by turns in each round; ours_over_theirs.time holds the "
    "quantiles of the rounds' own ratios, .memory the ratio of memory_mb, and .memory_with_inputs "
    "that of memory_mb + input_mb",
}
NOTES_OF = {
    "attention": {
        "batch": "segments x rows of each",
        "tflops": "TFLOP/s at the median: 4 heads head_dim sum(rows^2), times 3.5 with the "
        "backward",
    },
    "loss": {
        "terms": "grid of prediction and target, or ->, x channels, kind; no grid: summaries",
        "bytes": "read the predictions, read the targets, write the gradients: no less will do",
        "copy_gb_s": "bytes read and written by a plain copy on this machine, per second",
        "floor_ms": "what such a copy takes for a case's bytes",
        "of_floor": "floor_ms over the median time",
        "compile_s": "the first call of the compiled peer, in a fresh cache",
    },
    "merge": {
        "tflops": "TFLOP/s of the product of sources and destinations at the median of the whole",
        "unshuffle": "the number of tokens nearest to ours that whole windows give",
    },
}
NOTES_OF["heads"] = {
    "tflops": "TFLOP/s of the products at the median",
    "moved_mb": "what our passes read and write, each tensor of a pass once",
    "saved_mb": "what autograd keeps for the backward, without x and the parameters",
    "compile_s": "the first call of the compiled peer, in a fresh cache",
}


def condense(
    raw: Mapping[str, Any], name: str, command: str, peers: Mapping[str, str]
) -> dict[str, Any]:
    """The kept results.

    Args:
        raw: what pytest-benchmark wrote, of tests whose ``extra_info`` says ``case``, ``facts``,
            ``peer``, ``repeats``, ``memory_bytes``, ``input_bytes`` and, for a duel, ``rivals`` and
            ``absent``. ``facts`` with ``flops`` give a rate, facts with ``bytes`` a floor, for
            which ``extra_info`` has ``copy_bytes_per_second``.
        name: of the benchmark file.
        command: that makes them again.
        peers: who takes part, by name, in words.
    """
    cases, rows, duels = {}, [], []
    for entry in raw["benchmarks"]:
        info = entry["extra_info"]
        cases[info["case"]] = info["facts"]
        if "rivals" in info:
            duels.append(_duel(info, entry["stats"]["data"]))
        else:
            rows.append({"case": info["case"]} | _row(info, entry["stats"]["data"]))
    skipped = raw["bench"]["skipped"]
    first = {reason: test for test, reason in reversed(skipped.items())}
    return {
        "name": name,
        "command": command,
        "machine": raw["machine_info"]["bench"],
        "peers": dict(peers),
        "notes": NOTES | NOTES_OF[name],
        "skipped": [
            {"reason": reason, "tests": count, "first": first[reason]}
            for reason, count in Counter(skipped.values()).items()
        ],
        "failed": raw["bench"]["failed"],
        "cases": cases,
        "duels": duels,
        "rows": rows,
    }


def _row(info: Mapping[str, Any], seconds: Sequence[float]) -> dict[str, Any]:
    times = np.array(seconds) / info["repeats"]
    row = {
        "peer": info["peer"],
        "ms": _short(np.percentile(times, QUANTILES) * 1e3),
        "rounds": len(seconds),
        "repeats": info["repeats"],
    }
    if "flops" in info["facts"]:
        row["tflops"] = _short(info["facts"]["flops"] / np.median(times) / 1e12)
    if "bytes" in info["facts"]:
        floor = info["facts"]["bytes"] / info["copy_bytes_per_second"]
        row["copy_gb_s"] = _short(info["copy_bytes_per_second"] / 1e9)
        row["floor_ms"] = _short(floor * 1e3)
        row["of_floor"] = _short(floor / np.median(times))
    if "compile_seconds" in info:
        row["compile_s"] = _short(info["compile_seconds"])
    row["memory_mb"] = _short(info["memory_bytes"] / 1e6)
    if "saved_bytes" in info:
        row["saved_mb"] = _short(info["saved_bytes"] / 1e6)
    row["input_mb"] = _short(info["input_bytes"] / 1e6)
    return row


def _duel(info: Mapping[str, Any], own: Sequence[float]) -> dict[str, Any]:
    rows = [_row(info, own)]
    for peer, rival in info["rivals"].items():
        ours, theirs = info["memory_bytes"], rival["memory_bytes"]
        ratio = {
            "time": _short(np.percentile(np.array(own) / np.array(rival["seconds"]), QUANTILES)),
            "memory": _short(ours / theirs),
            "memory_with_inputs": _short(
                (ours + info["input_bytes"]) / (theirs + rival["input_bytes"])
            ),
        }
        if "saved_bytes" in info:
            ratio["saved"] = _short(info["saved_bytes"] / rival["saved_bytes"])
        row = _row({**info, **rival, "peer": peer}, rival["seconds"])
        rows.append(row | {"ours_over_theirs": ratio})
    return {"case": info["case"], "absent": info["absent"], "rows": rows}


def _short(value: Any) -> Any:
    """Four digits: more are noise."""
    if isinstance(value, np.ndarray):
        return [_short(float(x)) for x in value]
    return float(f"{value:.4g}")


def write(results: Mapping[str, Any], path: Path) -> None:
    """JSON with a line for each row and each case, which a diff can show."""
    parts = []
    for key, value in results.items():
        if key == "duels":
            duels = (f"  {_head(duel)}{_lines(duel['rows'], 3)}\n  ]}}" for duel in value)
            text = "[\n" + ",\n".join(duels) + "\n ]" if value else "[]"
        elif key == "rows":
            text = f"[{_lines(value, 2)}\n ]"
        elif key == "cases":
            lines = (f"  {_line(name)}: {_line(facts)}" for name, facts in value.items())
            text = "{\n" + ",\n".join(lines) + "\n }"
        else:
            text = json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\n ")
        parts.append(f" {_line(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lines(rows: Sequence[Any], indent: int) -> str:
    return "\n" + ",\n".join(" " * indent + _line(row) for row in rows)


def _head(duel: Mapping[str, Any]) -> str:
    shell = {key: value for key, value in duel.items() if key != "rows"}
    return _line(shell)[:-1] + ', "rows": ['


def summary(
    results: Mapping[str, Any],
    targets: Mapping[tuple[str, str], float],
    memory_targets: Mapping[tuple[str, str], float] | None = None,
    saved_targets: Mapping[tuple[str, str], float] | None = None,
) -> str:
    """The duels as a table for the terminal.

    Args:
        results: of :func:`condense`.
        targets: of our time over theirs, by mix (or case, where there are no mixes) and peer.
        memory_targets: of our memory over theirs, likewise.
        saved_targets: of what is kept for the backward, likewise.
    """
    lines = [
        f"{'ours / theirs, by turns':42} {'time (20 .. 80 %)':>24} {'memory':>8} {'+inputs':>8}"
    ]
    for duel in results["duels"]:
        facts, first = results["cases"][duel["case"]], duel["rows"][0]
        rate = (
            f"{first['tflops']:g} TFLOP/s"
            if "tflops" in first
            else f"floor {first['floor_ms']:g} ms at {first['copy_gb_s']:g} GB/s"
        )
        lines.append(f"{duel['case']}: {first['ms'][1]:g} ms, {first['memory_mb']:g} MB, {rate}")
        for row in duel["rows"][1:]:
            ratio = row["ours_over_theirs"]
            low, middle, high = ratio["time"]
            times = f"{middle:.3f} ({low:.3f} .. {high:.3f})"
            key = (facts.get("mix", duel["case"]), row["peer"])
            target, memory_target = targets.get(key), (memory_targets or {}).get(key)
            saved_target = (saved_targets or {}).get(key)
            lines.append(
                f"    {results['peers'][row['peer']]:38} {times:>24} {ratio['memory']:8.3f} "
                f"{ratio['memory_with_inputs']:8.3f}"
                + ("" if target is None else f"   target {target:g}")
                + ("" if memory_target is None else f", memory {memory_target:g}")
                + (f"   saved {ratio['saved']:.3f}" if "saved" in ratio else "")
                + ("" if saved_target is None else f", target {saved_target:g}")
            )
        for peer, why in duel["absent"].items():
            lines.append(f"    {results['peers'][peer]:38} absent: {why}")
    return "\n".join(lines)
