"""Choose the block sizes of tiles.json: timed on the GPU at hand, or estimated from machine code.

    python -m fastagglo.kernels.tune --arch sm_80,sm_90,sm_100   # on any machine: an estimate
    python -m fastagglo.kernels.tune --measure                   # on a GPU, for that GPU

Every candidate is compiled through the real launcher. What does not fit the chip is out, and what
spills, if anything does not. The rest is ranked by `estimate`; with ``--measure`` the likeliest few
are then timed on a mix of lengths. The table says what made each
part of it: versions and, if it was measured, device and driver.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from fastagglo.kernels import attention
from fastagglo.kernels.analysis import Report
from fastagglo.kernels.candidates import DTYPES, KERNELS, candidates, launch
from fastagglo.kernels.chips import CHIPS, SUB_PARTITIONS
from fastagglo.kernels.sweep import Job, run_jobs
from fastagglo.kernels.tiles import TABLE, Tile

HEAD_DIMS = tuple(range(16, 129, 8))
TILE_ROWS = (64, 128)
TUNED = ("bf16", "fp32")

# Bytes that an SM reads from the L2 cache in a clock: A100's whitepaper gives 5120 for 108 SMs;
# what H100 is measured to reach comes to less for each of its 132.
L2_BYTES = 32

# What --measure times: a batch of the recipe's resolutions, and one of windows of 8 x 8 patches.
LENGTHS = {128: (196,) * 32 + (576,) * 16 + (1024,) * 8 + (4096,) * 2, 64: (64,) * 512}
MEASURED = 6

# Bytes of stack that a bias may cost a thread: a tile is chosen for calls without one.
BIAS_STACK = 16


def estimate(
    report: Report, kernel: str, tile: Tile, element_size: int, head_dim: int
) -> tuple[float, float]:
    """Clocks of an SM per useful kFLOP of the main loop: a model, to rank what was never run.

    The busiest unit decides, as in `analysis`, with two more limits. A stream, which is a warp in
    each of the four sub-partitions, does its products and its other work in turns: n streams take
    at least an n-th of the sum. And a trip reads two blocks (columns, head dim) from the L2 cache.

    Returns:
        The clocks to three digits and, for ties, the instructions other than products per kFLOP.
    """
    loop = report.main
    if loop is None or not loop.cycles or not report.occupancy.ctas:
        return float("inf"), 0.0
    trips = loop.unroll or 1
    streams = report.occupancy.ctas * report.num_warps / SUB_PARTITIONS
    tensor = loop.cycles.get("tensor", 0.0)
    other = max(value for unit, value in loop.cycles.items() if unit != "tensor")
    read = trips * 2 * tile.columns * head_dim * element_size / L2_BYTES
    kflop = 2e-3 * KERNELS[kernel][1] * tile.rows * tile.columns * head_dim * trips
    clocks = max(tensor, other, read, (tensor + other) / streams)
    return float(f"{clocks / kflop:.3g}"), loop.non_tensor / kflop


def compiled(
    arch: str,
    dtype: str,
    kernel: str,
    head_dim: int,
    tiles: Sequence[Tile],
    bias: bool,
    workers: int,
) -> dict[Tile, Report]:
    """What became of those tiles that compile and fit the chip."""
    jobs = [
        Job(
            str(index),
            arch,
            partial(launch, kernel, dtype, head_dim, 128, tile, bias),
            kernels=(KERNELS[kernel][0],),
        )
        for index, tile in enumerate(tiles)
    ]
    return {
        tiles[int(row.label)]: row.report
        for row in run_jobs(jobs, workers)
        if row.report and row.report.fits
    }


def choose(
    arch: str, dtype: str, kernel: str, head_dim: int, workers: int, measure: bool
) -> list[list[Any]]:
    """The table's entries for one kernel and head dim, for each height of the work list's tiles.

    Where no candidate is free of spills, the one that spills least. Without tensor cores a thread
    holds whole rows of its operands: wide heads of fp32 always spill, and the estimate counts what
    that costs.

    Raises:
        RuntimeError: no candidate compiles and fits.
    """
    size = DTYPES[dtype].itemsize
    tiles = candidates(kernel, dtype, head_dim, max(TILE_ROWS))
    reports = compiled(arch, dtype, kernel, head_dim, tiles, False, workers)
    scores = {tile: estimate(reports[tile], kernel, tile, size, head_dim) for tile in reports}

    @cache
    def holds(tile: Tile) -> bool:
        if dtype == "fp32":
            return True
        biased = compiled(arch, dtype, kernel, head_dim, [tile], True, 1)
        return tile in biased and biased[tile].stack <= BIAS_STACK

    entries = []
    for tile_rows in TILE_ROWS:
        wanted = MEASURED if measure else 1
        ranked = [tile for tile in sorted(scores, key=scores.__getitem__) if tile.rows <= tile_rows]
        if not ranked:
            raise RuntimeError(
                f"{kernel}: no candidate for {arch}, {dtype}, head dim {head_dim} and tiles of "
                f"{tile_rows} rows compiles and fits; add one to candidates()"
            )
        held: list[Tile] = []
        for tile in ranked:
            clean = dtype == "fp32" or not reports[tile].spills
            if clean and len(held) < wanted and holds(tile):
                held.append(tile)
        held = held or [min(ranked, key=lambda tile: reports[tile].stack)]
        best = held[0]
        if measure:
            best = min(held, key=partial(milliseconds, kernel, dtype, head_dim, tile_rows))
        entries.append([kernel, size, head_dim, tile_rows, *astuple(best)])
    return entries


def milliseconds(kernel: str, dtype: str, head_dim: int, tile_rows: int, tile: Tile) -> float:
    """Median time of a pass on the current CUDA device; a backward pass has both of its kernels."""
    lengths = sorted(LENGTHS[tile_rows], reverse=True)
    rows, heads = sum(lengths), 16
    qkv = torch.randn(rows, 3, heads, head_dim, dtype=DTYPES[dtype], device="cuda")
    work, start = [], 0
    for segment, length in enumerate(lengths):
        work += [(start, length, first, segment) for first in range(0, length, tile_rows)]
        start += length
    tiles = torch.tensor(work, dtype=torch.int32, device="cuda")
    inputs = (*qkv.unbind(1), None, tiles, tile_rows)
    scale = head_dim**-0.5
    if kernel == "fwd":
        return triton.testing.do_bench(
            lambda: attention.forward(*inputs, scale, tile=tile), return_mode="median"
        )
    out, lse = attention.forward(*inputs, scale)
    return triton.testing.do_bench(
        lambda: attention.backward(
            torch.ones_like(out), *inputs, out, lse, scale, fused=True, **{f"tile_{kernel}": tile}
        ),
        return_mode="median",
    )


def source(measure: bool) -> dict[str, str]:
    """What made a part of the table."""
    made = {"triton": triton.__version__}
    if not measure:
        return {"method": "estimated from machine code, not measured", **made}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = "unknown"
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "method": "measured",
        **made,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "device": torch.cuda.get_device_name(),
        "driver": driver,
    }


def write(arch: str, entries: Sequence[Sequence[Any]], made_by: dict[str, str], path: Path) -> None:
    """Put entries for one architecture into the table; its other entries stay if made alike."""
    table = json.loads(path.read_text()) if path.exists() else {}
    part = table.get(arch.removeprefix("sm_"), {})
    old = part["tiles"] if part.get("source") == made_by else []
    new = {tuple(entry[:4]): list(entry) for entry in (*old, *entries)}
    table[arch.removeprefix("sm_")] = {
        "source": made_by,
        "tiles": [new[key] for key in sorted(new)],
    }
    parts = []
    for name in sorted(table, key=int):
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table[name]["tiles"])
        head = json.dumps(table[name]["source"])
        parts.append(f'"{name}": {{"source": {head}, "tiles": [\n{lines}\n]}}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastagglo.kernels.tune", description="Choose the attention's block sizes."
    )
    parser.add_argument("--arch", metavar="A,B", help=f"of {', '.join(CHIPS)}; default: all")
    parser.add_argument("--measure", action="store_true", help="time them on the CUDA device here")
    parser.add_argument(
        "--heads", metavar="A,B", default=",".join(map(str, HEAD_DIMS)), help="of 16, 24, ..., 128"
    )
    parser.add_argument("--dtype", choices=[*TUNED, "all"], default="all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default 2)")
    parser.add_argument("--out", type=Path, default=TABLE, help="default: the library's own table")
    options = parser.parse_args(arguments)
    archs = options.arch.split(",") if options.arch else list(CHIPS)
    if options.measure:
        if not torch.cuda.is_available():
            parser.error("--measure needs a CUDA device, and there is none")
        archs = ["sm_{}{}".format(*torch.cuda.get_device_capability())]
    if unknown := [arch for arch in archs if arch not in CHIPS]:
        parser.error(f"--arch: {unknown[0]!r} is not known; choose from {', '.join(CHIPS)}")
    try:
        head_dims = [HEAD_DIMS[HEAD_DIMS.index(int(text))] for text in options.heads.split(",")]
    except ValueError:
        parser.error(f"--heads: choose from {HEAD_DIMS}, got {options.heads!r}")
    dtypes = list(TUNED) if options.dtype == "all" else [options.dtype]
    for arch, dtype, head_dim in product(archs, dtypes, head_dims):
        entries = [
            entry
            for kernel in KERNELS
            for entry in choose(arch, dtype, kernel, head_dim, options.jobs, options.measure)
        ]
        # Head dim by head dim, so that a long run may be stopped.
        write(arch, entries, source(options.measure), options.out)
        print(f"{arch} {dtype} {head_dim}: {entries}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
