"""Shapes of published teachers, for plans that must do without their weights.

From the models' public configurations; a test builds each of them without weights and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastagglo.model.cost import VitShape
from fastagglo.teachers import TeacherSpec
from fastagglo.train.config import RunConfig

__all__ = ["SHAPES", "TeacherShape", "known_specs"]


@dataclass(frozen=True)
class TeacherShape:
    """A teacher's image tower.

    Attributes:
        vit: its blocks.
        input_size: the only input size in pixels, or None for any multiple of the patch.
    """

    vit: VitShape
    input_size: int | None = None


# A pooling head by attention: q, k, v, output and an MLP. Position tables have a row a patch.
_SO400M_POOL = 4 * 1152**2 + 2 * 1152 * 4304
_G_OPT_POOL = 4 * 1536**2 + 2 * 1536 * 6144

SHAPES: dict[str, TeacherShape] = {
    "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378": TeacherShape(
        VitShape(1280, 32, 5120, 14, extra=730 * 1280 + 1280 * 1024), 378
    ),
    "vit_so400m_patch14_siglip_384.webli": TeacherShape(
        VitShape(1152, 27, 4304, 14, prefix=0, extra=729 * 1152 + _SO400M_POOL), 378
    ),
    "vit_giant_patch14_reg4_dinov2.lvd142m": TeacherShape(
        VitShape(1536, 40, 4096, 14, prefix=5, gated=True, extra=1369 * 1536)
    ),
    "facebook/sam-vit-huge": TeacherShape(
        VitShape(
            1280,
            32,
            5120,
            16,
            prefix=0,
            window=14,
            global_layers=4,
            extra=4096 * 1280 + 256 * 1280 + 9 * 256**2,
        ),
        1024,
    ),
    "vit_giantopt_patch16_siglip_384.v2_webli": TeacherShape(
        VitShape(1536, 40, 6144, 16, prefix=0, extra=576 * 1536 + _G_OPT_POOL), 384
    ),
    "vit_7b_patch16_dinov3.lvd1689m": TeacherShape(
        VitShape(4096, 40, 8192, 16, prefix=5, gated=True)
    ),
    "facebook/sam3": TeacherShape(
        VitShape(1024, 32, 4736, 14, prefix=0, window=24, global_layers=4, extra=577 * 1024), 1008
    ),
}


def known_specs(config: RunConfig) -> dict[str, TeacherSpec]:
    """What the teachers of a run accept and give, of those whose shapes are known."""
    grey, found = (0.5, 0.5, 0.5), {}
    for name, teacher in config.teachers.items():
        if (shape := SHAPES.get(teacher.model)) is not None:
            size, width = shape.vit.patch, shape.vit.width
            found[name] = TeacherSpec(name, shape.input_size, size, size, grey, grey, width, width)
    return found
