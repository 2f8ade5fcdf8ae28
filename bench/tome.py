"""What token merging inside a trained vision transformer gains and costs, on real photographs.

    python train.py                          # three minutes; leaves runs/demo/student
    python -m bench.tome                     # prints the table, writes bench/results/tome.json
    python -m bench.tome --model vit_small_patch14_reg4_dinov2 --checkpoint dinov2-s.safetensors

The transformer is timm's: by default with the weights of the student that the demo trains, which
no package of weights brings (a small one, trained for minutes: look at your own model with
``--model`` and ``--checkpoint``). It is compared with itself, on the ten colour photographs that
scikit-image and scikit-learn ship, the middle square of each:

- ``timm``: as it comes, with PyTorch's attention; its features are held against all others;
- ``patched``: ``fastagglo.patch``, no merging;
- ``constant``, ``decreasing``: ``fastagglo.tome.apply`` with that share of the patches left behind
  the last block;
- ``smaller photo``: the photo shrunk so that all blocks have that share of the patches, and the
  features resized again.

Lost is the share of the variance, ``|x - y|^2 / |x - mean(x)|^2`` over the patches of a photo,
mean over the photos; cosine the mean of patches and their counterparts, and that of the prefix
tokens (CLS and registers). Images per second: all run once in each round, by turns; their median,
and the median of the rounds' own ratios to ``timm`` with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastagglo
from bench import machine
from bench.intervals import median_interval
from bench.merge_quality import lost, photographs
from fastagglo.model import Student, load_student

HERE = Path(__file__).resolve().parent
SHARES = (0.75, 0.5, 0.25, 0.125)
SCHEDULES = ("constant", "decreasing")


def as_timm(student: Student, side: int) -> nn.Module:
    """timm's VisionTransformer with a student's weights, for images of ``side`` pixels.

    Raises:
        ValueError: the student has parts that timm's does not have.
    """
    from timm.models.vision_transformer import VisionTransformer

    config = student.config
    extra = student.feature_normaliser or student.block_normaliser
    if config.mlp != "gelu" or extra is not None or not config.final_norm:
        raise ValueError("as_timm: the student must have GELU MLPs, a last norm and no normalisers")
    grid, patch = side // config.patch_size, config.patch_size
    model = VisionTransformer(
        img_size=side,
        patch_size=patch,
        num_classes=0,
        global_pool="",
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=(config.mlp_width + 0.5) / config.width,  # timm rounds the product down
        init_values=config.layer_scale,
        no_embed_class=True,
        reg_tokens=config.prefix_tokens - 1,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        weight_init="skip",
    )
    state = {
        name: value
        for name, value in student.state_dict().items()
        if name.startswith(("blocks.", "norm."))
    }
    prefix = torch.cat((torch.stack(list(student.cls_tokens.values())), student.registers))
    state |= {
        "cls_token": prefix[None, :1],
        "reg_token": prefix[None, 1:],
        "pos_embed": student.positions(((1, grid, grid),))[None],
        "patch_embed.proj.weight": student.patch_embed.weight.unflatten(1, (3, patch, patch)),
        "patch_embed.proj.bias": student.patch_embed.bias,
    }
    model.load_state_dict(state)
    return model.eval()


class Subject:
    """A transformer at one image size, and how it wants its pixels.

    Attributes:
        words: what it is, for the table.
        at: the transformer for images of a side.
        patch: pixels of a patch.
        mean, std: (3, 1, 1), of its pixels.
    """

    def __init__(
        self,
        words: str,
        at: Callable[[int], nn.Module],
        patch: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.words, self.at, self.patch = words, at, patch
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))

    @classmethod
    def of_student(cls, folder: Path) -> Subject:
        student = load_student(folder).eval()
        config = student.config
        words = f"the student of {folder.parent.name}, {config.width} wide, {config.depth} blocks"
        at = lambda side: as_timm(student, side)  # noqa: E731
        return cls(words, at, config.patch_size, config.pixel_mean, config.pixel_std)

    @classmethod
    def of_timm(cls, name: str, checkpoint: Path) -> Subject:
        import timm

        model = timm.create_model(name, checkpoint_path=str(checkpoint), dynamic_img_size=True)
        model.eval()
        wanted = timm.data.resolve_model_data_config(model)
        patch = model.patch_embed.patch_size[0]
        return cls(f"timm's {name}", lambda side: model, patch, wanted["mean"], wanted["std"])

    def pixels(self, photos: Tensor) -> Tensor:
        return (photos - self.mean) / self.std


def run(model: nn.Module, pixels: Tensor, batch: int) -> Tensor:
    """Normed tokens (N, L, C), ``batch`` photographs a call."""
    with torch.inference_mode():
        return torch.cat([model.forward_features(x) for x in pixels.split(batch)])


def cost(found: Tensor, exact: Tensor, prefix: int) -> dict[str, float]:
    """What is lost of the patches, and the cosines; (N, L, C) both."""
    each = [lost(x[None, prefix:], y[None, prefix:]) for x, y in zip(exact, found, strict=True)]
    mean = {key: sum(row[key] for row in each) / len(each) for key in each[0]}
    if prefix:
        cosine = F.cosine_similarity(exact[:, :prefix], found[:, :prefix], dim=-1)
        mean["prefix_cosine"] = cosine.mean().item()
    return {key: round(value, 4) for key, value in mean.items()}


def shrunk(side: int, share: float, patch: int) -> int:
    """The side of a photo with that share of the patches, a multiple of the patch."""
    return max(1, round(side / patch * share**0.5)) * patch


def resized(tokens: Tensor, prefix: int, side: int) -> Tensor:
    """(N, prefix + a a, C) as (N, prefix + side side, C), by bilinear interpolation."""
    small = int((tokens.shape[1] - prefix) ** 0.5)
    grid = tokens[:, prefix:].unflatten(1, (small, small)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return torch.cat((tokens[:, :prefix], grid.flatten(2).transpose(1, 2)), dim=1)


def measure(subject: Subject, size: int, rounds: int, batch: int) -> list[dict[str, Any]]:
    """A row for each way to run the transformer on photographs of ``size`` pixels."""
    photos = torch.stack(list(photographs(size).values()))
    pixels = subject.pixels(photos)
    full = subject.at(size)
    prefix, cells = full.num_prefix_tokens, size // subject.patch
    exact = run(full, pixels, batch)

    def plain() -> Tensor:
        return run(full, pixels, batch)

    def smaller(model: nn.Module, side: int) -> Tensor:
        small = F.interpolate(photos, size=(side, side), mode="bilinear", antialias=True)
        return resized(run(model, subject.pixels(small), batch), prefix, cells)

    # Name, share, how the model is changed for it, and what is timed then.
    Way = tuple[str, float, Callable[[nn.Module], Any] | None, Callable[[], Tensor]]
    ways: list[Way] = [("timm", 1.0, None, plain), ("patched", 1.0, fastagglo.patch, plain)]
    for share in SHARES:
        for schedule in SCHEDULES:
            change = partial(fastagglo.tome.apply, tokens=share, schedule=schedule)
            ways.append((schedule, share, change, plain))
        side = shrunk(size, share, subject.patch)
        ways.append(("smaller photo", share, None, partial(smaller, subject.at(side), side)))
    rows: list[dict[str, Any]] = []
    samples: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):  # the first one gives the features and warms up
        for step in range(len(ways)):
            index = (turn + step) % len(ways)
            name, share, change, call = ways[index]
            if change is not None:
                change(full)
            start = time.perf_counter()
            found = call()
            if turn > 0:
                samples[index].append(time.perf_counter() - start)
            else:
                rows.append({"way": name, "share": share, **cost(found, exact, prefix)})
            fastagglo.unpatch(full)
    for row, own in zip(rows, samples, strict=True):
        row["images_per_second"] = round(len(photos) / median_interval(own)[1], 2)
        ratios = [base / mine for base, mine in zip(samples[0], own, strict=True)]
        row["speed"] = [round(x, 3) for x in median_interval(ratios)]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| | share of patches | images/s | speed, of timm's | variance lost | cosine | prefix |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, middle, high = row["speed"]
        prefix = f"{row['prefix_cosine']:.3f}" if "prefix_cosine" in row else ""
        lines.append(
            f"| {row['way']} | {row['share']:g} | {row['images_per_second']:.1f} | "
            f"{middle:.2f}x ({low:.2f} to {high:.2f}) | {row['lost']:.1%} | "
            f"{row['cosine']:.3f} | {prefix} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tome",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--student", type=Path, default=Path("runs/demo/student"), help="its folder"
    )
    parser.add_argument("--model", help="a vision transformer's name in timm, instead")
    parser.add_argument("--checkpoint", type=Path, help="its weights, a file")
    parser.add_argument("--size", type=int, default=512, help="side of the photos, in pixels")
    parser.add_argument("--batch", type=int, default=5, help="photos a call")
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    chosen = parser.parse_args(arguments)
    if (chosen.model is None) != (chosen.checkpoint is None):
        parser.error("--model and --checkpoint go together")
    if chosen.model is not None:
        subject = Subject.of_timm(chosen.model, chosen.checkpoint)
    elif (chosen.student / "config.json").is_file():
        subject = Subject.of_student(chosen.student)
    else:
        parser.error(
            f"no student in {chosen.student}; run `python train.py` first, or give --student, or "
            "--model and --checkpoint"
        )
    if chosen.size % subject.patch:
        parser.error(f"--size must be a multiple of the patch, {subject.patch}, got {chosen.size}")
    threads = machine.fix_threads()
    rows = measure(subject, chosen.size, chosen.rounds, chosen.batch)
    results = {
        "name": "tome",
        "command": "python -m bench.tome",
        "commit": machine.commit(HERE.parent),
        "torch": torch.__version__,
        "threads": threads,
        "subject": subject.words,
        "size": chosen.size,
        "patches": (chosen.size // subject.patch) ** 2,
        "notes": {
            "lost": "|x - y|^2 / |x - mean(x)|^2 of the patches of a photo, mean over the photos",
            "speed": "time of timm over time, [low, median, high] of the rounds",
        },
        "rows": rows,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (chosen.out / "tome.json").write_text(text + "\n")
    print(f"{subject.words}; photos of {chosen.size} px, {results['patches']} patches")
    print(table(rows))
    print(f"wrote tome.json in {os.path.relpath(chosen.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
