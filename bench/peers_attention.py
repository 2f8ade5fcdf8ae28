"""Public Triton attention kernels through the same gate as ours: compiled for a named NVIDIA GPU on
a machine without one, and compared by what their machine code issues per tensor-core FLOP.

    python -m bench.peers_attention --arch sm_90 --heads 64,72,80,128 --json peers_sm90.json

The peers go into an environment of their own, since some pin other versions of our dependencies:

    python -m venv peers && . peers/bin/activate
    pip install -c constraints.txt torch numpy && pip install --no-deps -e .
    pip install einops pyyaml packaging sqlalchemy
    pip install --no-deps flag-gems==5.0.2 fla-core==0.6.0 xformers==0.0.35 sglang==0.5.23

A peer that is not installed is skipped. FlexAttention comes with torch: inductor writes its kernels
from traced graphs, here as if a GPU were there.

What is compared. Dense bf16, one sequence of 4096 rows, 16 heads, no mask; where a peer's kernel is
causal only, its unmasked loop. Each peer's own launcher makes the launch. Only the kernel object in
its module is replaced, by one that compiles the launch in every configuration that the peer's
autotuner would time, if it has one; shown is the one that fits the chip and issues least, loop by
loop. So a peer may look better here than its autotuner would leave it, but not worse. A low count
is no speed: a loop that waits for its loads (one stage) counts few instructions too.

Columns. FLOP: tensor-core FLOPs issued per useful one (2 per product, logit and head dim, without
padding). Non-tensor/MFLOP: other instructions, summed over warps, per million tensor-core FLOPs
issued. /useful: the same per million useful FLOPs. A head of 72 padded to 128 has 1.8 times the
FLOPs for the same softmax, which makes the first figure better and the kernel slower: for odd head
dims go by the second. Bound: see `fastagglo.kernels.analysis`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

from bench import peer_kernels
from bench.peer_flex import flex
from bench.peer_kernels import FORWARD, HEADS, NAMES, ROWS, Session, as_if_on, why
from fastagglo.kernels.analysis import Loop, Report, analyse
from fastagglo.kernels.stub import stub_device

OURS = "fastagglo"
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products per logit


@dataclass(frozen=True)
class Row:
    """One line of the table; figures are None where ``note`` says why there are none."""

    peer: str
    version: str
    kernel: str
    part: str
    head_dim: int
    note: str = ""
    configurations: int = 0
    tile: tuple[int, int] | None = None
    warps: int | None = None
    stages: int | None = None
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    flops_per_useful: float | None = None
    non_tensor_per_mflop: float | None = None
    non_tensor_per_useful_mflop: float | None = None
    bound: float | None = None


# Name -> (how to launch it, distribution, what to install).
PEERS: dict[str, tuple[Callable[[Session, int], None], str, str]] = {
    OURS: (peer_kernels.ours, "fastagglo", "-e ."),
    "FlexAttention": (flex, "torch", "torch"),
    "flag-gems": (peer_kernels.flag_gems, "flag-gems", "flag-gems==5.0.2 sqlalchemy==2.0.48"),
    "fla-core": (peer_kernels.fla, "fla-core", "fla-core==0.6.0 einops"),
    "sglang": (peer_kernels.sglang, "sglang", "sglang==0.5.23"),
    "xformers": (peer_kernels.xformers, "xformers", "xformers==0.0.35"),
}


# --- the table ------------------------------------------------------------------------------------


def rows_of(peer: str, arch: str, dim: int) -> list[Row]:
    """What a peer's kernels come to for one head dim.

    Raises:
        ModuleNotFoundError: the peer is not installed.
    """
    run, distribution, _ = PEERS[peer]
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(str(error)) from None
    with stub_device(arch) as launches, as_if_on(arch):
        session = Session(arch, launches)
        try:
            run(session, dim)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # another version of the peer, say; the others still count
            if peer == OURS:
                raise
            session.failed.append((distribution, FORWARD, why(error)))
    found: dict[tuple[str, str], list[Row]] = {}
    for name, tiles, constants, launch in session.compiled:
        report = analyse(launch)
        for part, (rows, columns) in tiles.items():
            base = Row(peer, version, name, part, dim)
            row = _row(base, report, (constants[rows], constants[columns]))
            found.setdefault((name, part), []).append(row)
    for name, tiles, reason in session.failed:
        for part in tiles:
            found.setdefault((name, part), []).append(Row(peer, version, name, part, dim, reason))
    return [_best(rows) for rows in found.values()]


def _row(base: Row, report: Report, tile: tuple[int, int]) -> Row:
    row = replace(
        base,
        tile=tile,
        warps=report.num_warps,
        stages=report.num_stages,
        registers=report.registers,
        spilled=report.stack,
        shared=report.shared,
    )
    if not report.fits:
        return replace(row, note="; ".join(report.notes))
    # What the loop multiplies: ours pads to 16, every peer that pads does so to a power of two.
    dim = base.head_dim
    width = -(-dim // 16) * 16 if base.peer == OURS else triton.next_power_of_2(dim)
    products = 2 * PRODUCTS[base.part] * tile[0] * tile[1]
    loop = _loop(report, products * width)
    if loop is None or not loop.tensor_flops or not loop.unroll:
        return replace(row, note="its loop was not recognised")
    useful = products * dim * loop.unroll
    return replace(
        row,
        flops_per_useful=loop.tensor_flops / useful,
        non_tensor_per_mflop=loop.non_tensor / loop.tensor_flops * 1e6,
        non_tensor_per_useful_mflop=loop.non_tensor / useful * 1e6,
        bound=loop.bound,
    )


def _loop(report: Report, flops: int) -> Loop | None:
    """The loop of these products; the unmasked one where there are twins."""
    fitting = [x for x in report.loops if x.unroll and x.dot_flops == flops * x.unroll]
    return min(fitting, key=lambda x: x.non_tensor / (x.unroll or 1)) if fitting else None


def _best(rows: list[Row]) -> Row:
    measured = [row for row in rows if row.non_tensor_per_mflop is not None]
    best = min(measured or rows, key=lambda row: row.non_tensor_per_mflop or 0.0)
    return replace(best, configurations=len(rows))


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each head dim and part: ours against the peer that issues least, and the FLOPs saved."""
    found = []
    for mine in rows:
        if mine.peer != OURS or mine.non_tensor_per_mflop is None:
            continue
        rivals = [
            row
            for row in rows
            if row.peer != OURS
            and row.head_dim == mine.head_dim
            and row.part == mine.part
            and row.non_tensor_per_mflop is not None
        ]
        if not rivals:
            continue
        verdict: dict[str, Any] = {"head_dim": mine.head_dim, "part": mine.part}
        for key in ("non_tensor_per_mflop", "non_tensor_per_useful_mflop"):
            best = min(rivals, key=lambda row: getattr(row, key))
            verdict[key] = {
                "ours": getattr(mine, key),
                "best_peer": f"{best.peer} {best.kernel}",
                "peer": getattr(best, key),
                "fewer": getattr(mine, key) < getattr(best, key),
            }
        least = min(row.flops_per_useful or 0.0 for row in rivals)
        verdict["flops_saved"] = 1 - (mine.flops_per_useful or 0.0) / least
        verdict["spills"] = bool(mine.spilled)
        verdict["against"] = [f"{row.peer} {row.kernel}" for row in rivals]
        found.append(verdict)
    return found


