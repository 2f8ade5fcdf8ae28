"""Which road a product of the adaptor heads takes, in which blocks, and what it costs at least.

All of it waits for a GPU to time it: the blocks were chosen by compiling (nothing spills on sm_80,
sm_90 and sm_100, and tests/kernels/test_mlp_compiled.py holds them to that), the roads by counting.
A prologue is computed anew for each tile of columns. An exact GELU comes to about 35 instructions
an element: with tiles of 256 columns on an H100, whose SM issues for 128 lanes and multiplies 4,096
FLOP a clock, that is 0.27 clocks an element for 512 FLOP, which take 0.125. So a large product
reads what one pass of LayerNorm + GELU has written, and cuBLAS computes it. A small one waits for
launches and memory, and saves both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastagglo.kernels.tiles import arch_of

# The roads: the most rows, M, that Triton's fused product takes; above, cuBLAS and one pointwise
# kernel. Not measured.
MOST_ROWS = {"linear": 2048, "input_grad": 2048, "weight_grad": 2048, "grouped": 2048}

GROUP = 8  # rows of tiles whose programs start together
SMS = 132  # that the parts of a weight's gradient are to fill; fixed, so that its bits are, too
MOST_PARTS = 16
LEAST_STEPS = 8  # trips of the loop that a part is worth


@dataclass(frozen=True)
class GemmTile:
    """Block sizes of a product.

    Attributes:
        rows, columns: of the result's tile; columns beyond 128 are 256.
        depth: of the inner dimension that one trip of the loop takes in.
        warps: warps of 32 threads.
        stages: trips in flight between global and shared memory.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_MEDIUM, _WIDE = GemmTile(128, 128, 32, 8, 3), GemmTile(128, 256, 64, 8, 3)
# By generation (8: also 12.x, which has no more shared memory nor other matrix units) and kind: of
# "linear", "input", "weight", with "activated_" before it where there is a prologue and blocks of
# its own, and "grouped" for all that is grouped.
TILES = {
    8: {
        "linear": _MEDIUM,
        "input": _MEDIUM,
        "weight": _MEDIUM,
        "grouped": GemmTile(64, 64, 64, 4, 4),
    },
    9: {
        "linear": _WIDE,
        "input": _WIDE,
        "weight": _WIDE,
        "activated_weight": GemmTile(128, 128, 64, 8, 3),
        "grouped": GemmTile(64, 128, 64, 4, 4),
    },
    10: {
        "linear": _WIDE,
        "input": _WIDE,
        "weight": _WIDE,
        "activated_weight": GemmTile(128, 128, 64, 8, 3),
        "grouped": GemmTile(64, 128, 64, 4, 4),
    },
}
# Rows that do not begin at 16 bytes are read number by number, each with an address of its own.
SCATTERED = GemmTile(64, 64, 32, 8, 2)
# fp32, by what the product is made of: without tensor cores, and with them.
EXACT, ROUGH = GemmTile(32, 64, 16, 4, 2), GemmTile(64, 64, 32, 4, 3)


def gemm_tile(kind: str, x: Tensor, prologue: bool, aligned: bool) -> GemmTile:
    """The table's blocks for a launch on tensors like ``x``.

    Args:
        kind: "linear", "input", "weight" or "grouped".
        prologue: whether there is a LayerNorm or GELU on what is read.
        aligned: whether all rows begin at 16 bytes.
    """
    if x.dtype == torch.float32:
        return ROUGH if torch.backends.cuda.matmul.fp32_precision == "tf32" else EXACT
    if not aligned:
        return SCATTERED
    generation = arch_of(x) // 10
    table = TILES[8 if generation == 12 else min(max(generation, 8), 10)]
    return table.get(f"activated_{kind}", table[kind]) if prologue else table[kind]


