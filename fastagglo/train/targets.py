"""Teacher features for a batch of mixed resolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastagglo.data import GroupViews
from fastagglo.distill import mosaic
from fastagglo.features import Features
from fastagglo.teachers import Teacher, load_teacher
from fastagglo.train.config import RunConfig, TeacherSettings
from fastagglo.train.teacher_speed import Sample, changes_features, speed_up


def load_teachers(
    config: RunConfig, device: torch.device, sample: Sample | None = None
) -> dict[str, Teacher]:
    """Build every teacher of a run, in the recipe's order; see `load_one_teacher`."""
    return {n: load_one_teacher(n, t, device, sample) for n, t in config.teachers.items()}


def load_one_teacher(
    name: str, settings: TeacherSettings, device: torch.device, sample: Sample | None = None
) -> Teacher:
    """Build the teacher that a recipe calls ``name``, in the type and as fast as it asks for.

    Args:
        name: in the recipe.
        settings: of the teacher.
        device: where it lives.
        sample: photographs to measure by how much its features change for that
            (``feature_errors``), or None to measure nothing.

    Raises:
        UserError: it cannot be loaded, or a setting is impossible for it.
    """
    changes = changes_features(settings)
    # What is measured, or has islands of float32, is loaded in float32 first.
    whole = changes and (sample is not None or bool(settings.keep_float32))
    teacher = load_teacher(
        settings.source,
        settings.model,
        name=name,
        checkpoint=settings.checkpoint,
        layer=settings.layer,
        dtype=torch.float32 if whole else getattr(torch, settings.dtype),
        device=device,
        summary=settings.summary_weight > 0,
    )
    if changes:
        images = None if sample is None else sample(teacher.spec, settings).to(device)
        speed_up(name, teacher, settings, images)
    return teacher


def teacher_features(
    teachers: Mapping[str, Teacher],
    groups: Sequence[GroupViews],
    settings: Mapping[str, TeacherSettings],
) -> list[dict[str, Features]]:
    """Each teacher's features of each image group that it has views of.

    Groups that a teacher sees at the same size go through it in one call; a mosaic teacher sees
    groups of small images as tiles of its own input size, and then has spatial features only.
    """
    found: list[dict[str, Features]] = [{} for _ in groups]
    for name, teacher in teachers.items():
        by_size: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            if name not in group.teachers:
                continue
            by_size.setdefault(group.teachers[name].shape[-1], []).append(index)
        for size, members in by_size.items():
            views = [groups[index].teachers[name] for index in members]
            images = torch.cat(views) if len(views) > 1 else views[0]
            canvas = teacher.spec.input_size
            if settings[name].mosaic and canvas is not None and size < canvas:
                features = _through_mosaic(teacher, images, canvas)
            else:
                features = teacher(images)
            counts = [len(view) for view in views]
            summaries = _split(features.summary, counts)
            spatials = _split(features.spatial, counts)
            for index, summary, spatial in zip(members, summaries, spatials, strict=True):
                found[index][name] = Features(summary, spatial)
    return found


def finite_teachers(targets: Sequence[Mapping[str, Features]]) -> dict[str, Tensor]:
    """For each teacher a 0-d bool tensor: are all its features of this batch finite?"""
    finite: dict[str, Tensor] = {}
    for group in targets:
        for name, features in group.items():
            for value in (features.summary, features.spatial):
                if value is not None:
                    # A sum is finite unless a term is not (or fp32 overflows, as bad a target).
                    ok = value.sum(dtype=torch.float32).isfinite()
                    finite[name] = finite[name] & ok if name in finite else ok
    return finite


def _through_mosaic(teacher: Teacher, images: Tensor, canvas: int) -> Features:
    plan = mosaic.mosaic_plan(images.shape[-1], canvas, teacher.spec.patch_size)
    features = teacher(mosaic.assemble(images, plan))
    return Features(None, mosaic.split(features.spatial, plan, len(images)))


def _split(value: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if value is None else value.split(counts)
