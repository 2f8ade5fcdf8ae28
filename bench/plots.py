"""The pictures of a result file: ratios to the peers, and the roofline, on light and on dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.roofline import default_dtype

BARS = 12  # of a suite
CASES = 4
LABEL = 62  # characters of a case
PEER = 44  # of a peer

# Okabe and Ito's colours, which colour-blind readers tell apart; a shape each besides.
STYLES = {
    "attention": ("#0072B2", "o"),
    "loss": ("#D55E00", "s"),
    "merge": ("#009E73", "^"),
    "heads": ("#CC79A7", "D"),
    "student": ("#56B4E9", "v"),
    "step": ("#E69F00", "P"),
    "data": ("#F0E442", "X"),
    "teachers": ("#009E73", "<"),
    "scaling": ("#999999", ">"),
}


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; those of the bars say who is ahead."""

    paper: str
    ink: str
    faint: str
    grid: str
    ahead: str
    behind: str
    even: str


THEMES = {
    "light": Theme("#FFFFFF", "#1F2328", "#59636E", "#E3E6EA", "#0072B2", "#D55E00", "#A0A7AF"),
    "dark": Theme("#0D1117", "#E6EDF3", "#9198A1", "#2A313A", "#56B4E9", "#E69F00", "#6E7681"),
}


@dataclass(frozen=True)
class Bar:
    """A peer's time, and memory, over ours: [low, middle, high] and a quotient."""

    peer: str
    time: tuple[float, float, float]
    memory: float | None

    def colour(self, theme: Theme) -> str:
        low, _, high = self.time
        return theme.ahead if low > 1 else theme.behind if high < 1 else theme.even


def draw(results: Mapping[str, Any], folder: Path, device: str) -> list[Path]:
    """The pictures that the results have something for.

    Args:
        results: of ``bench.report.condense``.
        folder: gets ``<device>-ratios-light.svg`` and the like.
        device: for the names of the files.
    """
    drawn = []
    for name, theme in THEMES.items():
        with _style(theme):
            for kind, figure in (
                ("ratios", ratios(results, theme)),
                ("roofline", roofline(results, theme)),
            ):
                if figure is not None:
                    drawn.append(folder / f"{device}-{kind}-{name}.svg")
                    figure.savefig(drawn[-1], metadata={"Date": None})
    return sorted(drawn)


# ---- Ratios ----

ROW, HEAD, TITLE, FOOT = 0.215, 0.30, 0.42, 0.42  # inches: a bar, a case, a suite, its axis
WIDTH, NAMES, MEMORY = 7.3, 3.3, 0.75  # of a panel, its peers' names, and the column of memory
TOP, GAP = 1.0, 0.25


def headline(suite: Mapping[str, Any]) -> list[tuple[str, list[Bar]]]:
    """The cases to show: a label, and a bar for each peer.

    Those with goals come first. Where a label has several passes, only the one with the backward
    counts; of a curve only its last point.
    """
    duels = [duel for duel in suite["duels"] if len(duel["rows"]) > 1]
    facts = [suite["cases"][duel["case"]] for duel in duels]
    both = {of["label"] for of in facts if of["pass"] == "forward+backward"}
    last: dict[str, float] = {}
    for of in facts:
        if "series" in of:
            last[of["series"]] = max(of["x"], last.get(of["series"], of["x"]))

    def counts(of: Mapping[str, Any]) -> bool:
        if "series" in of:
            return of["x"] == last[of["series"]]
        return of["pass"] != "forward" or of["label"] not in both

    chosen = [duel for duel, of in zip(duels, facts, strict=True) if counts(of)]
    chosen.sort(key=lambda duel: not any("goal" in row for row in duel["rows"]))
    shown: list[tuple[str, list[Bar]]] = []
    for duel in chosen[:CASES]:
        bars = [_bar(row, suite) for row in duel["rows"][1:]]
        if shown and sum(len(more) for _, more in shown) + len(bars) > BARS:
            break
        shown.append((_label(suite["cases"][duel["case"]]), bars[:BARS]))
    return shown