def splits(rows: int, tiles: int, depth: int) -> int:
    """Rows of each part that a weight's gradient is summed up in.

    As many parts as make the last wave of programs fullest, each of which writes a gradient that is
    read again: a hundredth of its time, so that more of them must gain something.

    Args:
        rows: M. tiles: of the gradient. depth: of a trip of the loop, which divides the result.
    """
    most = max(1, min(MOST_PARTS, rows // (depth * LEAST_STEPS)))
    parts = min(range(1, most + 1), key=lambda n: -(-tiles * n // SMS) / n * (1 + n / 100))
    each = -(-rows // parts)
    return -(-each // depth) * depth


def choose(op: str, m: int, n: int, k: int, dtype: torch.dtype) -> str:
    """The road of a product: "triton", fused; or "cublas", beside one pointwise kernel.

    Args:
        op: of :data:`MOST_ROWS`.
        m, n, k: rows, output and input channels of the linear layer; of a group, the largest.
        dtype: of its tensors.

    Raises:
        ValueError: an op that is not known.
    """
    if op not in MOST_ROWS:
        raise ValueError(f"op must be one of {', '.join(MOST_ROWS)}, got {op!r}")
    if dtype == torch.float32:  # where Triton multiplies without tensor cores, or with rough ones
        return "cublas"
    if not m or not n or not k:
        return "cublas"
    return "triton" if m <= MOST_ROWS[op] else "cublas"


# --- costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a pass cannot do without.

    Attributes:
        flops: of products, two for each multiplication; other arithmetic is not counted.
        bytes: read and written, each tensor once.
    """

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """The roofline of a device of so many FLOP/s and bytes/s."""
        return max(self.flops / flops, self.bytes / bandwidth)


def product_cost(
    op: str,
    m: int,
    n: int,
    k: int,
    size: int,
    *,
    bias: bool = True,
    norm: bool = False,
    extra: bool = False,
    pre: bool = False,
    grad_size: int = 4,
) -> Cost:
    """Of one product of a linear layer with m rows, k input and n output channels.

    Args:
        op: "linear", "input_grad" or "weight_grad".
        size: bytes of an element.
        bias: that the forward adds, or whose gradient comes with the weight's.
        norm: the statistics and parameters of a LayerNorm are read.
        extra: a residual (``linear``) or the input of a GELU (``input_grad``) is read.
        pre: what comes before a GELU is written, too.
        grad_size: bytes of an element of the weight's gradient.
    """
    if op not in ("linear", "input_grad", "weight_grad"):
        raise ValueError(f"op must be linear, input_grad or weight_grad, got {op!r}")
    x, y, weight = m * k, m * n, n * k
    elements = x + y + weight
    wide = 8 * m if norm else 0  # bytes of fp32
    if norm:
        elements += 2 * k
    if op == "weight_grad":
        elements -= weight
        wide += weight * grad_size + (4 * n if bias else 0)
    elif op == "linear":
        elements += (n if bias else 0) + (y if extra else 0) + (y if pre else 0)
    else:
        elements += x if extra else 0
    return Cost(2 * m * n * k, elements * size + wide)


def pointwise_cost(op: str, m: int, k: int, size: int) -> Cost:
    """Of one pass over (m, k) elements of so many bytes.

    Args:
        op: "norm_gelu_forward", "norm_gelu_backward", "gelu_forward", "gelu_backward" or
            "row_statistics".
    """
    passes = {
        "norm_gelu_forward": 2,
        "norm_gelu_backward": 3,
        "gelu_forward": 2,
        "gelu_backward": 3,
        "row_statistics": 1,
    }
    if op not in passes:
        raise ValueError(f"op must be one of {', '.join(passes)}, got {op!r}")
    total = passes[op] * m * k * size
    if op.startswith(("norm", "row")):
        total += 8 * m
    if op.startswith("norm"):
        total += 2 * k * size
    if op.endswith("backward"):
        total += 4 * k * (2 if op.startswith("norm") else 1)
    return Cost(0, total)
