"""The adaptor heads' kernels through the real launcher, compiled for GPUs that need not be there.

No spills, shared memory fits, products on tensor cores, 64-bit addresses; and beside a plain
product of the same blocks, what an epilogue or a prologue adds to the inner loop: nothing, or its
own arithmetic. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
import triton
import triton.language as tl

from fastagglo.kernels import mlp, mlp_choice
from fastagglo.kernels.analysis import Report, analyse
from fastagglo.kernels.mlp_choice import GemmTile
from fastagglo.kernels.sass import disassemble
from fastagglo.kernels.stub import Launch, stub_device
from fastagglo.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

OPCODES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS, COLUMNS, INNER = 46080, 1536, 1280
CELLS = mlp.Cells(2, 8)
PRODUCTS = (
    "plain", "epilogue", "gelu", "tanh", "norm", "input", "weight", "norm weight",
    "grouped", "grouped norm", "grouped input",
    "shuffled norm", "shuffled input", "shuffled norm weight",
)  # fmt: skip


@triton.jit
def plain_kernel(
    x, weight, out, M, N, K, x_row, w_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``out = x @ weight.T`` as everyone writes it, for whole blocks of the inner dimension."""
    down = tl.cdiv(M, ROWS)
    rows = (tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)) % M
    columns = (tl.program_id(0) // down * COLUMNS + tl.arange(0, COLUMNS)) % N
    inner = tl.arange(0, DEPTH)
    a = x + rows.to(tl.int64)[:, None] * x_row + inner[None, :]
    b = weight + columns.to(tl.int64)[None, :] * w_row + inner[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, K, DEPTH):
        sums = tl.dot(tl.load(a), tl.load(b), sums)
        a += DEPTH
        b += DEPTH
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty))


