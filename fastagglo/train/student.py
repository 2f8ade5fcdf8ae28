"""The student that a run's settings describe."""

from __future__ import annotations

from collections.abc import Mapping

from fastagglo.model import HeadSpec, Student
from fastagglo.model.config import StudentConfig, preset
from fastagglo.train.config import RunConfig

Widths = Mapping[str, tuple[int | None, int | None]]


def student_config(config: RunConfig, widths: Widths) -> StudentConfig:
    """Sizes of a run's student, with one head per teacher.

    Args:
        config: the run.
        widths: summary and spatial width of each teacher, by name.

    Raises:
        ValueError: settings that contradict each other.
    """
    settings = config.student
    heads = {
        name: HeadSpec(
            summary=widths[name][0] if teacher.summary_weight > 0 else None,
            spatial=widths[name][1] if teacher.spatial_weight > 0 else None,
            hidden=teacher.head.hidden,
            blocks=teacher.head.blocks,
            upsample=teacher.head.upsample,
            pre_norm=teacher.head.pre_norm,
            spatial_blocks=teacher.head.spatial_blocks,
        )
        for name, teacher in config.teachers.items()
    }
    overrides = {
        name: getattr(settings, name)
        for name in ("patch_size", "depth", "mlp", "global_layers", "max_resolution")
        if getattr(settings, name) is not None
    }
    return preset(
        settings.preset,
        heads=heads,
        registers=settings.registers,
        drop_path=settings.drop_path,
        **overrides,
    )


def build_student(config: RunConfig, widths: Widths) -> Student:
    """The student of a run, with fresh weights; arguments and errors of `student_config`."""
    student = Student(student_config(config, widths))
    student.checkpoint_blocks = config.student.checkpoint_blocks
    return student


def stated_widths(config: RunConfig) -> dict[str, tuple[int | None, int | None]]:
    """Widths of the teachers as the recipe states them, without loading any."""
    return {n: (t.summary_width, t.spatial_width) for n, t in config.teachers.items()}
