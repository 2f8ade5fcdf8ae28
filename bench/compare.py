"""What changed between two result files: ``python -m bench --compare before.json after.json``.

Two things are compared for each case. Our own time, which a slower machine changes too. And ours
relative to the peers', who ran by turns with us: what the machine did to all cancels, so where both
runs have a peer in common, the verdict is that of the ratio. Intervals are bootstrapped over the
rounds, which the two runs do not share, and so wide that 95 % holds for the whole table and not for
each row: sixty comparisons of noise with noise would else show three changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import intervals

LEAST = 0.03  # of a change that counts
RESAMPLED = 10_000

Interval = tuple[float, float, float]


class Unreadable(Exception):
    """A file that is no result of ``python -m bench``."""


@dataclass(frozen=True)
class Change:
    """After over before, [low, middle, high].

    Attributes:
        suite, case: which.
        own: of our median times.
        peers: of our time over each peer's, for peers that are in both.
        relative: of our time over all these peers', their geometric mean; None without peers.
        memory: of our peak memory.
    """

    suite: str
    case: str
    own: Interval
    peers: Mapping[str, Interval]
    relative: Interval | None
    memory: float

    @property
    def verdict(self) -> str:
        """ "regression", "improvement" or "unchanged"."""
        low, middle, high = self.relative or self.own
        slower, faster = low > 1 and middle > 1 + LEAST, high < 1 and middle < 1 - LEAST
        if slower or self.memory > 1 + LEAST:
            return "regression"
        return "improvement" if faster or self.memory < 1 - LEAST else "unchanged"


@dataclass(frozen=True)
class Comparison:
    """All cases that both files have, and what else to know.

    Attributes:
        changes: worst first within each verdict.
        warnings: where the runs were not made alike.
        only: cases of one file alone, in words.
        level: of the intervals.
    """

    changes: list[Change]
    warnings: list[str]
    only: list[str] = field(default_factory=list)
    level: float = intervals.LEVEL

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "regression"]


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        Unreadable: it is missing, no JSON, or not of ``python -m bench``.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Unreadable(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise Unreadable(f"{str(path)!r} is not JSON: {error}") from error
    try:
        for suite in found["suites"].values():
            for duel in suite["duels"]:
                rows = duel["rows"]
                if not (rows and all(row["samples_ms"] and row["peer"] for row in rows)):
                    raise KeyError("samples_ms")
                float(rows[0]["memory_mb"]), str(duel["case"])
        found["machine"]["versions"].items()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unreadable(
            f"{str(path)!r} is not a result file of this version of `python -m bench` "
            f"({type(error).__name__}: {error}); expected suites with duels with samples_ms"
        ) from error
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """All cases that are in both.

    Args:
        before, after: of :func:`load`.
    """
    old, new = _duels(before), _duels(after)
    both = [key for key in new if key in old]
    level = 1 - (1 - intervals.LEVEL) / max(1, len(both))
    changes = [_change(key, old[key], new[key], level) for key in both]
    order = ("regression", "improvement", "unchanged")
    changes.sort(key=lambda c: (order.index(c.verdict), -abs(np.log((c.relative or c.own)[1]))))
    only = [f"only before: {' '.join(key)}" for key in old if key not in new]
    only += [f"only after: {' '.join(key)}" for key in new if key not in old]
    return Comparison(changes, _warnings(before, after), only, level)


def _duels(results: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return {
        (name, duel["case"]): duel["rows"]
        for name, suite in results["suites"].items()
        for duel in suite["duels"]
    }


def _change(
    key: tuple[str, str],
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
    level: float,
) -> Change:
    there = {row["peer"] for row in before}
    common = [row["peer"] for row in after if row["peer"] in there]
    rng = intervals.generator()
    old, old_centre = _logs(before, common, rng)
    new, new_centre = _logs(after, common, rng)
    resampled, centre = new - old, new_centre - old_centre
    rounds = min(len(rows[0]["samples_ms"]) for rows in (before, after))

    def interval(middle: np.floating, draws: np.ndarray) -> Interval:
        if rounds < 2:
            return 0.0, float(np.exp(middle)), float("inf")
        low, middle, high = np.exp(intervals.bounds(float(middle), draws, rounds, level))
        return float(low), float(middle), float(high)

    found = [interval(*pair) for pair in zip(centre, resampled, strict=True)]
    relative = None
    if len(common) > 1:
        relative = interval(centre[1:].mean(), resampled[1:].mean(axis=0))
    memory = after[0]["memory_mb"] / before[0]["memory_mb"] if before[0]["memory_mb"] else 1.0
    return Change(*key, found[0], dict(zip(common[1:], found[1:], strict=True)), relative, memory)


def _logs(
    rows: list[dict[str, Any]], common: list[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of our median time, and of the median ratio of our time to each peer's.

    Returns:
        Resampled, (peers, resamples), and as measured, (peers,); our own time first.
    """
    samples = {row["peer"]: np.array(row["samples_ms"], float) for row in rows}
    ours = samples[common[0]]
    # Rounds are paired. Where lists were thinned differently, their ends have no partner.
    count = min(len(samples[peer]) for peer in common)
    series = np.stack([ours[:count], *(ours[:count] / samples[p][:count] for p in common[1:])])
    return np.log(intervals.medians(series, rng, RESAMPLED)), np.log(np.median(series, axis=1))


def _warnings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What the machine records say differs, and what makes any timing doubtful."""
    a, b = before["machine"], after["machine"]
    found = [
        f"{key} differs: {a.get(key)} before, {b.get(key)} after"
        for key in ("device", "cpu", "threads", "cuda", "driver", "commit")
        if a.get(key) != b.get(key)
    ]
    old, new = a["versions"], b["versions"]
    found += [
        f"{name} differs: {old.get(name) or 'absent'} before, {new.get(name) or 'absent'} after"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    for when, results in (("before", before), ("after", after)):
        if "--quick" in results.get("command", "").split():
            found.append(f"{when}: a run with --quick, whose cases are too small to mean anything")
    return found


def table(found: Comparison) -> str:
    """For the terminal."""
    lines = [f"warning: {text}" for text in found.warnings] + found.only
    if not found.changes:
        return "\n".join([*lines, "no case is in both files"])
    wide = max(len(f"{change.suite} {change.case}") for change in found.changes)
    lines += [
        f"after / before; {found.level:.2%} intervals, 95 % for the table as a whole",
        f"{'':{wide}}  {'our time':>24}  {'relative to peers':>24}  {'memory':>6}",
    ]
    for change in found.changes:
        name = f"{change.suite} {change.case}"
        relative = _words(change.relative) if change.relative else "no peers in both"
        lines.append(
            f"{name:{wide}}  {_words(change.own):>24}  {relative:>24}  {change.memory:6.3f}  "
            f"{change.verdict}"
        )
        if change.verdict != "unchanged" and len(change.peers) > 1:
            lines += [
                f"{'to ' + peer:>{wide}}  {'':24}  {_words(interval):>24}"
                for peer, interval in change.peers.items()
            ]
    counts = [change.verdict for change in found.changes]
    lines.append(
        ", ".join(
            f"{counts.count(kind)} {kind if kind == 'unchanged' else kind + 's'}"
            for kind in ("regression", "improvement", "unchanged")
        )
    )
    return "\n".join(lines)


def _words(interval: Interval) -> str:
    low, middle, high = interval
    return f"{middle:.3f} ({low:.3f} .. {high:.3f})"
