"""What a multiprocessor (SM) of each NVIDIA generation holds, and how fast it issues.

Sources. Limits: the table of technical specifications per compute capability in the CUDA
programming guide, the same numbers as ``cuda::arch_traits`` of NVIDIA's CCCL. Allocation
granularity (registers per warp in units of 256, shared memory in units of 128 bytes with 1 KiB kept
by the driver for each CTA): the CUDA occupancy calculator. Tensor-core rates: the architecture
white papers, as dense FLOP per clock and SM with fp32 accumulators (A100 312 TFLOP/s = 108 SM x
1.41 GHz x 2048; H100 989 = 132 x 1.83 x 4096; B200 2250 = 148 x 1.85 x 8192; sm_86, sm_89 and
sm_120 as in the data-centre and workstation parts, 1024: GeForce boards run fp16 with fp32
accumulators at half of it). Other rates: the guide's table of arithmetic throughput (results per
clock and SM, divided here by the four sub-partitions of an SM).
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
SUB_PARTITIONS = 4
REGISTER_UNIT = 256  # registers are handed to a warp in units of this many
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # of each CTA, for the driver


@dataclass(frozen=True)
class Chip:
    """One GPU generation.

    Attributes:
        arch: ``"sm_90"``.
        sms: of the generation's usual data-centre or workstation part.
        threads, ctas: at most so many resident in one SM.
        shared_sm, shared_cta: bytes of shared memory of an SM, and the most that a CTA may have.
        tensor: dense tensor-core FLOP per clock and SM, by the type of the operands.
        fp32, integer: lanes per sub-partition for FFMA/FADD/FMUL, and for integer and logic
            operations, comparisons, minima and maxima.
        registers: 32-bit registers of an SM.
        tmem: columns of tensor memory of an SM, 0 where there is none.
        mufu: lanes per sub-partition for exp2, log2, reciprocal and the like.
        shared_bytes: bytes per clock and SM out of or into shared memory and L1.
    """

    arch: str
    sms: int
    threads: int
    ctas: int
    shared_sm: int
    shared_cta: int
    tensor: dict[str, int]
    fp32: int
    integer: int = 16
    registers: int = 65536
    tmem: int = 0
    mufu: int = 4
    shared_bytes: int = 128

    @property
    def capability(self) -> int:
        """90 for sm_90, as Triton counts."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def warps(self) -> int:
        return self.threads // WARP


def _rates(half: int, *, fp8: bool) -> dict[str, int]:
    rates = {"fp16": half, "bf16": half, "tf32": half // 2, "int8": 2 * half}
    return rates | ({"fp8": 2 * half} if fp8 else {})


def _chips() -> dict[str, Chip]:
    kib = 1024
    hopper = (2048, 32, 228 * kib, 227 * kib)
    gaming = (1536, 24, 100 * kib, 99 * kib)
    chips = (
        Chip("sm_80", 108, 2048, 32, 164 * kib, 163 * kib, _rates(2048, fp8=False), fp32=16),
        Chip("sm_86", 84, 1536, 16, 100 * kib, 99 * kib, _rates(1024, fp8=False), fp32=32),
        Chip("sm_89", 142, *gaming, _rates(1024, fp8=True), fp32=32),
        Chip("sm_90", 132, *hopper, _rates(4096, fp8=True), fp32=32),
        Chip("sm_100", 148, *hopper, _rates(8192, fp8=True), fp32=32, tmem=512),
        # Integers run in the fp32 lanes (RTX Blackwell white paper).
        Chip("sm_120", 188, *gaming, _rates(1024, fp8=True), fp32=32, integer=32),
    )
    return {chip.arch: chip for chip in chips}


CHIPS = _chips()


def chip(arch: str) -> Chip:
    """The table's entry.

    Raises:
        ValueError: the architecture is not in the table.
    """
    if arch not in CHIPS:
        raise ValueError(f"arch {arch!r} is not known; choose from {', '.join(CHIPS)}")
    return CHIPS[arch]


@dataclass(frozen=True)
class Occupancy:
    """How many CTAs of a kernel are resident in one SM.

    Attributes:
        ctas, warps: resident at once; 0 where not one CTA fits.
        share: of the SM's warp slots.
        limits: CTAs that each resource would allow by itself.
        limiter: the resources that allow fewest, joined with "+".
    """

    ctas: int
    warps: int
    share: float
    limits: dict[str, int]
    limiter: str


def occupancy(arch: str, *, warps: int, registers: int, shared: int, tmem: int = 0) -> Occupancy:
    """Residents of one SM for a kernel of ``warps`` warps per CTA.

    Args:
        arch: e.g. ``"sm_90"``.
        warps: per CTA.
        registers: per thread.
        shared: bytes of shared memory per CTA, static and dynamic.
        tmem: columns of tensor memory per CTA.
    """
    sm = chip(arch)
    # A warp's registers come from the file of its own sub-partition.
    per_warp = _up(registers * WARP, REGISTER_UNIT)
    resident = SUB_PARTITIONS * (sm.registers // SUB_PARTITIONS // per_warp)
    limits = {
        "registers": resident // warps,
        "shared": sm.shared_sm // _up(shared + SHARED_RESERVED, SHARED_UNIT),
        "threads": sm.warps // warps,
        "ctas": sm.ctas,
    }
    if shared > sm.shared_cta:
        limits["shared"] = 0
    if tmem:
        limits["tmem"] = sm.tmem // tmem
    ctas = min(limits.values())
    return Occupancy(
        ctas=ctas,
        warps=ctas * warps,
        share=ctas * warps / sm.warps,
        limits=limits,
        limiter="+".join(name for name, limit in limits.items() if limit == ctas),
    )


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
