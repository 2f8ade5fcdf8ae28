"""The readers of machine code and of Triton's IR on small texts, and the table of chips."""

from __future__ import annotations

import textwrap

import pytest

from fastagglo.kernels.chips import CHIPS, chip, occupancy
from fastagglo.kernels.sass import Instruction, count, loops, parse, spilled
from fastagglo.kernels.ttgir import dot_loops, warp_specialised

# A main loop with a wait whose retry was moved behind the kernel's end and branches back into the
# middle of the loop; behind it the endless loop that pads every kernel.
WAITING = """
	.section	.text.other,"ax",@progbits
        /*0000*/                   MUFU.EX2 R0, R0 ;
	.section	.text.kernel,"ax",@progbits
	.sectionflags	@"SHF_BARRIERS=1"
        .global         kernel
kernel:
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P2 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR17], R4 ;
        /*0030*/              @!P4 BRA `(.L_x_4) ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/               @P0 LDS.128 R4, [R8+0x10] ;
        /*0070*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0080*/                   BRA.U UP1, `(.L_x_1) ;
.L_x_3:
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR17], R4 ;
        /*00c0*/              @!P4 BRA `(.L_x_4) ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
        /*00f0*/                   NOP;
.L_x_6:
	.section	.nv.shared.kernel,"aw",@nobits
        /*0000*/                   FFMA R0, R0, R0, R0 ;
"""

# Two loops deep; the inner one is left by a far jump, which is written as a call.
NESTED = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, 0x1 ;
.L_x_0:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/               @P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0040*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__division) ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
$__internal_0_$__division:
        /*0080*/                   RET.REL.NODEC R2 `(kernel) ;
"""


# A jump through a table, whose targets the listing does not name: the loop behind it counts.
TABLE = """
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   BRX R2 -0x10 ;
        /*0010*/                   EXIT ;
.L_x_0:
        /*0020*/                   UTCHMMA gdesc[UR4], gdesc[UR14], tmem[UR7], idesc[UR25], UPT ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""


def test_reads_one_kernels_instructions_and_labels() -> None:
    listing = parse(WAITING, "kernel")
    assert [i.address for i in listing.instructions] == list(range(0, 0x100, 16))
    assert listing.instructions[1] == Instruction(0x10, "BRA", "!P2", "`(.L_x_3)")
    assert listing.labels[".L_x_2"] == 4
    with pytest.raises(ValueError, match="no kernel 'kern'"):
        parse(WAITING, "kern")


def test_a_retry_moved_out_of_a_loop_is_no_loop_around_it() -> None:
    main, retry = loops(parse(WAITING, "kernel"))
    assert (main.start, main.depth, main.innermost, main.has_tensor) == (0x20, 1, True, True)
    assert (retry.start, retry.end, retry.depth, retry.has_tensor) == (0xB0, 0xC0, 2, False)
    # The retry's own instructions belong to nobody's trip; its way back is part of the main loop.
    assert [i.address for i in main.instructions] == [*range(0x20, 0x90, 16), 0xD0]
    counts = {name: n for name, n in count(main.instructions).items() if n}
    assert counts == {
        **{"tensor": 1, "shared": 1, "integer": 1, "sync": 1, "branch": 3},
        **{"other": 1, "total": 8},  # the load that never executes
    }


def test_nested_loops_and_far_jumps() -> None:
    outer, inner = loops(parse(NESTED, "kernel"))
    assert [i.address for i in inner.instructions] == [0x20, 0x30, 0x40]
    assert (inner.depth, inner.innermost) == (2, True)
    assert [i.address for i in outer.instructions] == [0x10, 0x50, 0x60]
    assert (outer.depth, outer.innermost) == (1, False)


def test_loops_behind_a_jump_table_are_found() -> None:
    (loop,) = loops(parse(TABLE, "kernel"))
    assert [i.address for i in loop.instructions] == [0x20, 0x30]


