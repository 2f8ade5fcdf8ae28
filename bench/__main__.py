"""Run the benchmarks and keep what they found: ``python -m bench``.

    python -m bench                      # all files, whole selection of this machine
    python -m bench attention --quick    # tiny cases: does it run?
    python -m bench attention -k varlen  # some of the tests, as pytest's -k

For each file it writes ``<name>-<device>.json`` and ``.svg``: the whole selection to
``bench/results``, a part of it to ``runs/bench``. On a CPU the whole takes a few minutes; timings
mean something only while nothing else runs. Figures are reported and nothing is gated: the exit
status says whether every peer agreed with us in value.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import plots, report

HERE = Path(__file__).resolve().parent
FILES = ("attention", "loss", "heads", "merge")

# What we mean to reach on a CPU: ours over theirs, by mix or case and peer.
CPU_TARGETS = {
    ("mix", "padded"): 0.25,
    ("mix", "per-image"): 1.05,
    ("phi-s-16", "matrix"): 0.08,
    ("phi-s-16", "eager"): 0.4,
    ("four-heads", "eager"): 1.0,
    ("bridge-1", "eager"): 1.0,
    ("half-1", "eager"): 1.0,
}
CPU_MEMORY_TARGETS = {
    ("phi-s-16", "eager"): 0.5,
    ("bridge-1", "eager"): 0.15,
    ("half-1", "eager"): 0.15,
}
CPU_SAVED_TARGETS = {("four-heads", "eager"): 0.6}


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, write; 0 if every benchmark ran or was skipped for a reason."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FILES)}")
    parser.add_argument("--out", type=Path, help="folder to write to; default: see above")
    parser.add_argument("--quick", action="store_true", help="tiny cases, a few rounds")
    parser.add_argument("-k", metavar="EXPRESSION", help="select tests, as pytest's -k")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in FILES]:
        parser.error(f"no benchmark {', '.join(unknown)}: there is {', '.join(FILES)}")
    if chosen.out is None:
        # What is kept in the repository is never replaced by a part of it.
        whole = not (chosen.quick or chosen.k)
        chosen.out = HERE / "results" if whole else HERE.parent / "runs" / "bench"
    chosen.out.mkdir(parents=True, exist_ok=True)
    return max(run(name, chosen) for name in chosen.names or FILES)


def run(name: str, chosen: argparse.Namespace) -> int:
    """One file: pytest's exit status."""
    options = ["--quick"] if chosen.quick else []
    options += ["-k", chosen.k] if chosen.k else []
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", str(HERE / f"{name}.py"), "-q", "--no-header"]
        command += ["--benchmark-disable-gc", "--benchmark-columns=median,iqr,rounds"]
        command += ["--benchmark-sort=name", f"--benchmark-json={raw}", *options]
        # From the repository, whose pyproject.toml says how pytest runs.
        done = subprocess.run(command, cwd=HERE.parent, env=os.environ | {"MPLBACKEND": "Agg"})
        if not raw.is_file():
            print(f"{name}: no results", file=sys.stderr)
            return done.returncode or 1
        found = json.loads(raw.read_text())
    shown = ["python -m bench", name, *(["--quick"] if chosen.quick else [])]
    shown += [f"-k '{chosen.k}'"] if chosen.k else []
    results = report.condense(found, name, " ".join(shown), peers_of(name))
    device = results["machine"]["device"]
    stem = f"{name}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}"
    report.write(results, chosen.out / f"{stem}.json")
    plots.draw(results, chosen.out / f"{stem}.svg")
    targets = (CPU_TARGETS, CPU_MEMORY_TARGETS, CPU_SAVED_TARGETS) if device == "CPU" else ({},)
    print(report.summary(results, *targets))
    for item in results["skipped"]:
        print(f"skipped {item['tests']} tests: {item['reason']}")
    for test in results["failed"]:
        print(f"FAILED {test}")
    print(f"wrote {stem}.json and {stem}.svg in {os.path.relpath(chosen.out)}")
    return done.returncode


def peers_of(name: str) -> dict[str, str]:
    """Who takes part in a file's benchmarks, by name, in words."""
    peers = importlib.import_module(f"bench.{name}_peers").PEERS
    return {peer: words for peer, (words, _) in peers.items()}


if __name__ == "__main__":
    sys.exit(main())
