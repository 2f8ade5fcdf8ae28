"""``python train.py plan``: the plan of a recipe as tables, and what to change first."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from fastagglo.errors import require
from fastagglo.train.config import RunConfig
from fastagglo.train.plan import GIB, GPUS, PUBLISHED, Assumptions, Plan, make_plan
from fastagglo.train.recipe import parse_arguments


def main(arguments: Sequence[str]) -> None:
    """Print the plan of a recipe; ``arguments`` are those after ``plan``."""
    parser = argparse.ArgumentParser(
        prog="train.py plan",
        description="What a recipe costs on N GPUs, by arithmetic. Any setting of the recipe may "
        "follow, as for train.py.",
    )
    parser.add_argument("--gpus", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (default h100)")
    usual = Assumptions()
    for field in dataclasses.fields(Assumptions):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=float,
            default=getattr(usual, field.name),
            help="assumption (default %(default)s)",
        )
    chosen, rest = parser.parse_known_args(list(arguments))
    given = Assumptions(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(usual)})
    show(make_plan(parse_arguments(rest), chosen.gpus, chosen.gpu.lower(), given))


def show(plan: Plan) -> None:
    """Print a plan as tables, a column for each stage."""
    console = require("rich.console", extra="train", purpose="tables").Console()
    config, (trunk, heads) = plan.config, plan.parameters.values()
    console.print(
        f"{config.recipe} on {plan.gpus} {plan.gpu.upper()}: student {config.student.preset}, "
        f"{(trunk + heads) / 1e6:,.1f} M parameters (trunk {trunk / 1e6:,.1f}, heads "
        f"{heads / 1e6:,.1f})"
    )
    stages = plan.stages
    _table(
        console,
        "Forward GFLOPs of an image",
        plan,
        {
            "trunk": [f"{s.student_flops / 1e9:,.1f}" for s in stages],
            "heads": [f"{s.heads_flops / 1e9:,.1f}" for s in stages],
            **{
                f"{t.name} ({t.parameters / 1e6:,.0f} M)": [
                    f"{s.teachers[i].flops / 1e9:,.1f}" for s in stages
                ]
                for i, t in enumerate(stages[0].teachers)
            },
        },
    )
    _table(
        console,
        "GiB of a GPU, at the largest sizes",
        plan,
        {
            **{part: [f"{s.memory[part] / GIB:.1f}" for s in stages] for part in stages[0].memory},
            "all": [f"{sum(s.memory.values()) / GIB:.1f}" for s in stages],
        },
    )
    image_kb = plan.assumptions.image_kb
    _table(
        console,
        "A step",
        plan,
        {
            "seconds": [f"{s.step_seconds:.3f}" for s in stages],
            **{
                f"of that {part}": [f"{s.seconds[part] / s.step_seconds:.0%}" for s in stages]
                for part in stages[0].seconds
            },
            "images/s": [f"{s.images_per_second:,.0f}" for s in stages],
            "MB/s from storage": [f"{s.images_per_second * image_kb / 1e3:,.0f}" for s in stages],
            "GB that a GPU sends": [f"{s.communicated / 1e9:.2f}" for s in stages],
            "GPU-hours of all steps": [f"{s.gpu_hours:,.0f}" for s in stages],
            "bottleneck": [s.bottleneck for s in stages],
        },
    )
    given, gpu = plan.assumptions, GPUS[plan.gpu]
    console.print(
        f"{_hours(plan)}, {plan.gpu_hours / plan.gpus / 24:,.1f} days; {_gib(plan)}: "
        f"{'fits' if plan.fits else 'does NOT fit'} {gpu.memory_gb:g} GB"
    )
    console.print(f"Change first: {advice(plan)}")
    console.print(
        f"Assumed, not measured: {given.utilisation:.0%} of {gpu.tflops:g} bf16 TFLOP/s; "
        f"{given.link_gb_s or gpu.link_gb_s:g} GB/s a GPU in all-reduce, behind the backward; "
        f"files of {image_kb:g} kB; {given.images_per_core:g} images/s a CPU core, "
        f"{max(1, config.data.workers)} cores a GPU."
    )
    if plan.short:
        console.print(
            f"To run it, every GPU needs an image in every micro-step: too few for {plan.gpus} x "
            f"{config.optimiser.accumulate} in {', '.join(plan.short)}"
        )
    if plan.unknown:
        console.print(f"Left out, shape not known: teachers {', '.join(plan.unknown)}")
    if (stated := PUBLISHED.get(config.recipe)) and len(stated) == len(stages):
        _beside_published(console, plan, stated)


def _table(console: Any, title: str, plan: Plan, rows: dict[str, list[str]]) -> None:
    table = require("rich.table", extra="train", purpose="tables").Table(
        title=title, title_justify="left"
    )
    table.add_column("")
    for stage in plan.stages:
        table.add_column(stage.name, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def _beside_published(console: Any, plan: Plan, stated: Sequence[float]) -> None:
    """The utilisation that published A100-hours mean, by this arithmetic."""
    a100 = make_plan(plan.config, plan.gpus, "a100", plan.assumptions)
    for stage, hours in zip(a100.stages, stated, strict=True):
        work = stage.gpu_hours * a100.assumptions.utilisation / hours
        console.print(
            f"{stage.name}: PHI-S (arXiv 2410.01680) states {hours:,.0f} A100-hours for its ViT-B, "
            f"this arithmetic {stage.gpu_hours:,.0f}; the stated ones mean {work:.0%} of the peak."
        )


def advice(plan: Plan) -> str:
    """The one setting that helps most, found by planning each change."""
    config = plan.config
    changes: list[tuple[str, RunConfig]] = []

    def change(text: str, part: str, **values: Any) -> None:
        inner = dataclasses.replace(getattr(config, part), **values)
        changes.append((text, dataclasses.replace(config, **{part: inner})))

    accumulate = 2 * config.optimiser.accumulate
    change(f"--optimiser.accumulate {accumulate}", "optimiser", accumulate=accumulate)
    if config.student.checkpoint_blocks:
        text = "--student.no-checkpoint-blocks"
        change(text, "student", checkpoint_blocks=False)
    else:
        change("--student.checkpoint-blocks", "student", checkpoint_blocks=True)
    if not plan.fits and plan.gpus > 1 and config.distributed.strategy == "ddp":
        change("--distributed.strategy fsdp2", "distributed", strategy="fsdp2")
    workers = 2 * max(1, config.data.workers)
    change(f"--data.workers {workers}", "data", workers=workers)
    found = []
    for text, changed in changes:
        other = make_plan(changed, plan.gpus, plan.gpu, plan.assumptions)
        if len(other.short) <= len(plan.short):
            found.append((text, other))
    able = [(text, other) for text, other in found if other.fits]
    if not plan.fits:
        if able:
            text, other = min(able, key=lambda pair: pair[1].gpu_hours)
            return f"{text}: it does not fit as it is; {_hours(other)} and {_gib(other)} then"
        if found:
            text, other = min(found, key=lambda pair: pair[1].memory_bytes)
            return f"{text} and more GPUs: it does not fit even so ({_gib(other)})"
        return "more GPUs or smaller batches: it does not fit"
    text, other = min(able, key=lambda pair: pair[1].gpu_hours, default=("", plan))
    if other.gpu_hours < 0.99 * plan.gpu_hours:
        return f"{text}: {_hours(other)} in place of {_hours(plan)}"
    worst = max(plan.stages, key=lambda stage: stage.gpu_hours)
    if worst.bottleneck == "teachers":
        teacher = max(worst.teachers, key=lambda t: t.flops)
        share = teacher.flops / sum(t.flops for t in worst.teachers)
        return (
            f"teachers.{teacher.name}: {share:.0%} of the teachers' work; smaller `sizes`, or a "
            "smaller model"
        )
    shard = max(1, config.distributed.shard)
    if worst.bottleneck == "all-reduce" and plan.gpus // 2 % shard == 0:
        fewer = make_plan(config, plan.gpus // 2, plan.gpu, plan.assumptions)
        if fewer.fits:
            return f"--gpus {fewer.gpus}: gradients wait for the network; {_hours(fewer)} then"
        return "stages.0.groups.0.images: more a step, since gradients wait for the network"
    return "nothing: the student's own arithmetic is the limit"


def _hours(plan: Plan) -> str:
    return f"{plan.gpu_hours:,.0f} GPU-hours"


def _gib(plan: Plan) -> str:
    return f"{plan.memory_bytes / GIB:.0f} GiB a GPU"