@pytest.mark.parametrize(
    ("opcode", "kind", "flops", "operand"),
    [
        ("HMMA.16816.F32.BF16", "tensor", 2 * 16 * 8 * 16, "bf16"),
        ("HMMA.1688.F32.TF32", "tensor", 2 * 16 * 8 * 8, "tf32"),
        ("IMMA.16832.S8.S8", "tensor", 2 * 16 * 8 * 32, "int8"),
        ("HGMMA.64x128x16.F32", "tensor", 2 * 64 * 128 * 16 / 4, "fp16"),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", "tensor", 2 * 64 * 64 * 32 / 4, "fp8"),
        ("UTCHMMA", "tensor", 0, None),
        ("MUFU.EX2", "mufu", 0, None),
        ("FMNMX3", "float", 0, None),
        ("IMAD.WIDE.U32", "integer", 0, None),
        ("UIADD3.X", "integer", 0, None),
        ("F2FP.BF16.F32.PACK_AB", "convert", 0, None),
        ("SHFL.BFLY", "shuffle", 0, None),
        ("LDSM.16.MT88.4", "shared", 0, None),
        ("LDGSTS.E.BYPASS.128", "global", 0, None),
        ("UTMALDG.2D", "global", 0, None),
        ("LDTM.x64", "tmem", 0, None),
        ("UTCBAR", "sync", 0, None),
        ("WARPGROUP.DEPBAR.LE", "sync", 0, None),
        ("SOMETHINGNEW.X", "other", 0, None),
    ],
)
def test_instructions(opcode: str, kind: str, flops: float, operand: str | None) -> None:
    instruction = Instruction(0, opcode)
    assert (instruction.kind, instruction.flops) == (kind, flops)
    assert instruction.operand_type == operand


def test_warpgroup_products_read_shared_memory() -> None:
    both = Instruction(0, "HGMMA.64x128x16.F32", "", "R56, gdesc[UR12].tnspB, R56")
    one = Instruction(0, "HGMMA.64x16x16.F32", "", "R56, R152, gdesc[UR12], R56")
    assert 4 * both.operand_bytes == 64 * 16 * 2 + 128 * 16 * 2
    assert 4 * one.operand_bytes == 16 * 16 * 2
    assert Instruction(0, "HMMA.16816.F32", "", "R4, R8, R12, R4").operand_bytes == 0


def test_widths_and_spilled_bytes() -> None:
    widths = {"LDS": 4, "LDS.U.128": 16, "LDG.E.64.CONSTANT": 8, "STS.U8": 1, "LDSM.16.M88.4": 16}
    widths |= {"LDSM.16.M88": 4, "LDGSTS.E.BYPASS.LTC128B.64": 8, "LDL.LU": 4, "STL.128": 16}
    assert {opcode: Instruction(0, opcode).width for opcode in widths} == widths
    code = tuple(Instruction(0, name) for name in ("STL.128", "STL", "LDL.LU.64", "STG.E.128"))
    assert spilled(code) == (20, 8)


IR = textwrap.dedent("""\
    #mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [2, 2], instrShape = [16, 8]}>
    #mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 128, 16]}>
    #tmem = #ttng.tensor_memory_encoding<blockM = 128, blockN = 64, colStride = 1>
    module attributes {"ttg.num-warps" = 4 : i32} {
      tt.func public @kernel(%Q: !tt.ptr<bf16> {tt.divisibility = 16 : i32}) {
        %0 = tt.dot %a, %b, %c : tensor<64x64xf16, #x> * tensor<64x64xf16, #y> -> tensor<64x64xf32, #mma>
        %1:2 = scf.for %i = %c0 to %n step %c1 iter_args(%x = %y) -> (i32) {
          %2 = "tt.reduce"(%s) <{axis = 1 : i32}> ({
          ^bb0(%p: f32, %q: f32):
            %3 = arith.maxnumf %p, %q : f32
          }) : (tensor<64x64xf32, #mma>) -> tensor<64xf32, #z>
          %4 = scf.for %j = %c0 to %n step %c1 -> (i32) {
            %5 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x80xf32, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>> * tensor<80x32xf32, #y> -> tensor<64x32xf32, #mma>
            scf.if %cond {
              %6 = tt.dot %a, %b, %c : tensor<16x16xf32, #b> * tensor<16x16xf32, #b> -> tensor<16x16xf32, #blocked>
            } else {
            }
          } {tt.num_stages = 3 : i32}
          %7 = scf.for %j = %c0 to %n step %c1 -> (i32) {
            scf.yield %j : i32
          }
          %8 = tt.dot %a, %b, %c : tensor<64x64xf16, #x> * tensor<64x64xf16, #y> -> tensor<64x64xf32, #mma>
        }
        scf.while (%i = %c0) : (i32) -> i32 {
          scf.condition(%c) %i : i32
        } do {
          %8 = ttng.warp_group_dot %a, %b, %c {inputPrecision = 0 : i32} : !ttg.memdesc<256x64xbf16, #s, #smem> * !ttg.memdesc<64x256xbf16, #s, #smem, mutable> -> tensor<256x256xf32, #mma1>
          ttng.tc_gen5_mma %a, %b, %c, %true, %true, %bar[%true] {is_async} : !ttg.memdesc<128x64xf8E4M3FN, #s, #smem>, !ttg.memdesc<64x128xf8E4M3FN, #s, #smem>, !ttg.memdesc<128x128xf32, #tmem, #ttng.tensor_memory, mutable>
        } attributes {x = 1 : i32}
      }
    }
    """)  # noqa: E501