def _bar(row: Mapping[str, Any], suite: Mapping[str, Any]) -> Bar:
    low, middle, high = row["ours_over_theirs"]["time"]
    memory = row["ours_over_theirs"].get("memory")
    words = _cut(suite["peers"][row["peer"]], PEER)
    return Bar(words, (1 / high, 1 / middle, 1 / low), 1 / memory if memory else None)


def _label(facts: Mapping[str, Any]) -> str:
    label, what = facts["label"].replace("->", "→"), facts["pass"].replace("+", " + ")
    return f"{_cut(label, LABEL - len(what))}, {what}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1].rstrip(" ,") + "…"


def ratios(results: Mapping[str, Any], theme: Theme) -> Any:
    """Bars of theirs over ours from a line at 1, a panel for each suite; None without peers."""
    from matplotlib.figure import Figure

    panels = {name: headline(suite) for name, suite in results["suites"].items()}
    panels = {name: cases for name, cases in panels.items() if cases}
    if not panels:
        return None
    columns = _columns({name: _height(cases) for name, cases in panels.items()})
    tall = TOP + max(sum(_height(panels[name]) for name in column) for column in columns) + 0.1
    figure = Figure(figsize=(WIDTH * len(columns) + GAP, tall))
    every = [bar for cases in panels.values() for _, bars in cases for bar in bars]
    limits = _limits(every)
    for number, column in enumerate(columns):
        y = tall - TOP
        for name in column:
            height = _height(panels[name])
            left = number * WIDTH + NAMES + GAP
            box = (left, y - height + FOOT, WIDTH - NAMES - MEMORY - GAP, height - FOOT - TITLE)
            sizes = (figure.get_figwidth(), tall, figure.get_figwidth(), tall)
            axis = figure.add_axes([a / b for a, b in zip(box, sizes, strict=True)])
            _panel(axis, name, panels[name], limits, theme)
            y -= height
    shown = sum(len(cases) for cases in panels.values())
    there = sum(len(suite["duels"]) for suite in results["suites"].values())
    _headings(figure, results, theme, f"{shown} of {there} cases shown, all in the result file.")
    return figure


def _height(cases: Sequence[tuple[str, list[Bar]]]) -> float:
    return TITLE + FOOT + sum(HEAD + ROW * len(bars) for _, bars in cases)


def _columns(heights: Mapping[str, float]) -> list[list[str]]:
    """One column or two, in order, as equally tall as can be."""
    names = list(heights)
    if len(names) == 1:
        return [names]
    cuts = range(1, len(names))
    total = sum(heights.values())
    best = min(cuts, key=lambda cut: abs(2 * sum(heights[n] for n in names[:cut]) - total))
    return [names[:best], names[best:]]


def _limits(bars: Sequence[Bar]) -> tuple[float, float]:
    low = min(0.8, *(bar.time[0] for bar in bars))
    high = max(2.0, *(bar.time[2] for bar in bars))
    return max(low / 1.15, 0.02), min(high * 1.9, 500.0)  # room for the figures beside the bars


