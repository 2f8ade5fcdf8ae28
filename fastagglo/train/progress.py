"""What a run shows on the terminal, or writes into a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastagglo.errors import require

_REDRAW_SECONDS = 0.25


def make_display(total: int, start: int, teachers: Sequence[str], quiet: bool) -> Display:
    """The display for this process's standard output.

    Args:
        total: steps of the whole run.
        start: the first step to come.
        teachers: in the order in which their losses are shown.
        quiet: show nothing.
    """
    if quiet:
        return Display()
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return _Live(total, start, teachers)
    return _Plain(total, start, teachers)


class Display:
    """Shows nothing; the others say more. Rows are those of `fastagglo.train.telemetry`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def advance(self, done: int) -> None: ...

    def train(self, row: Mapping[str, Any]) -> None: ...

    def event(self, row: Mapping[str, Any]) -> None: ...


class _Plain(Display):
    """One line an interval, without control codes, for logs and pipes."""

    def __init__(self, total: int, start: int, teachers: Sequence[str]) -> None:
        self.total, self.first, self.teachers = total, start, list(teachers)
        self.began = time.perf_counter()

    def start(self) -> None:
        self.began = time.perf_counter()

    def train(self, row: Mapping[str, Any]) -> None:
        done = row["step"] + 1
        parts = [
            f"step {done}/{self.total}",
            self.losses(row),
            self.speed(row),
            self.shares(row),
            self.gpu(row),
            f"{self.left(done)} left",
        ]
        self.say(" | ".join(part for part in parts if part))

    def event(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "held_out":  # dozens of rows at a time: they are for the report
            return
        fields = (f"{k} {v}" for k, v in row.items() if k not in ("kind", "step", "time"))
        self.say(f"step {row['step']}: {row['kind'].replace('_', ' ')}: {', '.join(fields)}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    # The parts of a line.

    def losses(self, row: Mapping[str, Any]) -> str:
        known = [name for name in self.teachers if name in row["loss"]]
        names = known + [name for name in row["loss"] if name not in known]
        return "loss " + "  ".join(f"{name} {row['loss'][name]:.4g}" for name in names)

    def speed(self, row: Mapping[str, Any]) -> str:
        images, tokens = row["images_per_second"], row["tokens_per_second"]
        parts = [f"{images:.1f} images/s", f"{tokens:,.0f} tokens/s"]
        if rates := row.get("tflops"):
            parts.append(f"{sum(rates.values()):.3g} TFLOP/s")
        if "mfu" in row:
            parts.append(f"{row['mfu']:.0%} MFU")
        return "  ".join(parts)

    def gpu(self, row: Mapping[str, Any]) -> str:
        """What NVML says, or nothing."""
        found = row.get("gpu") or {}
        forms = {
            "utilisation": "GPU {:.0%} busy",
            "power_w": "{:.0f} W",
            "joules_per_image": "{:.3g} J/image",
            "sm_clock_mhz": "{:.0f} MHz",
        }
        parts = [form.format(found[key]) for key, form in forms.items() if key in found]
        if found.get("throttled"):
            parts.append(f"throttled: {', '.join(found['throttled'])}")
        return "  ".join(parts)

    def shares(self, row: Mapping[str, Any]) -> str:
        shares = {**row["phases"], "overhead": row["overhead"]}
        if idle := row.get("extra", {}).get("expected_idle_share"):
            shares["uneven ranks"] = idle
        return "  ".join(f"{name} {share:.0%}" for name, share in shares.items())

    def left(self, done: int) -> str:
        """Time to the end at the pace since the start, as h:mm:ss."""
        if done == self.first:
            return "-:--:--"
        pace = (time.perf_counter() - self.began) / (done - self.first)
        minutes, seconds = divmod(round(pace * (self.total - done)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _Live(_Plain):
    """A few lines at the foot of the terminal that follow the run."""

    def __init__(self, total: int, start: int, teachers: Sequence[str]) -> None:
        super().__init__(total, start, teachers)
        self._rich = {
            name: require(f"rich.{name}", extra="train", purpose="the progress display")
            for name in ("console", "live", "progress_bar", "table", "text")
        }
        self._done, self._drawn = start, 0.0
        self._row: Mapping[str, Any] | None = None
        # Redrawn from `advance`, never from a thread: it would take turns with the step.
        self._live = self._rich["live"].Live(auto_refresh=False)

    def start(self) -> None:
        super().start()
        self._live.start()

    def stop(self) -> None:
        self._draw()
        self._live.stop()

    def advance(self, done: int) -> None:
        self._done = done
        if time.perf_counter() - self._drawn > _REDRAW_SECONDS:
            self._draw()

    def train(self, row: Mapping[str, Any]) -> None:
        self._row = row

    def say(self, text: str) -> None:
        self._live.console.print(self._rich["text"].Text(text))

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        text = self._rich["text"].Text
        bar = self._rich["table"].Table.grid(padding=(0, 1))
        bar.add_row(
            text(f"step {self._done}/{self.total}", style="bold"),
            self._rich["progress_bar"].ProgressBar(
                total=self.total, completed=self._done, width=40
            ),
            text(f"{self._done / self.total:.0%}"),
            text(f"{self.left(self._done)} left", style="dim"),
        )
        lines = [bar]
        if self._row is not None:
            lines.append(text(f"{self.losses(self._row)}"))
            lines.append(text(f"{self.speed(self._row)} | {self.shares(self._row)}", style="dim"))
            if gpu := self.gpu(self._row):
                lines.append(text(gpu, style="dim"))
        self._live.update(self._rich["console"].Group(*lines), refresh=True)
