"""What the kernels compile to, beside what they compiled to: ``python -m bench.static``.

    python -m bench.static                                     # compile all, compare
    python -m bench.static --family mlp --arch sm_90           # a part
    python -m bench.static --write                             # renew static.json

No GPU is needed: each launch is compiled for a GPU by name and taken apart
(``fastagglo.kernels.inspect``). ``static.json`` keeps a row for each kernel: registers, bytes of
spills, shared memory, tensor-core instructions and all instructions of one trip of the inner loop.
A change fails if it adds spills, loses tensor-core instructions, makes the loop longer by more than
5 %, or if a row is missing or does not compile. It says nothing about time. Where a change is
meant, ``--write`` makes the table say so, and the commit shows which rows it moved.

Registers and instructions are the compiler's doing, so the table names the Triton that made it.
Under another Triton nothing is compared; only what any compiler must get right is looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from bench.static_cases import ARCHS, FAMILIES, jobs
from fastagglo.kernels.analysis import Report
from fastagglo.kernels.sweep import Row, run_jobs

TABLE = Path(__file__).with_name("static.json")
GROWTH = 0.05  # of an inner loop; below it is the compiler's scheduling
# Bytes a thread that another Triton may spill beyond the table: some compile attention so.
OTHER_SPILLS = 256


@dataclass(frozen=True)
class Entry:
    """What is kept of one kernel.

    Attributes:
        registers, stack, shared: of a thread, bytes of a thread, bytes of a CTA.
        spills: bytes a thread that go to local memory and come from it, each instruction once.
        warps, stages: of the launch.
        tensor: tensor-core instructions of a trip of the inner loop, by kind: ``"HGMMA bf16"``.
        loop: all instructions of a trip; None where no loop computes anything.
        unroll: trips of the loop as written in one of the machine code; None if not known.
        code: instructions of the whole kernel.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    stages: int
    tensor: Mapping[str, int]
    loop: int | None
    unroll: int | None
    code: int


@dataclass(frozen=True)
class Change:
    """A row that is not as the table has it, and whether that is for the worse."""

    row: str
    text: str
    worse: bool

    def __str__(self) -> str:
        return f"{'WORSE' if self.worse else 'better, renew the table'}: {self.row}: {self.text}"


def entry_of(report: Report) -> Entry:
    """What the table keeps of a report."""
    loop = report.main
    tensor: dict[str, int] = {}
    for opcode, count in (loop.tensor_instructions if loop else {}).items():
        assert loop is not None
        kind = f"{opcode.partition('.')[0]} {loop.operand_type}"
        tensor[kind] = tensor.get(kind, 0) + count
    return Entry(
        registers=report.registers,
        stack=report.stack,
        spills=report.spill_stores + report.spill_loads,
        shared=report.shared,
        warps=report.num_warps,
        stages=report.num_stages,
        tensor=tensor,
        loop=loop.counts["total"] if loop else None,
        unroll=loop.unroll if loop else None,
        code=report.code,
    )


def entries(rows: Sequence[Row]) -> tuple[dict[str, Entry], dict[str, str]]:
    """By name, what compiled, and why the rest did not.

    A name is the architecture, the job and the kernel, with a number where a job launches several
    binaries of one kernel.
    """
    found: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for row in rows:
        if row.report is None:
            failed[f"{row.arch} {row.label}"] = row.error
            continue
        stem = name = f"{row.arch} {row.label} {row.report.kernel}"
        number = 1
        while name in found:
            number += 1
            name = f"{stem} {number}"
        found[name] = entry_of(row.report)
        if not row.report.fits:
            failed[name] = f"does not fit an SM: {row.report.shared} bytes of shared memory"
    return found, failed


def compare(table: Mapping[str, Entry], found: Mapping[str, Entry]) -> list[Change]:
    """Row by row, under one compiler. Rows that only one side has are for the worse, too.

    A row that the table lacks is held to nothing until the table is renewed.
    """
    changes = []
    for name in [*table, *(n for n in found if n not in table)]:
        if name not in found:
            changes.append(Change(name, "in the table, but no longer compiled", True))
        elif name not in table:
            changes.append(Change(name, "not in the table: --write adds it", True))
        else:
            changes += _row_changes(name, table[name], found[name])
    return changes


def _row_changes(name: str, before: Entry, now: Entry) -> list[Change]:
    changes = []

    def note(what: str, old: Any, new: Any, worse: bool) -> None:
        changes.append(Change(name, f"{what} {old} -> {new}", worse))

    for what, old, new in (
        ("spills, bytes a thread", before.spills, now.spills),
        ("stack, bytes a thread", before.stack, now.stack),
    ):
        if old != new:
            note(what, old, new, new > old)
    old_unroll, new_unroll = before.unroll or 1, now.unroll or 1
    kinds = sorted(before.tensor.keys() | now.tensor.keys())
    counts = [(before.tensor.get(k, 0) / old_unroll, now.tensor.get(k, 0) / new_unroll)
              for k in kinds]  # fmt: skip
    if any(old != new for old, new in counts):
        fewer = any(new < old for old, new in counts)
        note("tensor-core instructions of a trip", _shown(before), _shown(now), fewer)
    # A kernel without a loop is one trip of its code.
    looped = before.loop is not None and now.loop is not None
    if looped:
        old_length, new_length = before.loop / old_unroll, now.loop / new_unroll
    elif before.loop is None and now.loop is None:
        old_length, new_length = before.code, now.code
    else:
        note("instructions of the inner loop", before.loop, now.loop, True)
        return changes
    if abs(new_length / old_length - 1) > GROWTH:
        what = "instructions of a trip of the inner loop" if looped else "instructions"
        text = f"{new_length:g} ({new_length / old_length - 1:+.1%})"
        note(what, f"{old_length:g}", text, new_length > old_length)
    return changes