def test_products_of_innermost_loops() -> None:
    first, second = dot_loops(IR)
    tf32, full = first.dots
    assert (tf32.m, tf32.n, tf32.k, tf32.operand_type) == (64, 32, 80, "tf32")
    assert tf32.instructions == (64 // 32) * (32 // 16) * (80 // 8)
    assert (full.flops, full.instructions) == (2 * 16**3, 0)
    assert first.flops == 2 * 64 * 32 * 80
    assert first.fma_flops == full.flops
    hopper, blackwell = second.dots
    assert (hopper.operand_type, hopper.instructions) == ("bf16", 2 * 2 * 4)
    assert (blackwell.operand_type, blackwell.instructions) == ("fp8", 1 * 2 * 2)
    # Each instruction reads 32 bytes of 128 rows and of 64 columns.
    assert blackwell.operand_bytes == 4 * 32 * (128 + 64)
    assert hopper.operand_bytes == 0
    assert second.flops == 2 * (256 * 256 * 64 + 128 * 128 * 64)
    assert not warp_specialised(IR)


def test_products_that_cannot_be_read_are_named() -> None:
    text = "scf.for %i {\n %1 = tt.dot %a, %b, %c : tensor<64x64xf4, #x>\n}\n"
    with pytest.raises(ValueError, match=r"tt\.dot"):
        dot_loops(text)


# Worked by hand from the limits in the CUDA programming guide.
@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "tmem", "ctas", "limiter"),
    [
        # 128 x 32 = 4,096 registers a warp: 4 warps in each 16,384; 33,792 bytes 4 times in 167,936
        ("sm_80", 4, 128, 32768, 0, 4, "registers+shared"),
        # 81 x 32 = 2,592, rounded to 2,816: 5 warps in each sub-partition, 20 in all
        ("sm_80", 4, 81, 0, 0, 5, "registers"),
        ("sm_90", 8, 168, 1000, 0, 1, "registers"),
        ("sm_89", 8, 32, 0, 0, 6, "threads"),  # 48 warps; sm_90 has 64
        ("sm_90", 8, 32, 0, 0, 8, "registers+threads"),
        ("sm_86", 1, 32, 0, 0, 16, "ctas"),
        ("sm_120", 1, 32, 0, 0, 24, "ctas"),
        ("sm_90", 4, 32, 232448, 0, 1, "shared"),  # all there is
        ("sm_90", 4, 32, 232449, 0, 0, "shared"),
        ("sm_100", 4, 64, 49184, 256, 2, "tmem"),
    ],
)
def test_occupancy(
    arch: str, warps: int, registers: int, shared: int, tmem: int, ctas: int, limiter: str
) -> None:
    found = occupancy(arch, warps=warps, registers=registers, shared=shared, tmem=tmem)
    assert (found.ctas, found.limiter) == (ctas, limiter)
    assert found.warps == ctas * warps
    assert found.share == ctas * warps / CHIPS[arch].warps


def test_peaks_of_the_table_are_those_of_the_data_sheets() -> None:
    # TFLOP/s dense fp16 with fp32 accumulators, at the boost clock in GHz.
    sheets = {"sm_80": (312, 1.41), "sm_90": (989, 1.83), "sm_100": (2250, 1.85)}
    for arch, (peak, clock) in sheets.items():
        sm = chip(arch)
        assert sm.tensor["fp16"] * sm.sms * clock / 1e3 == pytest.approx(peak, rel=0.01)
    with pytest.raises(ValueError, match="'sm_70' is not known; choose from sm_80"):
        chip("sm_70")
