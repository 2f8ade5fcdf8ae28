"""The multi-teacher loss through the real launcher, compiled for GPUs that need not be there.

The goal for every kernel: no spills, features in loads and stores of 16 bytes, 64-bit addresses, no
atomics, and for the plain loss by channel enough programs at once. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastagglo.kernels import loss, sass
from fastagglo.kernels.analysis import Report, analyse
from fastagglo.kernels.stub import Launch, stub_device
from fastagglo.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

ARCHS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (768, 1024, 1152, 1280, 1408, 1536, 2048, 4096)
# Prediction's and target's grid; they are compared on the larger one.
GRIDS = {
    "plain": ((24, 24), (24, 24)),
    "target": ((24, 24), (16, 16)),
    "prediction": ((16, 16), (24, 24)),
}
FEATURES = {"compare_kernel", "spread_kernel", "scale_kernel"}


def term(kind: str, channels: int, grids: str = "plain", dtype: str = "bf16") -> loss.Term:
    with torch.device("meta"):  # tensors without memory
        x, t = (torch.empty(4, *grid, channels, dtype=DTYPES[dtype]) for grid in GRIDS[grids])
        return loss.Term(x, t, kind, 24, 24, mean=torch.empty(channels), scale=torch.empty(()))


def run(arch: str, *terms: loss.Term) -> list[Launch]:
    """What a forward and its backward launch."""
    with stub_device(arch) as launches:
        result = loss.forward(terms)
        kept = [i for i, t in enumerate(terms) if t.wants_gradient]
        outs = [
            torch.empty_like(gradient, dtype=terms[i].prediction.dtype)
            if terms[i].prediction.dtype == torch.float16
            else gradient
            for i, gradient in zip(kept, result.gradients, strict=True)
        ]
        images = [t.images for t in terms]
        upstream = result.per_term, result.per_image, result.shares, result.term_weights
        loss.backward(result.gradients, outs, kept, images, *upstream)
    return launches


@functools.lru_cache
def code_of(arch: str, cubin: bytes, kernel: str) -> tuple[sass.Instruction, ...]:
    return sass.parse(sass.disassemble(cubin), kernel).instructions


def reports_of(
    arch: str, chunks: int | None, block: tuple[int, int, int], grids: str, dtype: str
) -> dict[str, tuple[Launch, Report]]:
    """By kernel, of one block: what is compiled depends on nothing else."""
    rows, width, _ = block
    kind = "mse" if chunks is None else "cosine_smooth_l1"
    one = term(kind, width * (chunks or 5), grids, dtype)
    launches = [launch for launch in run(arch, one) if launch.kernel in FEATURES]
    assert launches[0].constants["ROWS"] == rows
    assert launches[0].constants["CHUNKS"] == (chunks or 0)
    return {launch.kernel: (launch, analyse(launch)) for launch in launches}


def assert_good(launch: Launch, report: Report) -> None:
    assert (report.stack, report.spill_stores, report.spill_loads) == (0, 0, 0), report.constants
    assert report.shared <= report.shared_limit
    assert report.fits
    code = code_of(launch.arch, launch.cubin, launch.kernel)
    assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS"} & {i.base for i in code}


def vectors(launch: Launch) -> Counter[str]:
    """Loads and stores of global memory, by their width in bytes: "load 16"."""
    names = {"LDG": "load", "LD": "load", "STG": "store", "ST": "store"}
    code = code_of(launch.arch, launch.cubin, launch.kernel)
    return Counter(f"{names[i.base]} {i.width}" for i in code if i.base in names)


# --- what is compiled


def variants() -> dict[tuple[int, tuple[int, int, int]], list[str]]:
    """Blocks that the widths are cut into, by losses of whole tokens: (chunks, block) -> widths."""
    found: dict[tuple[int, tuple[int, int, int]], list[str]] = {}
    for channels in WIDTHS:
        *block, chunks = loss._blocks([term("angular", channels)])
        found.setdefault((chunks, tuple(block)), []).append(str(channels))
    return found


VARIANTS = {"by channel": (None, loss.CHANNEL_BLOCK)} | {
    "/".join(widths): variant for variant, widths in variants().items()
}


# Everything by channel; of the larger kernels, which take seconds each, all for one generation.
COMBINATIONS = [
    *((arch, "by channel", g, d) for arch in ARCHS for g in GRIDS for d in ("bf16", "fp32")),
    *(("sm_90", widths, g, "bf16") for widths in list(VARIANTS)[1:] for g in ("plain", "target")),
    *(("sm_90", list(VARIANTS)[3], g, d) for g, d in (("prediction", "bf16"), ("target", "fp32"))),
    *((arch, list(VARIANTS)[3], "target", "bf16") for arch in ("sm_80", "sm_100")),
    ("sm_90", list(VARIANTS)[-1], "target", "fp32"),
]


@pytest.mark.parametrize(("arch", "widths", "grids", "dtype"), COMBINATIONS)
def test_no_spills_and_wide_accesses(arch: str, widths: str, grids: str, dtype: str) -> None:
    chunks, block = VARIANTS[widths]
    found = reports_of(arch, chunks, block, grids, dtype)
    assert set(found) == FEATURES - ({"spread_kernel"} if grids != "prediction" else set())
    if chunks:  # the others are the same as by channel
        found = {"compare_kernel": found["compare_kernel"]}
    print()
    for name, (launch, report) in found.items():
        accesses = vectors(launch)
        print(
            f"{arch:6} {name:14} {widths:14} {grids:10} {dtype} registers {report.registers:3}"
            f" CTAs {report.occupancy.ctas:2} of {report.num_warps} warps"
            f" ({report.occupancy.limiter}) {dict(sorted(accesses.items()))}"
        )
        assert_good(launch, report)
        # Eight elements of a prediction and of a target, and a mean and a scale of four floats,
        # are the least that a block's loads can be; none of features is narrower.
        assert accesses["load 16"] >= 2 if name != "scale_kernel" else accesses["load 16"]
        assert accesses["store 16"]
        narrow = {"load 2", "store 2", "store 8"}
        assert not narrow & set(accesses), accesses
    if widths == "by channel" and grids == "plain":
        launch, report = found["compare_kernel"]
        assert report.num_warps == 4
        assert report.occupancy.ctas >= 4
        in_flight = report.occupancy.warps * 32 * 2 * 16  # of a prediction and a target
        assert in_flight >= 16 * 1024  # bytes a SM


def test_every_width_and_kind_launches_what_is_examined_here() -> None:
    examined = {(chunks or 0, block) for chunks, block in VARIANTS.values()}
    for kind in loss.KINDS:
        for channels in WIDTHS:
            *block, chunks = loss._blocks([term(kind, channels)])
            assert (chunks, tuple(block)) in examined


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_unaligned_and_half(dtype: str) -> None:
    """Element by element where 16 bytes cannot be read at once."""
    terms = [
        term(kind, channels, grids, dtype)
        for kind, channels, grids in (
            ("mse", 1001, "prediction"),
            ("mse", 1280, "plain"),
            ("cosine", 255, "target"),
        )
    ]
    launches = [launch for launch in run("sm_90", *terms) if launch.kernel in FEATURES]
    names = Counter(launch.kernel for launch in launches)
    assert names == {"compare_kernel": 2, "spread_kernel": 1, "scale_kernel": 1}
    for launch in launches:
        report = analyse(launch)
        assert_good(launch, report)
        accesses = vectors(launch)
        assert bool(accesses["load 2"] or accesses["store 2"]) != launch.constants["ALIGNED"]


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_other_generations(arch: str) -> None:
    for launch in run(arch, term("mse", 1280, "prediction")):
        assert_good(launch, analyse(launch))


@pytest.mark.parametrize("arch", ARCHS)
def test_small_kernels(arch: str) -> None:
    masked = replace(
        term("mse", 1280),
        valid=torch.empty(4, 24, 24, dtype=torch.bool, device="meta"),
        shift=torch.empty(4, 2, dtype=torch.float64, device="meta"),
    )
    launches = [launch for launch in run(arch, masked) if launch.kernel not in FEATURES]
    assert [launch.kernel for launch in launches] == [
        "count_kernel",
        "weigh_kernel",
        "collect_kernel",
    ]
    for launch in launches:
        assert_good(launch, analyse(launch))


# --- what is launched


def test_one_launch_for_all_terms() -> None:
    """Whatever their kinds, widths and grids; another where dtypes or alignment differ."""
    terms = [
        term(kind, channels, grids)
        for kind, channels, grids in (
            ("mse", 1280, "plain"),
            ("mse", 768, "target"),
            ("cosine_smooth_l1", 1152, "prediction"),
            ("angular", 4096, "plain"),
        )
    ]
    launches = run("sm_90", *terms)
    assert_good(launches[1], analyse(launches[1]))  # both sides resampled, and the widest
    names = [launch.kernel for launch in launches]
    assert names == [
        "weigh_kernel",
        "compare_kernel",
        "spread_kernel",
        "collect_kernel",
        "scale_kernel",
    ]
    more = [*terms, term("mse", 1281), term("mse", 1280, dtype="fp32")]
    launches = run("sm_90", *more)
    names = Counter(launch.kernel for launch in launches)
    assert names["compare_kernel"] == 3
    assert names["weigh_kernel"] == names["collect_kernel"] == 1
    programs = sum(x.grid[0] for x in launches if x.kernel == "compare_kernel")
    assert programs == len(more) * 4 * 24 * 24 // loss.TOKENS


def test_numbers_of_terms_share_what_is_compiled() -> None:
    """Up to 16: a table is data."""
    few, many = (
        next(x for x in run("sm_90", *n * [term("mse", 1280)]) if x.kernel == "compare_kernel")
        for n in (2, 15)
    )
    assert few.cubin == many.cubin


# --- addresses

# Of pointers to features: the step's shape, of a tensor, and its width.
_STEP = re.compile(
    r"tt\.addptr %\w+, %\w+ .*?: (?:tensor<[^!]*)?!tt\.ptr<bf16>.*, (?:tensor<([0-9x]+)x)?(i\d+)"
)


@pytest.mark.parametrize("grids", GRIDS)
def test_addresses_of_64_bits(grids: str) -> None:
    """From image to image, row to row and token to token; 32 are enough for the channels of one."""
    launches = run("sm_90", term("mse", 1280, grids), term("angular", 1280, grids))
    for launch in launches:
        if launch.kernel not in FEATURES:
            continue
        steps = _STEP.findall(launch.ttgir)
        assert any(width == "i64" for _, width in steps), launch.kernel
        for shape, width in steps:
            # A block of channels: the step within a row of at most 8192.
            channels = shape and int(shape.split("x")[-1]) > 16
            assert width == "i64" or channels, (launch.kernel, shape, width)
    assert {launch.kernel for launch in launches} >= {"compare_kernel", "scale_kernel"}
