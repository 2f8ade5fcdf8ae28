"""Where a training step's time goes, and what telemetry costs: ``python -m bench.step``.

    python -m bench.step                                  # the demo's step, about a minute
    python -m bench.step --steps 20 --data.workers 2      # any setting of train.py
    python -m bench.step --recipe my.toml --json profile.json

A trainer of the recipe, its statistics settled, runs its own steps on its own data: teachers, data
and all. Every second step has the telemetry that a run has (rows, TensorBoard, lines of progress,
NVML where there is a GPU), the others none; which of two comes first changes. Shares of the phases
are those of the telemetry's rows. What is in no phase is "between"; overhead is all but student,
teachers and optimiser. Nothing is checked against a limit: the goals are printed beside.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.intervals import median_interval
from bench.measure import finish
from fastagglo.data import make_loader
from fastagglo.errors import UserError
from fastagglo.eval import read_metrics
from fastagglo.train import Trainer, choose_device
from fastagglo.train.ahead import Ahead
from fastagglo.train.config import RunConfig
from fastagglo.train.gpu_meter import GpuMeter
from fastagglo.train.recipe import parse_arguments
from fastagglo.train.telemetry import EVALUATION, PHASES, WORK, Telemetry

OVERHEAD_GOAL = 0.03  # of a step, all but student, teachers and optimiser
TELEMETRY_GOAL = 0.01  # of a step
SETTLED = 1  # steps that fit the statistics, before anything is timed
WARM = 4  # more steps before that


class Clocked(Telemetry):
    """Telemetry that knows the host's time in its own calls."""

    spent = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As `Telemetry.phase`."""
        began = time.perf_counter()
        inner = super().phase(name)
        inner.__enter__()
        self.spent += time.perf_counter() - began
        try:
            yield
        finally:
            began = time.perf_counter()
            inner.__exit__(None, None, None)
            self.spent += time.perf_counter() - began

    def step(self, *arguments: Any, **named: Any) -> None:
        """As `Telemetry.step`."""
        began = time.perf_counter()
        super().step(*arguments, **named)
        self.spent += time.perf_counter() - began


def settled(config: RunConfig, steps: int) -> RunConfig:
    """The run's first stage with nothing in it but steps, so many of them."""
    stage = replace(
        config.stages[0], steps=steps, phi_s_steps=SETTLED, freeze_trunk_steps=0, warmup_steps=0
    )
    return replace(config, stages=(stage,), eval=replace(config.eval, points=0))


