"""What a recipe costs on N GPUs, before anybody pays: ``python train.py plan --gpus 256``.

Arithmetic alone (`fastagglo.model.cost`): nothing is loaded and no GPU is needed. Every figure that
is not counted is an assumption, printed with the plan and set from the shell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastagglo.errors import UserError, suggestion
from fastagglo.model import Student, StudentConfig
from fastagglo.model.cost import VitShape, activation_bytes, student_flops
from fastagglo.train.budget import mean_images
from fastagglo.train.config import GroupSettings, RunConfig, StageSettings, TeacherSettings
from fastagglo.train.costs import teacher_view_flops
from fastagglo.train.parallel import check_ranks
from fastagglo.train.schedule import Planner, on_all_ranks
from fastagglo.train.sharing import model_bytes, sent_bytes
from fastagglo.train.student import build_student, stated_widths
from fastagglo.train.teacher_shapes import SHAPES, TeacherShape, known_specs

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Gpu:
    """A data-centre part.

    Attributes:
        tflops: dense bf16 TFLOP/s.
        memory_gb: 1e9 bytes.
        link_gb_s: what the network card beside it usually carries, each way.
    """

    tflops: float
    memory_gb: float
    link_gb_s: float


# NVIDIA's data sheets, SXM parts; one network card a GPU, as in its own servers.
GPUS = {
    "a100": Gpu(312, 80, 25),
    "h100": Gpu(989, 80, 50),
    "h200": Gpu(989, 141, 50),
    "b200": Gpu(2250, 180, 50),
    "l40s": Gpu(362, 48, 25),
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot count.

    Attributes:
        utilisation: share of the peak that student and teachers reach.
        link_gb_s: that a GPU sends in an all-reduce over the network; None is the GPU's usual.
        image_kb: of an image file in storage.
        images_per_core: that a CPU core decodes and crops in a second.
    """

    utilisation: float = 0.5
    link_gb_s: float | None = None
    image_kb: float = 110.0
    images_per_core: float = 200.0


@dataclass(frozen=True)
class TeacherCost:
    """A teacher in one stage, means over the draws of sizes.

    Attributes:
        flops: of an image of the step, forward.
        parameters: of its image tower.
        name: in the recipe.
    """

    name: str
    parameters: int
    flops: float


@dataclass(frozen=True)
class StagePlan:
    """One stage on one GPU of many.

    Attributes:
        name, steps, images: the stage's; images of a step over all GPUs.
        student_flops, heads_flops: forward, of an image.
        teachers: their costs.
        seconds: of a step by part: student, teachers, the wait for the rank with the most work,
            weights and gradients on the network that nothing hides, data that no GPU work hides.
        memory: bytes of a GPU by part, at the largest sizes.
        communicated: bytes that a GPU sends in a step (`fastagglo.train.sharing`).
        images_per_second: over all GPUs.
    """

    name: str
    steps: int
    images: int
    student_flops: float
    heads_flops: float
    teachers: tuple[TeacherCost, ...]
    seconds: dict[str, float]
    memory: dict[str, int]
    communicated: int
    gpus: int

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds

    @property
    def gpu_hours(self) -> float:
        return self.steps * self.step_seconds * self.gpus / 3600

    @property
    def bottleneck(self) -> str:
        return max(self.seconds, key=lambda part: self.seconds[part])


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of GPUs.

    Attributes:
        config, gpus, gpu, assumptions: what was asked.
        parameters: of the student by part.
        stages: a plan each.
        unknown: teachers whose shape is not known: they are left out.
    """

    config: RunConfig
    gpus: int
    gpu: str
    assumptions: Assumptions
    parameters: dict[str, int]
    stages: tuple[StagePlan, ...]
    unknown: tuple[str, ...]

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Of a GPU, in the stage that needs most."""
        return max(sum(stage.memory.values()) for stage in self.stages)

    @property
    def short(self) -> list[str]:
        """Stages with fewer images than GPUs and micro-steps, which the trainer refuses."""
        shares = self.gpus * self.config.optimiser.accumulate
        return [
            f"stages.{i}.groups ({stage.images})"
            for i, stage in enumerate(self.stages)
            if stage.images < shares
        ]

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= GPUS[self.gpu].memory_gb * 1e9


