"""Where each image lies in a packed token matrix."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastagglo.errors import require
from fastagglo.ops import worklist

_INT32_MAX = 2**31 - 1

# Where a layout's tiles are made with it.
_KERNEL_DEVICES = ("cuda",)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Segments (images, or windows of them) one after the other in a ``(T, ...)`` tensor.

    Packing instead of padding lets one batch mix resolutions: NaViT (arXiv 2307.06304). Build one
    with :meth:`from_lengths` or :meth:`from_cu_seqlens`, once for each batch; the constructor
    itself checks nothing. Two layouts are equal only if they are the same object.

    The fields are what a compiled graph needs: the rest is worked out from ``cu_seqlens_cpu`` when
    asked for, so that ``torch.compile`` has no number to guard on that changes with the mix of
    images. With ``max_segments`` the shapes of all buffers depend on it and on ``capacity`` alone,
    so that one CUDA graph serves every mix that fits.

    Attributes:
        cu_seqlens: ``(num_segments + 1,)`` int32 on ``device``; segment ``i`` is rows
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        cu_seqlens_cpu: the same numbers on the CPU, to be read without waiting for the device.
        capacity: rows ``T`` of the packed tensors. Rows from ``total`` on belong to no segment.
        tile_rows: rows of a tile of ``tiles``: 64 if no segment is longer and ``max_segments`` is
            None, else 128.
        max_segments: the number of segments of fixed-capacity buffers, or None.
    """

    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    capacity: int
    tile_rows: int
    max_segments: int | None

    @classmethod
    def from_lengths(
        cls,
        lengths: Iterable[int] | Tensor | np.ndarray,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        *,
        max_segments: int | None = None,
    ) -> PackedLayout:
        """Lay segments of the given lengths one after the other.

        Args:
            lengths: rows of each segment: integers, or a 1-D integer tensor or array. Zero is a
                segment without rows; no lengths at all are a layout without segments.
            capacity: rows of the packed tensors, at least ``sum(lengths)``, which is the default.
            device: where the packed tensors live; default: PyTorch's default device.
            max_segments: fill up with segments without rows to this many, which makes the buffers
                of fixed size: ``num_segments`` is then ``max_segments``.

        Raises:
            TypeError: a length, ``capacity`` or ``max_segments`` is not an integer.
            ValueError: a negative length, ``capacity`` below the sum, more than 2**31 - 1 rows, or
                more lengths than ``max_segments``.
        """
        sizes = _integers("lengths", lengths)
        if sizes.size and sizes.min() < 0:
            at = int(sizes.argmin())
            raise ValueError(f"lengths must not be negative, got {sizes[at]} at position {at}")
        if sizes.size and sizes.max() > _INT32_MAX:
            raise ValueError(f"a length must fit int32 (at most {_INT32_MAX}), got {sizes.max()}")
        boundaries = np.zeros(sizes.size + 1, dtype=np.int64)
        np.cumsum(sizes, out=boundaries[1:])
        return cls._build(boundaries, capacity, device, max_segments)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Iterable[int] | Tensor | np.ndarray,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        *,
        max_segments: int | None = None,
    ) -> PackedLayout:
        """Take the boundaries themselves: ``[0, length 0, length 0 + length 1, ...]``.

        Args:
            cu_seqlens: the boundaries, as integers or a 1-D integer tensor or array. A tensor on an
                accelerator is copied to the host, which waits for the device.
            capacity: rows of the packed tensors, at least the last boundary, which is the default.
            device: where the packed tensors live; default: that of ``cu_seqlens`` if it is a
                tensor, else PyTorch's default device.
            max_segments: as in :meth:`from_lengths`.

        Raises:
            TypeError: a boundary, ``capacity`` or ``max_segments`` is not an integer.
            ValueError: boundaries that do not start at 0 or that decrease, ``capacity`` below the
                last one, more than 2**31 - 1 rows, or more segments than ``max_segments``.
        """
        boundaries = _integers("cu_seqlens", cu_seqlens)
        if boundaries.size == 0 or boundaries[0] != 0:
            came = f"{boundaries[0]}" if boundaries.size else "no boundaries"
            raise ValueError(f"cu_seqlens must start with 0, got {came}")
        steps = np.diff(boundaries)
        if steps.size and steps.min() < 0:
            at = int(steps.argmin())
            raise ValueError(
                f"cu_seqlens must not decrease, got {boundaries[at]} then {boundaries[at + 1]} at "
                f"position {at + 1}; for lengths use PackedLayout.from_lengths"
            )
        if device is None and isinstance(cu_seqlens, Tensor):
            device = cu_seqlens.device
        return cls._build(boundaries, capacity, device, max_segments)

    @classmethod
    def from_xformers(cls, mask: Any, capacity: int | None = None) -> PackedLayout:
        """The layout of an ``xformers.ops.fmha.attn_bias.BlockDiagonalMask``, on its device."""
        info = mask.q_seqinfo
        return cls.from_cu_seqlens(info.seqstart_py, capacity, info.seqstart.device)

    @classmethod
    def _build(
        cls,
        boundaries: np.ndarray,
        capacity: int | None,
        device: torch.device | str | None,
        max_segments: int | None,
    ) -> PackedLayout:
        total = int(boundaries[-1])
        capacity = total if capacity is None else _integer("capacity", capacity)
        if capacity < total:
            raise ValueError(
                f"capacity must hold all segments: {total} rows, got capacity {capacity}"
            )
        if capacity > _INT32_MAX:
            raise ValueError(f"a layout holds at most {_INT32_MAX} rows (int32), got {capacity}")
        longest = int(np.diff(boundaries).max(initial=0))
        if max_segments is not None:
            max_segments, segments = _integer("max_segments", max_segments), boundaries.size - 1
            if max_segments < segments:
                raise ValueError(
                    f"max_segments must be at least the number of segments, {segments}, got "
                    f"{max_segments}"
                )
            boundaries = np.append(boundaries, np.full(max_segments - segments, total))
        short = max_segments is None and longest <= worklist.SHORT_TILE
        tile_rows = worklist.SHORT_TILE if short else worklist.LONG_TILE
        # Two tensors even on the CPU: torch.compile rejects a function given the same one twice.
        on_cpu, staged = (torch.from_numpy(boundaries.astype(np.int32)) for _ in range(2))
        device = torch.device(torch.get_default_device() if device is None else device)
        return cls(_upload(staged, device), on_cpu, capacity, tile_rows, max_segments)._ready()

    def _ready(self) -> PackedLayout:
        """Itself, with its tiles made now if it lives on a GPU, whose kernels read them.

        A compiled graph then finds them as a tensor among its inputs.
        """
        if self.device.type in _KERNEL_DEVICES:
            _ = self.tiles
        return self

    @property
    def device(self) -> torch.device:
        """Where ``cu_seqlens`` lives, and the packed tensors with it."""
        return self.cu_seqlens.device

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each segment."""
        return tuple(np.diff(self.cu_seqlens_cpu.numpy()).tolist())

    @cached_property
    def total(self) -> int:
        """Rows that belong to a segment."""
        return int(self.cu_seqlens_cpu[-1])

    @cached_property
    def max_length(self) -> int:
        """Rows of the longest segment; 0 without segments."""
        return max(self.lengths, default=0)

    @cached_property
    def segment_ids(self) -> Tensor:
        """``(capacity,)`` int32 on ``device``: the segment of each row, -1 where there is none."""
        # 0, 1, ..., -1: the rows behind the last segment are one more stretch.
        ids = torch.arange(-1, self.num_segments, dtype=torch.int32, device=self.device).roll(-1)
        lengths = torch.diff(self.cu_seqlens, append=self.cu_seqlens.new_full((1,), self.capacity))
        # With its size given, the repeat does not wait for a GPU to count the rows.
        return torch.repeat_interleave(ids, lengths, output_size=self.capacity)

    @cached_property
    def tiles(self) -> Tensor:
        """``(tiles, 4)`` int32 on ``device``: the work list of a kernel.

        One row for each tile of ``tile_rows`` rows of one segment: ``[first packed row of the
        segment, rows of the segment, first row of the tile within the segment, segment]``. Longest
        segment first, the tiles of one segment together and in order; then the rows from ``total``
        on as a segment -1. With ``max_segments`` follow rows ``[0, 0, 0, -1]``, without work, up to
        the most tiles that any layout of this ``capacity`` and ``max_segments`` has.

        Made with the layout on a GPU, elsewhere when first asked for, which must be outside of
        ``torch.compile``.
        """
        return self._make_tiles()

    @torch.compiler.disable
    def _make_tiles(self) -> Tensor:
        size = None
        if self.max_segments is not None:
            size = worklist.max_tiles(self.capacity, self.max_segments)
        tiles = worklist.build_tiles(
            self.cu_seqlens_cpu.numpy(), self.capacity, self.tile_rows, size
        )
        # A later training step may save them for its backward, which inference tensors cannot be.
        with torch.inference_mode(False):
            return _upload(torch.from_numpy(tiles), self.device)

    @cached_property
    def num_tiles(self) -> int:
        """Rows of ``tiles`` that have work, those for the rows from ``total`` on included."""
        return worklist.count_tiles(self.cu_seqlens_cpu.numpy(), self.capacity, self.tile_rows)

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout for tensors on another device; itself if it is there already."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one of several
        if device == self.device:
            return self
        return PackedLayout(
            _upload(self.cu_seqlens_cpu.clone(), device),
            self.cu_seqlens_cpu.clone(),
            self.capacity,
            self.tile_rows,
            self.max_segments,
        )._ready()

    def to_xformers(self) -> Any:
        """This layout as ``xformers.ops.fmha.attn_bias.BlockDiagonalMask`` over ``total`` rows.

        Segments without rows are left out: xformers rejects them. Built once, then remembered.

        Raises:
            UserError: xformers is not installed.
            ValueError: the layout has no rows.
        """
        return self._xformers_mask

    @cached_property
    def _xformers_mask(self) -> Any:
        bias = require("xformers.ops.fmha.attn_bias", extra="xformers", purpose="to_xformers")
        lengths = [length for length in self.lengths if length]
        if not lengths:
            raise ValueError("a BlockDiagonalMask needs at least one row, got a layout without any")
        return bias.BlockDiagonalMask.from_seqlens(lengths, device=self.device)

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.lengths[:8])) + (", ..." if self.num_segments > 8 else "")
        return (
            f"PackedLayout({self.num_segments} segments [{shown}], {self.total} of "
            f"{self.capacity} rows, device={str(self.device)!r})"
        )


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor that nobody else holds, on the device, which is not waited for."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _integers(name: str, values: Iterable[int] | Tensor | np.ndarray) -> np.ndarray:
    """The values as a 1-D int64 array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise TypeError(
                f"{name} must be 1-D and of an integer dtype, got shape {tuple(values.shape)} and "
                f"dtype {values.dtype}"
            )
        return values.astype(np.int64)
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    values = list(values)
    if not set(map(type, values)) <= {int}:  # quicker than looking at each of a thousand
        values = [_integer(f"{name}[{i}]", value) for i, value in enumerate(values)]
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise ValueError(f"{name} must fit int32 (at most {_INT32_MAX}), got larger ones") from None


def _integer(name: str, value: Any) -> int:
    """The value as a Python int, if it is an integer of whatever library."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
