"""What each step does: its resolutions, teacher inputs and window, and its learning rate.

All of it is a pure function of the configuration and the step, so a resumed run needs nothing but
the step number to go on as if it had never stopped, and every rank knows what all others do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fastagglo.data import GroupPlan, StepPlan
from fastagglo.errors import UserError
from fastagglo.model.config import preset
from fastagglo.teachers import TeacherSpec
from fastagglo.train.assignment import idle_share, spread
from fastagglo.train.budget import fill, image_tokens, stage_budgets
from fastagglo.train.config import EMA_VIEW, RunConfig, StageSettings
from fastagglo.train.costs import ImageCosts


@dataclass(frozen=True)
class WholeStep:
    """A step over all ranks and micro-steps.

    Attributes:
        groups: with the images of all of them.
        window: of the student, or None.
        counts: ``(groups, micro-steps, ranks)``, images of each.
        idle: share of the step that ranks are expected to wait for the one with the most work, by
            the FLOPs of their images.
    """

    groups: tuple[GroupPlan, ...]
    window: int | None
    counts: np.ndarray
    idle: float

    @property
    def images(self) -> int:
        return sum(group.count for group in self.groups)

    def tokens(self, prefix: int) -> int:
        """Tokens of the student, each image's with ``prefix`` CLS and register tokens."""
        return sum(g.count * ((g.size // g.patch_size) ** 2 + prefix) for g in self.groups)


class Planner:
    """Maps a micro-step to the plan of its batch on one rank.

    Micro-step ``i`` is number ``i % accumulate`` of optimiser step ``i // accumulate``; the draws
    (resolutions, teacher sizes, window) are the same on all ranks and micro-steps of a step. Where
    the images of every group can be divided evenly, ranks do equal work; where they cannot, or
    groups have ranks of their own, images are spread by what they cost
    (`fastagglo.train.assignment`).

    Args:
        config: the run.
        specs: what each teacher accepts, by name.
        patch_size: of the student, in pixels.
        world: number of ranks the images of a step are divided over.
        rank: the one to plan for.

    Raises:
        UserError: a step has fewer images than ranks and micro-steps, or a rank has none; a
            group's images are no multiple of the micro-steps; its ranks are not among the run's;
            an image does not fit a stage's tokens; a resolution is no multiple of the student's
            patch; no window divides the images of any stage; a teacher does not accept a size.
    """

    def __init__(
        self,
        config: RunConfig,
        specs: Mapping[str, TeacherSpec],
        patch_size: int,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        self.config = config
        self.specs = dict(specs)
        self.patch_size = patch_size
        self.world, self.rank = world, rank
        self._costs: ImageCosts | None = None
        self._latest: tuple[int, WholeStep] | None = None
        for name, spec in self.specs.items():
            if config.teachers[name].mosaic and not spec.input_size:
                raise UserError(
                    f"setting teachers.{name}.mosaic is true, but {config.teachers[name].model} "
                    "takes small images as they are; set it to false"
                )
        self.shares = world * config.optimiser.accumulate
        for index, stage in enumerate(config.stages):
            images = sum(group.images for group in stage.groups)
            if images < self.shares and not stage.tokens:
                raise UserError(
                    f"setting stages.{index}.groups has {images} images a step: give at least "
                    f"{self.shares}, one for each rank and micro-step (ranks x "
                    "optimiser.accumulate)"
                )
            for number, group in enumerate(stage.groups):
                here = f"stages.{index}.groups.{number}"
                if group.images % config.optimiser.accumulate and not stage.tokens:
                    raise UserError(
                        f"setting {here}.images is {group.images}: micro-steps are alike, so give "
                        f"a multiple of optimiser.accumulate ({config.optimiser.accumulate})"
                    )
                if group.ranks is not None and group.ranks[1] >= world:
                    raise UserError(
                        f"setting {here}.ranks is {group.ranks}: the ranks of this run are 0 to "
                        f"{world - 1}; start more with torchrun, or change it"
                    )
                for size in group.sizes:
                    self._check_student_size(f"{here}.sizes", size)
            self._check_ranks(index, stage)
        for size in config.eval.sizes:
            self._check_student_size("eval.sizes", size)
        self.budgets = stage_budgets(config, patch_size, self.shares)
        # Of stages with tokens, images before each of their steps, as far as they were asked for.
        self._filled = [array("q", [0]) for _ in config.stages]
        self._check_windows()
        for size in {
            *self.eval_sizes(),
            *(s for st in config.stages for g in st.groups for s in g.sizes),
        }:
            for name in specs:
                for choice in self.teacher_sizes(name, size):
                    self._check_teacher_size(name, choice)

    def __call__(self, micro_step: int) -> StepPlan:
        step, micro = divmod(micro_step, self.config.optimiser.accumulate)
        whole = self.whole(step)
        counts = whole.counts[:, micro, self.rank].tolist()
        groups = tuple(
            dataclasses.replace(group, count=count)
            for group, count in zip(whole.groups, counts, strict=True)
            if count
        )
        earlier = int(whole.counts.sum(axis=0).ravel()[: micro * self.world + self.rank].sum())
        budget = self.budgets[self.config.stage_at(step)[0]]
        return StepPlan(
            groups,
            whole.window,
            start=self._images_before(step) + earlier,
            capacity=None if budget is None else budget.capacity,
            max_images=None if budget is None else budget.max_images,
        )

    def whole(self, step: int) -> WholeStep:
        """What all ranks do together in an optimiser step, and who takes which images."""
        if self._latest is None or self._latest[0] != step:
            self._latest = (step, self._whole(step))
        return self._latest[1]

    def _whole(self, step: int) -> WholeStep:
        config = self.config
        stage = config.stages[config.stage_at(step)[0]]
        sizes, images, rng = self._images(step)
        draws = {name: rng.random() for name in self.specs}
        groups = tuple(
            self._group(size, count, draws, config.distill.shift_std, group.teachers)
            for size, count, group in zip(sizes, images, stage.groups, strict=True)
        )
        return self._spread(groups, self._window(sizes, rng), self._bins(stage))

    def teachers_of_rank(self) -> set[str]:
        """The teachers that see images of this rank in some stage."""
        return {
            name
            for stage in self.config.stages
            for group in stage.groups
            if group.ranks is None or group.ranks[0] <= self.rank <= group.ranks[1]
            for name in (self.specs if group.teachers is None else group.teachers)
        }

    def _bins(self, stage: StageSettings) -> list[np.ndarray] | None:
        """Which ranks may have images of each group; None: all of all groups."""
        if all(group.ranks is None for group in stage.groups):
            return None
        ranks = [group.ranks or (0, self.world - 1) for group in stage.groups]
        return [np.arange(a, b + 1) for a, b in ranks]

    def _spread(
        self, groups: tuple[GroupPlan, ...], window: int | None, bins: list[np.ndarray] | None
    ) -> WholeStep:
        shape = (len(groups), self.config.optimiser.accumulate, self.world)
        images = np.array([group.count for group in groups])
        if bins is None and not (images % self.shares).any():
            each = (images // self.shares)[:, None, None]
            return WholeStep(groups, window, np.broadcast_to(each, shape), 0.0)
        if self._costs is None:
            self._costs = ImageCosts(self.config, self.specs)
        costs = [self._costs(group, window) for group in groups]
        allowed = [range(self.world)] * len(groups) if bins is None else bins
        # Micro-steps are alike, so that each weighs the same in the step's loss.
        each = spread(costs, (images // shape[1]).tolist(), allowed, self.world)
        counts = np.broadcast_to(each[:, None], shape)
        idle = idle_share(np.einsum("gmr,g->mr", counts, costs))
        return WholeStep(groups, window, counts, idle)

    def _images(self, step: int) -> tuple[list[int], list[int], np.random.Generator]:
        """Size and images of each group over all ranks, and what draws the rest of the step."""
        index = self.config.stage_at(step)[0]
        stage, budget = self.config.stages[index], self.budgets[index]
        rng = np.random.default_rng((self.config.seed, step, 0x5EED))
        sizes = [int(rng.choice(group.sizes)) for group in stage.groups]
        images = [group.images for group in stage.groups]
        if budget is not None:
            lengths = [image_tokens(self.config, size, self.patch_size) for size in sizes]
            rounding = np.random.default_rng((self.config.seed, step, 0xF177))
            # Every rank and micro-step is filled alike.
            each = fill(lengths, images, budget.capacity, rounding)
            images = [count * self.shares for count in each]
        return sizes, images, rng

    def _images_before(self, step: int) -> int:
        index, within = self.config.stage_at(step)
        total = first = 0
        for number, stage in enumerate(self.config.stages[: index + 1]):
            steps = within if number == index else stage.steps
            if self.budgets[number] is None:
                total += steps * sum(group.images for group in stage.groups)
            else:
                filled = self._filled[number]
                while len(filled) <= steps:
                    images = self._images(first + len(filled) - 1)[1]
                    filled.append(filled[-1] + sum(images))
                total += filled[steps]
            first += stage.steps
        return total

    def eval_sizes(self) -> tuple[int, ...]:
        """Student resolutions of the held-out figures, ascending."""
        if self.config.eval.sizes:
            return tuple(sorted(set(self.config.eval.sizes)))
        return tuple(sorted({s for st in self.config.stages for g in st.groups for s in g.sizes}))

    def eval_group(self, size: int, count: int = 8) -> GroupPlan:
        """Plan of held-out images at one resolution: no shift, each teacher's first size."""
        return self._group(size, count, dict.fromkeys(self.specs, 0.0), shift_std=0.0)

    def crop_plans(self) -> list[GroupPlan]:
        """Plans of one image that together show all that the teachers see in training: every
        resolution of the stages with every size of each teacher, shifts as in the run."""
        config, names = self.config, list(self.specs)
        sizes = sorted({s for stage in config.stages for g in stage.groups for s in g.sizes})
        plans = []
        for size in sizes:
            plan = self._group(size, 1, dict.fromkeys(names, 0.0), config.distill.shift_std)
            # All combinations: at which scale a photo is decoded depends on the largest view.
            for choice in itertools.product(*(self.teacher_sizes(n, size) for n in names)):
                teachers = {**plan.teachers, **dict(zip(names, choice, strict=True))}
                plans.append(dataclasses.replace(plan, teachers=teachers))
        return plans

    def _group(
        self,
        size: int,
        count: int,
        draws: Mapping[str, float],
        shift_std: float,
        teachers: Collection[str] | None = None,
    ) -> GroupPlan:
        views = {}
        for name in self.specs:
            if teachers is not None and name not in teachers:
                continue
            choices = self.teacher_sizes(name, size)
            views[name] = choices[int(draws[name] * len(choices))]
        if self.config.distill.mesa_weight > 0 and shift_std > 0:
            views[EMA_VIEW] = size
        return GroupPlan(
            size=size, count=count, teachers=views, shift_std=shift_std, patch_size=self.patch_size
        )

    def teacher_sizes(self, name: str, student_size: int) -> tuple[int, ...]:
        settings, spec = self.config.teachers[name], self.specs[name]
        if settings.mosaic and spec.input_size:
            # A tile with as many cells as the student has, if at least 2 x 2 fit the canvas.
            tile = student_size // self.patch_size * spec.patch_size
            if tile <= spec.input_size // 2:
                return (tile,)
        if settings.sizes:
            return settings.sizes
        if spec.input_size:
            return (spec.input_size,)
        wanted = student_size * settings.scale
        return (max(1, round(wanted / spec.multiple)) * spec.multiple,)

    def _window(self, sizes: list[int], rng: np.random.Generator) -> int | None:
        student = self.config.student
        drawn = rng.random() < student.window_probability
        fitting = [w for w in student.windows if all(s // self.patch_size % w == 0 for s in sizes)]
        return int(rng.choice(fitting)) if drawn and fitting else None

    def _check_student_size(self, setting: str, size: int) -> None:
        patch, student = self.patch_size, self.config.student
        limit = student.max_resolution or preset(student.preset).max_resolution
        if size % patch or size < patch:
            below = max(patch, size // patch * patch)
            raise UserError(
                f"setting {setting} has {size}: the student's patch of {patch} pixels does not "
                f"divide it; {below} and {below + patch} would do"
            )
        if size > limit:
            raise UserError(
                f"setting {setting} has {size}: the position table ends at {limit} pixels; raise "
                "student.max_resolution"
            )

    def _check_ranks(self, index: int, stage: StageSettings) -> None:
        """Whether every rank can have an image in every micro-step."""
        bins = self._bins(stage)
        if bins is None:
            return
        here = f"setting stages.{index}.groups"
        if missing := sorted(set(range(self.world)) - {int(b) for part in bins for b in part}):
            raise UserError(
                f"{here}: rank {missing[0]} of {self.world} is in no group's ranks; give it one, "
                "or start fewer ranks"
            )
        try:
            micro = self.config.optimiser.accumulate
            spread([1.0] * len(bins), [g.images // micro for g in stage.groups], bins, self.world)
        except ValueError as error:
            raise UserError(
                f"{here}: too few images for the ranks that they are for; every rank needs one in "
                "every micro-step (optimiser.accumulate): give more images, or other ranks"
            ) from error

    def _check_windows(self) -> None:
        student = self.config.student
        fits = any(
            all(any(s // self.patch_size % window == 0 for s in g.sizes) for g in stage.groups)
            for window in student.windows
            for stage in self.config.stages
        )
        if student.window_probability > 0 and not fits:
            raise UserError(
                f"setting student.windows is {student.windows}: none of them divides the images of "
                f"any stage, which are sizes over {self.patch_size} tokens wide"
            )

    def _check_teacher_size(self, name: str, size: int) -> None:
        spec, settings = self.specs[name], self.config.teachers[name]
        # A mosaic tile is made of whole cells, and its canvas is what the teacher sees.
        mosaic = settings.mosaic and spec.input_size is not None and size < spec.input_size
        if spec.input_size and size != spec.input_size and not mosaic:
            raise UserError(
                f"setting teachers.{name}.sizes has {size}: {settings.model} takes "
                f"{spec.input_size} pixels only"
            )
        if not mosaic and size % spec.multiple:
            raise UserError(
                f"setting teachers.{name}.sizes has {size}: {settings.model} takes multiples of "
                f"{spec.multiple} pixels"
            )


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of a step: in each stage a linear warm-up, then half a cosine."""
    index, step = config.stage_at(step)
    stage = config.stages[index]
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    span = max(1, stage.steps - stage.warmup_steps)
    progress = min(1.0, (step - stage.warmup_steps) / span)
    ratio = stage.final_lr_ratio
    return stage.lr * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def eval_steps(config: RunConfig) -> list[int]:
    """Steps before which the held-out figures are taken; the last is the end of the run."""
    points, total = config.eval.points, config.total_steps
    if points == 0:
        return []
    if points == 1:
        return [total]
    return sorted({round(total * i / (points - 1)) for i in range(points)})


def on_all_ranks(config: RunConfig) -> RunConfig:
    """A run whose groups are for all ranks: what is planned or cached without them."""
    stages = tuple(
        dataclasses.replace(
            stage,
            groups=tuple(dataclasses.replace(group, ranks=None) for group in stage.groups),
        )
        for stage in config.stages
    )
    return dataclasses.replace(config, stages=stages)
