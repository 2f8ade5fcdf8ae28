"""Every setting of a run: one tree of dataclasses, read from a recipe file and the command line.

A recipe is a TOML file with the same names as the command line: ``[student] preset = "B"`` in the
file is ``--student.preset B`` in the shell. The shell wins over the file, the file over the
defaults below. The resolved configuration is saved with the run as a recipe, ``config.toml``, so
that any run can be repeated or varied.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastagglo.errors import UserError, suggestion

# pydantic (which validates recipe files) reads this from each dataclass: unknown keys are errors.
_STRICT = {"extra": "forbid"}

# The average student sees crops of its own, as one more view beside the teachers'.
EMA_VIEW = "ema"

LossKind = Literal["mse", "cosine", "smooth_l1", "cosine_smooth_l1", "angular"]


@dataclass(frozen=True)
class StudentSettings:
    """The vision transformer that learns."""

    __pydantic_config__ = _STRICT

    preset: Literal["tiny", "B", "L", "SO400M", "H", "g"] = "tiny"
    """Its width and depth: tiny 192 and 6, B 768 and 12, L 1024 and 24, SO400M 1152 and 27, H 1280
    and 32, g 1536 and 40 (patch 14)."""
    patch_size: int | None = None
    """Patch side in pixels; the preset's own if not given."""
    depth: int | None = None
    """Number of blocks; the preset's own if not given."""
    mlp: Literal["gelu", "swiglu"] | None = None
    """Kind of MLP in each block; the preset's own if not given."""
    registers: int = 4
    """Register tokens beside one CLS slot per teacher."""
    max_resolution: int | None = None
    """Side in pixels that the position table covers; the preset's own if not given."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block (linear from 0)."""
    windows: tuple[int, ...] = ()
    """ViTDet window sides in tokens to draw from; none means global attention in every block."""
    window_probability: float = 0.0
    """Probability of a step with windowed attention (of those windows that divide its images)."""
    global_layers: int | tuple[int, ...] | None = None
    """How many blocks stay global in windowed steps, or which (from 0), beside the last; the
    preset's own if not given."""
    init: str | None = None
    """Folder of a saved student, or a RADIO checkpoint, whose trunk and heads are the start."""
    checkpoint_blocks: bool = False
    """Recompute each block's activations in the backward pass, to save memory."""
    compile: bool = False
    """Compile the student by torch.compile, once for all mixes; needs `tokens` in every stage."""
    graphs: bool = False
    """Replay the student's step as a CUDA graph, on one GPU; needs `tokens` in every stage."""


@dataclass(frozen=True)
class HeadSettings:
    """The adaptor head that maps student tokens to one teacher's features."""

    __pydantic_config__ = _STRICT

    hidden: int | None = None
    """Hidden width; the student's width if not given."""
    blocks: int = 0
    """Residual blocks between the first and the last layer."""
    upsample: int = 1
    """The spatial grid is refined by this factor (pixel shuffle)."""
    pre_norm: bool = False
    """LayerNorm and GELU before the first layer."""
    spatial_blocks: int = 0
    """Transformer blocks before the spatial head (C-RADIOv4 uses 2)."""


@dataclass(frozen=True)
class TeacherSettings:
    """One frozen teacher: where it comes from, what it sees, how its features are matched."""

    __pydantic_config__ = _STRICT

    source: Literal["builtin", "timm", "open_clip", "transformers"] = "builtin"
    """The library that builds it; builtin teachers come with the extra `demo`."""
    model: str = ""
    """Its name there, e.g. efficientnet-lite0 or facebook/dinov2-base."""
    checkpoint: str | None = None
    """Local folder or file of weights, instead of the library's download."""
    layer: str | None = None
    """Builtin teachers: the feature map to learn, e.g. stride16."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type the teacher runs in."""
    keep_float32: tuple[str, ...] = ()
    """Modules that stay in float32 all the same, by name or pattern, e.g. "*.norm2"."""
    patch: bool = False
    """Run its self-attention on fastagglo's packed attention."""
    quantise: Literal["none", "int8", "fp8"] = "none"
    """Weights of its linear layers in eight bits, by torchao; the error is reported first."""
    compile: bool = False
    """Run it through torch.compile."""
    sizes: tuple[int, ...] = ()
    """Input sizes in pixels, one drawn each step; none means the student's size times `scale`."""
    scale: float = 1.0
    """Input size over the student's; 0.875 gives a patch-14 teacher the grid of patch 16."""
    mosaic: bool = False
    """Tile small images into one input of a teacher that only takes one large size."""
    summary_width: int | None = None
    """Width of its summary; known once it is loaded, stated where a plan must do without it."""
    spatial_width: int | None = None
    """Width of its spatial features; as above."""
    summary_weight: float = 1.0
    """Weight of the summary loss; 0 leaves the summary head out."""
    spatial_weight: float = 1.0
    """Weight of the spatial loss; 0 leaves the spatial head out."""
    summary_loss: LossKind = "cosine"
    """angular is C-RADIOv4's, balanced by the dispersion of the teacher's summaries."""
    spatial_loss: LossKind = "mse"
    """mse with PHI-S is RADIOv2.5's, cosine_smooth_l1 AM-RADIO's."""
    normaliser: Literal["phi-s", "standardize", "global", "none"] = "phi-s"
    """How the spatial targets are normalised."""
    resize: Literal["larger", "student", "teacher"] = "larger"
    """The grid on which unequal grids are compared."""
    head: HeadSettings = field(default_factory=HeadSettings)