def _print(rows: Sequence[Row], arch: str) -> None:
    print(f"\n{arch}, bf16, {ROWS} rows, {HEADS} heads")
    header = ("D", "part", "peer", "kernel", "tile", "w", "s", "regs", "spill", "smem")
    figures = ("FLOP", "non-tensor/MFLOP", "/useful", "bound")
    form = (
        "{:>3} {:<6} {:<25} {:<30.30} {:>7} {:>2} {:>2} {:>4} {:>5} {:>6} {:>5} {:>16} {:>7} {:>5}"
    )
    print(form.format(*header, *figures))
    order = {part: number for number, part in enumerate(PRODUCTS)}
    for row in sorted(rows, key=lambda r: (r.head_dim, order[r.part], r.peer != OURS)):
        who = f"{row.peer} {row.version}"
        if row.non_tensor_per_mflop is None:
            print(f"{row.head_dim:>3} {row.part:<6} {who:<25} {row.kernel:<30.30} {row.note}")
            continue
        print(
            form.format(
                row.head_dim,
                row.part,
                who,
                row.kernel,
                "x".join(map(str, row.tile or ())),
                row.warps,
                row.stages,
                row.registers,
                row.spilled,
                row.shared,
                f"{row.flops_per_useful:.2f}",
                f"{row.non_tensor_per_mflop:.0f}",
                f"{row.non_tensor_per_useful_mflop:.0f}",
                "" if row.bound is None else f"{row.bound:.2f}",
            )
        )


def _print_verdicts(found: Sequence[dict[str, Any]]) -> None:
    print()
    for verdict in found:
        texts = []
        for key, unit in (
            ("non_tensor_per_mflop", "MFLOP"),
            ("non_tensor_per_useful_mflop", "useful MFLOP"),
        ):
            one = verdict[key]
            relation = "fewer than" if one["fewer"] else "NOT fewer than"
            texts.append(
                f"{one['ours']:.0f} per {unit}, {relation} the best peer's "
                f"{one['peer']:.0f} ({one['best_peer']})"
            )
        print(
            f"D {verdict['head_dim']:>3} {verdict['part']:<4}: {'; '.join(texts)}; "
            f"{verdict['flops_saved']:.0%} fewer tensor-core FLOPs than the least padded "
            f"of {len(verdict['against'])} peer kernels"
            f"{'; SPILLS' if verdict['spills'] else ''}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers_attention", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--arch", default="sm_90", choices=list(NAMES))
    parser.add_argument("--heads", default="64,72,80,128", help="head dims, with commas")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of these, with commas")
    parser.add_argument("--json", type=Path, help="write rows and verdicts to this file")
    args = parser.parse_args(arguments)
    heads = [int(dim) for dim in re.split(r"[,\s]+", args.heads)]
    chosen = args.peers.split(",")
    if unknown := [peer for peer in chosen if peer not in PEERS]:
        parser.error(f"--peers: {', '.join(unknown)} not known; choose from {', '.join(PEERS)}")
    rows: list[Row] = []
    skipped = []
    for peer in chosen:
        try:
            for dim in heads:
                print(f"compiling {peer}, head dim {dim}", file=sys.stderr)
                rows += rows_of(peer, args.arch, dim)
        except ModuleNotFoundError as error:
            skipped.append(peer)
            print(f"skipped {peer} ({error}): pip install --no-deps {PEERS[peer][2]}")
    _print(rows, args.arch)
    found = verdicts(rows)
    _print_verdicts(found)
    if args.json:
        result = {
            "arch": args.arch,
            "shape": {"rows": ROWS, "heads": HEADS, "dtype": "bfloat16"},
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "rows": [asdict(row) for row in rows],
            "verdicts": found,
            "skipped": skipped,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
