"""Mosaics: small images share the canvas of a teacher with a large, fixed input.

A teacher such as SAM takes one resolution only, say 1024 or 1152 px. Showing it a 256 px image
costs as much as a full one, so RADIOv2.5 (arXiv 2412.07679) lays several small images side by side
on one canvas and cuts the teacher's feature map apart again. Only spatial features make sense then:
the summary of a mosaic belongs to no image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MosaicPlan:
    """How square images lie on a square canvas; made by :func:`mosaic_plan`.

    Attributes:
        image_px: side of an image.
        canvas_px: side of the canvas, the teacher's input size.
        patch: the teacher's stride in px: one cell of its feature map.
        tiles: images along one side of the canvas.
    """

    image_px: int
    canvas_px: int
    patch: int
    tiles: int

    @property
    def per_canvas(self) -> int:
        """Images on one canvas."""
        return self.tiles**2

    @property
    def cells(self) -> int:
        """Cells of the feature map along one side of an image: the image rounded up to patches."""
        return -(-self.image_px // self.patch)

    @property
    def pitch(self) -> int:
        """Distance in px from one image to the next, a whole number of patches."""
        return self.cells * self.patch

    @property
    def grid(self) -> int:
        """Cells of the feature map along one side of the canvas."""
        return self.canvas_px // self.patch

    def canvases(self, images: int) -> int:
        """Canvases that this many images fill; the last one may have empty tiles."""
        return -(-images // self.per_canvas)

    def valid(self, device: torch.device | str | None = None) -> Tensor | None:
        """None if images cover all their cells, else ``(cells, cells)`` bool, True where they do.

        Where ``image_px`` is not a multiple of ``patch``, the last row and column of cells see some
        of the padding. The cells then also reach ``pitch - image_px`` px beyond the image, so that
        the two grids have slightly different extents; give the teacher a multiple of its patch to
        avoid both.
        """
        if self.pitch == self.image_px:
            return None
        mask = torch.zeros(self.cells, self.cells, dtype=torch.bool, device=device)
        whole = self.image_px // self.patch
        mask[:whole, :whole] = True
        return mask


def mosaic_plan(image_px: int, canvas_px: int, patch: int) -> MosaicPlan:
    """Plans mosaics of ``image_px`` images for a teacher of ``canvas_px`` px.

    Every image starts on a cell of the teacher's grid: images are padded on the right and at the
    bottom to whole patches, and ``canvas_px // that`` of them fit along a side. On 1152 px with
    patch 16: 128 px images 9 x 9, 192 6 x 6, 224 5 x 5, 256 4 x 4, 384 3 x 3, 432 2 x 2. The rest
    of the canvas, to the right and at the bottom, stays empty. One image a canvas is a valid plan.

    Args:
        image_px: side of the images in px, as the teacher shall see them.
        canvas_px: the teacher's input size, a multiple of ``patch``.
        patch: the teacher's stride: px per cell of its feature map.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is not positive, the canvas is not a whole number of patches, or an image
            does not fit on it.
    """
    for name, value in (("image_px", image_px), ("canvas_px", canvas_px), ("patch", patch)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected a positive number of px, got {value}")
    if canvas_px % patch:
        raise ValueError(
            f"canvas_px: expected a multiple of the patch of {patch} px, got {canvas_px}"
        )
    if image_px > canvas_px:
        raise ValueError(
            f"image_px: {image_px} px images do not fit on a canvas of {canvas_px} px; resize them"
        )
    pitch = -(-image_px // patch) * patch
    return MosaicPlan(image_px, canvas_px, patch, canvas_px // pitch)


def assemble(images: Tensor, plan: MosaicPlan) -> Tensor:
    """Lays images on canvases, row by row, in order.

    Args:
        images: ``(N, channels, image_px, image_px)``, any dtype; the padding is zero, so pass
            images before their mean is subtracted if black padding is meant.
        plan: from :func:`mosaic_plan`.

    Returns:
        ``(plan.canvases(N), channels, canvas_px, canvas_px)``, same dtype and device.

    Raises:
        ValueError: the images do not have the shape of the plan.
    """
    side = plan.image_px
    if images.dim() != 4 or images.shape[2:] != (side, side):
        raise ValueError(f"images: expected (N, 3, {side}, {side}), got {tuple(images.shape)}")
    count, channels = images.shape[:2]
    m, n, pad = plan.canvases(count), plan.tiles, plan.pitch - side
    tiles = F.pad(images, (0, pad, 0, pad, 0, 0, 0, m * plan.per_canvas - count))
    tiles = tiles.reshape(m, n, n, channels, plan.pitch, plan.pitch)
    canvas = tiles.permute(0, 3, 1, 4, 2, 5).reshape(m, channels, n * plan.pitch, n * plan.pitch)
    rest = plan.canvas_px - n * plan.pitch
    return F.pad(canvas, (0, rest, 0, rest))


def split(features: Tensor, plan: MosaicPlan, count: int) -> Tensor:
    """Cuts the teacher's feature maps of canvases apart, one window per image.

    Args:
        features: ``(plan.canvases(count), plan.grid, plan.grid, C)``.
        plan: the one given to :func:`assemble`.
        count: the number of images that were assembled; empty tiles are not returned.

    Returns:
        ``(count, plan.cells, plan.cells, C)``; see :meth:`MosaicPlan.valid` for images that are not
        whole patches.

    Raises:
        ValueError: the features do not have that shape.
    """
    m, n, c = plan.canvases(count), plan.tiles, plan.cells
    if features.dim() != 4 or features.shape[:3] != (m, plan.grid, plan.grid):
        raise ValueError(
            f"features: expected ({m}, {plan.grid}, {plan.grid}, C) for {count} images, "
            f"got {tuple(features.shape)}"
        )
    windows = features[:, : n * c, : n * c].reshape(m, n, c, n, c, features.shape[-1])
    return windows.permute(0, 1, 3, 2, 4, 5).reshape(m * n * n, c, c, features.shape[-1])[:count]
