"""What a run says while it runs: a progress display, ``metrics.jsonl`` and TensorBoard.

Nothing here waits for the device between two intervals: losses stay where they are, and on CUDA
phases are timed with events that are read when the interval ends.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo.errors import UserError, require
from fastagglo.eval.report import json_values, read_metrics
from fastagglo.train.gpu_meter import GpuMeter
from fastagglo.train.progress import make_display

PHASES = ("data", "teachers", "student", "optimiser")
"""The parts of a step, in the order in which they are shown."""

WORK = ("teachers", "student", "optimiser")
"""The phases that a step is for; all else is overhead."""

# The work between steps: its time is no part of the throughput.
EVALUATION = "evaluation"


class Telemetry:
    """Collects what steps report and writes averages every ``interval`` steps.

    Use it as a context manager; leaving it writes what the last, incomplete interval has, also
    after an exception. Steps count from 0, as in `Trainer`.

    A row of ``metrics.jsonl`` is strict JSON (what is not finite is ``null``)::

        {"kind": "train", "step": 19, "steps": 10, "time": 1764000000.0, "seconds": 3.1,
         "loss": {"clip": 0.7}, "images_per_second": 77.4, "tokens_per_second": 6100.0,
         "phases": {"data": 0.02, ...}, "overhead": 0.03, "data_wait_ms": 6.2,
         "tflops": {"student": 0.04, "teachers": 0.01}, "mfu": 0.45, "peak_tflops": 0.11,
         "lr": 0.001, "grad_norm": 0.4, "skipped": {"corrupt": 1}, "memory_mb": 2100.0,
         "gpu": {"utilisation": 0.98, "power_w": 610.0, "joules_per_image": 0.9, ...}}

    ``step`` is the last step of the interval and ``steps`` their number; ``time`` is the Unix time
    and ``seconds`` the interval's length, without evaluations; ``phases`` are shares of that
    length, in [0, 1]; ``overhead`` is the share outside teachers, student and optimiser, and
    ``data_wait_ms`` the mean wait for data of a step; ``memory_mb`` is the peak of the resident
    memory so far (on CUDA, ``cuda_memory_mb`` is the allocator's). Other kinds of rows come from
    `event`.

    ``tflops`` are TFLOP/s of useful work (`fastagglo.train.work`) by part, of this process's
    device, and ``mfu`` is their sum over ``peak_tflops``, where that is known: the rate of a
    product of square matrices, measured at the start, or the setting ``log.peak_tflops``. What
    runs in a faster type than the one the peak was measured in counts as it is. ``gpu`` comes from
    NVML (`fastagglo.train.gpu_meter.GpuMeter.read`) and is of this process's GPU.

    Args:
        run_dir: the run's folder, which exists.
        total_steps: steps of the whole run.
        teachers: their names, in the order in which losses are shown.
        quiet: print nothing.
        tensorboard: write TensorBoard events to ``run_dir/tensorboard``.
        interval: steps between rows.
        start_step: the first step to come; more than 0 when a run is resumed. Rows of this step
            and later ones, which a killed run may have left, are dropped: they are made again.
        enabled: False on the ranks that write and print nothing.
        ranks: processes that share the images of a step.
        peak_flops: FLOP/s of the device that ``mfu`` is a share of, or None.
        meter: of the GPU, or None.

    Raises:
        UserError: a file cannot be written (the message names it), a package is missing, or
            ``metrics.jsonl`` of the run to resume is damaged.
        ValueError: ``interval`` or ``total_steps`` below 1, or ``start_step`` below 0.
    """

    def __init__(
        self,
        run_dir: Path | str,
        total_steps: int,
        teachers: Sequence[str],
        *,
        quiet: bool = False,
        tensorboard: bool = True,
        interval: int = 10,
        start_step: int = 0,
        enabled: bool = True,
        ranks: int = 1,
        peak_flops: float | None = None,
        meter: GpuMeter | None = None,
    ) -> None:
        for name, value, least in (
            ("total_steps", total_steps, 1),
            ("interval", interval, 1),
            ("start_step", start_step, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.run_dir, self.path = Path(run_dir), Path(run_dir) / "metrics.jsonl"
        self.total_steps, self.interval, self.start_step = total_steps, interval, start_step
        self.enabled = enabled
        self.ranks, self.peak_flops, self._meter = ranks, peak_flops, meter
        self._step = start_step - 1  # the last step that was reported
        self._file: Any = None
        self._board = _Board(self.run_dir, start_step) if enabled and tensorboard else None
        self._display = make_display(total_steps, start_step, teachers, quiet or not enabled)
        self._open: list[_Span] = []  # phases that are under way, the innermost last
        self._spans: list[_Span] = []  # phases of this interval that are over
        self._clear()

    def __enter__(self) -> Telemetry:
        if self.enabled:
            self.truncate_after(self.start_step - 1)
            with _writing(self.path):
                # Unbuffered: a row is on its way to the disk when its write returns.
                self._file = open(self.path, "ab", buffering=0)
            if self._board is not None:
                self._board.open()
        self._display.start()
        self._clear()
        if self.enabled and self._meter is not None:
            self._meter.restart()
            if self._meter.problem:
                self.event("gpu_meter", problem=self._meter.problem)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.flush()
        except Exception:
            # After an error the device or the disk may be unusable: report the first problem.
            if error is None:
                raise
        finally:
            self._display.stop()
            if self._file is not None:
                self._file.close()
            if self._meter is not None:
                self._meter.close()
            if self._board is not None:
                self._board.close(quietly=error is not None)

    # What the training loop calls.

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step: "data", "teachers", "student" or "optimiser".

        "evaluation" is work between steps; its time counts for no interval's throughput. On CUDA
        a phase is timed on the current stream, so "data" is the time that the device waits for
        data, and "teachers" that for which the student waits where they have a stream of their
        own. Phases may be nested: time counts for the innermost.
        """
        if not self.enabled:
            yield
            return
        now = _mark()
        if self._open:
            self._open[-1].marks.append(now)
        self._open.append(_Span(name, now))
        try:
            if name == EVALUATION and self._meter is not None:
                with self._meter.paused():
                    yield
            else:
                yield
        finally:
            now = _mark()
            span = self._open.pop()
            span.marks.append(now)
            self._spans.append(span)
            if self._open:
                self._open[-1].marks.append(now)

    def step(
        self,
        step: int,
        losses: Mapping[str, Tensor | float],
        *,
        images: int,
        tokens: int,
        lr: float,
        grad_norm: Tensor | float | None = None,
        skipped: Mapping[str, int] | None = None,
        extra: Mapping[str, Tensor | float] | None = None,
        flops: Mapping[str, int] | None = None,
    ) -> None:
        """Report a finished step.

        Args:
            step: its number, from 0.
            losses: 0-d, by teacher (and other terms); tensors stay on their device until the
                interval ends. A teacher may be absent from a step.
            images, tokens: of all ranks.
            lr: learning rate.
            grad_norm: 0-d, before clipping.
            skipped: images left out by reason, since the start of the run.
            extra: other 0-d values, averaged into the row's ``extra``.
            flops: that this process's device has computed, by part: "student", "teachers".
        """
        self._step = step
        if not self.enabled:
            return
        self._steps += 1
        self._images += images
        self._tokens += tokens
        self._lr, self._skipped = lr, dict(skipped or {})
        for part, count in (flops or {}).items():
            self._flops[part] = self._flops.get(part, 0) + count
        self._keep("loss", losses)
        self._keep("extra", extra or {})
        if grad_norm is not None:
            self._keep("grad_norm", {"": grad_norm})
        if (step + 1) % self.interval == 0 or step + 1 == self.total_steps:
            self.flush()
        self._display.advance(step + 1)

    def event(self, kind: str, /, **fields: object) -> None:
        """Write a row of its own at once: held-out figures, a warning, a stage change.

        Args:
            kind: what happened, the row's ``kind``.
            fields: what else the row says; a ``step`` that is not given is the last one. The key
                ``kind`` is taken, so a field of this name (a held-out row's) is written as
                ``data``.
        """
        if not self.enabled:
            return
        if "kind" in fields:
            fields = {"data": fields.pop("kind"), **fields}
        row = {"kind": kind, "step": max(self._step, 0), "time": time.time(), **fields}
        self._write(row)
        if self._board is not None:
            self._board.event(row)
        self._display.event(row)

    def flush(self) -> None:
        """Write the row of the interval so far, if it has any step, and begin another."""
        if not self.enabled or self._steps == 0:
            return
        values = self._averages()
        busy = self._read_spans()
        seconds = max(time.perf_counter() - self._began - busy.pop(EVALUATION, 0.0), 1e-9)
        shares = {name: busy.pop(name) for name in PHASES if name in busy} | busy
        # Marks on the device and the host's clock may differ by a little: shares never exceed 1.
        whole = max(seconds, sum(shares.values()))
        row: dict[str, Any] = {
            "kind": "train",
            "step": self._step,
            "steps": self._steps,
            "time": time.time(),
            "seconds": seconds,
            "loss": values.get("loss", {}),
            "images_per_second": self._images / seconds,
            "tokens_per_second": self._tokens / seconds,
            "phases": {name: share / whole for name, share in shares.items()},
            "overhead": 1 - sum(shares.get(name, 0.0) for name in WORK) / whole,
            "data_wait_ms": 1000 * shares.get("data", 0.0) / self._steps,
            **self._rates(seconds),
            "lr": self._lr,
            "grad_norm": values.get("grad_norm", {}).get(""),
            "skipped": self._skipped,
            **_memory(),
        }
        if "extra" in values:
            row["extra"] = values["extra"]
        if self._meter is not None and (found := self._meter.read(self._images / self.ranks)):
            row["gpu"] = found
        self._clear()
        self._write(row)
        if self._board is not None:
            self._board.train(row)
        self._display.train(row)

    def truncate_after(self, step: int) -> None:
        """Drop the rows of ``metrics.jsonl`` that belong to steps after ``step``.

        The file is rewritten beside itself and put in its place, so that it is never half there. A
        last line that a kill cut short is dropped as well.
        """
        if not self.path.exists():
            return
        rows = [row for row in read_metrics(self.path) if row.get("step", step) <= step]
        partial = self.path.with_suffix(".partial")
        with _writing(self.path, partial):
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(_line(row) for row in rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)

    # The interval.

    def _clear(self) -> None:
        self._steps = self._images = self._tokens = 0
        self._flops: dict[str, int] = {}
        self._lr: float = 0.0
        self._skipped: dict[str, int] = {}
        self._values: dict[tuple[str, str], list[Tensor | float]] = {}
        self._spans = []
        self._began = time.perf_counter()

    def _keep(self, group: str, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach()
            self._values.setdefault((group, name), []).append(value)

    def _averages(self) -> dict[str, dict[str, float]]:
        """Averages over the interval, fetched from the device in one transfer."""
        tensors: dict[torch.device, list[Tensor]] = {}
        for values in self._values.values():
            for value in values:
                if isinstance(value, Tensor):
                    tensors.setdefault(value.device, []).append(value.reshape(()).float())
        fetched = {d: iter(torch.stack(found).tolist()) for d, found in tensors.items()}
        averages: dict[str, dict[str, float]] = {}
        for (group, name), values in self._values.items():
            numbers = [next(fetched[v.device]) if isinstance(v, Tensor) else v for v in values]
            averages.setdefault(group, {})[name] = sum(numbers) / len(numbers)
        return averages

    def _read_spans(self) -> dict[str, float]:
        """Seconds in each phase since the interval began."""
        if self._spans and not isinstance(last := self._spans[-1].marks[-1], float):
            last.synchronize()
        busy: dict[str, float] = {}
        for span in self._spans:
            busy[span.name] = busy.get(span.name, 0.0) + span.seconds()
        return busy

    def _rates(self, seconds: float) -> dict[str, Any]:
        if not self._flops:
            return {}
        rates = {part: count / seconds / 1e12 for part, count in self._flops.items()}
        if self.peak_flops is None:
            return {"tflops": rates}
        peak = self.peak_flops / 1e12
        return {"tflops": rates, "mfu": sum(rates.values()) / peak, "peak_tflops": peak}

    def _write(self, row: Mapping[str, object]) -> None:
        if self._file is None:
            raise RuntimeError("Telemetry must be entered (with Telemetry(...) as t) before use")
        with _writing(self.path):
            left = memoryview(_line(row).encode())
            while left:
                left = left[self._file.write(left) :]


# Time. A mark is a moment on the host's clock, or an event on the device's stream.


def _mark() -> float | torch.cuda.Event:
    # Initialised only where this process has put something on a GPU.
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _Span:
    """The time of one phase: one or more stretches between marks."""

    def __init__(self, name: str, start: float | torch.cuda.Event) -> None:
        self.name = name
        self.marks = [start]

    def seconds(self) -> float:
        return sum(map(_seconds, self.marks[::2], self.marks[1::2]))


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float):
        # A phase in which CUDA came up has its end on another clock, and nothing to tell.
        return end - start if isinstance(end, float) else 0.0
    return start.elapsed_time(end) / 1000


def _memory() -> dict[str, float]:
    # In kB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    memory = {"memory_mb": peak / 2**20}
    if torch.cuda.is_initialized():
        memory["cuda_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return memory


# Files.


@contextmanager
def _writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise UserError(
            f"metrics {path}: cannot be written ({error.strerror or error}); make room or allow "
            f"it, then go on with --resume {path.parent}"
        ) from error


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(json_values(row), allow_nan=False, ensure_ascii=False) + "\n"


class _Board:
    """TensorBoard events with the numbers of the rows."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        tensorboard = require("torch.utils.tensorboard", extra="train", purpose="log.tensorboard")
        self._make = tensorboard.SummaryWriter
        self._folder, self._start = run_dir / "tensorboard", start_step
        self._writer: Any = None

    def open(self) -> None:
        with _writing(self._folder):
            self._writer = self._make(str(self._folder), purge_step=self._start)

    def train(self, row: Mapping[str, Any]) -> None:
        named = {
            "throughput/images_per_second": row["images_per_second"],
            "throughput/tokens_per_second": row["tokens_per_second"],
            "optimiser/lr": row["lr"],
            "optimiser/grad_norm": row["grad_norm"],
            "memory/peak_mb": row["memory_mb"],
            "throughput/mfu": row.get("mfu"),
            "time/overhead": row["overhead"],
        }
        groups = {"loss": "loss", "time": "phases", "extra": "extra", "tflops": "tflops"}
        for group, key in (groups | {"gpu": "gpu"}).items():
            named |= {f"{group}/{name}": value for name, value in row.get(key, {}).items()}
        self._add(named, row["step"])

    def event(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "held_out":
            where = "/".join(str(row.get(key)) for key in ("data", "teacher", "resolution"))
            figures = ("explained", "mean_predictor", "cosine")
            self._add({f"held_out_{f}/{where}": row.get(f) for f in figures}, row["step"])

    def _add(self, named: Mapping[str, Any], step: int) -> None:
        with _writing(self._folder):
            for name, value in named.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self, quietly: bool) -> None:
        if self._writer is None:
            return
        try:
            with _writing(self._folder):
                self._writer.close()
        except UserError:
            if not quietly:
                raise