@dataclass(frozen=True)
class DataSettings:
    """Images and how they are cropped."""

    __pydantic_config__ = _STRICT

    images: tuple[str, ...] = ("builtin",)
    """Where images come from: builtin, a folder, or tar shards such as shards/{000..099}.tar."""
    weights: tuple[float, ...] = ()
    """Sampling weight of each of `images`; equal if not given."""
    holdout_photos: float | None = None
    """Share of the photos never trained on; if not given 0.1, or the built-in photos' own four."""
    holdout_region: float = 0.0
    """Right-hand share of each training photo that no training crop touches."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Least and largest area of a crop, as a share of the photo."""
    min_size: int = 0
    """Photos with a shorter side below this many pixels are skipped."""
    uniform_std: float = 2.0
    """Photos whose pixel values deviate less than this (of 255) are skipped as uniform."""
    drop_duplicates: bool = False
    """Skip files with equal bytes; reads each file once at the start."""
    crops_per_photo: int = 0
    """Each photo shows so many crops, the same in every run, one an epoch; 0 draws all anew."""
    crop_seed: int = 0
    """Of these fixed crops; the run's own seed does not move them."""
    max_bad_share: float = 0.1
    """A larger share of unreadable images stops the run."""
    workers: int = 0
    """Worker processes; 0 decodes in the training process."""
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    """nvjpeg: a CUDA device decodes and crops JPEGs, by torchvision; other files come as ever."""


@dataclass(frozen=True)
class GroupSettings:
    """Images of one step that share a resolution."""

    __pydantic_config__ = _STRICT

    images: int = 8
    """Images a step, over all ranks and micro-steps."""
    sizes: tuple[int, ...] = (128,)
    """Resolutions in pixels; one is drawn each step."""
    ranks: tuple[int, int] | None = None
    """First and last rank that take these images; all ranks if not given."""
    teachers: tuple[str, ...] | None = None
    """Names of the teachers that see these images; all if not given."""


@dataclass(frozen=True)
class StageSettings:
    """A stretch of training with its own resolutions and schedule."""

    __pydantic_config__ = _STRICT

    name: str = "main"
    steps: int = 100
    groups: tuple[GroupSettings, ...] = (GroupSettings(),)
    """The resolutions that are mixed in each step's batch."""
    tokens: int = 0
    """Fill so many student tokens a step, over all ranks and micro-steps: the groups' `images` are
    then proportions, and the student's shapes constant. 0 counts images."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    final_lr_ratio: float = 0.0
    """The cosine ends at this share of the peak."""
    phi_s_steps: int = 0
    """Steps over which the statistics of each teacher are fitted anew; 0 keeps those there are."""
    freeze_trunk_steps: int = 0
    """Steps in which only the heads learn, while the statistics settle."""


@dataclass(frozen=True)
class OptimiserSettings:
    """Optimiser and numerics."""

    __pydantic_config__ = _STRICT

    name: Literal["adamw", "lamb"] = "adamw"
    weight_decay: float = 0.02
    """Applied to matrices only: not to norms, biases, tokens and positions."""
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    """Learning rate of a block over that of the block above it."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    accumulate: int = 1
    """Micro-steps a step: the batch is the same, its memory divided."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the student under autocast."""


@dataclass(frozen=True)
class DistillSettings:
    """How the teachers' losses are put together."""

    __pydantic_config__ = _STRICT

    balance: Literal["fixed", "uncertainty", "adaloss", "ratio"] = "fixed"
    """How teachers are weighted against one another, beside their own weights."""
    teacher_drop: float = 0.0
    """Per image, the probability of dropping each teacher but the one with the largest loss."""
    shift_std: float = 0.0
    """Shift-equivariant spatial loss: std in patches of the independent shifts of each view."""
    ema_decay: float = 0.0
    """Decay of an average of the student, exported as student-average beside it; 0 keeps none."""
    mesa_weight: float = 0.0
    """Weight of the match between student and average student; needs `ema_decay`."""


