"""A batch of mixed resolutions, and where its tokens lie in one packed matrix.

The student never loops over images or pads: a batch is one (T, C) matrix, each image a run of
``[CLS..., registers..., patches row by row]`` rows, images in batch order (NaViT's packing,
arXiv 2307.06304, without its padding). All index arithmetic is done once per mix of sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastagglo.model.config import PIXEL_MEAN, PIXEL_STD
from fastagglo.ops.exporting import exporting
from fastagglo.ops.head_mlp import check_int
from fastagglo.ops.heads import shape_of
from fastagglo.ops.layout import PackedLayout

__all__ = ["Geometry", "PackedBatch", "geometry", "patchify", "reorder"]

# Float images may overshoot [0, 1] by this much: rounding of half precision and of resizes.
RANGE_SLACK = 1e-3


@dataclass(frozen=True)
class PackedBatch:
    """Images of any mix of resolutions and aspect ratios; make one with :meth:`from_images`.

    Attributes:
        groups: (N_i, 3, H_i, W_i) RGB images, uint8 in 0..255 or float in [0, 1].
        capacity: rows that the student computes, with dummies in those that no image fills; None
            for as many as there are tokens.
        max_images: images that the student computes, with a capacity.
    """

    groups: tuple[Tensor, ...]
    capacity: int | None = None
    max_images: int | None = None

    @classmethod
    def from_images(
        cls,
        images: Sequence[Tensor],
        capacity: int | None = None,
        max_images: int | None = None,
    ) -> PackedBatch:
        """A batch from groups of images of equal size.

        Args:
            images: (N_i, 3, H_i, W_i) tensors, RGB, uint8 in 0..255 or floating point in [0, 1],
                all on one device. The same size may come in several groups; N_i may be 0. The
                student normalises, so do not. The range of floats is checked on the CPU only: on
                a GPU the check would wait for the device.
            capacity: have the student compute exactly so many rows, whatever the mix of sizes, so
                that its shapes are constant (see `fastagglo.model.run_budget`). It must hold all
                tokens, CLS and register tokens included, which the student checks.
            max_images: at most so many images; goes with ``capacity``.

        Raises:
            TypeError: not a sequence of uint8 or floating-point tensors, or a capacity or
                max_images that is not an integer.
            ValueError: no group, a wrong shape, mixed devices, floats outside [0, 1], or one of
                capacity and max_images without the other or below 1.
        """
        if isinstance(images, Tensor):
            raise TypeError(
                "PackedBatch.from_images: expected a list of (N, 3, H, W) tensors, got one tensor "
                f"{shape_of(images)}; wrap it in a list"
            )
        if not isinstance(images, Iterable):
            raise TypeError(
                "PackedBatch.from_images: expected a list of (N, 3, H, W) tensors, got "
                f"{type(images).__name__}"
            )
        groups = tuple(images)
        if not groups:
            raise ValueError("PackedBatch.from_images: expected at least one group, got none")
        for i, group in enumerate(groups):
            _check_group(f"images[{i}]", group)
            if group.device != groups[0].device:
                raise ValueError(
                    f"PackedBatch.from_images: all groups must be on one device, got images[0] on "
                    f"{groups[0].device} and images[{i}] on {group.device}"
                )
        if (capacity is None) != (max_images is None):
            raise ValueError(
                f"PackedBatch.from_images: capacity and max_images go together, got {capacity} and "
                f"{max_images}"
            )
        for name, value in (("capacity", capacity), ("max_images", max_images)):
            if value is not None:
                check_int("PackedBatch.from_images", name, value, 1)
        return cls(groups, capacity, max_images)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) in pixels of each group."""
        return tuple((g.shape[2], g.shape[3]) for g in self.groups)

    @property
    def num_images(self) -> int:
        """Images in all groups."""
        return sum(g.shape[0] for g in self.groups)

    @property
    def device(self) -> torch.device:
        """The device that all groups are on."""
        return self.groups[0].device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device; ``non_blocking`` needs pinned memory to be of use."""
        return replace(
            self, groups=tuple(g.to(device, non_blocking=non_blocking) for g in self.groups)
        )

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory; itself where there is no CUDA device to copy to."""
        if not torch.cuda.is_available():
            return self
        return replace(self, groups=tuple(g.pin_memory() for g in self.groups))


def _check_group(name: str, group: object) -> None:
    if not isinstance(group, Tensor):
        raise TypeError(f"{name} must be a tensor (N, 3, H, W), got {type(group).__name__}")
    if group.dtype != torch.uint8 and not group.is_floating_point():
        raise TypeError(f"{name} must be uint8 or floating point, got {group.dtype}")
    if group.dim() != 4 or group.shape[1] != 3 or 0 in group.shape[2:]:
        hint = "; add the batch dimension with x[None]" if group.dim() == 3 else ""
        raise ValueError(f"{name} must be (N, 3, H, W), got {shape_of(group)}{hint}")
    checked = group.is_floating_point() and group.device.type == "cpu" and group.numel() > 0
    if checked and not torch.compiler.is_compiling():
        low, high = (v.item() for v in torch.aminmax(group.detach()))
        # Written so that a NaN fails too.
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ValueError(
                f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}; pass images "
                "that are not normalised (x / 255, or uint8), the student normalises them"
            )


def patchify(
    groups: Sequence[Tensor],
    patch_size: int,
    mean: tuple[float, ...] = PIXEL_MEAN,
    std: tuple[float, ...] = PIXEL_STD,
) -> Tensor:
    """All groups' patches, normalised: (sum of N_i h_i w_i, 3 * patch_size**2).

    Channels run over colour, row, column, as in a flattened convolution weight. The result is at
    least fp32. Pixels are rearranged as they come, so uint8 images move a byte a pixel.
    """
    # Nothing made while tracing may be kept.
    statistics = _statistics if exporting() else pixel_statistics
    shift, scale = statistics(mean, std, groups[0].device)
    return normalised(patch_rows(groups, patch_size), shift, scale)