def make_plan(config: RunConfig, gpus: int, gpu: str, assumptions: Assumptions) -> Plan:
    """Count what each stage of a run costs on each of ``gpus`` GPUs.

    Raises:
        UserError: an unknown GPU, or a number out of range.
    """
    if gpu not in GPUS:
        raise UserError(
            f"--gpu {gpu}: unknown, expected one of {', '.join(GPUS)}" + suggestion(gpu, GPUS)
        )
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    for field in dataclasses.fields(assumptions):
        value = getattr(assumptions, field.name)
        if value is None:
            continue
        most = 1.0 if field.name == "utilisation" else math.inf
        if not 0 < value <= most:
            limit = " and at most 1" if most == 1 else ""
            name = field.name.replace("_", "-")
            raise UserError(f"--{name} must be above 0{limit}, got {value:g}")
    check_ranks(config.distributed, gpus)
    shapes = {n: SHAPES[t.model] for n, t in config.teachers.items() if t.model in SHAPES}
    student = _student(config)
    counted = [stage.groups for stage in config.stages if not stage.tokens]
    least = min((sum(group.images for group in groups) for groups in counted), default=math.inf)
    enough = least >= gpus * config.optimiser.accumulate
    planner = Planner(
        config if enough else on_all_ranks(config),
        known_specs(config),
        student.config.patch_size,
        gpus if enough else 1,
    )
    parameters = _parameters(student)
    stages = tuple(
        _stage(config, index, student, shapes, planner, gpus, GPUS[gpu], assumptions)
        for index in range(len(config.stages))
    )
    unknown = tuple(name for name in config.teachers if name not in shapes)
    return Plan(config, gpus, gpu, assumptions, parameters, stages, unknown)


def _student(config: RunConfig) -> Student:
    widths = {
        name: (summary or 1024, spatial or 1024)
        for name, (summary, spatial) in stated_widths(config).items()
    }
    with torch.device("meta"):
        return build_student(config, widths)


def _parameters(student: Student) -> dict[str, int]:
    heads = sum(p.numel() for p in student.heads.parameters())
    heads += sum(p.numel() for p in student.head_blocks.parameters())
    return {"trunk": sum(p.numel() for p in student.parameters()) - heads, "heads": heads}


def _teacher_flops(
    settings: TeacherSettings, shape: TeacherShape, size: int, planner: Planner, name: str
) -> float:
    """Forward FLOPs of one image of a group at the student's ``size``, mean over the draws."""
    choices = planner.teacher_sizes(name, size)
    return sum(teacher_view_flops(settings, shape, choice) for choice in choices) / len(choices)


def _mean(group: GroupSettings, of_size: Callable[[int], float]) -> float:
    return sum(of_size(size) for size in group.sizes) / len(group.sizes)