@dataclass(frozen=True)
class DistributedSettings:
    """How several processes, started by torchrun, share one model."""

    __pydantic_config__ = _STRICT

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """ddp keeps the whole model on every rank; fsdp2 a part of weights, gradients and averages."""
    shard: int = 0
    """fsdp2: ranks that share one copy of the model, such as the GPUs of a node; other ranks hold
    further copies. 0 shares one among all."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """What gradients are averaged in over ranks; bfloat16 halves the traffic."""


@dataclass(frozen=True)
class CacheSettings:
    """Teacher features kept on disk, so that later epochs and students skip the teachers."""

    __pydantic_config__ = _STRICT

    folder: str | None = None
    """Where they are; any number of runs may share it. Needs data.crops_per_photo."""
    storage: Literal["teacher", "bfloat16", "float16", "int8"] = "teacher"
    """teacher keeps each teacher's own dtype, bit by bit; int8 scales each channel of an image."""
    store: bool = True
    """Add what is missing; without it the folder is only read."""


@dataclass(frozen=True)
class EvalSettings:
    """Held-out figures and pictures."""

    __pydantic_config__ = _STRICT

    points: int = 3
    """How often the held-out figures are taken, evenly from the start to the end; 0 for never."""
    sizes: tuple[int, ...] = ()
    """Student resolutions in pixels; those of the stages if not given."""
    photos: int = 64
    """At most this many photos of each kind."""
    pictures: int = 4
    """Photos in the PCA pictures; 0 draws none."""


@dataclass(frozen=True)
class LogSettings:
    """Progress, metrics and checkpoints."""

    __pydantic_config__ = _STRICT

    interval: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always has one."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: bool = True
    """Show the live progress bar."""
    peak_tflops: float = 0.0
    """TFLOP/s of a device that MFU is a share of; 0 measures matrix products at the start."""
    max_bad_steps: int = 10
    """Steps in a row with a loss that is not finite before the run stops."""


@dataclass(frozen=True)
class RunConfig:
    """Train one vision transformer from several frozen teachers at many resolutions at once."""

    __pydantic_config__ = _STRICT

    recipe: str = "demo"
    """Name of a recipe that ships with fastagglo, or a path of a TOML file."""
    out: str | None = None
    """Folder of the run; runs/<recipe> if not given."""
    resume: str | None = None
    """Folder of an earlier run to go on with; no other setting is needed."""
    overwrite: bool = False
    """Replace a run that is already in the output folder."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    teacher_stream: bool = True
    """On CUDA the teachers see the next batch on a stream of their own, while the student goes
    backward; takes the memory of one more batch of features."""
    threads: int = 0
    """CPU threads of torch; 0 takes the number of cores."""
    student: StudentSettings = field(default_factory=StudentSettings)
    teachers: dict[str, TeacherSettings] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    stages: tuple[StageSettings, ...] = (StageSettings(),)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def total_steps(self) -> int:
        """Optimiser steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Index of the stage that ``step`` belongs to, and the step's number within it.

        The step after the last belongs to the last stage.
        """
        for index, stage in enumerate(self.stages):
            if step < stage.steps or index == len(self.stages) - 1:
                return index, step
            step -= stage.steps
        raise ValueError("a run has at least one stage")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, without those that are None (TOML has no word for None)."""
        return _without_none(dataclasses.asdict(self))


