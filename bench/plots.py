"""The picture of a result file: how many times faster, and leaner, we are than each peer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart; a shape each besides.
STYLES = {
    "per-resolution": ("#0072B2", "o"),
    "per-image": ("#56B4E9", "s"),
    "padded": ("#D55E00", "^"),
    "padded-batch": ("#E69F00", "v"),
    "flex": ("#009E73", "D"),
    "varlen": ("#CC79A7", "P"),
    "xformers": ("#000000", "X"),
    "matrix": ("#D55E00", "^"),
    "matrix-fp32": ("#E69F00", "v"),
    "eager": ("#0072B2", "o"),
    "twin": ("#56B4E9", "s"),
    "compile": ("#009E73", "D"),
    "kept": ("#CC79A7", "P"),
    "unshuffle": ("#009E73", "D"),
    "bicubic": ("#CC79A7", "P"),
    "product": ("#000000", "X"),
}
PANELS = (
    ("forward", "time", "Forward: time"),
    ("forward+backward", "time", "Forward + backward: time"),
    ("forward+backward", "memory", "Forward + backward: peak memory"),
)
PANELS_OF = {"merge": (PANELS[0], ("forward", "memory", "Forward: peak memory"), *PANELS[1:])}
ROWS = {
    "attention": "Rows: student heads×head_dim, batch (segments×rows).",
    "loss": "Rows: images×grid of prediction (->target)×channels.",
    "heads": "Rows: tokens×channels → hidden → teachers' channels.",
    "merge": "Rows: images×grid×channels → tokens of each image.",
}
LONGEST = 30  # characters of a batch that still stand beside its name

Ratios = dict[tuple[str, str], dict[str, dict[str, float]]]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One row per case, one mark per peer; right of the line at 1, we are ahead.

    Args:
        results: of ``bench.report.condense``.
        path: an SVG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios = ratios_of(results)
    names = list(dict.fromkeys(name for name, _ in ratios))
    passes = {direction for _, direction in ratios}
    all_panels = PANELS_OF.get(results["name"], PANELS)
    panels = [panel for panel in all_panels if panel[0] in passes] or all_panels
    style = {"svg.fonttype": "none", "svg.hashsalt": "fastagglo", "font.size": 9}
    with plt.rc_context(style):
        height = 2.1 + 0.3 * len(names)
        figure, axes = plt.subplots(
            1, len(panels), figsize=(13, height), sharey=True, squeeze=False, layout="constrained"
        )
        shown: dict[str, Any] = {}
        for axis, (direction, kind, title) in zip(axes[0], panels, strict=True):
            for peer, (colour, marker) in STYLES.items():
                points = [
                    (found[peer][kind], row)
                    for row, name in enumerate(names)
                    if peer in (found := ratios.get((name, direction), {}))
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    (shown[peer],) = axis.plot(
                        x, y, marker, color=colour, markersize=6, alpha=0.9, linestyle="none"
                    )
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("theirs / ours")
            _decorate(axis)
        axes[0][0].set_yticks(range(len(names)), names)
        axes[0][0].set_ylim(len(names) - 0.5, -0.5)
        figure.suptitle(_title(results), fontsize=10)
        figure.legend(
            list(shown.values()),
            [results["peers"][peer] for peer in shown],
            loc="outside lower center",
            ncols=min(5, max(1, len(shown))),
            frameon=False,
        )
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def ratios_of(results: Mapping[str, Any]) -> Ratios:
    """Theirs over ours, time and memory, by case and direction, then by peer.

    A duel's ratio, of rounds by turns, replaces the quotient of times taken apart.
    """
    found: Ratios = {}
    own = {row["case"]: row for row in results["rows"] if row["peer"] == "fastagglo"}
    for row in results["rows"]:
        if row["peer"] != "fastagglo" and (ours := own.get(row["case"])):
            found.setdefault(_key(results, row["case"]), {})[row["peer"]] = {
                "time": row["ms"][1] / ours["ms"][1],
                "memory": row["memory_mb"] / ours["memory_mb"],
            }
    for duel in results["duels"]:
        for row in duel["rows"][1:]:
            ratio = row["ours_over_theirs"]
            found.setdefault(_key(results, duel["case"]), {})[row["peer"]] = {
                "time": 1 / ratio["time"][1],
                "memory": 1 / ratio["memory"],
            }
    return found


def _key(results: Mapping[str, Any], case: str) -> tuple[str, str]:
    facts = results["cases"][case]
    if "label" in facts:
        return facts["label"].replace("->", "→"), facts["pass"]
    name = f"{facts['student']} {facts['heads']}×{facts['head_dim']}, {facts['mix']}"
    if len(facts["batch"]) <= LONGEST:
        name += f" ({facts['batch'].replace('x', '×')})"
    return name + (", key_bias" if facts["bias"] else ""), facts["pass"]


def _title(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    where = f"{machine['device']}, bfloat16"
    if machine["device"] == "CPU":
        where = f"CPU ({machine['cpu']}, threads: {machine['threads']}), float32"
    return (
        f"{results['name']}: fastagglo against its peers on {where}; torch {machine['torch']}, "
        f"commit {machine['commit']}\n"
        "Right of 1×, fastagglo is faster or needs less memory. " + ROWS[results["name"]]
    )


def _decorate(axis: Any) -> None:
    """A logarithmic axis with a line at 1 and ticks at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.axvline(1, color="#444444", linewidth=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    low, high = min(low, 0.8), max(high, 1.25)
    axis.set_xlim(low, high)
    ticks = [base * 10.0**power for power in range(-3, 4) for base in (1, 2, 5)]
    axis.set_xticks([tick for tick in ticks if low <= tick <= high])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