def _trunk_flops(config: RunConfig, shape: StudentConfig, size: int) -> float:
    """Forward FLOPs of one image, mean over the draws of windows that divide it."""
    settings = config.student
    whole = student_flops(shape, size, size)[0]
    fitting = [w for w in settings.windows if size // shape.patch_size % w == 0]
    if not fitting:
        return whole
    windowed = sum(student_flops(shape, size, size, w)[0] for w in fitting) / len(fitting)
    return whole + settings.window_probability * (windowed - whole)


def _stage(
    config: RunConfig, index: int, student: Student,
    shapes: dict[str, TeacherShape], planner: Planner, gpus: int, gpu: Gpu, given: Assumptions,
) -> StagePlan:  # fmt: skip
    stage, shape = config.stages[index], student.config
    counts = mean_images(stage, config, shape.patch_size)
    images, groups = sum(counts), list(zip(counts, stage.groups, strict=True))
    trunk = heads = 0.0
    for count, group in groups:
        trunk += count * _mean(group, lambda s: _trunk_flops(config, shape, s))
        heads += count * _mean(group, lambda s: student_flops(shape, s, s)[1])
    teachers = []
    for name, known in shapes.items():
        settings = config.teachers[name]
        flops = sum(
            count * _mean(group, lambda s: _teacher_flops(settings, known, s, planner, name))  # noqa: B023
            for count, group in groups
            if group.teachers is None or name in group.teachers
        )
        teachers.append(TeacherCost(name, known.vit.parameters, flops / images))
    rate = gpus * gpu.tflops * 1e12 * given.utilisation
    again = 1 if config.student.checkpoint_blocks else 0
    average = 1 if config.distill.mesa_weight > 0 else 0
    backward = 2 * (trunk + heads) / rate
    seconds = {
        "student": ((1 + again + average) * trunk + heads) / rate + backward,
        "teachers": sum(t.flops for t in teachers) * images / rate,
    }
    idle = _idle(planner, index)
    seconds["uneven ranks"] = sum(seconds.values()) * idle / (1 - idle)
    # Gradients travel during the last backward, shards of weights while the student runs.
    weights, gradients = sent_bytes(config, student, gpus)
    last = backward / config.optimiser.accumulate
    link = (given.link_gb_s or gpu.link_gb_s) * 1e9
    exposed = max(gradients / link - last, (weights + gradients) / link - seconds["student"])
    seconds["all-reduce"] = max(0.0, exposed)
    decoded = gpus * max(1, config.data.workers) * given.images_per_core
    seconds["data"] = max(0.0, images / decoded - sum(seconds.values()))
    return StagePlan(
        stage.name,
        stage.steps,
        round(images),
        trunk / images,
        heads / images,
        tuple(teachers),
        seconds,
        _memory(config, index, student, shapes, planner, gpus),
        weights + gradients,
        gpus,
    )


def _idle(planner: Planner, index: int) -> float:
    """Share of a stage's steps that ranks wait for one another, a mean over draws of sizes."""
    stages = planner.config.stages
    first = sum(stage.steps for stage in stages[:index])
    every = max(1, stages[index].steps // 16)
    idle = [planner.whole(first + step).idle for step in range(0, stages[index].steps, every)]
    return sum(idle) / len(idle)


def _memory(
    config: RunConfig, index: int, student: Student,
    shapes: dict[str, TeacherShape], planner: Planner, gpus: int,
) -> dict[str, int]:  # fmt: skip
    """Bytes of a GPU by part, at the largest sizes that a step of the stage may draw."""
    stage, starts = config.stages[index], {0}
    for group in stage.groups:
        if group.ranks is not None:
            starts |= {group.ranks[0], group.ranks[1] + 1} - {gpus}
    # Ranks between two starts have the same images.
    batches = (_batch_memory(config, stage, student, shapes, planner, r, gpus) for r in starts)
    activations, losses, working = max(batches, key=sum)
    teachers = sum(s.vit.parameters * _weight_bytes(config.teachers[n]) for n, s in shapes.items())
    return {
        **model_bytes(config, student, gpus),
        "teachers": teachers,
        "teachers at work": round(working),
        "activations": round(activations),
        "predictions and targets": round(losses),
    }


def _batch_memory(
    config: RunConfig, stage: StageSettings, student: Student, shapes: dict[str, TeacherShape],
    planner: Planner, rank: int, gpus: int,
) -> tuple[float, float, float]:  # fmt: skip
    """Bytes on a rank of activations, of predictions and targets, and of a teacher at work."""
    shape = student.config
    bf16 = config.optimiser.precision == "bf16"
    activations = losses = working = 0.0
    counts = mean_images(stage, config, shape.patch_size, largest=True)
    for images, group in zip(counts, stage.groups, strict=True):
        first, last = group.ranks or (0, gpus - 1)
        if not first <= rank <= last:
            continue
        here = images / ((last - first + 1) * config.optimiser.accumulate)
        size = max(group.sizes)
        if not stage.tokens:
            here = math.ceil(here)
        activations += here * activation_bytes(
            shape, size, size, bf16=bf16, checkpoint_blocks=config.student.checkpoint_blocks
        )
        patches = (size // shape.patch_size) ** 2
        for name, spec in shape.heads.items():
            # The prediction and its gradient, which the loss keeps, and the teacher's features.
            cells = patches * spec.upsample**2
            losses += here * cells * (spec.spatial or 0) * (2 * (2 if bf16 else 4))
            known = shapes.get(name)
            if known is None or (group.teachers is not None and name not in group.teachers):
                continue
            choice = max(planner.teacher_sizes(name, size))
            rows = (choice // known.vit.patch) ** 2
            wide = BYTES[config.teachers[name].dtype]
            losses += here * rows * (spec.spatial or 0) * wide
            working = max(working, here * rows * _working(known.vit) * wide)
    return activations, losses, working


def _weight_bytes(settings: TeacherSettings) -> int:
    return 1 if settings.quantise != "none" else BYTES[settings.dtype]


def _working(vit: VitShape) -> int:
    """Elements a row that a block's forward holds at once: residual, norm, hidden layer."""
    return 2 * vit.width + max(4 * vit.width, (3 if vit.gated else 2) * vit.mlp_width)


# A100-hours that PHI-S (arXiv 2410.01680) states for its ViT-B, stage by stage.
PUBLISHED = {"radio-v2.5-b": (32 * 40.0, 64 * 64.0, 128 * 68.0)}