def profile(config: RunConfig, pairs: int) -> dict[str, Any]:
    """Time ``pairs`` steps with telemetry and as many without, by turns.

    Returns:
        ``ms`` and ``share`` of each phase, ``between`` and ``overhead``, as [low, median, high]
        over the rows; ``step_ms`` with telemetry; ``telemetry``: ``on_over_off`` as [low, median,
        high] over pairs, and ``own_share``, the host's time in its calls over that of a step.
    """
    interval = min(config.log.interval, pairs)
    config = settled(config, SETTLED + WARM + 2 * pairs)
    trainer = Trainer(config, choose_device(config.device))
    device = trainer.device.type
    batches = iter(
        make_loader(
            trainer.stream,
            0,
            config.total_steps * config.optimiser.accumulate,
            workers=config.data.workers,
            device=device,
        )
    )
    if trainer.ahead:
        batches = Ahead(
            batches, trainer._counted_targets, lambda n: trainer.telemetry.phase(n), trainer.device
        )

    def step(telemetry: Telemetry) -> float:
        trainer.telemetry = telemetry
        finish(device)
        began = time.perf_counter()
        trainer._one_step(batches)
        finish(device)
        trainer.step += 1
        return time.perf_counter() - began

    seconds: dict[bool, list[float]] = {True: [], False: []}
    common = (config.total_steps, list(config.teachers))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        off = Telemetry(folder, *common, quiet=True, tensorboard=False, enabled=False)
        on = Clocked(
            *(folder, *common),
            interval=config.total_steps + 1,  # rows are asked for below
            tensorboard=config.log.tensorboard,
            quiet=not config.log.progress,
            peak_flops=trainer._peak(),
            meter=GpuMeter(trainer.device),
        )
        for _ in range(SETTLED + WARM):
            step(off)
        with on:
            on.spent = 0.0
            for pair in range(pairs):
                for with_telemetry in (True, False) if pair % 2 else (False, True):
                    if with_telemetry:
                        took = step(on)
                        if (pair + 1) % interval == 0:
                            began = time.perf_counter()
                            on.flush()
                            flushed = time.perf_counter() - began
                            on.spent += flushed
                            took += flushed
                    else:
                        with on.phase(EVALUATION):  # no interval's time
                            took = step(off)
                    seconds[with_telemetry].append(took)
            spent = on.spent
        rows = [row for row in read_metrics(Path(folder) / "metrics.jsonl") if "phases" in row]
    shares = {name: [row["phases"].get(name, 0.0) for row in rows] for name in PHASES}
    shares["between"] = [max(0.0, 1 - sum(row["phases"].values())) for row in rows]
    shares["overhead"] = [row["overhead"] for row in rows]
    length = [1000 * row["seconds"] / row["steps"] for row in rows]
    ratios = [on / off for on, off in zip(seconds[True], seconds[False], strict=True)]
    last = rows[-1]
    return {
        "recipe": config.recipe,
        "device": device,
        "threads": torch.get_num_threads(),
        "steps": pairs,
        "step_ms": median_interval(length),
        "share": {name: _interval(values) for name, values in shares.items()},
        "ms": {
            name: _interval([s * ms for s, ms in zip(values, length, strict=True)])
            for name, values in shares.items()
        },
        "telemetry": {
            "on_over_off": median_interval(ratios),
            "own_share": spent / sum(seconds[True]),
        },
        **{key: last[key] for key in ("tflops", "mfu", "peak_tflops", "gpu") if key in last},
    }


def _interval(values: Sequence[float]) -> list[float]:
    """As `median_interval`, which wants values above 0."""
    return median_interval([max(value, 1e-9) for value in values])


def table(found: dict[str, Any]) -> str:
    """For the terminal."""
    low, middle, high = found["step_ms"]
    lines = [
        f"{found['recipe']} on {found['device']}, {found['threads']} threads: a step takes "
        f"{middle:.1f} ms ({low:.1f} to {high:.1f}), {found['steps']} steps",
        f"{'':12}{'ms':>9}{'share':>9}",
    ]
    for name in (*PHASES, "between", "overhead"):
        low, middle, high = found["share"][name]
        lines.append(
            f"{name:12}{found['ms'][name][1]:>9.2f}{middle:>9.1%}  ({low:.1%} to {high:.1%})"
        )
    lines[-1] += f", goal at most {OVERHEAD_GOAL:.0%}: all but {', '.join(WORK)}"
    low, middle, high = found["telemetry"]["on_over_off"]
    lines.append(
        f"telemetry on / off: {middle:.4f} ({low:.4f} to {high:.4f}), goal within "
        f"{TELEMETRY_GOAL:.0%}; {found['telemetry']['own_share']:.2%} of a step is in its calls"
    )
    if "mfu" in found:
        rates = "  ".join(f"{part} {rate:.4g}" for part, rate in found["tflops"].items())
        lines.append(
            f"TFLOP/s: {rates}; {found['mfu']:.0%} of the measured peak of "
            f"{found['peak_tflops']:.4g}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the profile; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps (default 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.steps < 1:
        parser.error(f"--steps must be at least 1, got {chosen.steps}")
    try:
        found = profile(parse_arguments(rest), chosen.steps)
    except UserError as error:
        parser.error(str(error))
    print(table(found))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0
