"""How long ranks wait for one another, by arithmetic: ``python -m bench.ranks``.

    python -m bench.ranks                              # c-radio-v4-so400m, 64 to 4,096 ranks
    python -m bench.ranks --recipe radio-v2.5-h --ranks 96,768

Steps of a recipe's last stage. "By cost" is what the trainer does (`fastagglo.train.assignment`);
"by count" gives each rank the same number of images, whichever they are, as a sampler does that
shuffles all images and deals them out. Idle is the share of all ranks' time that is spent waiting
for the slowest, if time goes as the FLOPs of student, heads and teachers
(`fastagglo.train.costs`): no kernel, no network and no jitter is in it.

Two batches: the recipe's own, and one that grows with the ranks so that each has as many images as
on the first number of ranks. Two ways to draw resolutions: the recipe's, one for each group and
step; and all of a group's resolutions at once, in equal parts (without windows, which would have to
divide them all).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastagglo.errors import UserError
from fastagglo.train.assignment import idle_share
from fastagglo.train.config import GroupSettings, RunConfig
from fastagglo.train.costs import ImageCosts
from fastagglo.train.recipe import parse_arguments
from fastagglo.train.schedule import Planner
from fastagglo.train.teacher_shapes import known_specs


@dataclass(frozen=True)
class Idle:
    """Expected idle shares of one batch on a number of ranks."""

    ranks: int
    images: int
    by_cost: float
    by_count: float


def simulate(config: RunConfig, ranks: int, steps: int) -> Idle:
    """Idle shares over some steps, spread over the whole run.

    Raises:
        UserError: fewer images than ranks and micro-steps.
    """
    specs = known_specs(config)
    costs_of = ImageCosts(config, specs)
    planner = Planner(config, specs, costs_of.student.patch_size, ranks)
    rng = np.random.default_rng(0)
    cost_rounds, count_rounds = [], []
    for step in np.linspace(0, config.total_steps - 1, steps, dtype=int).tolist():
        whole = planner.whole(step)
        costs = np.array([costs_of(group, whole.window) for group in whole.groups])
        cost_rounds.append(np.einsum("gmr,g->mr", whole.counts, costs))
        images = rng.permutation(np.repeat(costs, [group.count for group in whole.groups]))
        shares = np.array_split(images, planner.shares)
        dealt = np.array([share.sum() for share in shares])
        count_rounds.append(dealt.reshape(-1, ranks))
    by_cost, by_count = (idle_share(np.concatenate(r)) for r in (cost_rounds, count_rounds))
    return Idle(ranks, whole.images, by_cost, by_count)


def grown(config: RunConfig, factor: float) -> RunConfig:
    """The last stage with so many times the images."""
    groups = tuple(
        dataclasses.replace(group, images=round(group.images * factor))
        for group in config.stages[-1].groups
    )
    return _last(config, groups)


def all_at_once(config: RunConfig) -> RunConfig:
    """The last stage with all resolutions of a group in each batch, in equal parts."""
    groups = []
    for group in config.stages[-1].groups:
        each, over = divmod(group.images, len(group.sizes))
        for number, size in enumerate(group.sizes):
            groups.append(GroupSettings(images=each + (number < over), sizes=(size,)))
    student = dataclasses.replace(config.student, windows=(), window_probability=0.0)
    config = dataclasses.replace(config, student=student)
    return _last(config, tuple(group for group in groups if group.images))


def _last(config: RunConfig, groups: tuple[GroupSettings, ...]) -> RunConfig:
    last = dataclasses.replace(config.stages[-1], groups=groups)
    return dataclasses.replace(config, stages=(last,))


def table(config: RunConfig, ranks: Sequence[int], steps: int) -> str:
    """Idle shares as lines of text."""
    images = sum(group.images for group in config.stages[-1].groups)
    lines = [
        f"{config.recipe}, stage {config.stages[-1].name!r}: idle share, a mean of {steps} steps",
        f"{'ranks':>6} {'images':>7}   {'one resolution a group':^22}   {'all resolutions':^22}",
        f"{'':14}   {'by cost':>10} {'by count':>11}   {'by cost':>10} {'by count':>11}",
    ]
    for batch in ("own", "grown"):
        own = batch == "own"
        lines.append("the recipe's batch" if own else f"{images / ranks[0]:g} images a rank")
        for count in ranks:
            if own and images < count * config.optimiser.accumulate:
                lines.append(f"{count:6,} {images:7,}   fewer images than ranks")
                continue
            this = grown(config, 1.0 if own else count / ranks[0])
            drawn, mixed = (simulate(c, count, steps) for c in (this, all_at_once(this)))
            cells = [f"{x.by_cost:10.2%} {x.by_count:11.1%}" for x in (drawn, mixed)]
            lines.append(f"{count:6,} {drawn.images:7,}   {cells[0]}   {cells[1]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", default="64,256,1024,4096", help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="of the stage (default 64)")
    parser.add_argument("--recipe", default="c-radio-v4-so400m", help="(default %(default)s)")
    chosen, rest = parser.parse_known_args(arguments)
    try:
        ranks = [int(part) for part in chosen.ranks.split(",")]
    except ValueError:
        parser.error(f"--ranks must be numbers between commas, got {chosen.ranks!r}")
    if min(ranks) < 1 or chosen.steps < 1:
        parser.error("--ranks and --steps must be at least 1")
    try:
        print(table(parse_arguments(["--recipe", chosen.recipe, *rest]), ranks, chosen.steps))
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
