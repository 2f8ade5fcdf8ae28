"""What is lost by fewer tokens, on real features of real photographs.

    python -m bench.merge_quality            # writes bench/results/merge-quality.json and .jpg

Features are EfficientNet-Lite0's at stride 16, as in the demo, of the ten colour photographs that
scikit-image and scikit-learn ship: the middle square of each at 768 px, a grid of 48 x 48. They are
shrunk to 256, 144 and 64 tokens, spread over the grid again, and compared:

- merging: ``fastagglo.compress`` with each partition, and back by its index;
- window mean: pixel unshuffle with a plain mean in place of its linear layer;
- strided: one token of each window, from its middle.

The figure is the share of the variance that is lost, ``|x - y|^2 / |x - mean(x)|^2`` per photo, and
its mean over the photos; beside it the mean cosine of a token with what stands for it. Takes about
half a minute on two cores; nothing is random but ``random2d``'s destinations, whose seed is fixed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastagglo
from bench import machine
from fastagglo.data.photos import PhotoSource
from fastagglo.teachers import load_teacher

HERE = Path(__file__).resolve().parent
SIZE, STRIDE = 768, 16
TOKENS = (256, 144, 64)
SHOWN = "coffee"  # in the picture; see PhotoSource.credits
GREY = ("brick", "camera", "coins", "grass", "gravel", "moon")


def merging(partition: str) -> Callable[[Tensor, int], Tensor]:
    """Of a grid (h, w, C) and a number of tokens, the grid again; each token's slot's mean."""

    def shrink(x: Tensor, tokens: int) -> Tensor:
        found = fastagglo.compress(x[None], tokens, partition=partition)
        return found.tokens[0][found.index[0]]

    return shrink


def window_mean(x: Tensor, tokens: int) -> Tensor:
    """Each window's mean in all of its cells; the windows must fit."""
    step = window(x, tokens)
    small = F.avg_pool2d(x.permute(2, 0, 1), step)
    return small.repeat_interleave(step, 1).repeat_interleave(step, 2).permute(1, 2, 0)


