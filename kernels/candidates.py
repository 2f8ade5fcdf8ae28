"""What the bench compiles of the library's attention: the table's tiles, or every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import torch

from fastagglo.kernels import attention
from fastagglo.kernels.stub import Launch
from fastagglo.kernels.sweep import Job
from fastagglo.kernels.tiles import Tile

# Short name -> the compiled function, and the products of (rows, head dim, columns) in one trip of
# its loop.
KERNELS = {
    "fwd": ("forward_kernel", 2),
    "dq": ("dq_kernel", 3),
    "dkv": ("dkv_kernel", 4),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}
HEADS = 16
ROWS_IN_ALL = 1 << 16


def launch(
    kernel: str, dtype: str, head_dim: int, tile_rows: int, tile: Tile | None, bias: bool
) -> None:
    """Launch one kernel of attention on tensors without memory: for a stub device only.

    Args:
        kernel: of `KERNELS`; "dq" and "dkv" are one call, which launches both.
        dtype: of `DTYPES`; "tf32" is fp32 with TF32 products allowed.
        head_dim: 16 to 128 in steps of 8.
        tile_rows: of the work list, 64 or 128.
        tile: block sizes; None for those of the table.
        bias: whether there is a bias per key, with its gradient.
    """
    matmul = torch.backends.cuda.matmul
    former = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        with torch.device("meta"):
            # Views of one projection, as in a transformer's block.
            fused = torch.empty(ROWS_IN_ALL, 3, HEADS, head_dim, dtype=DTYPES[dtype])
            out = torch.empty(ROWS_IN_ALL, HEADS, head_dim, dtype=DTYPES[dtype])
            lse = torch.empty(HEADS, ROWS_IN_ALL)
            key_bias = torch.empty(ROWS_IN_ALL, HEADS) if bias else None
            work = torch.empty(ROWS_IN_ALL // tile_rows, 4, dtype=torch.int32)
        q, k, v = fused.unbind(1)
        scale = head_dim**-0.5
        if kernel == "fwd":
            attention.forward(q, k, v, key_bias, work, tile_rows, scale, tile=tile)
        else:
            tiles = {f"tile_{kernel}": tile}
            attention.backward(
                *(out, q, k, v, key_bias, work, tile_rows, out, lse, scale),
                bias_grad=bias,
                fused=True,
                **tiles,
            )
    finally:
        matmul.fp32_precision = former


def candidates(kernel: str, dtype: str, head_dim: int, tile_rows: int) -> list[Tile]:
    """Block sizes worth a compile.

    Args:
        kernel: of `KERNELS`.
        dtype: of `DTYPES`.
        head_dim: 16 to 128 in steps of 8.
        tile_rows: rows of a tile of the work list, which a program's rows divide.
    """
    if dtype == "fp32":  # multiplied without tensor cores
        sizes = [(16, 16, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 16, 8), (64, 32, 8)]
        return [Tile(*size, 2) for size in sizes if size[0] <= tile_rows]
    width = -(-head_dim // 16) * 16
    tiles = []
    for (rows, warps), columns in product(((64, 4), (128, 8), (128, 4)), (16, 32, 64, 128)):
        if not columns <= rows <= tile_rows or (kernel == "fwd" and columns < 32):
            continue
        if rows == 32 * warps and (kernel != "fwd" or width > 64):
            continue  # a thread of such a tile has no registers left, but for sm_100
        # Blocks that one thread holds in registers, in fp32; more leave no room for the rest.
        sums = width * (2 if kernel == "dkv" else 1)
        if rows * (sums + columns) // (32 * warps) <= 192:
            tiles += [Tile(rows, columns, warps, stages) for stages in (2, 3)]
    return tiles


def jobs(
    archs: Sequence[str],
    kernels: Sequence[str],
    head_dims: Sequence[int],
    *,
    dtype: str = "bf16",
    tile_rows: int = 128,
    bias: bool = False,
    sweep: bool = False,
) -> list[Job]:
    """Compile attention for each architecture, kernel and head dim; all candidates in a sweep.

    The useful FLOPs of a trip are those of the head dim itself, without padding.
    """
    made = []
    for arch, head_dim, kernel in product(archs, head_dims, kernels):
        found: Sequence[Tile | None] = [None]
        if sweep:
            found = candidates(kernel, dtype, head_dim, tile_rows)
        group = f"{kernel} d{head_dim}"
        for tile in found:
            function, products = KERNELS[kernel]
            made.append(
                Job(
                    label=f"{group} {tile_name(tile)}" if tile else group,
                    arch=arch,
                    run=partial(launch, kernel, dtype, head_dim, tile_rows, tile, bias),
                    kernels=(function,),
                    useful_flops=partial(_useful_flops, 2 * products * head_dim),
                    group=group if sweep else "",
                )
            )
    return made


def _useful_flops(each: int, compiled: Launch) -> int:
    """Of one trip, by the logits that it computes."""
    return each * compiled.constants["ROWS"] * compiled.constants["COLUMNS"]


def tile_name(tile: Tile) -> str:
    """``"128x64 w8 s3"``: rows, columns, warps, stages."""
    return f"{tile.rows}x{tile.columns} w{tile.warps} s{tile.stages}"
