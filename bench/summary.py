"""The results of a run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDE = 40, 66  # characters of a peer in words, at least and at most


def summary(results: Mapping[str, Any]) -> str:
    """Every suite's duels, curves and absent peers, and at the end what failed.

    Args:
        results: of ``bench.report.condense``.
    """
    lines, failures = [_head(results)], []
    for name, suite in results["suites"].items():
        lines += ["", *_suite(name, suite)]
        failures += [f"FAILED {name} {item['test']}: {item['why']}" for item in suite["failed"]]
    goals = [
        state
        for suite in results["suites"].values()
        for duel in suite["duels"]
        for row in duel["rows"][1:]
        for state in _goals(row)
    ]
    if goals:
        met = sum(state.endswith(": met") for state in goals)
        lines += ["", f"{met} of {len(goals)} goals met"]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _head(results: Mapping[str, Any]) -> str:
    machine, roofline = results["machine"], results["roofline"]
    peaks = roofline["matmul_tflops"].items()
    rates = ", ".join(f"{rate:g} TFLOP/s {kind}" for kind, rate in peaks)
    where = machine["device"]
    if where == "CPU":
        where = f"CPU ({machine['cpu']}), {machine['threads']} threads"
    return (
        f"{where}, torch {machine['versions']['torch']}, commit {machine['commit']}\n"
        f"copy {roofline['copy_gb_s']:g} GB/s, products {rates}; {results['seconds']:.0f} s in all"
    )


def _suite(name: str, suite: Mapping[str, Any]) -> list[str]:
    shown = {row["peer"] for duel in suite["duels"] for row in duel["rows"][1:]}
    wide = min(max(WIDE[0], *(len(suite["peers"][peer]) for peer in shown), 0), WIDE[1])
    title = f"{name} ({suite['seconds']:.0f} s): ours / theirs"
    lines = [f"{title:{wide + 6}} {'time (95 % interval)':>24} {'memory':>8} {'+inputs':>8}"]
    absent: dict[tuple[str, str], int] = {}
    for duel in suite["duels"]:
        lines += _duel(duel, suite, wide)
        for peer, why in duel["absent"].items():
            absent[peer, why] = absent.get((peer, why), 0) + 1
    for fit in suite.get("fits", ()):
        who = "" if fit["peer"] == "fastagglo" else f", {suite['peers'][fit['peer']]}"
        flops = [
            f"; FLOPs: {facts['expected_exponent']:.2f}"
            for facts in suite["cases"].values()
            if (facts.get("series"), facts.get("axis")) == (fit["series"], fit["axis"])
            and "expected_exponent" in facts
        ]
        lines.append(
            f"  {fit['series']}{who}: time ~ ({fit['axis']})^{fit['exponent']:.2f} "
            f"({fit['low']:.2f} .. {fit['high']:.2f}{''.join(flops[:1])})"
        )
    cases = len(suite["duels"])
    for (peer, why), count in absent.items():
        lines.append(f"  absent in {count} of {cases}: {suite['peers'][peer]}: {why}")
    for item in suite["skipped"]:
        lines.append(f"  skipped {item['tests']}, first {item['first']}: {item['reason']}")
    return lines


def _duel(duel: Mapping[str, Any], suite: Mapping[str, Any], wide: int) -> list[str]:
    first, facts = duel["rows"][0], suite["cases"][duel["case"]]
    words = [f"{first['ms'][1]:g} ms", f"{first['memory_mb']:g} MB"]
    if "tflops" in first:
        words.append(f"{first['tflops']:g} TFLOP/s")
    if "gb_s" in first:
        words.append(f"{first['gb_s']:g} GB/s")
    if "roof" in duel:
        words.append(f"{100 * first['of_roofline']:.2g} % of the {duel['roof']['limit']} roof")
    done = "" if facts["pass"] in duel["case"] else f", {facts['pass']}"
    lines = [f"  {duel['case']}{done}: {', '.join(words)}"]
    for row in duel["rows"][1:]:
        ratio = row["ours_over_theirs"]
        low, middle, high = ratio["time"]
        cells = [f"{middle:.3f} ({low:.3f} .. {high:.3f})".rjust(24)]
        for key in ("memory", "memory_with_inputs"):
            cells.append(f"{ratio[key]:8.3f}" if key in ratio else " " * 8)
        extra = [f"saved {ratio['saved']:.3f}"] if "saved" in ratio else []
        line = f"      {suite['peers'][row['peer']]:{wide}} " + " ".join(cells)
        lines.append("   ".join([line.rstrip(), *extra, *_goals(row)]))
    return lines


def _goals(row: Mapping[str, Any]) -> list[str]:
    """ "goal 0.4: met" for the time, and likewise for what else has a goal."""
    words = []
    for kind, goal in row.get("goal", {}).items():
        found = row["ours_over_theirs"].get(kind)
        if found is None:
            continue
        found = found[1] if kind == "time" else found
        what = "goal" if kind == "time" else f"{kind} goal"
        words.append(f"{what} {goal:g}: {'met' if found <= goal else 'missed'}")
    return words
