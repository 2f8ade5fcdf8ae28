"""What makes a teacher faster, and by how much that changes its features.

Each step is a setting of its own, taken in this order: half precision with islands of float32,
packed attention in its blocks, weights of eight bits, torch.compile. After each the teacher looks
at the same few photographs, and its features are compared with those of the teacher as its library
runs it, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastagglo.data import GroupPlan, Source, eval_views
from fastagglo.errors import UserError, require
from fastagglo.features import Features
from fastagglo.interop import patch
from fastagglo.teachers import Teacher, TeacherSpec
from fastagglo.teachers.base import TeacherSettingError
from fastagglo.teachers.precision import set_precision
from fastagglo.train.config import RunConfig, TeacherSettings
from fastagglo.train.feature_store import relative_error

__all__ = ["Sample", "changes_features", "sample_of", "speed_up"]

Sample = Callable[[TeacherSpec, TeacherSettings], Tensor]
"""Photographs in a size that a teacher takes: ``(N, 3, H, W)`` uint8."""

_PHOTOS = 4
_TORCHAO = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def changes_features(settings: TeacherSettings) -> bool:
    """Whether a teacher is to run otherwise than its library runs it in float32."""
    return (
        settings.dtype != "float32"
        or settings.patch
        or settings.quantise != "none"
        or settings.compile
    )


def sample_of(config: RunConfig, photos: Callable[[], Source]) -> Sample:
    """The middles of a few training photos, evenly from all.

    Args:
        config: the run.
        photos: gives them when a teacher asks first.
    """

    def sample(spec: TeacherSpec, settings: TeacherSettings) -> Tensor:
        size = spec.input_size or next(iter(settings.sizes), None)
        if size is None:
            wanted = config.stages[0].groups[0].sizes[0] * settings.scale
            size = max(1, round(wanted / spec.multiple)) * spec.multiple
        plan = GroupPlan(size=size, count=_PHOTOS, teachers={spec.name: size})
        views = eval_views(photos(), plan, "photos", crops=1, limit=_PHOTOS)
        return next(iter(views)).teachers[spec.name]

    return sample


def speed_up(
    name: str, teacher: Teacher, settings: TeacherSettings, images: Tensor | None
) -> dict[str, float]:
    """Apply a teacher's settings, in place.

    Args:
        name: of the teacher in the run.
        teacher: as loaded; in float32 where ``images`` or ``keep_float32`` are given.
        settings: its settings.
        images: what it looks at before and after, or None to measure nothing.

    Returns:
        By step taken, the error of the features so far (`relative_error`'s figure: its root mean
        square over the deviation of the features): empty without ``images``.

    Raises:
        UserError: a step is impossible for this teacher, or its features are not finite after it;
            the message names the setting.
    """
    teacher.count_as_is()
    right = None if images is None else teacher(images)
    errors: dict[str, float] = {}

    def look(step: str, setting: str) -> None:
        if right is None:
            return
        try:
            found = teacher(images)
        except Exception as error:  # the compiler's are of any kind
            text = str(error).strip().splitlines()
            raise UserError(
                f"setting teachers.{name}.{setting} is {getattr(settings, setting)!r}, with which "
                f"{settings.model} does not run ({type(error).__name__}: {(text or [''])[0]}); "
                "leave it out"
            ) from error
        errors[step] = _error(found, right)
        if not errors[step] < float("inf"):
            raise UserError(
                f"setting teachers.{name}.{setting} is {getattr(settings, setting)!r}, with which "
                f"features of {settings.model} are not finite; take bfloat16, or name the modules "
                f"that need it in teachers.{name}.keep_float32"
            )

    dtype = getattr(torch, settings.dtype)
    if dtype != teacher.dtype or settings.keep_float32:
        try:
            set_precision(teacher, dtype, settings.keep_float32)
        except TeacherSettingError as error:
            raise UserError(f"setting teachers.{name}.keep_float32: {error}") from error
    if settings.dtype != "float32":
        look(settings.dtype, "dtype")
    if settings.patch:
        try:
            patch(teacher.tower, mlp=False)  # which saves memory of a backward, and there is none
        except ValueError as error:
            raise UserError(
                f"setting teachers.{name}.patch is true, but {settings.model} has no attention to "
                f"patch ({error}); set it to false"
            ) from error
        look("patch", "patch")
    if settings.quantise != "none":
        _quantise(name, teacher.tower, settings)
        look(settings.quantise, "quantise")
    if settings.compile:
        teacher.tower.compile()
        look("compile", "compile")
    teacher.feature_errors = errors
    return errors


def _quantise(name: str, tower: nn.Module, settings: TeacherSettings) -> None:
    """Weights of linear layers as int8 or FP8 with a scale each row; products stay in the dtype."""
    setting = f"setting teachers.{name}.quantise"
    torchao = require("torchao.quantization", extra="quantise", purpose=setting)
    dtype = getattr(torch, settings.dtype)

    def chosen(module: nn.Module, where: str) -> bool:
        linear = isinstance(module, nn.Linear) and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        )
        return linear and module.weight.dtype == dtype  # an island of float32 stays one

    if not any(chosen(module, where) for where, module in tower.named_modules()):
        raise UserError(
            f"{setting} is {settings.quantise!r}, but {settings.model} has no linear layers; set "
            "it to none"
        )
    torchao.quantize_(tower, getattr(torchao, _TORCHAO[settings.quantise])(), filter_fn=chosen)


def _error(found: Features, right: Features) -> float:
    count = len(next(v for v in (found.summary, found.spatial) if v is not None))
    views = [
        Features(*(None if v is None else v[row] for v in (found.summary, found.spatial)))
        for row in range(count)
    ]
    return max(error or 0.0 for error in relative_error(right, views))


def described(errors: dict[str, float]) -> str:
    """Errors in words, for a log."""
    return ", ".join(f"{step} {error:.2g}" for step, error in errors.items())


def report_of(teachers: Iterable[tuple[str, dict[str, float]]]) -> list[str]:
    """A line for each teacher that runs otherwise than its library runs it."""
    return [
        f"{name}: features are off by {described(errors)} of their deviation (each step with those "
        "before it, against float32)"
        for name, errors in teachers
        if errors
    ]
