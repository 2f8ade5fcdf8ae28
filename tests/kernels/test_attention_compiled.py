"""Packed attention through the real launcher, compiled for GPUs that need not be there.

The goal for every tile of the table that matters: no spills, shared memory fits, tensor cores do
the products of the loop, and they multiply no padding beyond the next 16 columns.
"""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
import triton

from fastagglo.kernels import attention, tiles
from fastagglo.kernels.analysis import Report, analyse
from fastagglo.kernels.candidates import KERNELS, launch
from fastagglo.kernels.stub import Launch, stub_device
from fastagglo.kernels.tune import BIAS_STACK
from fastagglo.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

OPCODES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


@functools.cache
def launches_of(
    arch: str, call: str, head_dim: int, dtype: str = "bf16", tile_rows: int = 128, bias=False
) -> dict[str, Launch]:
    """What a forward ("fwd") or a backward ("dq", which is both) launches, by short name."""
    with stub_device(arch) as launches:
        launch(call, dtype, head_dim, tile_rows, None, bias)
    names = {function: name for name, (function, _) in KERNELS.items()}
    return {names[found.kernel]: found for found in launches}


@functools.cache
def report_of(arch: str, kernel: str, head_dim: int, **options) -> Report:
    call = "fwd" if kernel == "fwd" else "dq"
    return analyse(launches_of(arch, call, head_dim, **options)[kernel])


def flops_of_a_trip(report: Report, kernel: str, width: int) -> int:
    """What the products of one trip of the loop come to, for heads of this width."""
    _, products = KERNELS[kernel]
    return 2 * products * report.constants["ROWS"] * report.constants["COLUMNS"] * width


# Registers are the compiler's: the table keeps its promise under the Triton that chose it.
TABLES_TRITON = {part["source"]["triton"] for part in json.loads(tiles.TABLE.read_text()).values()}


def assert_good(report: Report, stack: int = 0) -> None:
    if {triton.__version__} == TABLES_TRITON:
        assert report.stack <= stack
        assert stack or (report.spill_stores, report.spill_loads) == (0, 0)
    assert report.shared <= report.shared_limit
    assert report.fits
    assert report.main is not None
    assert report.main.tensor_instructions


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("arch", list(OPCODES))
def test_tiles_of_the_table(arch, head_dim, kernel):
    report = report_of(arch, kernel, head_dim)
    assert_good(report)
    # The newer generations may take the older instruction, for blocks too small for their own.
    allowed = {OPCODES[arch], "HMMA"}
    assert {name.split(".")[0] for name in report.main.tensor_instructions} <= allowed
    assert report.main.operand_type == "bf16"
    # 72 as 80, and 80 itself: 80/128 of what a head padded to a power of two would cost.
    padded = -(-head_dim // 16) * 16
    assert padded == {64: 64, 72: 80, 80: 80, 128: 128}[head_dim]
    expected = flops_of_a_trip(report, kernel, padded) * (report.main.unroll or 1)
    assert report.main.dot_flops == expected
    assert report.main.tensor_flops == expected


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("head_dim", [72, 80, 128])
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
def test_small_shared_memory_suffices(arch, head_dim, kernel):
    """99 KiB: some of these generations have no entries of their own."""
    report = report_of(arch, kernel, head_dim, bias=True)
    assert report.shared_limit == 99 * 1024
    assert report.fits
    assert report.main is not None
    assert report.main.tensor_instructions


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("head_dim", [72, 128])
def test_a_bias_spills_next_to_nothing(head_dim, kernel):
    """A tile is chosen for calls without one; at 128 all registers are taken already."""
    stack = BIAS_STACK if head_dim == 128 else 0
    assert_good(report_of("sm_90", kernel, head_dim, bias=True), stack)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_half_precision_has_the_same_tensor_cores(kernel):
    report = report_of("sm_90", kernel, 64, dtype="fp16", tile_rows=64)
    assert_good(report)
    assert report.constants["TILE_ROWS"] == 64
    assert report.main.operand_type == "fp16"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_float32_uses_tensor_cores_only_where_pytorch_allows_tf32(kernel, arch):
    exact = report_of(arch, kernel, 16, dtype="fp32")  # wider heads take long to compile
    assert exact.fits
    assert exact.constants["PRECISION"] == "ieee"
    assert exact.main is not None
    assert not exact.main.tensor_instructions
    assert exact.main.counts["tensor"] == 0
    rough = report_of(arch, kernel, 16, dtype="tf32")
    assert rough.fits
    assert rough.main.operand_type == "tf32"


# --- addresses

# Scalars only: within the blocks of pointers, of at most 128 rows, 32 bits are enough.
_STEP = re.compile(r"tt\.addptr %\w+, (%\w+)[^:]*: !tt\.ptr<bf16>, (i\d+)")
_PRODUCT = re.compile(r"arith\.muli (%\w+), (%\w+)[^:]*: i32")


def _is_constant(value: str) -> bool:
    return re.fullmatch(r"%c\d+_i\d+\w*", value) is not None


@pytest.mark.parametrize("call", ["fwd", "dq"])
def test_pointers_move_by_64_bits(call):
    """Or by constants; and no row or head is multiplied by its stride in 32 bits before."""
    for name, found in launches_of("sm_90", call, 72).items():
        steps = _STEP.findall(found.ttgir)
        assert len(steps) >= 4, name
        assert any(width == "i64" for _, width in steps), name
        assert all(width == "i64" or _is_constant(step) for step, width in steps), name
        for factors in _PRODUCT.findall(found.ttgir):
            assert any(map(_is_constant, factors)), (name, factors)


def test_strides_of_more_than_32_bits():
    """Heads first: in units of 8 elements, the stride from one to the next is still above 2**31."""
    rows, heads = 2**31 - 1, 2
    with torch.device("meta"):
        heads_first = torch.empty(heads, rows, 16, dtype=torch.bfloat16)
        q = heads_first.transpose(0, 1)
        bias = torch.empty(heads, rows).T
        work = torch.empty(1, 4, dtype=torch.int32)
        out = torch.empty(rows, heads, 16, dtype=torch.bfloat16)
        lse = torch.empty(heads, rows)
    assert q.stride(1) // 8 > 2**31
    with stub_device("sm_90") as launches:
        attention.forward(q, q, q, bias, work, 64, 0.25)
        attention.backward(out, q, q, q, bias, work, 64, out, lse, 0.25, bias_grad=True)
    assert [found.kernel for found in launches] == ["forward_kernel", "dq_kernel", "dkv_kernel"]
    for found in launches:
        assert found.signature["q_head"] == found.signature["k_head"] == "i64"
        assert found.signature["bias_head"] == "i32"
