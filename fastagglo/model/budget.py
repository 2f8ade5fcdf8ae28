"""The student at constant shapes: one graph, compiled or captured, for every mix of images.

A batch with a capacity of T rows and N images is computed on exactly T rows. Those that no image
fills are dummies: zeros at the start, in no segment of attention, cut off at the end, so that no
number of the batch and no gradient depends on them. What depends on the mix alone, where each token
lies, is `Slots`, made on the host beforehand; `run_budget` then has no shape, no branch and no
number left that changes with the mix.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.model.packing import normalised, patch_rows, pixel_statistics, reorder, unit_rows
from fastagglo.model.positions import crop_corners, resize_corners
from fastagglo.ops.layout import PackedLayout

if TYPE_CHECKING:
    from fastagglo.model.student import Student

__all__ = ["BudgetInputs", "BudgetOutput", "BudgetRun", "Slots", "budget_inputs", "run_budget"]

Grids = tuple[tuple[int, int, int], ...]

# Windows of at least this many patches a side share one size of work list, and with it one graph.
_LEAST_WINDOW = 8


@dataclass(frozen=True)
class WindowSlots:
    """The order of rows for windowed layers: patches window by window, then all others."""

    enter: Tensor  # (T,) int64, packed row of each row in window order
    leave: Tensor  # (T,) int64, its inverse
    layout: PackedLayout  # over the patches alone, a segment per window


@dataclass(frozen=True)
class Slots:
    """Where every token of one mix of sizes lies among T rows.

    Rows exist in two orders: packed (image by image, then dummies) and apart (all patches, then all
    images' CLS and register tokens, then dummies). All tensors are on the batch's device.

    Attributes:
        layout: of the packed order, a segment per image.
        patch_layout: of the order apart, a segment per image, of its patches.
        pack: (T,) int64, row apart of each packed row. unpack: its inverse.
        packed_image: (T,) int64, image of each packed row; 0 of dummies.
        patch_image: (T,) int64, image of each row apart that is a patch, in window order too;
            else 0.
        is_patch: (T, 1) bool, in the order apart.
        token: (T, 1) int64, the CLS or register token of each row apart; 0 where there is none.
        token_weight: (T, 4) fp32, (1, 0, 0, 0) in the rows of tokens, else zeros.
        cls_rows: (N, CLS tokens) int64, their rows apart; row 0 for images that are not there.
        unit: (T, 2) fp32, row and column of each patch over ``max(h, w) - 1`` of its image.
        windows: the windowed order, or None.
    """

    layout: PackedLayout
    patch_layout: PackedLayout
    pack: Tensor
    unpack: Tensor
    packed_image: Tensor
    patch_image: Tensor
    is_patch: Tensor
    token: Tensor
    token_weight: Tensor
    cls_rows: Tensor
    unit: Tensor
    windows: WindowSlots | None


@dataclass(frozen=True)
class BudgetInputs:
    """What `run_budget` reads beside the student's weights.

    Attributes:
        patches: (T, 3, patch area), uint8 or float in [0, 1], in the order apart. Rows that are
            no patches may hold anything.
        statistics: mean and standard deviation of pixels, (3, 1) each.
        slots: where each token lies.
        uniform: (N, 4) uniform numbers for the position crops of training, or None.
        corners: in evaluation index (T, 4) and weight (T, 4) of the position table, else None.
        keep: (depth, 2, N) factors of stochastic depth, or None.
    """

    patches: Tensor
    statistics: tuple[Tensor, Tensor]
    slots: Slots
    uniform: Tensor | None
    corners: tuple[Tensor, Tensor] | None
    keep: Tensor | None


BudgetOutput = tuple[Tensor, Tensor, dict[str, tuple[Tensor | None, Tensor | None]]]
"""CLS tokens (N, CLS tokens, C), rows apart (T, C), and per teacher a summary (N, C_summary) and
spatial tokens (T, C_spatial * upsample**2)."""


class BudgetRun(Protocol):
    """`run_budget`, or what computes the same: `torch.compile` of it."""

    def __call__(
        self,
        student: Student,
        inputs: BudgetInputs,
        rotations: Mapping[str, Tensor],
        names: Sequence[str],
        /,
    ) -> BudgetOutput: ...


def run_budget(
    student: Student,
    inputs: BudgetInputs,
    rotations: Mapping[str, Tensor],
    names: Sequence[str],
) -> BudgetOutput:
    """The student's forward pass on T rows; compile this function.

    Args:
        student: whose weights and settings are used.
        inputs: of `budget_inputs`.
        rotations: as of ``Student.forward``.
        names: the teachers to compute, in the order of the heads.
    """
    slots = inputs.slots
    rows = _blocks(student, _embedded(student, inputs), inputs)
    rows = reorder(student.norm(rows), slots.unpack, slots.pack)
    summary = rows.index_select(0, slots.cls_rows.flatten()).unflatten(0, slots.cls_rows.shape)
    if student.feature_normaliser is not None:
        rows = student.feature_normaliser(rows)
    spatial: Tensor | dict[str, Tensor] = rows
    if student.head_blocks:
        spatial = {}
        for name in names:
            spatial[name] = rows
            if name in student.head_blocks:
                for block in student.head_blocks[name]:
                    spatial[name] = student.run_block(block, spatial[name], slots.patch_layout)
    outputs = student.heads(student.head_summaries(summary), spatial, rotations, names)
    return summary, rows, outputs


def _embedded(student: Student, inputs: BudgetInputs) -> Tensor:
    """What the first block reads: (T, C) in packed order, zeros in the dummies."""
    slots, positions = inputs.slots, student.positions
    tokens = torch.cat([torch.stack(list(student.cls_tokens.values())), student.registers])
    # Whatever else the rows hold, a NaN say, would otherwise reach the weights' gradients.
    pixels = torch.where(slots.is_patch, normalised(inputs.patches, *inputs.statistics), 0)
    patches = student.patch_embed(pixels.to(student.patch_embed.weight.dtype)).to(tokens.dtype)
    if inputs.uniform is None:
        index, weight = inputs.corners
    else:
        index, weight = crop_corners(inputs.uniform, slots.unit, slots.patch_image, positions.grid)
    # The tokens are further rows of the table: they are read, exactly, by the same gather.
    index = torch.where(slots.is_patch, index, slots.token + positions.grid**2)
    weight = torch.where(slots.is_patch, weight, slots.token_weight)
    table = torch.cat([positions.table[0].to(_wide(tokens)), tokens.to(_wide(tokens))])
    added = F.embedding_bag(index, table, per_sample_weights=weight.to(table.dtype), mode="sum")
    x = torch.where(slots.is_patch, patches, 0) + added
    return reorder(x.to(tokens.dtype), slots.pack, slots.unpack)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(student: Student, x: Tensor, inputs: BudgetInputs) -> Tensor:
    slots, windows, keep = inputs.slots, inputs.slots.windows, inputs.keep
    inside = False  # in window order
    for i, block in enumerate(student.blocks):
        windowed = windows is not None and i not in student.config.global_layer_set
        if windowed != inside:
            order = (windows.enter, windows.leave) if windowed else (windows.leave, windows.enter)
            x, inside = reorder(x, *order), windowed
        layout = windows.layout if windowed else slots.layout
        factors = None
        if keep is not None:
            image = slots.patch_image if windowed else slots.packed_image
            factors = keep[i].index_select(1, image)[..., None]
        if windowed:
            # CLS and register tokens pass by unchanged.
            passing = slots.is_patch.to(x.dtype).expand(2, -1, 1)
            factors = passing if factors is None else factors * passing
        x = student.run_block(block, x, layout, factors)
    return x  # in packed order: the last layer is always global


def budget_inputs(
    student: Student,
    groups: Sequence[Tensor],
    grids: Grids,
    capacity: int,
    images: int,
    window: int | None,
    uniform: Tensor | None,
    keep: Tensor | None,
) -> BudgetInputs:
    """Inputs of `run_budget` for a batch.

    Args:
        student: that will run.
        groups: (N_i, 3, H_i, W_i) images, uint8 or float.
        grids: (images, h, w) of each group, in patches.
        capacity, images: T and N, which the batch must not exceed.
        window: patches per side of a window, which divides every h and w, or None.
        uniform: (N, 4) random numbers for the position crops of training, None in evaluation.
        keep: (depth, 2, N) factors of stochastic depth, or None.

    Raises:
        ValueError: more tokens than ``capacity``, or more images than ``images``.
    """
    config, device = student.config, groups[0].device
    count = sum(n for n, _, _ in grids)
    used = sum(n * h * w for n, h, w in grids) + count * config.prefix_tokens
    if count > images:
        raise ValueError(f"student: the batch has {count} images, but max_images is {images}")
    if used > capacity:
        raise ValueError(
            f"student: the batch has {used} tokens ({config.prefix_tokens} of each image beside "
            f"its patches), but its capacity is {capacity}"
        )
    patches = patch_rows(groups, config.patch_size)
    patches = F.pad(patches, (0, 0, 0, 0, 0, capacity - len(patches)))
    corners = None
    if uniform is None:
        index, weight = resize_corners(grids, student.positions.grid, device)
        pad = (0, 0, 0, capacity - len(index))
        corners = F.pad(index, pad), F.pad(weight, pad)
    place = slots(
        grids, config.prefix_tokens, len(config.cls_names), window, capacity, images, device
    )
    return BudgetInputs(
        patches,
        pixel_statistics(config.pixel_mean, config.pixel_std, device),
        place,
        uniform,
        corners,
        keep,
    )


@functools.lru_cache(maxsize=64)
def slots(
    grids: Grids,
    prefix: int,
    cls: int,
    window: int | None,
    capacity: int,
    images: int,
    device: torch.device,
) -> Slots:
    """The places of one mix, cached for the 64 latest.

    Args:
        grids: (images, h, w) of each group, in patches.
        prefix: CLS and register tokens per image; cls: CLS tokens among them, the first ones.
        window: patches per side of a window, or None.
        capacity, images: T and N.
        device: where the tensors go.
    """
    # Cached tensors must not be inference tensors: a later training step saves them for backward.
    with torch.inference_mode(False):
        cpu = torch.device("cpu")
        lengths = torch.tensor(
            [h * w for n, h, w in grids for _ in range(n)], dtype=torch.int64, device=cpu
        )
        count, patches = len(lengths), int(lengths.sum())
        first = (lengths + prefix).cumsum(0) - lengths - prefix  # packed row of each image
        at = torch.arange(prefix, device=cpu)
        image = torch.arange(count, device=cpu).repeat_interleave(lengths)
        patch_at = torch.arange(patches, device=cpu) + (image + 1) * prefix
        total = patches + count * prefix
        rest = torch.arange(total, capacity, device=cpu)
        tokens_at = (first[:, None] + at).flatten()
        unpack = torch.cat([patch_at, tokens_at, rest])

        def rows(values: Tensor, start: int = 0) -> Tensor:
            """The values from a row on, zeros elsewhere."""
            found = values.new_zeros(capacity, *values.shape[1:])
            found[start : start + len(values)] = values
            return found

        ones = torch.ones(count * prefix, dtype=torch.float32, device=cpu)
        cls_rows = torch.zeros(images, cls, dtype=torch.int64, device=cpu)
        cls_rows[:count] = patches + torch.arange(count, device=cpu)[:, None] * prefix + at[:cls]
        patch_layout = PackedLayout.from_lengths(lengths, capacity, cpu, max_segments=images)
        windows = None
        if window is not None:
            sides = [(h, w) for n, h, w in grids for _ in range(n)]
            most = capacity // min(window, _LEAST_WINDOW) ** 2
            cut = patch_layout.windowed(sides, window, max_windows=most)
            enter = unpack[cut.order]
            windows = WindowSlots(
                _moved(enter, device), _moved(_inverse(enter), device), cut.layout.to(device)
            )
        parts = {
            "pack": _inverse(unpack),
            "unpack": unpack,
            "packed_image": rows(
                torch.arange(count, device=cpu).repeat_interleave(lengths + prefix)
            ),
            "patch_image": rows(image),
            "is_patch": (torch.arange(capacity, device=cpu) < patches)[:, None],
            "token": rows(at.repeat(count), patches)[:, None],
            "token_weight": F.pad(rows(ones, patches)[:, None], (0, 3)),
            "cls_rows": cls_rows,
            "unit": rows(unit_rows(grids)),
        }
        return Slots(
            layout=PackedLayout.from_lengths(
                lengths + prefix, capacity, device, max_segments=images
            ),
            patch_layout=patch_layout.to(device),
            windows=windows,
            **{name: _moved(value, device) for name, value in parts.items()},
        )


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """On the device, which is not waited for."""
    value = value.contiguous()
    if device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
