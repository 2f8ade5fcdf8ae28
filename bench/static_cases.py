"""What the static table compiles: every kernel family's own launches, at the presets' shapes.

The launches are those of the ops, on tensors without memory. Sizes that are arguments at run time
decide nothing; what does is listed here: head dims, the widths that constants are made of, dtypes,
and what is fused. Tiles are the ones that the library's tables choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from fastagglo.kernels import candidates, loss, merge, merge_move, mlp
from fastagglo.kernels.merge_plan import Image, make_plan
from fastagglo.kernels.sweep import Job
from fastagglo.ops.partition import plan_rounds

ARCHS = ("sm_80", "sm_90", "sm_100")
HEAD_DIMS = (64, 72, 80, 128)  # of the presets, and the widest that the kernels take

# The prediction's grid; it is compared on 24 x 24. A target's grid is data to the kernel.
GRIDS = {"plain": (24, 24), "prediction resized": (16, 16)}
# Beside a loss by channel, one of whole tokens: its blocks depend on the teacher's width.
TOKEN_LOSS, TOKEN_WIDTHS = "cosine_smooth_l1", (768, 1280, 4096)

MERGE_IMAGES, MERGE_SIDE, MERGE_CHANNELS = 8, 72, 1280

# The pointwise kernels hold a row: of a head's usual hidden width, and of the widest.
POINTWISE_WIDTHS = (1520, 8192)
PRODUCTS = (
    "linear", "linear gelu residual", "gelu linear", "norm gelu linear", "input grad gelu",
    "weight grad", "norm gelu weight grad", "grouped", "grouped norm gelu", "grouped input grad",
)  # fmt: skip


def jobs(family: str, archs: Sequence[str] = ARCHS) -> list[Job]:
    """What to compile of a family of :data:`FAMILIES`; labels are unique for an architecture."""
    return [job for arch in archs for job in FAMILIES[family](arch)]


def _attention(arch: str) -> list[Job]:
    found = candidates.jobs([arch], list(candidates.KERNELS), HEAD_DIMS)
    # The bias of merged tokens, whose gradient the backward adds up.
    biased = candidates.jobs([arch], list(candidates.KERNELS), HEAD_DIMS[:1], bias=True)
    named = [*found, *(replace(job, label=f"{job.label} bias") for job in biased)]
    return [replace(job, label=f"attention {job.label}") for job in named]


def _loss(arch: str) -> list[Job]:
    made = [Job("loss mse 1280 plain", arch, partial(run_loss, "mse", 1280, "plain"))]
    # What else they launch is among the above.
    for kind, channels, grids, kernels in (
        ("mse", 1280, "prediction resized", ("compare_kernel", "spread_kernel")),
        *((TOKEN_LOSS, width, "plain", ("compare_kernel",)) for width in TOKEN_WIDTHS),
    ):
        run = partial(run_loss, kind, channels, grids)
        made.append(Job(f"loss {kind} {channels} {grids}", arch, run, kernels))
    return made


def _merge(arch: str) -> list[Job]:
    return [Job(f"merge {MERGE_CHANNELS}", arch, run_merge)]


def _mlp(arch: str) -> list[Job]:
    calls = {what: partial(run_product, what) for what in PRODUCTS}
    calls |= {f"pointwise {width}": partial(run_pointwise, width) for width in POINTWISE_WIDTHS}
    return [Job(f"mlp {name}", arch, call) for name, call in calls.items()]


FAMILIES: dict[str, Callable[[str], list[Job]]] = {
    "attention": _attention,
    "loss": _loss,
    "merge": _merge,
    "mlp": _mlp,
}


def cells() -> list[tuple[str, str]]:
    """(family, architecture) of each part of the table."""
    return list(product(FAMILIES, ARCHS))


def run_loss(kind: str, channels: int, grids: str) -> None:
    """One teacher's loss and its backward; "plain" with a mask and a shift."""
    with torch.device("meta"):
        x, t = (
            torch.empty(4, *grid, channels, dtype=torch.bfloat16)
            for grid in (GRIDS[grids], (24, 24))
        )
        mean, scale = torch.empty(channels), torch.empty(())
        term = loss.Term(x, t, kind, 24, 24, mean=mean, scale=scale)
        if grids == "plain":
            valid = torch.empty(4, 24, 24, dtype=torch.bool)
            term = replace(term, valid=valid, shift=torch.empty(4, 2, dtype=torch.float64))
    result = loss.forward([term])
    upstream = result.per_term, result.per_image, result.shares, result.term_weights
    loss.backward(result.gradients, result.gradients, [0], [term.images], *upstream)


