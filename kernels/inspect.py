"""Look at compiled Triton kernels for a GPU that need not be there.

    python -m fastagglo.kernels.inspect attention --arch sm_90,sm_80 --heads 64,72,80,128
    python -m fastagglo.kernels.inspect launch my_module:my_function --arch sm_90

and from Python:

    with stub_device("sm_90") as launches:
        my_function()  # launches Triton kernels on tensors of the CPU, or of "meta"
    reports = [analyse(launch) for launch in launches]

``attention`` prints the library's own kernels with the tiles of its table, or with ``--sweep`` all
candidates, ranked. ``launch`` takes any function without arguments. What the columns and the bound
mean, and what they leave out: `fastagglo.kernels.analysis`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import torch
import triton

from fastagglo.kernels import candidates
from fastagglo.kernels.analysis import Loop, Report, analyse
from fastagglo.kernels.chips import CHIPS, Chip, Occupancy, chip, occupancy
from fastagglo.kernels.stub import Launch, stub_device
from fastagglo.kernels.sweep import Job, Row, rank, run_job, run_jobs
from fastagglo.kernels.tiles import Tile

__all__ = [
    "CHIPS",
    "Chip",
    "Job",
    "Launch",
    "Loop",
    "Occupancy",
    "Report",
    "Row",
    "analyse",
    "chip",
    "main",
    "occupancy",
    "rank",
    "run_job",
    "run_jobs",
    "stub_device",
    "table",
]

LEGEND = """\
Main loop, per trip and warp: tens(or core), mufu, fp, int(eger, logic, moves), cvt, shfl, shm
(shared memory), glb (global memory), bar(riers and waits), all. ir/MF: non-tensor instructions of
all warps per million tensor-core FLOPs; /use: per million useful ones (no padding). bound: the
share of the dense tensor-core peak that the loop could reach, tensor / max(tensor, issue, mufu,
fma, alu, l1) clocks, and what takes longest. It assumes perfect overlap of all units and no
waiting for memory, barriers or dependencies: it ranks kernels, it predicts no time. occ: CTAs per
SM and what limits them. spill: stores+loads, bytes per thread. smem: KiB per CTA."""

_HEADER = (
    f"{'':24} {'reg':>3} {'spill':>7} {'smem':>5} {'occ':<7}"
    f" {'tens':>4} {'mufu':>4} {'fp':>4} {'int':>4} {'cvt':>3} {'shfl':>4} {'shm':>3} {'glb':>3}"
    f" {'bar':>3} {'all':>4} {'ir/MF':>5} {'/use':>5} bound"
)
_SHORT = {"registers": "reg", "shared": "smem", "threads": "warps", "ctas": "slots"}


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text of at most 120 columns, a section per architecture."""
    lines = []
    for (arch, group), members in groupby(rows, key=lambda row: (row.arch, row.group)):
        sm = chip(arch)
        lines.append(
            f"{f'{arch} {group}'.strip()}: {sm.shared_cta // 1024} KiB of shared memory per CTA,"
            f" {sm.warps} warps and {sm.tensor['bf16']} dense bf16 FLOP per clock per SM"
        )
        lines.append(_HEADER)
        notes = []
        for row in members:
            if row.report is None:
                lines.append(_cut(f"{_name(row):24} {row.error}"))
                continue
            lines.append(_line(_name(row), row.report))
            notes += [f"  {_name(row)}: {note}" for note in row.report.notes]
        lines += [_cut(note) for note in notes]
        lines.append("")
    return "\n".join([*lines, LEGEND])


def _name(row: Row) -> str:
    return row.label if len(row.label) <= 24 else row.label[:23] + "…"


def _cut(line: str) -> str:
    return line if len(line) <= 120 else line[:119] + "…"


def _line(name: str, report: Report) -> str:
    spill = f"{report.spill_stores}+{report.spill_loads}" if report.spills else "-"
    residents = report.occupancy
    limiter = residents.limiter.partition("+")[0]
    text = (
        f"{name:24} {report.registers:>3} {spill:>7} {report.shared / 1024:>5.1f}"
        f" {residents.ctas:>2} {_SHORT.get(limiter, limiter):<4}"
    )
    if not report.fits:
        text = text[:-7] + f"{'no fit':<7}"
    if report.main is None:
        return f"{text} no loop with arithmetic"
    loop, n = report.main, report.main.counts
    text += (
        f" {n['tensor']:>4} {n['mufu']:>4} {n['float']:>4} {n['integer']:>4} {n['convert']:>3}"
        f" {n['shuffle']:>4} {n['shared']:>3} {n['global']:>3} {n['sync']:>3} {n['total']:>4}"
    )
    costs = (loop.non_tensor_per_mflop, loop.non_tensor_per_useful_mflop)
    text += "".join(f" {'-' if cost is None else round(cost):>5}" for cost in costs)
    bound = f"{loop.bound:>4.0%} {loop.limiter}" if loop.bound is not None else "-"
    return f"{text} {bound}"