@functools.cache
def launches_of(
    arch: str,
    what: str,
    dtype: str = "bf16",
    sizes: tuple[int, int, int] = (ROWS, COLUMNS, INNER),
    tile: GemmTile | None = None,
    tf32: bool = False,
) -> tuple[Launch, ...]:
    rows, columns, inner = sizes
    with torch.device("meta"):  # tensors without memory
        x = torch.empty(rows, inner, dtype=DTYPES[dtype])
        weight = torch.empty(columns, inner, dtype=DTYPES[dtype])
        y = torch.empty(rows, columns, dtype=DTYPES[dtype])
        shuffled = torch.empty(rows * CELLS.each, columns // CELLS.each, dtype=DTYPES[dtype])
        statistic = torch.empty(rows)
    bias, scale = weight[:, 0].contiguous(), weight[0]
    norm = (statistic, statistic, scale, scale)
    problem = mlp.Problem(x, weight, bias, gelu_out=True, keep_pre=True)
    block = {"norm": norm, "gelu_in": True, "residual": y}

    def plain_of_others() -> None:
        t = tile or mlp_choice.gemm_tile("linear", x, False, True)
        plain_kernel[(1,)](
            x, weight, y, rows, columns, inner, x.stride(0), weight.stride(0),
            ROWS=t.rows, COLUMNS=t.columns, DEPTH=t.depth, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    calls = {
        "pointwise": lambda: (
            mlp.norm_gelu_forward(x, scale, scale),
            mlp.norm_gelu_backward(x, x, statistic, statistic, scale, scale),
            mlp.gelu_forward(x),
            mlp.gelu_backward(x, x),
            mlp.row_statistics(x),
        ),
        "others": plain_of_others,
        "plain": lambda: mlp.linear(x, weight, tile=tile),
        "epilogue": lambda: mlp.linear(
            x, weight, bias, gelu_out=True, residual=y, keep_pre=True, tile=tile
        ),
        "gelu": lambda: mlp.linear(x, weight, bias, gelu_in=True, tile=tile),
        "tanh": lambda: mlp.linear(x, weight, bias, gelu_in=True, tanh=True, tile=tile),
        "norm": lambda: mlp.linear(x, weight, bias, **block, tile=tile),
        "input": lambda: mlp.linear_input_grad(y, weight, gelu_of=x, tile=tile),
        "weight": lambda: mlp.linear_weight_grad(y, x, tile=tile),
        "weight alone": lambda: mlp.linear_weight_grad(y, x, sums=False, tile=tile),
        "norm weight": lambda: mlp.linear_weight_grad(y, x, norm=norm, gelu_in=True, tile=tile),
        "shuffled norm": lambda: mlp.linear(
            x, weight, bias, norm=norm, gelu_in=True, cells=CELLS, tile=tile
        ),
        "shuffled input": lambda: mlp.linear_input_grad(shuffled, weight, cells=CELLS, tile=tile),
        "shuffled norm weight": lambda: mlp.linear_weight_grad(
            shuffled, x, norm=norm, gelu_in=True, cells=CELLS, tile=tile
        ),
        "last norm": lambda: mlp.linear(x, weight, bias, norm=norm, gelu_in=True, tile=tile),
        "grouped": lambda: mlp.grouped_linear([problem] * 8, tile=tile),
        "grouped norm": lambda: mlp.grouped_linear(
            [mlp.Problem(x, weight, bias, **block)] * 8, tile=tile
        ),
        "grouped input": lambda: mlp.grouped_linear_input_grad([(y, weight, x)] * 8, tile=tile),
    }
    matmul = torch.backends.cuda.matmul
    former = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with stub_device(arch) as launches:
            calls[what]()
    finally:
        matmul.fp32_precision = former
    return tuple(launches)


def report_of(arch: str, what: str, *args, **options) -> Report:
    """Of the product; a second pass that adds up partial sums is left out."""
    first, *rest = launches_of(arch, what, *args, **options)
    assert {launch.kernel for launch in rest} <= {"sum_kernel"}
    return analyse(first)


def assert_good(report: Report) -> None:
    spilled = (report.stack, report.spill_stores, report.spill_loads)
    assert spilled == (0, 0, 0), f"{report.kernel} {report.constants}"
    assert report.shared <= report.shared_limit
    assert report.fits


def row(name: str, report: Report) -> str:
    text = (
        f"{report.arch:7}{name:20} registers {report.registers:3} shared {report.shared:6}"
        f" CTAs {report.occupancy.ctas:2}"
    )
    if loop := report.main:
        bound = f" bound {loop.bound:.2f} ({loop.limiter})" if loop.bound else ""
        text += f" loop {loop.counts['total']:5} of which tensor {loop.counts['tensor']:3}{bound}"
    return text


# --- gates


@pytest.mark.parametrize("arch", OPCODES)
def test_pointwise(arch: str) -> None:
    # The widest, which has most to hold, and on one of them what is usual.
    for dtype, width in [("bf16", 8192), ("bf16", 1520)][: 2 if arch == "sm_90" else 1]:
        launches = launches_of(arch, "pointwise", dtype, (46080, 8, width))
        # Sums of columns are a pass of their own, and statistics the forward without its result.
        assert [launch.kernel for launch in launches] == [
            "norm_gelu_kernel", "norm_gelu_backward_kernel", "sum_kernel",
            "gelu_kernel", "gelu_backward_kernel", "sum_kernel", "norm_gelu_kernel",
        ]  # fmt: skip
        for launch in {launch.cubin: launch for launch in launches}.values():
            report = analyse(launch)
            print(row(f"{launch.kernel} {dtype} {width}", report))
            assert_good(report)


# The lighter ones are subsets of the others, and are compiled below.
@pytest.mark.parametrize("what", sorted(set(PRODUCTS) - {"plain", "gelu", "tanh"}))
@pytest.mark.parametrize("arch", OPCODES)
def test_products(arch: str, what: str) -> None:
    report = report_of(arch, what)
    print(row(what, report))
    assert_good(report)
    assert {name.split(".")[0] for name in report.main.tensor_instructions} == {OPCODES[arch]}
    assert report.main.operand_type == "bf16"
    # Warps compute nothing twice, and nothing is multiplied that is not in the blocks.
    of = report.constants
    expected = 2 * of["ROWS"] * of["COLUMNS"] * of["DEPTH"] * report.main.unroll
    assert report.main.dot_flops == report.main.tensor_flops == expected


@pytest.mark.parametrize("sizes", [(1000, 1528, 1160), (1000, 1155, 1283)], ids=str)
@pytest.mark.parametrize("what", ["norm", "input", "norm weight", "grouped norm"])
def test_widths_that_are_no_block(what: str, sizes: tuple[int, int, int]) -> None:
    """Of no multiple of 16 and of no multiple of 8."""
    report = report_of("sm_90", what, "fp16", sizes)
    assert_good(report)
    assert report.main.operand_type == "fp16"
    vectors = sizes[2] % 8 == 0
    assert report.constants["ROWS"] == (64 if what == "grouped norm" or not vectors else 128)


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_small_shared_memory_suffices(arch: str) -> None:
    """99 KiB."""
    for what in ("norm", "grouped norm"):
        report = report_of(arch, what)
        assert report.shared_limit == 99 * 1024
        assert_good(report)


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_uses_tensor_cores_only_where_pytorch_allows_tf32(tf32: bool) -> None:
    for arch in ("sm_80", "sm_90") if tf32 else ("sm_80", "sm_100"):
        for what in ("norm", "norm weight"):
            report = report_of(arch, what, "fp32", tf32=tf32)
            print(row(f"{what} {'tf32' if tf32 else 'fp32'}", report))
            assert_good(report)
            if tf32:
                assert report.main.operand_type == "tf32"
            else:
                assert not report.main.tensor_instructions


# --- the inner loop


def mix(report: Report) -> dict[str, int]:
    return {name: n for name, n in report.main.counts.items() if n}


@pytest.mark.parametrize("arch", OPCODES)
def test_beside_a_plain_product(arch: str) -> None:
    """Tiles of 128 x 128: all of what the loops say, instruction class by instruction class."""
    tile = GemmTile(128, 128, 32 if arch == "sm_80" else 64, 8, 3)
    plain = mix(report_of(arch, "others", tile=tile))
    ours = mix(report_of(arch, "plain", tile=tile))
    epilogue = mix(report_of(arch, "epilogue", tile=tile))
    print(arch, "others", plain)
    print(arch, "ours", ours)
    print(arch, "epilogue", epilogue)
    # An epilogue adds nothing, and ours has no more than the plain one. Integers are addresses, of
    # which the compiler keeps as many as registers are left for.
    assert ours["total"] <= plain["total"]
    assert epilogue["total"] <= ours["total"]
    for name in ours.keys() | epilogue.keys():
        if name not in ("integer", "total"):
            assert epilogue.get(name) == ours.get(name) <= plain.get(name, 0), name
    for prologue in ("tanh", "gelu", "norm") if arch == "sm_90" else ("tanh",):
        found = mix(report_of(arch, prologue, tile=tile))
        print(arch, prologue, {k: n - ours.get(k, 0) for k, n in found.items()})
        # Only arithmetic, and reading what it needs: no products, no round trip through local
        # memory.
        assert found["tensor"] == ours["tensor"]
        assert "local" not in found


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_beside_a_plain_product_in_wide_tiles(arch: str) -> None:
    """The table's: where registers are short, a few moves more or less."""
    plain, ours, epilogue = (mix(report_of(arch, w)) for w in ("others", "plain", "epilogue"))
    print(arch, plain, ours, epilogue, sep="\n")
    assert abs(epilogue["total"] - ours["total"]) <= 4
    for found in (ours, epilogue):
        assert found["total"] <= plain["total"]
        for name in ("tensor", "global", "sync"):
            assert found[name] == plain[name], name
        assert not {"float", "mufu", "convert", "local", "shuffle"} & found.keys()


@pytest.mark.parametrize("arch", OPCODES)
def test_only_some_programs_add_up_columns(arch: str) -> None:
    """A weight's gradient has two loops: one with the bias's gradient, one without."""
    loops = report_of(arch, "weight").loops
    assert len(loops) >= 2
    floats = [loop.counts["float"] for loop in loops if loop.counts["tensor"]]
    assert min(floats) == 0
    assert max(floats) > 0
    (loop,) = report_of(arch, "weight alone").loops
    assert loop.counts["float"] == 0


@pytest.mark.parametrize("arch", OPCODES)
def test_a_shuffle_is_all_in_addresses(arch: str) -> None:
    """Forward: outside of the loop. Gradients: one division a trip, and one a row of the block."""
    plain, ours = (mix(report_of(arch, what)) for what in ("last norm", "shuffled norm"))
    assert abs(ours["total"] - plain["total"]) <= 4
    assert ours["global"] == plain["global"]
    # 16 bytes at a time, in all of them.
    for what in ("shuffled norm", "shuffled input", "shuffled norm weight"):
        listing = disassemble(launches_of(arch, what)[0].cubin)
        stores = re.findall(r"\bSTG\.E\.128\b", listing)
        copies = re.findall(r"\bLDGSTS\.E\.BYPASS[.\w]*\.128\b", listing)
        assert len(stores) >= 8, what
        assert len(copies) >= 12, what
    for what, most in (("input", 1.2), ("norm weight", 1.1)):
        plain, ours = (mix(report_of(arch, w)) for w in (what, f"shuffled {what}"))
        print(arch, what, {k: n - plain.get(k, 0) for k, n in ours.items()})
        for name in ("tensor", "global", "sync", "shared"):
            assert ours.get(name) == plain.get(name), name
        assert "local" not in ours
        assert ours["total"] <= most * plain["total"]


@pytest.mark.parametrize("what", ["shuffled norm", "shuffled input", "shuffled norm weight"])
def test_shuffled_widths_that_are_no_block(what: str) -> None:
    for sizes in ((1000, 4 * 382, 1160), (1000, 4 * 289, 1283)):
        assert_good(report_of("sm_90", what, "fp16", sizes))


# --- launches


def test_a_group_is_one_launch() -> None:
    (launch,) = launches_of("sm_90", "grouped", sizes=(1000, 1024, 1280))
    tiles = -(-1000 // launch.constants["ROWS"]) * -(-1024 // launch.constants["COLUMNS"])
    assert launch.grid == (8 * tiles, 1, 1)


def test_parts_of_a_weight_gradient_fill_the_sms() -> None:
    launches = launches_of("sm_90", "weight")
    assert [launch.kernel for launch in launches] == ["weight_grad_kernel"] + 2 * ["sum_kernel"]
    tiles, parts, _ = launches[0].grid
    assert tiles == 12 * 5
    waves = tiles * parts / mlp_choice.SMS
    assert waves / -(-waves // 1) > 0.9
    # Few rows: in one piece, straight into the result.
    (alone,) = launches_of("sm_90", "weight", sizes=(512, 1536, 1280))
    assert alone.grid == (60, 1, 1)


def test_addresses_are_64_bits() -> None:
    """From row to row, and in steps along the inner dimension."""
    rows_of = re.compile(
        r"tt\.addptr %\w+, %\w+ : tensor<(\d+)x1x!tt\.ptr<bf16>.*?, tensor<\1x1xi(\d+)"
    )
    seen = 0
    for what in (*PRODUCTS, "pointwise"):
        sizes = (46080, 8, 1520) if what == "pointwise" else (ROWS, COLUMNS, INNER)
        for launch in launches_of("sm_90", what, "bf16", sizes):
            found = rows_of.findall(launch.ttgir)
            assert all(width == "64" for *_, width in found), (what, launch.kernel)
            seen += len(found)
    assert seen > 20


def test_strides_of_more_than_32_bits() -> None:
    far = torch.empty(4, device="meta", dtype=torch.bfloat16).as_strided((4, 64), (2**36, 1))
    near = torch.empty(64, 64, device="meta", dtype=torch.bfloat16)
    statistic = torch.empty(4, device="meta")
    with stub_device("sm_90") as launches:
        mlp.linear_input_grad(far, near, gelu_of=far)
        mlp.linear_weight_grad(far, far)
        mlp.norm_gelu_forward(far, None, None)
        mlp.norm_gelu_backward(far, far, statistic, statistic, None, None, sums=False)
        mlp.gelu_forward(far)
        mlp.gelu_backward(far, far, sums=False)
    names = ("x_row", "extra_row", "grad_row", "row_stride", "grad_stride")
    kinds = [
        launch.signature[name] for launch in launches for name in names if name in launch.signature
    ]
    assert len(kinds) == 10
    assert set(kinds) == {"i64"}


# --- the choice of a road


def test_choice() -> None:
    low = torch.bfloat16
    for op in ("linear", "input_grad", "weight_grad", "grouped"):
        assert mlp.choose(op, 64, 1536, 1280, low) == "triton"
        assert mlp.choose(op, 2048, 1536, 1280, low) == "triton"
        assert mlp.choose(op, 46080, 1536, 1280, low) == "cublas"
        assert mlp.choose(op, 64, 1536, 1280, torch.float32) == "cublas"
        assert mlp.choose(op, 0, 1536, 1280, low) == "cublas"
    with pytest.raises(ValueError, match=r"op must be one of linear, .*got 'matmul'"):
        mlp.choose("matmul", 1, 1, 1, low)


@pytest.mark.parametrize("tiles", [1, 60, 100, 132, 133, 500])
@pytest.mark.parametrize("rows", [1, 511, 2048, 46080])
def test_parts_cover_all_rows(rows: int, tiles: int) -> None:
    each = mlp_choice.splits(rows, tiles, 64)
    assert each % 64 == 0
    parts = -(-rows // each)
    assert 1 <= parts <= mlp_choice.MOST_PARTS
    assert parts == 1 or each >= 64 * mlp_choice.LEAST_STEPS


def test_costs() -> None:
    """By hand, for 10 rows of 4 -> 6 channels of 2 bytes."""
    x, y, weight = 40, 60, 24
    assert mlp.product_cost("linear", 10, 6, 4, 2) == mlp.Cost(480, 2 * (x + y + weight + 6))
    full = mlp.product_cost("linear", 10, 6, 4, 2, norm=True, extra=True, pre=True)
    assert full == mlp.Cost(480, 2 * (x + 3 * y + weight + 6 + 8) + 80)
    grad = mlp.product_cost("input_grad", 10, 6, 4, 2, extra=True)
    assert grad == mlp.Cost(480, 2 * (2 * x + y + weight))
    grad = mlp.product_cost("weight_grad", 10, 6, 4, 2)
    assert grad == mlp.Cost(480, 2 * (x + y) + 4 * weight + 4 * 6)
    forward = mlp.pointwise_cost("norm_gelu_forward", 10, 4, 2)
    assert forward == mlp.Cost(0, 2 * 2 * x + 8 * 10 + 2 * 4 * 2)
    backward = mlp.pointwise_cost("gelu_backward", 10, 4, 2)
    assert backward == mlp.Cost(0, 3 * 2 * x + 4 * 4)
    assert forward + grad == mlp.Cost(480, forward.bytes + grad.bytes)
    assert mlp.Cost(100, 10).seconds(50, 1) == 10
    assert mlp.Cost(100, 10).seconds(5, 10) == 20
    with pytest.raises(ValueError, match="got 'linear'"):
        mlp.pointwise_cost("linear", 1, 1, 1)
    with pytest.raises(ValueError, match="got 'gelu_forward'"):
        mlp.product_cost("gelu_forward", 1, 1, 1, 1)
