"""The table of block sizes: (kernel, GPU generation, dtype, head dim, tile of the work list)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

# The oldest generation that the table holds; also whose blocks the interpreter takes, having none.
OLDEST_ARCH = 80
TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    """Block sizes of a launch.

    Attributes:
        rows: rows that a program owns: queries of ``fwd`` and ``dq``, keys of ``dkv``.
        columns: rows of the other side that one trip of its loop takes in.
        warps: warps of 32 threads.
        stages: trips in flight between global and shared memory.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def head_pieces(head_dim: int, widest: int = 128) -> tuple[int, ...]:
    """Split a head dim into the sizes that its products are made of: 80 -> (64, 16).

    Triton's blocks are powers of two. Their sum is the head dim rounded up to 16, the least that a
    tensor core multiplies by: 72 -> (64, 16), 96 -> (64, 32), 112 -> (64, 32, 16), 128 -> (128,).

    Args:
        head_dim: to be split.
        widest: of the pieces, a power of two of at least 16.
    """
    left = -(-head_dim // 16) * 16
    pieces = []
    while left:
        pieces.append(min(widest, 1 << left.bit_length() - 1))
        left -= pieces[-1]
    return tuple(pieces)


def widest_piece(arch: int, element_size: int) -> int:
    """The widest piece of a head that a generation's products take without spilling.

    Multiplied without tensor cores (fp32), a thread holds whole rows of its operands. With
    ``mma.sync``, Triton lays out warps beside each other as soon as a block is wider than high, and
    rows then meet through shared memory.
    """
    if element_size == 4:
        return 32
    return 64 if arch // 10 in (8, 12) else 128


def arch_of(x: Tensor) -> int:
    """The GPU generation that launches with this tensor compile for, as 10 * major + minor."""
    if x.is_cuda:
        return capability(x.device.index)
    if triton.knobs.runtime.interpret:
        return OLDEST_ARCH
    return triton.runtime.driver.active.get_current_target().arch  # a stub driver's


@torch.compiler.assume_constant_result
def capability(index: int) -> int:
    """The generation of a CUDA device; a compiled graph takes it for granted."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def tile_for(kernel: str, x: Tensor, tile_rows: int) -> Tile:
    """The table's block sizes for a launch on tensors like ``x`` (T, H, D).

    A head dim without an entry takes that of the next multiple of 16, to which it is padded. What
    the table lacks for a generation comes from the nearest older one of its kind that has it:
    12.x is of the kind of 8.x, without the matrix units and the shared memory of 9.x and 10.x.

    Args:
        kernel: "fwd", "dq" or "dkv".
        x: a tensor of the launch: its dtype, head dim and device count.
        tile_rows: rows of a tile of the work list, which a program's rows divide.

    Raises:
        ValueError: a GPU older than every one in the table.
    """
    return _tile(kernel, arch_of(x), x.element_size(), x.shape[2], tile_rows)


@functools.cache
def _tile(kernel: str, arch: int, element_size: int, head_dim: int, tile_rows: int) -> Tile:
    if arch < OLDEST_ARCH:
        raise ValueError(
            f"the Triton kernels need a GPU of compute capability {OLDEST_ARCH / 10} or later, "
            f"this one has {arch / 10}; use the backend 'torch'"
        )
    known = [entry for entry in table() if entry <= arch]
    if arch // 10 == 12:
        known = [entry for entry in known if entry // 10 in (8, 12)]
    for entry in sorted(known, reverse=True):
        for width in (head_dim, -(-head_dim // 16) * 16):
            if tile := table()[entry].get((kernel, element_size, width, tile_rows)):
                return tile
    raise AssertionError("the oldest generation has every entry")


@functools.cache
def table() -> dict[int, dict[tuple[str, int, int, int], Tile]]:
    """Tiles by generation and by (kernel, bytes of an element, head dim, tile_rows)."""
    raw = json.loads(TABLE.read_text())
    result: dict[int, dict[tuple[str, int, int, int], Tile]] = {}
    for arch, part in raw.items():
        result[int(arch)] = {
            (kernel, int(size), int(width), int(tile_rows)): Tile(*tile)
            for kernel, size, width, tile_rows, *tile in part["tiles"]
        }
    return result