def to_json(rows: Sequence[Row]) -> str:
    """All that is known of the rows, every loop included, with the versions that compiled them."""
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    return (
        json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            wrong = ", ".join(map(repr, unknown)) or repr(text)
            raise argparse.ArgumentTypeError(
                f"{wrong} is not known; choose from {', '.join(known)}"
            )
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists")
    return path


def _function(text: str) -> Callable[[], object]:
    """Import ``module:function``; ``python -m`` finds modules of the current directory."""
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form module:function")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"cannot import {module!r}: {error}") from error
    function = getattr(found, name, None)
    if not callable(function):
        what = "has no" if function is None else "holds something that cannot be called as"
        raise argparse.ArgumentTypeError(f"module {module!r} {what} {name!r}")
    return function


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fastagglo.kernels.inspect",
        description="Compile Triton launches for a named GPU on any machine, and take them apart.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    common = _Parser(add_help=False)
    common.add_argument(
        "--arch",
        type=_names(list(CHIPS)),
        default=["sm_90"],
        metavar="A,B",
        help=f"of {', '.join(CHIPS)} (default sm_90)",
    )
    common.add_argument("--json", type=_file, metavar="FILE", help="write every figure there")
    common.add_argument(
        "--jobs", type=_positive, default=2, metavar="N", help="processes that compile (default 2)"
    )
    launch = commands.add_parser(
        "launch", parents=[common], help="what a function of yours launches"
    )
    launch.add_argument(
        "function",
        type=_function,
        metavar="module:function",
        help='takes no arguments; launches Triton kernels on tensors of the CPU or of "meta"',
    )
    launch.set_defaults(rows=_launch_rows)
    own = commands.add_parser(
        "attention", parents=[common], help="the library's attention, forward and backward"
    )
    heads = [str(width) for width in range(16, 129, 8)]
    own.add_argument(
        "--heads",
        type=_names(heads),
        default=["64", "72", "80", "128"],
        metavar="D,D",
        help="head dims, 16 to 128 in steps of 8 (default 64,72,80,128)",
    )
    own.add_argument("--dtype", choices=list(candidates.DTYPES), default="bf16")
    kernels = list(candidates.KERNELS)
    own.add_argument(
        "--kernel",
        type=_names(kernels),
        default=kernels,
        metavar="A,B",
        help=f"of {', '.join(kernels)} (default all)",
    )
    own.add_argument(
        "--tile-rows",
        type=int,
        choices=(64, 128),
        default=128,
        help="rows of a tile of the work list: 64 where no segment is longer (default 128)",
    )
    own.add_argument("--bias", action="store_true", help="with a bias per key and its gradient")
    own.add_argument(
        "--sweep", action="store_true", help="compile every candidate tile, and rank them"
    )
    own.set_defaults(rows=_attention_rows)
    return parser


def _launch_rows(options: argparse.Namespace) -> list[Row]:
    function = options.function
    rows = run_jobs([Job(function.__name__, arch, function) for arch in options.arch], options.jobs)
    for row in rows:
        if row.trace:
            print(row.trace, file=sys.stderr)
    # A function may launch several kernels: they go by their own names.
    return [_renamed(row, row.report.kernel) if row.report else row for row in rows]


def _attention_rows(options: argparse.Namespace) -> list[Row]:
    made = candidates.jobs(
        options.arch,
        options.kernel,
        [int(head) for head in options.heads],
        dtype=options.dtype,
        tile_rows=options.tile_rows,
        bias=options.bias,
        sweep=options.sweep,
    )
    rows = run_jobs(made, options.jobs)
    if options.sweep:
        groups = groupby(rows, key=lambda row: (row.arch, row.group))
        return [row for _, members in groups for row in rank(list(members))]
    return [_with_tile(row, row.report) if row.report else row for row in rows]


def _with_tile(row: Row, report: Report) -> Row:
    sizes = report.constants["ROWS"], report.constants["COLUMNS"]
    tile = candidates.tile_name(Tile(*sizes, report.num_warps, report.num_stages))
    return replace(row, label=f"{row.label} {tile}")


def _renamed(row: Row, kernel: str) -> Row:
    assert row.report is not None
    suffix = f" w{row.report.num_warps} s{row.report.num_stages}"
    return replace(row, label=kernel[: 24 - len(suffix)] + suffix)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit status: 1 where a launch failed (in a sweep: where all did), else 0. Bad arguments
        end the process with status 2 and one line on standard error.
    """
    options = _parser().parse_args(arguments)
    rows = options.rows(options)
    if options.json:
        options.json.write_text(to_json(rows))
    print(table(rows))
    failed = [bool(row.error) for row in rows]
    return int(all(failed) if getattr(options, "sweep", False) else any(failed))


if __name__ == "__main__":
    sys.exit(main())
