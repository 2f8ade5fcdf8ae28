"""A fixed number of tokens a step instead of a number of images: what fits, and of which sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastagglo.errors import UserError
from fastagglo.model import run_budget
from fastagglo.model.budget import BudgetRun
from fastagglo.train.config import RunConfig, StageSettings


@dataclass(frozen=True)
class Budget:
    """What one rank computes in a micro-step of a stage, whatever the mix of images.

    Attributes:
        capacity: rows, of tokens and dummies.
        max_images: images that fit at most.
    """

    capacity: int
    max_images: int


def image_tokens(config: RunConfig, size: int, patch_size: int) -> int:
    """Tokens of the student for an image of ``size`` pixels, CLS and registers included."""
    return (size // patch_size) ** 2 + len(config.teachers) + config.student.registers


def stage_budgets(config: RunConfig, patch_size: int, shares: int) -> list[Budget | None]:
    """The budget of each stage; None where it counts images.

    Args:
        config: the run.
        patch_size: of the student, in pixels.
        shares: ranks times micro-steps, over which a step is divided.

    Raises:
        UserError: the largest image of a stage does not fit a share.
    """
    budgets: list[Budget | None] = []
    for index, stage in enumerate(config.stages):
        if not stage.tokens:
            budgets.append(None)
            continue
        sizes = [size for group in stage.groups for size in group.sizes]
        least, most = (image_tokens(config, f(sizes), patch_size) for f in (min, max))
        capacity = stage.tokens // shares
        if capacity < most:
            raise UserError(
                f"setting stages.{index}.tokens is {stage.tokens}: an image of {max(sizes)} pixels "
                f"has {most} tokens; give at least {most * shares}, or 0 to count images"
                + (f" ({shares} ranks x micro-steps)" if shares > 1 else "")
            )
        budgets.append(Budget(capacity, capacity // least))
    return budgets


def fill(
    lengths: Sequence[int], weights: Sequence[float], capacity: int, rng: np.random.Generator
) -> list[int]:
    """How many images of each group fill a budget.

    The counts of all groups but the one with the shortest images are in proportion to the weights,
    by rounding that is right on average, the longest first; the shortest fill what is left, so that
    fewer tokens than one of them has stay unused.

    Args:
        lengths: tokens of one image of each group, each at most ``capacity``.
        weights: images that each group would have with the others', above 0.
        capacity: tokens.
        rng: decides the rounding.

    Returns:
        at least one image in all.
    """
    scale = capacity / sum(w * n for w, n in zip(weights, lengths, strict=True))
    counts, left = [0] * len(lengths), capacity
    *longer, shortest = sorted(range(len(lengths)), key=lambda g: (-lengths[g], g))
    for group in longer:
        wanted = int(scale * weights[group] + rng.random())
        counts[group] = min(wanted, left // lengths[group])
        left -= counts[group] * lengths[group]
    counts[shortest] = left // lengths[shortest]
    return counts


def compiled_run() -> BudgetRun:
    """`run_budget` by torch.compile: a graph for each kind of step, whatever its mix of images.

    Kinds of steps differ in the stage's tokens, in windows or none, in whether the trunk is frozen,
    and in the student or its average: more of them than torch expects of a function by itself.
    Under DDP torch cuts each graph where a bucket of gradients is full, so that it travels early.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    return torch.compile(run_budget, fullgraph=True, dynamic=False)


def mean_images(
    stage: StageSettings, config: RunConfig, patch_size: int, largest: bool = False
) -> list[float]:
    """Images of each group of a stage in a step, over all ranks and micro-steps.

    Args:
        stage: of the run ``config``.
        patch_size: of the student, in pixels.
        largest: where all draw their largest size, instead of a mean over the draws.
    """
    if not stage.tokens:
        return [float(group.images) for group in stage.groups]
    sizes = [[max(group.sizes)] if largest else group.sizes for group in stage.groups]
    draws = itertools.islice(itertools.product(*sizes), 4096)
    totals = [
        sum(
            group.images * image_tokens(config, size, patch_size)
            for group, size in zip(stage.groups, draw, strict=True)
        )
        for draw in draws
    ]
    scale = stage.tokens * float(np.mean([1 / total for total in totals]))
    return [group.images * scale for group in stage.groups]