def run_merge() -> None:
    """A merge to a quarter with its backward, then unmerging with its own."""
    tokens = MERGE_SIDE * MERGE_SIDE
    x = torch.empty(MERGE_IMAGES * tokens, MERGE_CHANNELS, dtype=torch.bfloat16, device="meta")
    size = torch.empty(len(x), device="meta")
    rounds = plan_rounds(tokens, tokens // 4, "strided", (MERGE_SIDE, MERGE_SIDE), 0, (2, 2), 0)
    plan = make_plan(
        [Image(tokens, 0, rounds)] * MERGE_IMAGES, tuple(tile.rows for tile in merge.tiles_for(x))
    )
    _, slot, order, starts = merge.match(x, size, plan.buffer.to("meta"), plan)
    _, totals = merge_move.segment_sum(x, order, starts, size=size, mean=True)
    merge_move.gather(x, slot, size=size, totals=totals)
    merge_move.gather(x, slot)
    merge_move.segment_sum(x, order, starts)


def run_product(what: str) -> None:
    """One product of a head of :data:`PRODUCTS`, 46,080 rows of 1280 channels to 1536."""
    rows, columns, inner = 46080, 1536, 1280
    with torch.device("meta"):
        x, weight, y = (
            torch.empty(shape, dtype=torch.bfloat16)
            for shape in ((rows, inner), (columns, inner), (rows, columns))
        )
        statistic = torch.empty(rows)
    bias, scale = weight[:, 0].contiguous(), weight[0]
    norm = (statistic, statistic, scale, scale)
    block = {"norm": norm, "gelu_in": True, "residual": y}
    plain = mlp.Problem(x, weight, bias, gelu_out=True, keep_pre=True)
    calls = {
        "linear": lambda: mlp.linear(x, weight),
        "linear gelu residual": lambda: mlp.linear(
            x, weight, bias, gelu_out=True, residual=y, keep_pre=True
        ),
        "gelu linear": lambda: mlp.linear(x, weight, bias, gelu_in=True),
        "norm gelu linear": lambda: mlp.linear(x, weight, bias, **block),
        "input grad gelu": lambda: mlp.linear_input_grad(y, weight, gelu_of=x),
        "weight grad": lambda: mlp.linear_weight_grad(y, x),
        "norm gelu weight grad": lambda: mlp.linear_weight_grad(y, x, norm=norm, gelu_in=True),
        "grouped": lambda: mlp.grouped_linear([plain] * 8),
        "grouped norm gelu": lambda: mlp.grouped_linear(
            [mlp.Problem(x, weight, bias, **block)] * 8
        ),
        "grouped input grad": lambda: mlp.grouped_linear_input_grad([(y, weight, x)] * 8),
    }
    calls[what]()


def run_pointwise(width: int) -> None:
    """LayerNorm and GELU, forward and backward, beside cuBLAS's products."""
    with torch.device("meta"):
        x = torch.empty(46080, width, dtype=torch.bfloat16)
        scale, statistic = torch.empty(width, dtype=torch.bfloat16), torch.empty(46080)
    mlp.norm_gelu_forward(x, scale, scale)
    mlp.norm_gelu_backward(x, x, statistic, statistic, scale, scale)
    mlp.gelu_forward(x)
    mlp.gelu_backward(x, x)
