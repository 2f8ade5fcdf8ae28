"""What an image costs in a training step, by arithmetic: student, heads and teachers."""

from __future__ import annotations

from collections.abc import Mapping

from fastagglo.data import GroupPlan
from fastagglo.distill.mosaic import mosaic_plan
from fastagglo.model.cost import VitShape, student_flops, vit_flops
from fastagglo.teachers import TeacherSpec
from fastagglo.train.config import RunConfig, TeacherSettings
from fastagglo.train.student import student_config
from fastagglo.train.teacher_shapes import SHAPES, TeacherShape


def teacher_view_flops(settings: TeacherSettings, shape: TeacherShape, size: int) -> float:
    """Forward FLOPs of a teacher for one image that it sees at ``size`` pixels.

    An image that is a tile of a mosaic costs its share of the canvas.
    """
    canvas = shape.input_size
    if settings.mosaic and canvas is not None and size < canvas:
        tiles = mosaic_plan(size, canvas, shape.vit.patch).per_canvas
        return vit_flops(shape.vit, canvas, canvas) / tiles
    return vit_flops(shape.vit, size, size)


class ImageCosts:
    """FLOPs of one image of a group, forward and backward: linear in its tokens and, through
    attention, in their squares.

    A teacher whose shape is not known counts as a 12-block vision transformer that is as wide as
    its features. With a feature cache teachers cost nothing.

    Args:
        config: the run.
        specs: what each teacher accepts and gives, by name.
    """

    def __init__(self, config: RunConfig, specs: Mapping[str, TeacherSpec]) -> None:
        self.config = config
        known = {name: (spec.summary, spec.spatial) for name, spec in specs.items()}
        widths = {name: known.get(name, (1024, 1024)) for name in config.teachers}
        self.student = student_config(config, widths)
        self.shapes = {
            name: SHAPES.get(config.teachers[name].model) or _guess(spec)
            for name, spec in specs.items()
        }

    def __call__(self, group: GroupPlan, window: int | None) -> float:
        """Of one image, in a step whose windowed layers have this window."""
        config = self.config
        trunk, heads = student_flops(self.student, group.size, group.size, window)
        again = config.student.checkpoint_blocks + (config.distill.mesa_weight > 0)
        total = (3 + again) * trunk + 3 * heads
        if config.cache.folder is None:
            for name, size in group.teachers.items():
                if name in self.shapes:  # not the average student's view
                    total += teacher_view_flops(config.teachers[name], self.shapes[name], size)
        return float(total)


def _guess(spec: TeacherSpec) -> TeacherShape:
    width = spec.spatial or spec.summary or 768
    return TeacherShape(VitShape(width, 12, 4 * width, spec.patch_size), spec.input_size)
