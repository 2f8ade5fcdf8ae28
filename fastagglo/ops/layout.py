"""Where each image lies in a packed token matrix."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastagglo.errors import require
from fastagglo.ops import worklist
from fastagglo.ops.windows import window_positions, window_rows

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
    def from_nested(cls, x: Tensor) -> PackedLayout:
        """The layout of ``x.values()`` for a jagged nested tensor ``(segments, T*, ...)``.

        The capacity is the rows of the values. The offsets are copied to the host, which waits for
        an accelerator.

        Raises:
            TypeError: ``x`` is not a nested tensor of the layout ``torch.jagged``.
            ValueError: the ragged dimension is not the second one, or there are holes between the
                segments.
        """
        if not isinstance(x, Tensor) or x.layout != torch.jagged:
            came = type(x).__name__
            if isinstance(x, Tensor):
                came = f"a {'nested ' if x.is_nested else ''}tensor of layout {x.layout}"
            raise TypeError(f"x must be a nested tensor with layout=torch.jagged, got {came}")
        if x._ragged_idx != 1:
            raise ValueError(
                f"x must be ragged in dimension 1, (segments, rows*, ...), got dimension "
                f"{x._ragged_idx}; transpose it back"
            )
        if x.lengths() is not None:
            raise ValueError(
                "x must have no holes between its segments, got a nested tensor with lengths, as "
                "torch.nested.narrow makes them; call x.contiguous() first"
            )
        return cls.from_cu_seqlens(x.offsets(), x.values().shape[0])

    @classmethod
    @torch.inference_mode(False)  # a later training step may save what is built for its backward
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
        layout = cls(_upload(staged, device), on_cpu, capacity, tile_rows, max_segments)
        vars(layout)["boundaries"] = boundaries  # an exporter cannot read a tensor's numbers
        if layout.device.type in _KERNEL_DEVICES:
            _ = layout.tiles  # a compiled graph then finds a tensor among its inputs
        return layout

    @property
    def device(self) -> torch.device:
        """Where ``cu_seqlens`` lives, and the packed tensors with it."""
        return self.cu_seqlens.device

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def boundaries(self) -> np.ndarray:
        """``cu_seqlens`` in NumPy's hands."""
        return self.cu_seqlens_cpu.numpy()

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each segment."""
        return tuple(np.diff(self.boundaries).tolist())

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

    @property
    def _rows_of_tiles(self) -> int:
        if self.max_segments is None:
            return self.num_tiles
        return worklist.max_tiles(self.capacity, self.max_segments)

    @torch.compiler.disable
    def _make_tiles(self) -> Tensor:
        size = None if self.max_segments is None else self._rows_of_tiles
        tiles = worklist.build_tiles(
            self.cu_seqlens_cpu.numpy(), self.capacity, self.tile_rows, size
        )
        with torch.inference_mode(False):  # as in _build
            return _upload(torch.from_numpy(tiles), self.device)

    @cached_property
    def num_tiles(self) -> int:
        """Rows of ``tiles`` that have work, those for the rows from ``total`` on included."""
        return worklist.count_tiles(self.cu_seqlens_cpu.numpy(), self.capacity, self.tile_rows)

    def windowed(
        self,
        grids: Iterable[tuple[int, int]],
        window: int,
        *,
        max_windows: int | None = None,
    ) -> Windows:
        """Cut segments that are grids, stored row by row, into square windows.

        Windows are laid segment by segment and row by row, as are the rows within each. Where
        ``window`` does not divide a grid, those at its lower and right border are smaller.

        Args:
            grids: ``(h, w)`` of each segment, of ``h * w`` rows. Segments without rows at the end,
                those of ``max_segments`` say, need none.
            window: rows and columns of a window.
            max_windows: ``max_segments`` of the layout of windows.

        Raises:
            TypeError: ``grids`` are not pairs of integers, or ``window`` or ``max_windows`` is not
                an integer.
            ValueError: grids that do not fit the segments, ``window`` below 1, or more windows than
                ``max_windows``.
        """
        window = _integer("window", window)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        sides = self._check_grids(grids)
        rows = window_rows(sides, window)
        if max_windows is not None and _integer("max_windows", max_windows) < rows.size:
            raise ValueError(
                f"max_windows must be at least the number of windows, {rows.size}, got "
                f"{max_windows}"
            )
        places = np.arange(self.capacity)
        places[: self.total] = window_positions(sides, window)
        order = np.empty_like(places)
        order[places] = np.arange(self.capacity)
        with torch.inference_mode(False):  # as in _build
            return Windows(
                _upload(torch.from_numpy(order), self.device),
                _upload(torch.from_numpy(places), self.device),
                PackedLayout.from_lengths(
                    rows, self.capacity, self.device, max_segments=max_windows
                ),
            )

    def _check_grids(self, grids: Iterable[tuple[int, int]]) -> np.ndarray:
        """The grids as an int64 array (grids, 2)."""
        if not isinstance(grids, Iterable):
            raise TypeError(f"grids must be pairs (h, w), got {grids!r}")
        pairs = grids.tolist() if isinstance(grids, Tensor | np.ndarray) else list(grids)
        for i, grid in enumerate(pairs):
            if not isinstance(grid, Sequence) or len(grid) != 2:
                raise TypeError(f"grids[{i}] must be a pair (h, w), got {grid!r}")
        columns = [[pair[i] for pair in pairs] for i in range(2)]
        names = ("h of grids", "w of grids")
        sides = np.stack(list(map(_integers, names, columns)), axis=1)
        lengths = np.array(self.lengths, dtype=np.int64)
        if len(sides) > lengths.size or lengths[len(sides) :].any():
            raise ValueError(
                f"grids must have one (h, w) for each of {lengths.size} segments, got {len(sides)}"
            )
        lengths = lengths[: len(sides)]
        bounded = sides.clip(0, _INT32_MAX)  # whose products fit int64
        wrong = (bounded != sides).any(axis=1) | (bounded.prod(axis=1) != lengths)
        if wrong.any():
            at = int(wrong.argmax())
            h, w = pairs[at]
            raise ValueError(f"grids[{at}] is {h} x {w}, but segment {at} has {lengths[at]} rows")
        return sides

    def copy_(self, source: PackedLayout) -> PackedLayout:
        """Take over another layout in place, without waiting for the device.

        ``cu_seqlens``, ``cu_seqlens_cpu`` and ``tiles`` stay the same tensors with new numbers, so
        that a CUDA graph captured with this layout runs the other's mix. What else was worked out,
        ``segment_ids`` say, is made anew when next asked for.

        Args:
            source: a layout on any device whose buffers have the same sizes: sure to be so with the
                same ``capacity`` and ``max_segments``.

        Returns:
            Itself.

        Raises:
            TypeError: ``source`` is not a layout.
            ValueError: its buffers have other sizes.
        """
        if not isinstance(source, PackedLayout):
            raise TypeError(f"source must be a PackedLayout, got {type(source).__name__}")
        for what in ("capacity", "num_segments", "tile_rows", "_rows_of_tiles"):
            mine, other = getattr(self, what), getattr(source, what)
            if mine != other:
                name = "len(tiles)" if what == "_rows_of_tiles" else what
                raise ValueError(
                    f"source must have the {name} of this layout, {mine}, got {other}; make both "
                    "with the same capacity and max_segments"
                )
        source = source.to(self.device)
        self.cu_seqlens.copy_(source.cu_seqlens, non_blocking=True)
        self.cu_seqlens_cpu.copy_(source.cu_seqlens_cpu)
        if "tiles" in vars(self):
            self.tiles.copy_(source.tiles, non_blocking=True)
        vars(self)["boundaries"] = source.boundaries
        kept = {field.name for field in fields(self)} | {"tiles", "boundaries"}
        for name in vars(self).keys() - kept:
            del vars(self)[name]
        return self

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout for tensors on another device; itself if it is there already."""
        device = torch.empty(0, device=device).device  # "cuda" is the current one of several
        if device == self.device:
            return self
        boundaries = self.cu_seqlens_cpu.numpy().astype(np.int64)
        return self._build(boundaries, self.capacity, device, self.max_segments)

    def to_nested(self, x: Tensor) -> Tensor:
        """The first ``total`` rows of a packed tensor as a jagged nested one, without a copy.

        Args:
            x: ``(T, ...)`` with ``T == capacity``, on the layout's device.

        Returns:
            ``(num_segments, T*, ...)`` with ``layout=torch.jagged``; gradients flow through it.

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: ``x`` has other rows or is elsewhere.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[0] != self.capacity:
            raise ValueError(
                f"x must have {self.capacity} rows, the layout's capacity, got shape "
                f"{tuple(x.shape)}"
            )
        if x.device != self.device:
            raise ValueError(f"x must be on the layout's device, {self.device}, got {x.device}")
        return torch.nested.nested_tensor_from_jagged(
            x[: self.total],
            self.cu_seqlens.long(),
            min_seqlen=min(self.lengths, default=0),  # given, they need not be read back
            max_seqlen=self.max_length,
        )

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


@dataclass(frozen=True, eq=False)
class Windows:
    """A layout's rows window by window: see :meth:`PackedLayout.windowed`.

    Attributes:
        order: ``(T,)`` int64, the packed row of each row in window order: ``x[order]`` is in window
            order. Rows behind the last segment stay where they are.
        inverse: ``(T,)`` int64, its inverse: ``x[order][inverse]`` is ``x``.
        layout: of the window order, a segment per window.
    """

    order: Tensor
    inverse: Tensor
    layout: PackedLayout


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
