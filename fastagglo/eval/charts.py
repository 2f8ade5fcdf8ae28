"""Line charts as inline SVG: the page's own colours in light and dark, no script, a few kB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_HEIGHT = 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 34
_POINTS = 400  # more than a line of this width can show
SMOOTHED_FROM = 20
"""Lines of at least this many points get a moving average."""
COLOURS = 6
"""Colours that the page defines (``--c0`` to ``--c5``); further series use them again, dashed."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: what the line shows.
        x, y: of the same length, x rising; a y that is not finite leaves a gap.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    series: Sequence[Series],
    label: str,
    *,
    marks: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    width: int = 980,
) -> str:
    """Lines over training steps: raw values faint, their moving average on top.

    The vertical axis is logarithmic where values are positive and span more than a decade.

    Args:
        series: the lines.
        label: what the chart shows, for screen readers.
        marks: (x, name) of vertical lines, e.g. stage changes.
        from_zero: let the vertical axis start at 0; it is linear then.
        width: in CSS pixels; the chart scales with its place, text included.

    Returns:
        An ``<svg>`` element, or "" when no series has a finite value.
    """
    values = [y for line in series for y in line.y if math.isfinite(y)]
    if not values:
        return ""
    log = not from_zero and min(values) > 0 and max(values) > 10 * min(values)
    xs = [x for line in series for x in line.x]
    x_ticks = _linear_ticks(min(xs), max(xs))
    low = 0.0 if from_zero else min(values)
    y_ticks = _log_ticks(low, max(values)) if log else _linear_ticks(low, max(values))
    scale = math.log10 if log else float
    bottom, top = scale(min(low, y_ticks[0])), scale(max(*values, y_ticks[-1]))
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = (scale(y) - bottom) / ((top - bottom) or 1)
        return (
            round(_LEFT + across * (width - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    floor = _HEIGHT - _BOTTOM
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {_HEIGHT}" role="img">',
        f"<title>{escape(label)}</title>",
    ]
    for tick in y_ticks:
        y = place(left, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(_LEFT - 8, y + 4, "end", _short(tick)))
    for tick in x_ticks:
        if left <= tick <= right:
            x = place(tick, y_ticks[-1])[0]
            parts.append(_text(x, floor + 18, "middle", _short(tick)))
    for at, name in marks:
        if left < at < right:
            x = place(at, y_ticks[-1])[0]
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{floor}"/>')
            parts.append(_text(x + 4, _TOP + 10, "start", name))
    for number, line in enumerate(series):
        x, y = _thin(line.x, line.y)
        smooth = _moving_average(y)
        dashed = " dashed" if number >= COLOURS else ""
        style = f'style="stroke: var(--c{number % COLOURS})"'
        if smooth != y:
            parts.append(f'<path class="raw" {style} d="{_path(x, y, place)}"/>')
        parts.append(
            f'<path class="line{dashed}" {style} d="{_path(x, smooth, place)}">'
            f"<title>{escape(line.name)}</title></path>"
        )
    parts.append("</svg>")
    return "".join(parts)


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(x: Sequence[float], y: Sequence[float], place) -> str:
    steps, pen_down = [], False
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            px, py = place(a, b)
            # A point alone between gaps would be invisible: a line of no length has round ends.
            steps.append(f"{'L' if pen_down else f'M{px} {py}L'}{px} {py}")
        pen_down = math.isfinite(b)
    return "".join(steps)


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `_POINTS` points: the means of equal stretches."""
    size = math.ceil(len(x) / _POINTS)
    if size <= 1:
        return list(x), list(y)
    cuts = range(0, len(x), size)
    return [_mean(x[i : i + size]) for i in cuts], [_mean(y[i : i + size]) for i in cuts]


def _moving_average(y: list[float]) -> list[float]:
    """Centred, over a tenth of the points."""
    reach = len(y) // SMOOTHED_FROM
    return [
        _mean(y[max(0, i - reach) : i + reach + 1]) if math.isfinite(y[i]) else y[i]
        for i in range(len(y))
    ]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five of them, the outer ones at or beyond the limits."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1-2-5 numbers (powers of ten over more than three decades) around the limits."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    below = max((t for t in ticks if t <= low), default=ticks[0])
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]


def _short(value: float) -> str:
    """An axis label: 1200 as 1.2k."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}".replace("-", "−")