def _shown(entry: Entry) -> str:
    text = ", ".join(f"{count} {kind}" for kind, count in entry.tensor.items()) or "none"
    return f"{text} / {entry.unroll}" if entry.unroll not in (None, 1) else text


def sane(table: Mapping[str, Entry], found: Mapping[str, Entry]) -> list[Change]:
    """What must hold under any Triton: tensor cores where the table has them, no flood of spills,
    and every kernel of the table compiled."""
    changes = []
    for name, before in table.items():
        if name not in found:
            changes.append(Change(name, "in the table, but not compiled", True))
            continue
        now = found[name]
        if bool(before.tensor) > bool(now.tensor):
            changes.append(Change(name, f"tensor cores {_shown(before)} -> none", True))
        if now.spills > before.spills + OTHER_SPILLS:
            text = f"spills, bytes a thread {before.spills} -> {now.spills}"
            changes.append(Change(name, text, True))
    return changes


def read(path: Path = TABLE) -> tuple[str, dict[str, Entry]]:
    """The Triton that made a table, and its rows."""
    raw = json.loads(path.read_text())
    return raw["triton"], {name: Entry(**values) for name, values in raw["rows"].items()}


def write(rows: Mapping[str, Entry], path: Path = TABLE) -> None:
    """A row a line, so that a commit shows what moved."""
    lines = [f"{json.dumps(name)}: {json.dumps(asdict(entry))}" for name, entry in rows.items()]
    head = f'"triton": {json.dumps(triton.__version__)}'
    path.write_text(f"{{\n{head},\n" + '"rows": {\n' + ",\n".join(lines) + "\n}\n}\n")


def part(
    table: Mapping[str, Entry], families: Sequence[str], archs: Sequence[str]
) -> dict[str, Entry]:
    """The table's rows of some families and architectures."""
    starts = tuple(f"{arch} {family} " for arch in archs for family in families)
    return {name: entry for name, entry in table.items() if name.startswith(starts)}


def check(
    families: Sequence[str], archs: Sequence[str], workers: int = 1, path: Path = TABLE
) -> tuple[dict[str, Entry], list[Change], str]:
    """Compile a part and compare it.

    Returns:
        What compiled, the changes (failures among them), and why nothing was compared but what any
        compiler must get right; empty where the table's own Triton compiled it.
    """
    made = [job for family in families for job in jobs(family, archs)]
    found, failed = entries(run_jobs(made, workers))
    version, table = read(path)
    table = part(table, families, archs)
    same = version == triton.__version__
    reason = "" if same else (
        f"the table is Triton {version}'s and this is {triton.__version__}: code of another "
        "compiler, only tensor cores and spills are looked at"
    )  # fmt: skip
    changes = [Change(name, error, True) for name, error in failed.items()]
    return found, changes + (compare if same else sane)(table, found), reason


def shown(rows: Mapping[str, Entry]) -> str:
    """Rows as aligned text."""
    width = max((len(name) for name in rows), default=0)
    lines = [f"{'':{width}} {'reg':>3} {'spill':>5} {'shared':>6} {'warps':>5} {'loop':>5} tensor"]
    for name, entry in rows.items():
        loop = "-" if entry.loop is None else entry.loop
        lines.append(
            f"{name:{width}} {entry.registers:>3} {entry.spills:>5} {entry.shared:>6}"
            f" {entry.warps:>5} {loop:>5} {_shown(entry)}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 if a row is worse, 2 for bad arguments, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="renew the rows that were compiled")
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default 2)")
    chosen = parser.parse_args(arguments)
    if chosen.write:
        return _renew(chosen)
    found, changes, reason = check(chosen.family, chosen.arch, chosen.jobs)
    print(shown(found))
    if reason:
        print(reason)
    for change in changes:
        print(change)
    worse = sum(change.worse for change in changes)
    print(f"{len(found)} rows, {worse} worse, {len(changes) - worse} better")
    return int(worse > 0)


def _renew(chosen: argparse.Namespace) -> int:
    """Write what compiles; nothing if something does not, or part of another Triton's table."""
    version, table = read() if TABLE.exists() else (triton.__version__, {})
    others = [name for name in table if name not in part(table, chosen.family, chosen.arch)]
    if others and version != triton.__version__:
        print(f"the table is Triton {version}'s: renew all of it", file=sys.stderr)
        return 1
    made = [job for family in chosen.family for job in jobs(family, chosen.arch)]
    found, failed = entries(run_jobs(made, chosen.jobs))
    for name, error in failed.items():
        print(f"{name}: {error}", file=sys.stderr)
    if failed:
        return 1
    kept = {name: table[name] for name in others} | found
    order = [f"{arch} {family} " for family in FAMILIES for arch in ARCHS]
    rows = {name: kept[name] for start in order for name in kept if name.startswith(start)}
    write(rows)
    print(shown(found))
    print(f"wrote {len(rows)} rows to {TABLE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