def patch_rows(groups: Sequence[Tensor], patch_size: int) -> Tensor:
    """All groups' patches as they come: (sum of N_i h_i w_i, 3, patch_size**2).

    uint8 if all groups are, else floats in [0, 1], at least fp32.
    """
    p = patch_size
    patches = [
        g.unflatten(3, (-1, p))
        .unflatten(2, (-1, p))
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(-1, 3, p * p)
        for g in groups
    ]
    if any(x.is_floating_point() for x in patches):
        patches = [_unit(x) for x in patches]
    return torch.cat(patches)


def normalised(patches: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Patches (T, 3, area) of `patch_rows` as the student's first layer reads them, (T, 3 area)."""
    x = _unit(patches)
    return ((x - mean.to(x.dtype)) / std.to(x.dtype)).flatten(1)


def _unit(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if x.is_floating_point() else wide / 255


@torch.compiler.disable
@functools.lru_cache(maxsize=16)
def pixel_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """``mean`` and ``std`` of each colour, fp64 (3, 1) each."""
    with torch.inference_mode(False):
        return _statistics(mean, std, device)


def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    values = torch.tensor([mean, std], dtype=torch.float64, device="cpu")
    shift, scale = values[:, :, None].to(device)
    return shift, scale


class _Reorder(torch.autograd.Function):
    """Rows by a permutation. Its gradient is a gather too; index_select's is a scatter-add."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, index), None, None


def reorder(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``x[index]`` for a permutation of the rows and its inverse."""
    return _Reorder.apply(x, index, inverse)


@dataclass(frozen=True)
class Windows:
    """The order of rows for windowed layers: all prefix rows, then patches window by window."""

    enter: Tensor  # (T,) packed row of each row in window order
    leave: Tensor  # (T,) its inverse
    layout: PackedLayout  # over the patch rows alone, a segment per window


@dataclass(frozen=True)
class Geometry:
    """Where every token of one mix of sizes lies.

    Rows exist in two orders: apart (all images' prefix tokens, then all patches) and packed
    (image by image). Indices are int64 on the batch's device.

    Attributes:
        grids: (images, h, w) of each group, in patches.
        prefix_rows: number of prefix rows, images * prefix tokens.
        layout: of the packed order, a segment per image.
        patch_layout: of the patches alone, a segment per image.
        pack: (T,) row in the order apart of each packed row.
        unpack: (T,) its inverse.
        image_ids: (patches,) the image of each patch; the same in window order.
        unit: (patches, 2) row and column over ``max(h, w) - 1``, fp32.
        windows: the windowed order, or None.
    """

    grids: tuple[tuple[int, int, int], ...]
    prefix_rows: int
    layout: PackedLayout
    patch_layout: PackedLayout
    pack: Tensor
    unpack: Tensor
    image_ids: Tensor
    unit: Tensor
    windows: Windows | None = field(default=None)


@torch.compiler.disable
@functools.lru_cache(maxsize=64)
def geometry(
    grids: tuple[tuple[int, int, int], ...], prefix: int, window: int | None, device: torch.device
) -> Geometry:
    """The geometry of one mix, cached for the 64 latest.

    Args:
        grids: (images, h, w) of each group, in patches.
        prefix: CLS and register tokens per image.
        window: patches per side of a window, which divides every h and w, or None.
        device: where the indices go.
    """
    # Cached tensors must not be inference tensors: a later training step saves them for backward.
    with torch.inference_mode(False):
        cpu = torch.device("cpu")
        counts = [h * w for n, h, w in grids for _ in range(n)]
        per_image = torch.tensor(counts, dtype=torch.int64, device=cpu)
        images = len(counts)
        start = torch.arange(images, device=cpu) * prefix + per_image.cumsum(0) - per_image
        prefix_at = (start[:, None] + torch.arange(prefix, device=cpu)).flatten()
        image_ids = torch.arange(images, device=cpu).repeat_interleave(per_image)
        # Patch j of the batch lies behind the prefix tokens of images 0 .. its own.
        patch_at = torch.arange(len(image_ids), device=cpu) + (image_ids + 1) * prefix
        unpack = torch.cat([prefix_at, patch_at])
        patch_layout = PackedLayout.from_lengths(per_image, device=cpu)
        windows = None
        if window is not None:
            images_of = [(h, w) for n, h, w in grids for _ in range(n)]
            cut = patch_layout.windowed(images_of, window)
            enter = torch.cat([prefix_at, patch_at[cut.order]])
            windows = Windows(enter.to(device), _inverse(enter).to(device), cut.layout.to(device))
        return Geometry(
            grids,
            images * prefix,
            PackedLayout.from_lengths(per_image + prefix, device=device),
            patch_layout.to(device),
            _inverse(unpack).to(device),
            unpack.to(device),
            image_ids.to(device),
            unit_rows(grids).to(device),
            windows,
        )


def unit_rows(grids: tuple[tuple[int, int, int], ...]) -> Tensor:
    """Row and column of each patch over ``max(h, w) - 1`` of its image: (patches, 2) fp32."""
    parts = []
    for n, h, w in grids:
        along = torch.arange(max(h, w), dtype=torch.float32, device="cpu") / max(h - 1, w - 1, 1)
        yx = torch.stack(torch.meshgrid(along[:h], along[:w], indexing="ij"), dim=-1)
        parts.append(yx.reshape(-1, 2).repeat(n, 1))
    return torch.cat(parts)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse
