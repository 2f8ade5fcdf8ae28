"""README's table of ratios, from a result file: ``python -m bench.readme_table FILE``.

It prints what stands in README.md between the comments ``bench table`` and ``end of table``. The
tests compare the two, so no figure there was typed in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Peers in words, where several cases have them.
EAGER = {"eager": "eager, as in the papers"}
NO_MATRIX = {"eager": "eager, no matrix"}
PLAIN = {"plain": "the plain trainer, PHI-S in fp64"}
TIMM = {
    "per-image": "timm, looped per image",
    "per-resolution": "timm, looped per resolution",
    "padded": "timm, padded and masked",
}
JPEG = {
    "PIL": "Pillow, torchvision's v1 transforms",
    "torchvision": "torchvision's decoder, v2",
}

# Suite, case, the case in words, and the peers in words.
ROWS = (
    ("attention", "B-mix-forward", "`packed_attention`, images of 64 to 1024 tokens, forward",
     {"padded": "SDPA, padded and masked", "per-image": "SDPA, looped per image",
      "flex": "FlexAttention, document mask"}),
    ("attention", "B-mix-forward+backward", "the same, forward + backward",
     {"padded": "SDPA, padded and masked", "per-image": "SDPA, looped per image"}),
    ("loss", "phi-s-16", "`multi_teacher_loss`, 16 x 27 x 27 x 1024, forward + backward",
     {"matrix": "eager, PHI-S with its matrix in fp64", "eager": "eager, no matrix",
      "compile": "`torch.compile`, no matrix"}),
    ("loss", "four-teachers-4", "four teachers of 768 to 1280 channels", NO_MATRIX),
    ("loss", "resized-8", "16 x 16 cells resized to 27 x 27", NO_MATRIX),
    ("loss", "shifted-8", "a shift and a mask", NO_MATRIX),
    ("merge", "bridge-1", "`merge_tokens`, 72 x 72 x 1280 to 256, forward",
     {"eager": "eager, as in the papers", "unshuffle": "pixel unshuffle"}),
    ("merge", "bridge-1-backward", "the same, forward + backward", EAGER),
    ("merge", "layer-4", "a ToMe layer, 4 x 577 x 768, forward", EAGER),
    ("heads", "four-heads", "`AdaptorHeads`, four teachers, 2,048 x 768, forward + backward",
     {"eager": "`nn.Sequential`", "compile": "`torch.compile` of it"}),
    ("student", "mix-demo-tiny-forward+backward", "`Student`, the demo's mix, forward + backward",
     TIMM),
    ("student", "mix-radio-tiny-forward+backward", "the same, RADIO's mix", TIMM),
    ("step", "demo", "a training step, cached features", PLAIN),
    ("step", "demo-uncached", "with its teachers", PLAIN),
    ("step", "demo-wide", "wider teachers", PLAIN),
    ("step", "radio-mix", "RADIO's mix", PLAIN),
    ("data", "small", "JPEGs of 500 x 375 to 224 px", JPEG),
    ("data", "large", "JPEGs of 2000 x 1500 to 224 px", JPEG),
    ("teachers", "efficientnet", "EfficientNet teacher, 8 x 192 px", {"batch": "timm's own call"}),
    ("teachers", "mosaic", "small images on a large canvas",
     {"alone": "each image alone on its canvas"}),
)  # fmt: skip


def table(results: Mapping[str, Any]) -> str:
    """The rows as Markdown: ours over theirs, time with its 95 % interval, and memory.

    Args:
        results: a run of everything, as ``python -m bench`` writes it.

    Raises:
        ValueError: it lacks a case or a peer that README shows.
    """
    machine = results["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, fp32"
    lines = [
        f"| {where} | against | time, ours / theirs | memory |",
        "|---|---|---|---|",
    ]
    for suite, case, words, peers in ROWS:
        for peer, name in peers.items():
            ratio = _ratio(results, suite, case, peer)
            low, middle, high = ratio["time"]
            memory = f"{ratio['memory']:.2f}x" if "memory" in ratio else ""
            lines.append(
                f"| {words} | {name} | **{middle:.2f}x** ({low:.2f} to {high:.2f}) | {memory} |"
            )
            words = ""
    return "\n".join(lines)


def _ratio(results: Mapping[str, Any], suite: str, case: str, peer: str) -> Mapping[str, Any]:
    for duel in results["suites"].get(suite, {"duels": ()})["duels"]:
        if duel["case"] == case:
            for row in duel["rows"][1:]:
                if row["peer"] == peer:
                    return row["ours_over_theirs"]
    raise ValueError(f"the results have no peer {peer!r} in case {case!r} of suite {suite!r}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.readme_table bench/results/DEVICE-DATE.json")
    print(table(json.loads(Path(sys.argv[1]).read_text())))