def _panel(
    axis: Any,
    name: str,
    cases: Sequence[tuple[str, list[Bar]]],
    limits: tuple[float, float],
    theme: Theme,
) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    down = axis.get_yaxis_transform()  # x in shares of the axis, y in inches from its top
    height = sum(HEAD + ROW * len(bars) for _, bars in cases)
    left = -NAMES / (WIDTH - NAMES - MEMORY - GAP)
    right = 1 + (MEMORY - 0.08) / (WIDTH - NAMES - MEMORY - GAP)
    axis.set_xscale("log")
    axis.set_xlim(limits)
    axis.set_ylim(height, 0)
    axis.text(left, -0.16, name, transform=down, fontsize=12, weight="bold", va="center")
    axis.text(right, -0.16, "memory", transform=down, color=theme.faint, ha="right", va="center")
    y = 0.0
    for label, bars in cases:
        axis.text(
            left,
            y + HEAD * 0.6,
            label,
            transform=down,
            weight="bold",
            fontsize=8.5,
            va="center",
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1},  # over the grid
            zorder=5,
        )
        y += HEAD
        for bar in bars:
            centre = y + ROW / 2
            _draw_bar(axis, bar, centre, limits, theme)
            axis.text(
                -0.02, centre, bar.peer, transform=down, color=theme.ink, ha="right", va="center"
            )
            if bar.memory is not None:
                words = times(bar.memory)
                axis.text(
                    right, centre, words, transform=down, color=theme.faint, ha="right", va="center"
                )
            y += ROW
    axis.axvline(1, color=theme.ink, linewidth=1, zorder=3)
    steps = (1, 2, 5) if limits[1] / limits[0] < 100 else (1, 3)
    ticks = [base * 10.0**power for power in range(-2, 4) for base in steps]
    axis.set_xticks([tick for tick in ticks if limits[0] <= tick <= limits[1]])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axis.set_yticks([])
    axis.grid(axis="x", color=theme.grid, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, colors=theme.faint)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _draw_bar(axis: Any, bar: Bar, y: float, limits: tuple[float, float], theme: Theme) -> None:
    low, middle, high = (min(max(x, limits[0]), limits[1]) for x in bar.time)
    axis.barh(y, middle - 1, left=1, height=ROW * 0.66, color=bar.colour(theme), zorder=2)
    axis.plot([low, high], [y, y], color=theme.ink, linewidth=0.9, zorder=4)
    for end in (low, high):
        axis.plot([end, end], [y - ROW * 0.16, y + ROW * 0.16], color=theme.ink, linewidth=0.9)
    axis.annotate(
        times(bar.time[1]),
        (max(high, 1.0), y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=theme.ink,
    )


def times(x: float) -> str:
    """0.06x, 0.62x, 2.0x, 16x: about two digits."""
    return f"{x:.2f}×" if x < 0.995 else f"{x:.1f}×" if x < 9.95 else f"{x:.0f}×"


def _headings(figure: Any, results: Mapping[str, Any], theme: Theme, more: str) -> None:
    from matplotlib.patches import Patch

    height = figure.get_figheight()
    figure.text(
        GAP / figure.get_figwidth(),
        1 - 0.22 / height,
        f"Time of each peer over fastagglo's: {_where(results)}",
        fontsize=13,
        weight="bold",
        va="center",
    )
    figure.text(
        GAP / figure.get_figwidth(),
        1 - 0.50 / height,
        f"Right of 1× fastagglo is faster. Run by turns; whiskers: 95 % intervals; "
        f"memory: peak of theirs over ours. {more}",
        color=theme.faint,
        va="center",
    )
    words = {
        theme.ahead: "fastagglo is faster",
        theme.behind: "the peer is faster",
        theme.even: "no difference shown",
    }
    figure.legend(
        handles=[Patch(color=colour, label=text) for colour, text in words.items()],
        loc="center left",
        bbox_to_anchor=(GAP / figure.get_figwidth(), 1 - 0.78 / height),
        borderaxespad=0,
        borderpad=0,
        ncols=3,
        frameon=False,
    )


def _where(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    if machine["device"] == "CPU":
        count = machine["threads"]
        return f"{machine['cpu']}, {count} thread{'s' if count != 1 else ''}, float32"
    return f"{machine['device']}, bfloat16"


# ---- Roofline ----


def points(results: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """FLOP per byte and our FLOP/s of each case that counts both, by suite."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, suite in results["suites"].items():
        for duel in suite["duels"]:
            facts, first = suite["cases"][duel["case"]], duel["rows"][0]
            if facts.get("flops") and facts.get("bytes"):
                point = (facts["flops"] / facts["bytes"], facts["flops"] / first["ms"][1] * 1e3)
                found.setdefault(name, []).append(point)
    return found


def roofline(results: Mapping[str, Any], theme: Theme) -> Any:
    """Our FLOP/s over FLOP per byte under the measured roofs, and each case's share of its roof.

    None where no case counts its FLOP or its bytes.
    """
    from matplotlib.figure import Figure

    by_suite, shares = points(results), shares_of(results)
    if not shares:
        return None
    figure = Figure(figsize=(12.6, 5.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.87), w_pad=0.1)
    plane, strip = figure.subplots(1, 2, width_ratios=(1.75, 1))
    _plane(plane, results, by_suite, theme)
    _strip(strip, shares, theme)
    for axis in (plane, strip):
        axis.grid(color=theme.grid, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.012, 0.965, f"Roofline: {_where(results)}", fontsize=13, weight="bold", va="top")
    words = (
        "Roofs as measured in the same run: square products, and a plain copy, read and written."
    )
    figure.text(0.012, 0.905, words, color=theme.faint, va="top")
    return figure


def _plane(
    axis: Any,
    results: Mapping[str, Any],
    by_suite: Mapping[str, Sequence[tuple[float, float]]],
    theme: Theme,
) -> None:
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    copy = results["roofline"]["copy_gb_s"] * 1e9
    peaks = {k: v * 1e12 for k, v in results["roofline"]["matmul_tflops"].items()}
    usual = default_dtype("cpu" if results["machine"]["device"] == "CPU" else "cuda")
    ridge = peaks[usual] / copy
    at = [point for found in by_suite.values() for point in found] + [(ridge, peaks[usual])]
    left, right = min(x for x, _ in at) / 4, max(x for x, _ in at) * 6
    low = min(*(y for _, y in at), left * copy) / 2
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    axis.set_ylim(low, max(*peaks.values(), *(y for _, y in at)) * 3)
    x = np.geomspace(left, right, 100)
    roof = np.minimum(x * copy, peaks[usual])
    axis.plot(x, roof, color=theme.ink, linewidth=1.8)
    axis.fill_between(x, roof, low, color=theme.grid, alpha=0.35, linewidth=0)
    for kind, peak in peaks.items():
        if kind != usual:
            dashes = {"color": theme.faint, "linewidth": 1, "linestyle": "--"}
            axis.plot([peak / copy, right], [peak, peak], **dashes)
        axis.annotate(
            f"{kind} products: {_rate(peak)}",
            (right, peak),
            xytext=(-6, 5),
            textcoords="offset points",
            ha="right",
            color=theme.ink if kind == usual else theme.faint,
        )
    axis.annotate(
        f"copy: {copy / 1e9:.3g} GB/s",
        (left * 1.25, left * 1.25 * copy),
        xytext=(0, 9),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        color=theme.ink,
    )
    for name, found in by_suite.items():
        axis.plot(*zip(*found, strict=True), label=name, **_marker(name, theme))
    axis.set_xlabel("FLOP per byte, of what nobody can do without")
    axis.set_title("fastagglo's rate, cases that count both", loc="left", fontsize=9.5)
    axis.yaxis.set_major_locator(LogLocator(numticks=8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _rate(y)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
    if by_suite:
        axis.legend(loc="lower right", frameon=False)


def _strip(axis: Any, shares: Mapping[str, Sequence[float]], theme: Theme) -> None:
    from matplotlib.ticker import PercentFormatter

    for row, (name, found) in enumerate(shares.items()):
        axis.plot(found, [row] * len(found), **_marker(name, theme))
    axis.axvline(1, color=theme.ink, linewidth=1.2)
    axis.set_xlim(0, max(1.05, 1.05 * max(x for found in shares.values() for x in found)))
    axis.set_ylim(len(shares) - 0.5, -0.5)
    axis.set_yticks(range(len(shares)), list(shares))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("of the limit that binds: FLOP or bytes")
    axis.set_title("share of its roof, each case", loc="left", fontsize=9.5)


def _marker(name: str, theme: Theme) -> dict[str, Any]:
    colour, marker = STYLES.get(name, (theme.faint, "o"))
    return {
        "marker": marker,
        "color": colour,
        "markersize": 8,
        "linestyle": "none",
        "markeredgecolor": theme.ink,
        "markeredgewidth": 0.6,
        "alpha": 0.9,
    }


def shares_of(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Our share of the roof in each case that counts FLOP or bytes, by suite."""
    found = {
        name: [d["rows"][0]["of_roofline"] for d in suite["duels"] if "roof" in d]
        for name, suite in results["suites"].items()
    }
    return {name: shares for name, shares in found.items() if shares}


def _rate(flops: float) -> str:
    for size, unit in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")):
        if flops >= 0.9995 * size or unit == "MFLOP/s":
            return f"{flops / size:.3g} {unit}"
    raise AssertionError


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    """Text stays text, and the same results give the same bytes."""
    import matplotlib

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastagglo",
        "font.family": "sans-serif",
        "font.size": 9,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "legend.labelcolor": theme.ink,
    }
    with matplotlib.rc_context(style):
        yield
