"""What a compiled launch costs: registers, spills, shared memory, occupancy, and its inner loops.

The bound of a loop. For one trip of one CTA, with w = warps / 4 of its warps in each of the SM's
four sub-partitions, and n the instructions of one warp:

    tensor = FLOPs that tensor cores execute / (dense FLOP per clock and SM)
    issue  = w * n(all)                                          one instruction per clock
    mufu   = w * n(MUFU and conversions other than packing) * 32 / lanes
    fma    = w * (n(FFMA, FADD, FMUL; two-wide ones twice) * 32 / lanes + n(IMAD) * 2)
    alu    = w * n(integer, logic, compare, min, max, select, pack) * 32 / lanes
    l1     = warps * sum(max(1, 32 * bytes per lane / 128) over shared, global and local accesses
             and shuffles) + bytes of shared memory that HGMMA and UTCHMMA read / 128
                                                       one data path per SM, shared memory and L1

in clocks, with the rates of `chips`. bound = tensor / max(all of them) is the share of the dense
tensor-core peak that the loop could reach at best. It assumes that all units overlap perfectly
(enough warps of enough CTAs), that no load, barrier or dependency is ever waited for and that there
are no bank conflicts; an access that lanes share counts in full. It leaves out tensor memory. A
block under a branch counts as executed by every warp in every trip, a loop inside of the loop (a
wait) as not executed. So it ranks kernels and finds what limits them; it predicts no time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastagglo.kernels import sass, ttgir
from fastagglo.kernels.chips import SUB_PARTITIONS, WARP, Chip, Occupancy, chip, occupancy
from fastagglo.kernels.sass import Instruction, SassLoop
from fastagglo.kernels.stub import Launch

# Instructions that cost an issue slot only: they move constants, or run once per warp.
_ISSUE_ONLY = {"LDC", "S2R", "S2UR", "CS2R", "R2UR", "R2P", "P2R", "ELECT", "LEPC"}
_TWO_WIDE = {"FFMA2", "FADD2", "FMUL2"}
_COMPARE = {"FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK", "HMNMX2", "HSET2", "HSETP2"}
_PACK = {"F2FP", "I2FP", "F2IP"}


@dataclass(frozen=True)
class Loop:
    """One innermost loop of the machine code, counted per trip and per warp.

    Attributes:
        label: "main" for the one with most tensor-core FLOPs (then fewest instructions, so that an
            unmasked loop comes before its masked twin), "loop 2", ... for others.
        start, end, depth: where it is in the code, and how many loops deep.
        counts: instructions of each of `sass.CLASSES`, and "total".
        tensor_instructions: opcode -> count.
        operand_type: of the tensor-core instructions, as in `chips.Chip.tensor`; None without any.
        unroll: trips of the loop as written in one trip of the machine code; None if not known.
        dot_flops: FLOPs of the products of one trip by their shapes in Triton's IR, for the CTA.
        tensor_flops: FLOPs that the tensor cores execute in one trip, for the CTA; more than
            ``dot_flops`` where warps compute the same thing twice. None if not known.
        useful_flops: what the caller said that one trip is good for, times ``unroll``.
        non_tensor: other instructions of one trip, summed over the warps of the CTA.
        non_tensor_per_mflop: of them, per million tensor-core FLOPs: compare kernels by this.
        non_tensor_per_useful_mflop: the same per million of ``useful_flops``, which padding does
            not flatter.
        cycles: clocks of each unit, see the module's docstring.
        bound: share of the dense tensor-core peak at best; None without tensor cores.
        limiter: the unit that takes longest.
    """

    label: str
    start: int
    end: int
    depth: int
    counts: dict[str, int]
    tensor_instructions: dict[str, int]
    operand_type: str | None
    unroll: int | None
    dot_flops: int | None
    tensor_flops: float | None
    useful_flops: float | None
    non_tensor: int
    non_tensor_per_mflop: float | None
    non_tensor_per_useful_mflop: float | None
    cycles: dict[str, float]
    bound: float | None
    limiter: str


@dataclass(frozen=True)
class Report:
    """One compiled launch; `dataclasses.asdict` makes it JSON.

    Attributes:
        kernel, arch, constants, grid: as in `stub.Launch` (``constants`` as text where it is no
            number, string or bool).
        num_warps, num_stages: of the launch.
        registers, stack: per thread; ``stack`` in bytes.
        spill_stores, spill_loads: bytes per thread of the stores to and loads from local memory in
            the code, each counted once.
        shared, shared_limit, fits: bytes per CTA, the chip's limit, and whether it is kept (tensor
            memory included).
        tmem: columns of tensor memory per CTA.
        occupancy: CTAs in an SM, and what limits them.
        code: instructions of the whole kernel.
        loops: innermost loops with tensor-core instructions, main first; if there are none, the
            innermost loops with floating-point arithmetic.
        notes: what the reader must know about this row.
    """

    kernel: str
    arch: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int] | None
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    shared_limit: int
    fits: bool
    tmem: int
    occupancy: Occupancy
    code: int
    loops: tuple[Loop, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def main(self) -> Loop | None:
        """The loop that decides; None where the kernel has none with arithmetic."""
        return self.loops[0] if self.loops else None

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


def analyse(launch: Launch, *, useful_flops: float | None = None) -> Report:
    """Take a compiled launch apart.

    Args:
        launch: from `stub.stub_device`.
        useful_flops: FLOPs that one trip of the main loop, as written, is good for (without padding
            or recomputation), for the figures per useful FLOP.

    Raises:
        RuntimeError: one of Triton's bundled tools (nvdisasm, cuobjdump) failed.
    """
    sm = chip(launch.arch)
    listing = sass.parse(sass.disassemble(launch.cubin), launch.kernel)
    used = sass.resources(launch.cubin, launch.kernel)
    stores, loads = sass.spilled(listing.instructions)
    notes = []
    special = ttgir.warp_specialised(launch.ttgir)
    if special:
        notes.append("warp-specialised: its warps run different loops, so there is no bound")
    residents = occupancy(
        launch.arch,
        warps=launch.warps,
        registers=used.registers,
        shared=launch.shared,
        tmem=launch.tmem,
    )
    if launch.shared > sm.shared_cta:
        notes.append(
            f"does not fit: {launch.shared} bytes of shared memory, {sm.arch} has {sm.shared_cta}"
        )
    elif not residents.ctas:
        notes.append(f"does not fit: {residents.limiter}")
    ir = ttgir.dot_loops(launch.ttgir)
    chosen = [loop for loop in sass.loops(listing) if loop.innermost and loop.has_tensor]
    if chosen:
        paired = _pair(chosen, [loop for loop in ir if loop.instructions])
    else:
        chosen = _arithmetic(sass.loops(listing))
        ir = [loop for loop in ir if loop.fma_flops]
        paired = [(ir[0], None)] if len(ir) == len(chosen) == 1 else [(None, None)] * len(chosen)
    unmatched = [loop for loop, (found, _) in zip(chosen, paired, strict=True) if found is None]
    if any(loop.has_tensor for loop in unmatched):
        notes.append(
            "a loop matches none of Triton's IR: its FLOPs are those of the code, if shown"
        )
    built = [
        _loop(loop, found, unroll, launch.warps, sm, useful_flops, special)
        for loop, (found, unroll) in zip(chosen, paired, strict=True)
    ]
    built.sort(key=_rank)
    return Report(
        kernel=launch.kernel,
        arch=launch.arch,
        constants={name: _plain(value) for name, value in launch.constants.items()},
        num_warps=launch.warps,
        num_stages=launch.stages,
        grid=launch.grid,
        registers=used.registers,
        stack=used.stack,
        spill_stores=stores,
        spill_loads=loads,
        shared=launch.shared,
        shared_limit=sm.shared_cta,
        fits=residents.ctas > 0,
        tmem=launch.tmem,
        occupancy=residents,
        code=len(listing.instructions),
        loops=tuple(
            replace(loop, label=f"loop {number}" if number > 1 else "main")
            for number, loop in enumerate(built, 1)
        ),
        notes=tuple(notes),
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _rank(loop: Loop) -> tuple[float, int]:
    if loop.tensor_flops:
        return -loop.tensor_flops, loop.counts["total"]
    return 0.0, -loop.counts["float"]


def _arithmetic(loops: Sequence[SassLoop]) -> list[SassLoop]:
    deepest = [a for a in loops if not any(a.start < b.start <= b.end < a.end for b in loops)]
    return [loop for loop in deepest if sass.count(loop.instructions)["float"]]


def _pair(
    code: Sequence[SassLoop], ir: Sequence[ttgir.IrLoop]
) -> list[tuple[ttgir.IrLoop | None, int | None]]:
    """For each loop of the machine code the loop of the IR it came from, and how often unrolled.

    Both keep their order; the compiler may unroll one into a body and a remainder, or do away with
    one. Of the IR's loops that are not before the last one taken, the first whose instruction count
    divides that of the machine code with the smallest quotient.
    """
    paired: list[tuple[ttgir.IrLoop | None, int | None]] = []
    first = 0
    for number, loop in enumerate(code):
        count = sass.count(loop.instructions)[sass.TENSOR]
        candidates = range(first, len(ir))
        if len(code) == len(ir):
            candidates = range(number, number + 1)
        fitting = [at for at in candidates if count % ir[at].instructions == 0]
        if not fitting:
            paired.append((None, None))
            continue
        first = min(fitting, key=lambda at: count // ir[at].instructions)
        paired.append((ir[first], count // ir[first].instructions))
    return paired


def _loop(
    loop: SassLoop,
    ir: ttgir.IrLoop | None,
    unroll: int | None,
    warps: int,
    sm: Chip,
    useful: float | None,
    special: bool,
) -> Loop:
    counts = sass.count(loop.instructions)
    tensor = [i for i in loop.instructions if i.kind == sass.TENSOR]
    dot_flops = None
    if ir is not None:
        dot_flops = ir.flops * unroll if unroll else ir.fma_flops
    flops: float | None = 0.0
    operand = None
    if tensor:
        # Warps that share the work of one instruction (UTCHMMA) do not show its shape.
        shown = all(i.flops for i in tensor)
        flops = sum(i.flops for i in tensor) * warps if shown else dot_flops
        operand = ir.dots[0].operand_type if ir is not None else tensor[0].operand_type
    read = ir.operand_bytes * unroll if ir is not None and unroll else 0
    cycles = {} if special else _cycles(loop.instructions, warps, sm, flops, operand, read)
    non_tensor = (counts["total"] - counts[sass.TENSOR]) * warps
    comparable = bool(tensor and flops and not special)
    useful_trip = useful * unroll if useful and unroll else None
    return Loop(
        label="",
        start=loop.start,
        end=loop.end,
        depth=loop.depth,
        counts=counts,
        tensor_instructions=dict(Counter(i.opcode for i in tensor)),
        operand_type=operand,
        unroll=unroll,
        dot_flops=dot_flops,
        tensor_flops=flops,
        useful_flops=useful_trip,
        non_tensor=non_tensor,
        non_tensor_per_mflop=non_tensor / flops * 1e6 if comparable and flops else None,
        non_tensor_per_useful_mflop=(
            non_tensor / useful_trip * 1e6 if comparable and useful_trip else None
        ),
        cycles=cycles,
        bound=cycles["tensor"] / max(cycles.values()) if "tensor" in cycles else None,
        limiter=max(cycles, key=lambda unit: cycles[unit]) if cycles else "",
    )


def _issue_only(instruction: Instruction) -> bool:
    return instruction.uniform or instruction.base in _ISSUE_ONLY


def _cycles(
    code: Sequence[Instruction],
    warps: int,
    sm: Chip,
    flops: float | None,
    operand: str | None,
    read: int,
) -> dict[str, float]:
    """Clocks of one trip of a CTA in each unit; without "tensor" where its rate is not known."""
    each = warps / SUB_PARTITIONS
    fma = alu = mufu = l1 = 0.0
    for i in code:
        kind, base = i.kind, i.base
        if base == "IMAD":
            fma += 2  # half of the lanes multiply integers, on all of these chips
        elif kind == "float" and base not in _COMPARE:
            fma += WARP / sm.fp32 * (2 if base in _TWO_WIDE else 1)
        elif base in _COMPARE | _PACK or (kind == "integer" and not _issue_only(i)):
            alu += WARP / sm.integer
        elif kind in ("mufu", "convert"):
            mufu += WARP / sm.mufu
        elif kind == "shuffle":
            l1 += 1
        elif kind in ("shared", "global", "local") and not base.startswith("U"):
            l1 += max(1.0, WARP * i.width / sm.shared_bytes)
        elif kind == sass.TENSOR:
            l1 += i.operand_bytes / sm.shared_bytes
    cycles = {
        "issue": len(code) * each,
        "mufu": mufu * each,
        "fma": fma * each,
        "alu": alu * each,
        "l1": l1 * warps + read / sm.shared_bytes,
    }
    rate = sm.tensor.get(operand or "")
    if flops and rate:
        cycles = {"tensor": flops / rate} | cycles
    return cycles
