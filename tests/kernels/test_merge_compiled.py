"""Token merging through the real launcher, compiled for GPUs that need not be there.

The goal for every kernel: no spills, shared memory fits, 64-bit addresses, and for the one that
compares tokens in half precision, products on tensor cores alone. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch

from fastagglo.kernels import merge, merge_move
from fastagglo.kernels.analysis import Report, analyse
from fastagglo.kernels.merge_plan import Image, make_plan
from fastagglo.kernels.stub import Launch, stub_device
from fastagglo.ops.backend import INTERPRETED
from fastagglo.ops.partition import plan_rounds

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

OPCODES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATCH = ["norm_kernel", "match_kernel", "select_kernel"]
IMAGES, SIDE = 8, 72


@functools.cache
def launches_of(
    arch: str, dtype: str, channels: int, keep: int = SIDE * SIDE // 4, sizes: bool = True
) -> tuple[Launch, ...]:
    """A merge of 8 images of 72 x 72 tokens with its backward, then unmerging with its own."""
    tokens = SIDE * SIDE
    # Tensors without memory.
    x = torch.empty(IMAGES * tokens, channels, dtype=DTYPES[dtype], device="meta")
    size = torch.empty(len(x), device="meta") if sizes else None
    rounds = plan_rounds(tokens, keep, "strided", (SIDE, SIDE), 0, (2, 2), 0)
    with stub_device(arch) as launches:
        rows = tuple(tile.rows for tile in merge.tiles_for(x))
        plan = make_plan([Image(tokens, 0, rounds)] * IMAGES, rows)
        _, slot, order, starts = merge.match(x, size, plan.buffer.to("meta"), plan)
        y, totals = merge_move.segment_sum(x, order, starts, size=size, mean=True)
        merge_move.gather(y, slot, size=size, totals=totals)
        merge_move.gather(y, slot)
        merge_move.segment_sum(x, order, starts)
    return tuple(launches)


def assert_good(report: Report) -> None:
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0), report.kernel
    assert report.shared <= report.shared_limit
    assert report.fits


def row(launch: Launch, report: Report) -> str:
    spills = f"{report.spill_stores}+{report.spill_loads}"
    tensor = report.main.tensor_instructions if report.main else {}
    return (
        f"{report.arch:7}{launch.kernel:15} registers {report.registers:3} stack {report.stack}"
        f" spills {spills} shared {report.shared:6} of {report.shared_limit}"
        f" CTAs {report.occupancy.ctas:2} {' '.join(tensor)}"
    )


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*((arch, d) for arch in OPCODES for d in ("bf16", "fp32")), ("sm_90", "fp16")],
)
def test_nothing_spills_and_tensor_cores_multiply(arch: str, dtype: str) -> None:
    kernels = [*MATCH, *2 * ["segment_kernel"], *2 * ["gather_kernel"]]
    launches = launches_of(arch, dtype, 1280)
    assert sorted(launch.kernel for launch in launches) == sorted(kernels)
    print()
    for launch in launches:
        report = analyse(launch)
        print(row(launch, report), dtype)
        assert_good(report)
        tensor = report.main.tensor_instructions if report.main else {}
        if launch.kernel != "match_kernel":
            assert not tensor
            continue
        assert report.constants["PRECISION"] == "ieee"
        if dtype == "fp32":  # in full
            assert not tensor
            assert report.main.counts["float"] > 0.7 * report.main.counts["total"]
        else:
            assert {name.split(".")[0] for name in tensor} == {OPCODES[arch]}
            assert report.main.operand_type == dtype


def test_a_maximum_passes_nan_over() -> None:
    """What the kernel relies on for NaN, and for columns that are not there."""
    for arch in OPCODES:
        (match,) = (x for x in launches_of(arch, "bf16", 1280) if x.kernel == "match_kernel")
        assert "arith.maxnumf" in match.ttgir
        assert "arith.maximumf" not in match.ttgir


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_small_shared_memory_suffices(arch: str) -> None:
    """99 KiB."""
    for launch in launches_of(arch, "bf16", 1280):
        report = analyse(launch)
        assert report.shared_limit == 99 * 1024
        assert_good(report)


@pytest.mark.parametrize(("dtype", "channels"), [("bf16", 64), ("bf16", 1000), ("fp32", 4096)])
def test_other_widths(dtype: str, channels: int) -> None:
    """Of a head, of no block, and the widest."""
    for launch in launches_of("sm_90", dtype, channels, sizes=False):
        assert_good(analyse(launch))


# --- what is launched


def test_launches_of_a_merge() -> None:
    """Four for a merge in one round: what is compared is read by one kernel for its norms, by one
    for its products; one selects, one moves."""
    names = [launch.kernel for launch in launches_of("sm_90", "bf16", 1280)]
    assert names[:4] == [*MATCH, "segment_kernel"]
    # Two rounds: means of what is compared in between, products in float32 after them.
    rounds = launches_of("sm_90", "bf16", 1280, SIDE * SIDE // 16)
    assert [launch.kernel for launch in rounds[:8]] == 2 * [*MATCH, "segment_kernel"]
    assert rounds[3].signature["out"] == rounds[5].signature["metric"] == "*fp32"
    assert rounds[1].signature["metric"] == rounds[7].signature["out"] == "*bf16"
    # Nothing to merge: tokens are numbered and copied.
    none = launches_of("sm_90", "bf16", 1280, SIDE * SIDE)
    assert [launch.kernel for launch in none[:2]] == ["select_kernel", "segment_kernel"]


def test_grids() -> None:
    """A program for each tile of sources and each image; the last one for rows of no image."""
    norm, match, select, segment, *_ = launches_of("sm_90", "bf16", 1280)
    sources = SIDE * SIDE * 3 // 4
    assert norm.grid == (IMAGES * -(-SIDE * SIDE // 4 // merge.NORM_ROWS), 1, 1)
    assert match.grid == (IMAGES * -(-sources // match.constants["ROWS"]), 1, 1)
    assert select.grid == (IMAGES + 1, 1, 1)
    assert segment.grid == (IMAGES * SIDE * SIDE // 4, 5, 1)


# --- addresses

_STEP = re.compile(r"tt\.addptr %\w+, (%\w+)[^:]*: !tt\.ptr<bf16>, (i\d+)")
_ROWS = re.compile(r"tt\.addptr %\w+, %\w+ : tensor<(\d+)x1x!tt\.ptr<bf16>.*?, tensor<\1x1xi(\d+)")


def _is_constant(value: str) -> bool:
    return re.fullmatch(r"%c\d+_i\d+\w*", value) is not None


def test_pointers_move_by_64_bits() -> None:
    """From token to token, and from image to image."""
    seen = 0
    for launch in launches_of("sm_90", "bf16", 1000):
        if launch.kernel == "select_kernel":
            continue
        steps = _STEP.findall(launch.ttgir)
        assert steps, launch.kernel
        assert all(width == "i64" or _is_constant(step) for step, width in steps), launch.kernel
        rows = _ROWS.findall(launch.ttgir)
        assert all(width == "64" for *_, width in rows), launch.kernel
        seen += len(rows)
    assert seen >= 4  # destinations of norms; sources, destinations and partners of a match


def test_strides_of_more_than_32_bits() -> None:
    far = torch.empty(4, device="meta", dtype=torch.bfloat16).as_strided((4, 16), (2**36, 1))
    rounds = plan_rounds(4, 3, "alternate", (0, 0), 0, (2, 2), 0)
    with stub_device("sm_90") as launches:
        plan = make_plan([Image(4, 0, rounds)], (128, 64))
        _, slot, order, starts = merge.match(far, None, plan.buffer.to("meta"), plan)
        merge_move.segment_sum(far, order, starts)
        merge_move.gather(far, slot)
    strides = [launch.signature.get("row_stride") for launch in launches]
    assert strides == ["i64", "i64", None, "i64", "i64"]
