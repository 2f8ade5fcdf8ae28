"""Run the benchmarks and keep what they found: ``python -m bench``.

    python -m bench                                  # all suites
    python -m bench --suite loss,merge               # some (also: python -m bench loss merge)
    python -m bench --suite attention --quick        # tiny cases: does it run?
    python -m bench --suite attention -k mix --peers varlen,flex
    python -m bench --compare before.json after.json # regressions between two result files
    python -m bench --sweep                          # on a GPU: choose the attention's tiles

A run writes <device>-<date>.json and the plots <device>-ratios-light.svg, -dark.svg,
<device>-roofline-light.svg and -dark.svg: a run of everything to bench/results, any part of it to
runs/bench. Timings mean something only while nothing else runs. The exit status of a run is 1 if a
peer disagreed with us in value or a suite failed, that of --compare 1 if something got slower.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUITES = (
    "attention",
    "loss",
    "merge",
    "heads",
    "student",
    "step",
    "data",
    "teachers",
    "scaling",
)
NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "matplotlib": "matplotlib"}
INSTALL = 'pip install -c constraints.txt -e ".[bench]"'


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, write; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"suites, as --suite: {', '.join(SUITES)}")
    add("--suite", action="append", default=[], metavar="NAMES", help="comma-separated, or repeat")
    add("--quick", action="store_true", help="tiny cases, a few rounds")
    add("-k", metavar="EXPRESSION", help="select cases, as pytest's -k")
    add("--peers", metavar="NAMES", help="only these peers beside us, comma-separated")
    add("--out", type=Path, metavar="FOLDER", help="where to write; default: see above")
    add("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="run nothing")
    add("--sweep", action="store_true", help="time the attention's tiles on this GPU; run nothing")
    chosen = parser.parse_args(arguments)
    given = [name for text in (*chosen.names, *chosen.suite) for name in text.split(",") if name]
    for name in given:
        if name not in SUITES:
            near = get_close_matches(name, SUITES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            parser.error(f"--suite: no suite {name!r}{hint}; there is {', '.join(SUITES)}")
    alone = "--compare" if chosen.compare else "--sweep" if chosen.sweep else None
    if alone:
        parts = [*given, *(["--peers"] if chosen.peers else []), *(["-k"] if chosen.k else [])]
        parts += ["--sweep"] if chosen.compare and chosen.sweep else []
        if parts:
            parser.error(f"{alone} runs no suite: leave out {' '.join(parts)}")
    if chosen.compare:
        if chosen.out or chosen.quick:
            parser.error("--compare only prints: leave out --out and --quick")
        return compare(parser, *chosen.compare)
    if missing := [pip for name, pip in NEEDED.items() if not importlib.util.find_spec(name)]:
        parser.error(f"{', '.join(missing)} not installed: {INSTALL}")
    if chosen.sweep:
        return sweep(parser, chosen.out, chosen.quick)
    return run(parser, [name for name in SUITES if not given or name in given], chosen)


def run(parser: argparse.ArgumentParser, names: list[str], chosen: argparse.Namespace) -> int:
    """All chosen suites in one process of pytest, then the results, the plots and the summary."""
    from bench import plots, report
    from bench.summary import summary

    whole = len(names) == len(SUITES) and not (chosen.quick or chosen.k or chosen.peers)
    # What is kept in the repository is never replaced by a part of it.
    out = chosen.out or (HERE / "results" if whole else HERE.parent / "runs" / "bench")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {str(out)!r}: {error.strerror}")
    options = _options(names, chosen)
    raw, status = _pytest(names, options, chosen)
    if raw is None:
        return status
    results = report.condense(raw, shlex.join(["python", "-m", "bench", *options]))
    device = re.sub("[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
    path = out / f"{device}-{results['machine']['date'][:10]}.json"
    size = report.write(results, path)
    pictures = plots.draw(results, out, device)
    print(summary(results))
    shown = os.path.relpath(path)
    print(f"\nwrote {shown} ({size / 1e3:.0f} kB), {', '.join(p.name for p in pictures)}")
    failed = any(suite["failed"] for suite in results["suites"].values())
    return 1 if failed else 0


def _options(names: list[str], chosen: argparse.Namespace) -> list[str]:
    """The command's own, as the results quote them."""
    options = [] if len(names) == len(SUITES) else ["--suite", ",".join(names)]
    options += ["--quick"] if chosen.quick else []
    options += ["-k", chosen.k] if chosen.k else []
    return options + (["--peers", chosen.peers] if chosen.peers else [])


def _pytest(
    names: list[str], options: list[str], chosen: argparse.Namespace
) -> tuple[dict[str, Any] | None, int]:
    """What pytest-benchmark wrote, or None and an exit status, the reason being printed."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        # pytest-benchmark warns that there is nothing to save, which we say ourselves.
        command = [sys.executable, "-W", "ignore:Not saving anything", "-m", "pytest"]
        command += [str(HERE / f"{name}.py") for name in names]
        command += ["-qq", "--no-header", "-rN", "--tb=short", "--disable-warnings"]
        command += ["--bench-progress", "--continue-on-collection-errors"]
        command += ["--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={raw}"]
        command += ["--quick"] if chosen.quick else []
        command += ["-k", chosen.k] if chosen.k else []
        command += ["--peers", chosen.peers] if chosen.peers else []
        # From the repository, whose pyproject.toml says how pytest runs.
        try:
            done = subprocess.run(command, cwd=HERE.parent, env=os.environ | {"MPLBACKEND": "Agg"})
        except KeyboardInterrupt:
            return None, 130
        if done.returncode == 5:
            print(f"no case of {', '.join(names)} matches -k {chosen.k!r}", file=sys.stderr)
            return None, 2
        if not raw.is_file() or not raw.stat().st_size:
            words = " ".join(["python -m bench", *options])
            print(f"{words}: no results (pytest's status {done.returncode})", file=sys.stderr)
            return None, 2 if done.returncode == 4 else 1
        return json.loads(raw.read_text()), done.returncode


def compare(parser: argparse.ArgumentParser, before: Path, after: Path) -> int:
    """Print what changed from one result file to the other; 1 if something got worse."""
    from bench import compare as comparison

    try:
        found = comparison.compare(comparison.load(before), comparison.load(after))
    except comparison.Unreadable as error:
        parser.error(f"--compare: {error}")
    print(comparison.table(found))
    return 1 if found.regressions else 0


def sweep(parser: argparse.ArgumentParser, out: Path | None, quick: bool) -> int:
    """The kernels' own tile sweep, on the GPU at hand."""
    import torch

    if not torch.cuda.is_available():
        parser.error(
            "--sweep times the attention's tiles and needs a CUDA device; there is none. Without "
            "one, machine code ranks them: python -m fastagglo.kernels.inspect attention --arch "
            "sm_90 --heads 80 --kernel fwd --sweep, and python -m fastagglo.kernels.tune --arch "
            "sm_90 --out tiles.json makes a table of such estimates"
        )
    command = [sys.executable, "-m", "fastagglo.kernels.tune", "--measure"]
    command += ["--heads", "64,80", "--dtype", "bf16"] if quick else []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        command += ["--out", str(out.resolve() / "tiles.json")]
    status = subprocess.run(command, cwd=HERE.parent).returncode
    if status == 0:
        print(f"wrote {out / 'tiles.json' if out else 'kernels/tiles.json, which attention reads'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
