"""Who may merge into whom: the geometry of token merging, its arguments and its result.

Everything here depends on shapes and the seed alone, never on the tokens, so the op
(:mod:`fastagglo.ops.merge`) and its eager twin (:mod:`fastagglo.ops.reference.merge`) share it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastagglo.ops.layout import PackedLayout

__all__ = [
    "Grid",
    "Keep",
    "MergeRequest",
    "MergedTokens",
    "Partition",
    "Round",
    "check_merge",
    "check_unmerge",
    "plan_rounds",
]

Partition = Literal["alternate", "strided", "random2d"]
Keep = int | Sequence[int]
Grid = tuple[int, int] | Sequence[tuple[int, int]]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class MergedTokens:
    """The tokens that :func:`merge_tokens` left, and where every original token went.

    The slots of an image are in the order in which their survivors stood in the image: protected
    tokens first, then each unmerged token and each destination at its own original place.

    Attributes:
        x: (N, keep, C), or packed (sum of keeps, C) where ``layout`` is given; the input's dtype.
        size: (N, keep) or (sum of keeps,): how many original tokens each one stands for; float32
            (float64 for float64 tokens). ``size.log()`` is the ``key_bias`` of proportional
            attention in :func:`packed_attention`.
        index: (N, L) or (T,) int64: the slot, 0 .. keep-1 of its image, that each original token
            went to; -1 in the rows of a packed input that belong to no image.
        layout: layout of packed ``x``, one segment per image; None for (N, keep, C).
        slot: shape of ``index``: the same as a row of the flattened ``x``, for unmerging.
        order: (N * L,) or (T,) int32: the original tokens by slot, and by position within one, for
            the gradient of unmerging; None: made again when needed.
        starts: (slots + 1,) int32: where each slot begins in ``order``; None with it.
    """

    x: Tensor
    size: Tensor
    index: Tensor
    layout: PackedLayout | None
    slot: Tensor = field(repr=False)
    order: Tensor | None = field(default=None, repr=False)
    starts: Tensor | None = field(default=None, repr=False)


class Round(NamedTuple):
    """One round of bipartite matching over the unprotected tokens that are left.

    Attributes:
        sources: int64 positions, ascending, of the tokens that may be merged away.
        destinations: int64 positions, ascending, of the tokens they may be merged into.
        merges: how many sources are merged, at most ``len(sources)``.
    """

    sources: Tensor
    destinations: Tensor
    merges: int


class MergeRequest(NamedTuple):
    """Checked arguments of a merge, per image.

    Attributes:
        lengths: tokens of each image.
        keeps: tokens to keep of each image, protected ones included.
        grids: (h, w) of each image's unprotected tokens, or None.
        stride: (rows, columns) of a window.
    """

    lengths: tuple[int, ...]
    keeps: tuple[int, ...]
    grids: tuple[tuple[int, int], ...] | None
    stride: tuple[int, int]

    def table(self) -> Tensor:
        """(images, 4) int64 on the CPU: length, keep, grid height, grid width (0, 0: no grid)."""
        grids = self.grids or ((0, 0),) * len(self.lengths)
        rows = [(n, k, h, w) for n, k, (h, w) in zip(self.lengths, self.keeps, grids, strict=True)]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 4)


@lru_cache(maxsize=64)
def plan_rounds(
    tokens: int,
    target: int,
    partition: Partition,
    grid: tuple[int, int],
    protect: int,
    stride: tuple[int, int],
    seed: int,
) -> tuple[Round, ...]:
    """The rounds that take ``tokens`` unprotected tokens of one image to ``target``.

    Each round but the last merges as much as it can: ``alternate`` (ToMe, arXiv 2210.09461)
    half of the tokens, ``strided`` and ``random2d`` (ToMe for SD, arXiv 2303.17604) all but the
    destinations, which then form the smaller grid of the next round. The positions of
    ``alternate`` count from the first token of the image, protected ones included, as in ToMe.

    Random destinations are drawn on the CPU from ``seed`` alone, so that they are the same on
    every device and for every image of that grid, whatever else is in the batch.
    """
    rounds: list[Round] = []
    height, width = grid
    position = torch.arange(tokens, device="cpu")
    row = position // max(width, 1)
    column = position - row * width
    generator = torch.Generator("cpu").manual_seed(seed)
    while tokens > target:
        if partition == "alternate":
            position = torch.arange(tokens, device="cpu")
            chosen = (position + protect) % 2 == 1
            most = tokens // 2
        else:
            chosen = _window_picks(row, column, (height, width), partition, stride, generator)
            most = tokens - int(chosen.sum())
            row, column = row[chosen] // stride[0], column[chosen] // stride[1]
            height, width = -(-height // stride[0]), -(-width // stride[1])
        merges = min(most, tokens - target)
        rounds.append(Round((~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0], merges))
        tokens -= merges
    return tuple(rounds)


def _window_picks(
    row: Tensor,
    column: Tensor,
    grid: tuple[int, int],
    partition: Partition,
    stride: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """Bool per token: the one destination of each window, the last ones cut by the grid's edge."""
    (height, width), (sy, sx) = grid, stride
    if partition == "strided":
        return (row % sy == 0) & (column % sx == 0)
    tall = (height - torch.arange(0, height, sy, device="cpu")).clamp(max=sy)[:, None]
    wide = (width - torch.arange(0, width, sx, device="cpu")).clamp(max=sx)[None]
    shape = len(tall), wide.shape[1]
    draw = torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu")
    cell = (draw * (tall * wide)).long()
    cell = cell[row // sy, column // sx]
    span = wide[0, column // sx]
    return (row % sy == cell // span) & (column % sx == cell % span)


def check_merge(
    x: Tensor,
    keep: Keep,
    size: Tensor | None,
    metric: Tensor | None,
    partition: Partition,
    grid: Grid | None,
    protect: int,
    layout: PackedLayout | None,
    stride: tuple[int, int],
    seed: int,
) -> MergeRequest:
    """Check the arguments of ``merge_tokens``; see there for what is accepted."""
    _check_tokens("merge_tokens: x", x)
    if x.dim() and x.shape[-1] == 0:
        raise ValueError(f"merge_tokens: x must have at least one channel, got {tuple(x.shape)}")
    if layout is None:
        if x.dim() != 3:
            raise ValueError(
                f"merge_tokens: x must be (N, L, C), or packed (T, C) with layout=; got "
                f"{tuple(x.shape)} without a layout"
            )
        lengths = (x.shape[1],) * x.shape[0]
    else:
        if not isinstance(layout, PackedLayout):
            raise TypeError(
                f"merge_tokens: layout must be a PackedLayout, got {type(layout).__name__}"
            )
        if x.dim() != 2 or x.shape[0] != layout.capacity:
            raise ValueError(
                f"merge_tokens: with a layout x must be ({layout.capacity}, C), one row for each "
                f"of the layout's capacity; got {tuple(x.shape)}"
            )
        lengths = tuple(layout.lengths)
    lead = tuple(x.shape[:-1])
    if size is not None:
        if not isinstance(size, Tensor) or size.is_complex() or size.dtype == torch.bool:
            raise TypeError(f"merge_tokens: size must be a real number tensor, got {_kind(size)}")
        _check_place("size", size, x)
        if tuple(size.shape) != lead:
            raise ValueError(f"merge_tokens: size must be {lead}, got {tuple(size.shape)}")
    if metric is not None:
        _check_tokens("merge_tokens: metric", metric)
        _check_place("metric", metric, x)
        if tuple(metric.shape[: len(lead)]) != lead or metric.dim() - len(lead) not in (1, 2):
            raise ValueError(
                f"merge_tokens: metric must be {lead} + (D,) or {lead} + (heads, D), "
                f"got {tuple(metric.shape)}"
            )
        if 0 in metric.shape[len(lead) :]:
            raise ValueError(f"merge_tokens: metric is empty in {tuple(metric.shape)}")
    if partition not in get_args(Partition):
        raise ValueError(
            f"merge_tokens: partition must be one of {', '.join(get_args(Partition))}; "
            f"got {partition!r}"
        )
    protect = _integer("protect", protect)
    if protect < 0 or any(0 < length < protect for length in lengths):
        raise ValueError(
            f"merge_tokens: protect must be between 0 and the tokens of each image, {lengths}; "
            f"got {protect}"
        )
    if not -(2**63) <= _integer("seed", seed) < 2**63:
        raise ValueError(f"merge_tokens: seed must fit 64 bits with a sign, got {seed}")
    if not isinstance(stride, Sequence) or len(stride) != 2:
        raise ValueError(f"merge_tokens: stride must be (rows, columns), got {stride!r}")
    stride = (_integer("stride", stride[0]), _integer("stride", stride[1]))
    if min(stride) < 1:
        raise ValueError(f"merge_tokens: stride must be at least (1, 1), got {stride}")
    free = tuple(max(length - protect, 0) for length in lengths)
    grids = _check_grids(grid, free, partition)
    keeps = _check_keeps(keep, lengths, free, grids if partition != "alternate" else None, stride)
    return MergeRequest(lengths, keeps, grids, stride)


def check_unmerge(y: Tensor, merged: MergedTokens) -> None:
    """Check the arguments of ``unmerge_tokens``; see there for what is accepted."""
    if not isinstance(merged, MergedTokens):
        raise TypeError(
            f"unmerge_tokens: merged must be the MergedTokens of merge_tokens, got {_kind(merged)}"
        )
    _check_tokens("unmerge_tokens: y", y)
    lead = tuple(merged.size.shape)
    if tuple(y.shape[: len(lead)]) != lead:
        raise ValueError(
            f"unmerge_tokens: y must start with the merged tokens' {lead}, got {tuple(y.shape)}"
        )
    if y.device != merged.slot.device:
        raise ValueError(
            f"unmerge_tokens: y is on {y.device}, the merged tokens are on {merged.slot.device}"
        )


def _check_grids(
    grid: Grid | None, free: tuple[int, ...], partition: Partition
) -> tuple[tuple[int, int], ...] | None:
    """One (h, w) per image, each with as many cells as the image has unprotected tokens."""
    if grid is None:
        if partition == "alternate":
            return None
        raise ValueError(
            f"merge_tokens: partition {partition!r} needs grid=(h, w) of the unprotected tokens "
            f"(or one per image)"
        )
    if hasattr(grid, "tolist"):  # an array or a tensor
        grid = grid.tolist()
    if isinstance(grid, str) or not isinstance(grid, Sequence):
        raise TypeError(
            f"merge_tokens: grid must be (h, w) or one such pair per image, got {_kind(grid)}"
        )
    entries = list(grid)
    if len(entries) == 2 and not any(isinstance(entry, Sequence) for entry in entries):
        entries = [entries] * len(free)
    if len(entries) != len(free):
        raise ValueError(
            f"merge_tokens: grid must be (h, w) or one per image; got {len(entries)} grids for "
            f"{len(free)} images"
        )
    grids = []
    for image, (entry, tokens) in enumerate(zip(entries, free, strict=True)):
        if not isinstance(entry, Sequence):
            raise TypeError(f"merge_tokens: grid of image {image} must be (h, w), got {entry!r}")
        if len(entry) != 2:
            raise ValueError(f"merge_tokens: grid of image {image} must be (h, w), got {entry!r}")
        h, w = _integer("grid", entry[0]), _integer("grid", entry[1])
        if min(h, w) < 0 or h * w != tokens:
            raise ValueError(
                f"merge_tokens: grid of image {image} is {h} x {w} = {h * w} cells, but the image "
                f"has {tokens} unprotected tokens"
            )
        grids.append((h, w))
    return tuple(grids)


def _check_keeps(
    keep: Keep,
    lengths: tuple[int, ...],
    free: tuple[int, ...],
    grids: tuple[tuple[int, int], ...] | None,
    stride: tuple[int, int],
) -> tuple[int, ...]:
    """One keep per image, each between what repeated rounds can reach and the image's tokens."""
    if isinstance(keep, Iterable) and not (isinstance(keep, Tensor) and keep.dim() == 0):
        keeps = tuple(_integer("keep", k) for k in keep)
        if len(keeps) != len(lengths):
            raise ValueError(
                f"merge_tokens: keep must be one int or one per image; got {len(keeps)} for "
                f"{len(lengths)} images"
            )
    else:
        keeps = (_integer("keep", keep),) * len(lengths)
    for image, (k, length, tokens) in enumerate(zip(keeps, lengths, free, strict=True)):
        least = min(tokens, 1)
        if grids is not None and tokens:
            # A window of one row (or column) never shortens that side of the grid.
            (h, w), (sy, sx) = grids[image], stride
            least = (h if sy == 1 else 1) * (w if sx == 1 else 1)
        least += length - tokens
        if not least <= k <= length:
            raise ValueError(
                f"merge_tokens: keep of image {image} must be between {least} and its {length} "
                f"tokens (protected ones included), got {k}"
            )
    return keeps


def _check_tokens(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_place(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"merge_tokens: {name} is on {tensor.device}, x is on {x.device}")


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"merge_tokens: {name} must be an int, got a bool")
    if isinstance(value, int | torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"merge_tokens: {name} must be an int, got {_kind(value)}") from None


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