def strided(x: Tensor, tokens: int) -> Tensor:
    """Each window's middle cell in all of its cells."""
    step = window(x, tokens)
    small = x[step // 2 :: step, step // 2 :: step]
    return small.repeat_interleave(step, 0).repeat_interleave(step, 1)


def window(x: Tensor, tokens: int) -> int:
    """The side of ``tokens`` square windows.

    Raises:
        ValueError: no such windows fill the grid.
    """
    h, w, _ = x.shape
    step = math.isqrt(h * w // tokens)
    if h % step or w % step or h * w != tokens * step**2:
        raise ValueError(f"no {tokens} square windows fill a grid of {h} x {w}")
    return step


METHODS: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "strided": ("merging, strided destinations", merging("strided")),
    "random2d": ("merging, random destinations", merging("random2d")),
    "alternate": ("merging, alternate tokens", merging("alternate")),
    "window-mean": ("window mean", window_mean),
    "sampled": ("strided sampling", strided),
}


def lost(x: Tensor, y: Tensor) -> dict[str, float]:
    """Of features (h, w, C) and what stands for them."""
    x, y = x.double().flatten(0, 1), y.double().flatten(0, 1)
    variance = (x - x.mean(0)).square().sum()
    return {
        "lost": ((x - y).square().sum() / variance).item(),
        "cosine": F.cosine_similarity(x, y, dim=1).mean().item(),
    }


def photographs(size: int) -> dict[str, Tensor]:
    """The middle squares of the colour photographs, (3, size, size) in [0, 1], by name."""
    from PIL import Image

    source, found = PhotoSource(), {}
    for index in range(len(source)):
        if (name := source.key(index)) in GREY:
            continue
        photo = source.image(index).convert("RGB")
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        box = (left, top, left + side, top + side)
        square = photo.resize((size, size), Image.Resampling.BICUBIC, box=box)
        found[name] = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return found


def features(photos: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(h, w, C) of each photograph."""
    teacher = load_teacher("builtin", "efficientnet-lite0", layer="stride16", summary=False)
    with torch.no_grad():
        return {name: teacher(photo[None]).spatial[0] for name, photo in photos.items()}


def measure(maps: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each method and number of tokens."""
    rows = []
    for method, (_, shrink) in METHODS.items():
        for tokens in TOKENS:
            each = {name: lost(x, shrink(x, tokens)) for name, x in maps.items()}
            mean = {
                key: round(sum(found[key] for found in each.values()) / len(each), 4)
                for key in ("lost", "cosine")
            }
            by_photo = {name: round(found["lost"], 4) for name, found in each.items()}
            rows.append({"method": method, "tokens": tokens, **mean, "photos": by_photo})
    return rows


def draw(rows: list[dict[str, Any]], photo: Tensor, x: Tensor, path: Path) -> None:
    """Merged patches as coloured segments over a photograph, and what is lost by tokens.

    Args:
        rows: of :func:`measure`.
        photo: (3, H, W) in [0, 1].
        x: its features (h, w, C).
        path: a JPEG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.5), layout="constrained")
    for axis, tokens in zip(axes, (TOKENS[0], TOKENS[-1]), strict=False):
        index = fastagglo.compress(x[None], tokens).index[0]
        axis.imshow(segments(photo, index))
        axis.set_title(f"{index.numel():,} patches merged into {tokens} tokens", fontsize=10)
        axis.set_axis_off()
    styles = zip(("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00"), "osD^v", strict=True)
    for (method, (words, _)), (colour, marker) in zip(METHODS.items(), styles, strict=True):
        line = [100 * row["lost"] for row in rows if row["method"] == method]
        axes[2].plot(TOKENS, line, marker=marker, color=colour, label=words)
    axes[2].set_title("Variance of the features that is lost, %", fontsize=10)
    axes[2].set_xlabel("tokens")
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(TOKENS, [str(tokens) for tokens in TOKENS])
    axes[2].set_ylim(0)
    axes[2].grid(color="#DDDDDD", linewidth=0.6)
    axes[2].spines[["top", "right"]].set_visible(False)
    axes[2].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 85, "optimize": True})
    plt.close(figure)


def segments(photo: Tensor, index: Tensor) -> np.ndarray:
    """(H, W, 3): each merged token's patches under a colour of its own, with their outlines.

    A token that stands for itself alone keeps the photograph's colours.
    """
    import colorsys

    side = photo.shape[1] // index.shape[0]
    count = torch.bincount(index.flatten())
    # Turning by the golden angle keeps the hues of slots that follow each other far apart.
    hues = [colorsys.hsv_to_rgb(slot * 0.618034 % 1, 0.85, 1.0) for slot in range(len(count))]
    slots = index.repeat_interleave(side, 0).repeat_interleave(side, 1)
    merged = (count[slots] > 1)[..., None].numpy()
    picture = photo.permute(1, 2, 0).numpy()
    grey = picture.mean(2, keepdims=True)
    tinted = 0.55 * grey + 0.45 * np.array(hues)[slots.numpy()] * (0.55 + 0.45 * grey)
    picture = np.where(merged, tinted, picture)
    edge = np.zeros(slots.shape, dtype=bool)
    for axis in (0, 1):
        differs = np.diff(slots.numpy(), axis=axis) != 0
        pad = [(0, 0), (0, 0)]
        pad[axis] = (1, 0)
        edge |= np.pad(differs, pad)
        pad[axis] = (0, 1)
        edge |= np.pad(differs, pad)
    picture[edge] = 1.0
    return picture.clip(0, 1)


def main(arguments: list[str] | None = None) -> int:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.merge_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    photos = photographs(SIZE)
    maps = features(photos)
    rows = measure(maps)
    results = {
        "name": "merge-quality",
        "command": "python -m bench.merge_quality",
        "commit": machine.commit(HERE.parent),
        "torch": torch.__version__,
        "features": f"efficientnet-lite0, stride {STRIDE}, photos of {SIZE} px",
        "grid": list(next(iter(maps.values())).shape[:2]),
        "notes": {
            "lost": "|x - y|^2 / |x - mean(x)|^2 of a photo, mean over the photos",
            "cosine": "of a token with what stands for it, mean over tokens and photos",
            "photos": "lost, by photo",
        },
        "methods": {method: words for method, (words, _) in METHODS.items()},
        "shown": {"photo": SHOWN, "credit": PhotoSource().credits[SHOWN]},
        "rows": rows,
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (chosen.out / "merge-quality.json").write_text(text + "\n")
    draw(rows, photos[SHOWN], maps[SHOWN], chosen.out / "merge-quality.jpg")
    print(table(rows))
    print(f"wrote merge-quality.json and merge-quality.jpg in {os.path.relpath(chosen.out)}")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """For the terminal."""
    lines = [f"{'variance lost (mean cosine)':32}" + "".join(f"{t:>18}" for t in TOKENS)]
    for method, (words, _) in METHODS.items():
        cells = [
            f"{row['lost']:>9.1%} ({row['cosine']:.3f})" for row in rows if row["method"] == method
        ]
        lines.append(f"{words:32}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