def check_config(config: RunConfig) -> None:
    """Reject settings that are well typed but make no sense, before anything is loaded.

    Raises:
        UserError: names the setting, its value and what is accepted.
    """

    def refuse(setting: str, value: object, expected: str) -> None:
        raise UserError(f"setting {setting} is {value!r}: {expected}")

    def in_range(setting: str, value: float, low: float, high: float = float("inf")) -> None:
        if not low <= value <= high or math.isinf(value):
            most = f" and at most {high:g}" if high != float("inf") else " and finite"
            refuse(setting, value, f"it must be at least {low:g}{most}")

    if not config.teachers:
        refuse(
            "teachers", {}, "a run needs at least one teacher, e.g. [teachers.dino] in the recipe"
        )
    if not config.stages:
        refuse("stages", (), "a run needs at least one stage")
    for name, teacher in config.teachers.items():
        here = f"teachers.{name}"
        if not name.isidentifier():
            refuse("teachers", name, "a teacher's name is made of letters, digits and underscores")
        if name == EMA_VIEW:
            refuse("teachers", name, "this name is taken by the average of the student")
        if not teacher.model:
            refuse(f"{here}.model", "", "name the model to load")
        for setting in ("summary_weight", "spatial_weight", "scale"):
            in_range(f"{here}.{setting}", getattr(teacher, setting), 0)
        if teacher.summary_weight == teacher.spatial_weight == 0:
            refuse(
                f"{here}.spatial_weight", 0.0, "summary_weight or spatial_weight must be above 0"
            )
        if teacher.spatial_loss == "angular":
            refuse(f"{here}.spatial_loss", "angular", "the angular loss is for summaries")
        if teacher.mosaic and teacher.spatial_weight == 0:
            refuse(f"{here}.mosaic", True, "a mosaic gives spatial features only: spatial_weight")
        if teacher.keep_float32 and teacher.dtype == "float32":
            refuse(
                f"{here}.keep_float32",
                teacher.keep_float32,
                "with dtype = float32 all modules stay in it; leave it out",
            )
        if teacher.scale == 0:
            refuse(f"{here}.scale", teacher.scale, "it must be above 0")
        if teacher.mosaic and config.distill.shift_std > 0 and len(teacher.sizes) > 1:
            refuse(f"{here}.sizes", teacher.sizes, "a mosaic teacher has one input size")
        for size in teacher.sizes:
            in_range(f"{here}.sizes", size, 1)
        for setting, least in (
            ("hidden", 1),
            ("blocks", 0),
            ("upsample", 1),
            ("spatial_blocks", 0),
        ):
            if (value := getattr(teacher.head, setting)) is not None:
                in_range(f"{here}.head.{setting}", value, least)
    for index, stage in enumerate(config.stages):
        here = f"stages.{index}"
        in_range(f"{here}.steps", stage.steps, 1)
        in_range(f"{here}.warmup_steps", stage.warmup_steps, 0)
        in_range(f"{here}.phi_s_steps", stage.phi_s_steps, 0, stage.steps)
        in_range(f"{here}.freeze_trunk_steps", stage.freeze_trunk_steps, 0)
        in_range(f"{here}.final_lr_ratio", stage.final_lr_ratio, 0, 1)
        in_range(f"{here}.lr", stage.lr, 0)
        if stage.lr == 0:
            refuse(f"{here}.lr", stage.lr, "it must be above 0")
        in_range(f"{here}.tokens", stage.tokens, 0)
        for setting in ("compile", "graphs"):
            if getattr(config.student, setting) and not stage.tokens:
                refuse(
                    f"{here}.tokens",
                    0,
                    f"student.{setting} needs constant shapes; give every stage a number of tokens",
                )
        if not stage.groups:
            refuse(f"{here}.groups", (), "a stage needs at least one group of images")
        for number, group in enumerate(stage.groups):
            in_range(f"{here}.groups.{number}.images", group.images, 1)
            if not group.sizes:
                refuse(
                    f"{here}.groups.{number}.sizes", (), "give at least one resolution in pixels"
                )
            if group.ranks is not None and not 0 <= group.ranks[0] <= group.ranks[1]:
                refuse(
                    f"{here}.groups.{number}.ranks",
                    group.ranks,
                    "give the first and the last rank, counted from 0",
                )
            if group.ranks is not None and stage.tokens:
                refuse(
                    f"{here}.groups.{number}.ranks",
                    group.ranks,
                    "a stage with a number of tokens fills all ranks alike; leave one of them out",
                )
            if group.teachers is not None:
                _check_group_teachers(f"{here}.groups.{number}", group.teachers, config)
        for name in config.teachers:
            if not any(g.teachers is None or name in g.teachers for g in stage.groups):
                raise UserError(
                    f"setting {here}.groups has no images for teacher {name!r}; add it to the "
                    "teachers of a group"
                )
    if config.stages[0].phi_s_steps == 0 and any(
        t.normaliser != "none" and t.spatial_weight for t in config.teachers.values()
    ):
        refuse(
            "stages.0.phi_s_steps",
            0,
            "the first stage must fit the teachers' statistics (or set normaliser = none)",
        )
    data = config.data
    if data.weights and len(data.weights) != len(data.images):
        refuse(
            "data.weights",
            data.weights,
            f"give one weight for each of the {len(data.images)} data.images",
        )
    if not data.images:
        refuse("data.images", (), "give builtin, a folder or tar shards")
    for weight in data.weights:
        in_range("data.weights", weight, 0)
        if weight == 0:
            refuse("data.weights", weight, "it must be above 0; leave the images out instead")
    in_range("data.min_size", data.min_size, 0)
    in_range("data.uniform_std", data.uniform_std, 0, 255)
    in_range("data.holdout_photos", data.holdout_photos or 0, 0, 0.9)
    in_range("data.holdout_region", data.holdout_region, 0, 0.9)
    in_range("data.crops_per_photo", data.crops_per_photo, 0)
    in_range("data.crop_seed", data.crop_seed, 0)
    if config.cache.folder == "":
        refuse("cache.folder", "", "give a folder, or leave it out")
    if config.cache.folder is not None and data.crops_per_photo == 0:
        refuse(
            "data.crops_per_photo",
            0,
            "with cache.folder it must be at least 1, e.g. 4: of crops that are drawn anew none "
            "comes twice",
        )
    in_range("data.max_bad_share", data.max_bad_share, 0, 1)
    if data.decoder == "nvjpeg":
        for setting, value in (
            ("data.uniform_std", data.uniform_std),
            ("data.crops_per_photo", data.crops_per_photo),
            ("distill.shift_std", config.distill.shift_std),
        ):
            if value > 0:
                refuse(setting, value, "with data.decoder nvjpeg it must be 0")
    in_range("data.workers", data.workers, 0)
    if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        refuse(
            "data.crop_scale",
            data.crop_scale,
            "give least and largest area with 0 < least <= largest <= 1",
        )
    in_range("seed", config.seed, 0)
    in_range("threads", config.threads, 0)
    for beta in config.optimiser.betas:
        in_range("optimiser.betas", beta, 0, 0.999999)
    in_range("optimiser.accumulate", config.optimiser.accumulate, 1)
    in_range("optimiser.clip", config.optimiser.clip, 0)
    in_range("optimiser.weight_decay", config.optimiser.weight_decay, 0)
    in_range("optimiser.layer_decay", config.optimiser.layer_decay, 0.01, 1)
    for setting, least in (
        ("registers", 0),
        ("depth", 1),
        ("patch_size", 1),
        ("max_resolution", 1),
    ):
        if (value := getattr(config.student, setting)) is not None:
            in_range(f"student.{setting}", value, least)
    layers = config.student.global_layers
    if isinstance(layers, int):
        in_range("student.global_layers", layers, 1)
    for layer in layers if isinstance(layers, tuple) else ():
        in_range("student.global_layers", layer, 0)
    for window in config.student.windows:
        in_range("student.windows", window, 1)
    in_range("student.window_probability", config.student.window_probability, 0, 1)
    in_range("student.drop_path", config.student.drop_path, 0, 0.99)
    if config.student.window_probability > 0 and not config.student.windows:
        refuse("student.windows", (), "window_probability needs the window sides to draw from")
    in_range("distill.teacher_drop", config.distill.teacher_drop, 0, 1)
    in_range("distill.ema_decay", config.distill.ema_decay, 0, 0.999999)
    in_range("distill.shift_std", config.distill.shift_std, 0)
    in_range("distill.mesa_weight", config.distill.mesa_weight, 0)
    if config.distill.mesa_weight > 0 and config.distill.ema_decay == 0:
        refuse(
            "distill.mesa_weight", config.distill.mesa_weight, "it needs distill.ema_decay above 0"
        )
    if config.student.compile and config.distributed.strategy == "fsdp2":
        refuse(
            "student.compile",
            True,
            "with distributed.strategy fsdp2 weights come and go while the student runs, which the "
            "compiled one does not know; use strategy ddp or set it to false",
        )
    shard = config.distributed.shard
    in_range("distributed.shard", shard, 0)
    if shard == 1:
        refuse("distributed.shard", 1, "a whole copy on every rank is strategy ddp; give 2 or more")
    if shard and config.distributed.strategy == "ddp":
        refuse("distributed.shard", shard, "with strategy ddp nothing is sharded; choose fsdp2")
    in_range("log.interval", config.log.interval, 1)
    in_range("log.peak_tflops", config.log.peak_tflops, 0)
    in_range("log.checkpoint_every", config.log.checkpoint_every, 1)
    in_range("log.max_bad_steps", config.log.max_bad_steps, 1)
    in_range("eval.points", config.eval.points, 0)
    in_range("eval.photos", config.eval.photos, 1)
    in_range("eval.pictures", config.eval.pictures, 0)


def _check_group_teachers(here: str, names: tuple[str, ...], config: RunConfig) -> None:
    for name in names:
        if name not in config.teachers:
            raise UserError(
                f"setting {here}.teachers has {name!r}: the teachers of this run are "
                f"{', '.join(config.teachers)}" + suggestion(name, config.teachers)
            )
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"setting {here}.teachers is {names!r}: give one or more different teachers, or leave "
            "it out for all"
        )


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value
