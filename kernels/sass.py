"""Machine code of a compiled kernel: its resources, its loops, and what its instructions are.

The disassembler and ``cuobjdump`` are the ones that Triton ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TENSOR, OTHER = "tensor", "other"

# Class of an instruction by the first word of its opcode. A leading U (uniform datapath) is cut off
# for what is not found as it stands.
_CLASSES = {
    TENSOR: "HMMA IMMA DMMA BMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA"
    " UTCMXQMMA",
    "mufu": "MUFU",
    "float": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FFMA32I FADD32I FMUL32I FMNMX FMNMX3 FSEL FSETP FSET"
    " FCHK HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2 HFMA2_32I HADD2_32I HMUL2_32I DADD DFMA DMUL DSETP"
    " DMNMX",
    "integer": "IADD IADD3 IADD32I IMAD IMUL IABS IDP ISETP IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX"
    " LOP3 LOP32I LOP PLOP3 SEL SHF SHL SHR LEA MOV MOV32I PRMT SGXT BMSK BREV FLO POPC CS2R S2R"
    " S2UR R2UR R2P P2R P2UR UR2UP LDC LDCU ULDC ELECT CLEA LEPC I2IP VABSDIFF",
    "convert": "F2F F2FP F2I F2IP I2F I2FP I2I FRND",
    "shuffle": "SHFL REDUX VOTE VOTEU MATCH MOVM CREDUX",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LD ST LDG STG LDGSTS ATOM ATOMG RED REDG REDAS UTMALDG UTMASTG UTMAREDG UTMAPF"
    " UTMACCTL UBLKCP UBLKPF UBLKRED CCTL LDGMC",
    "tmem": "LDTM STTM LDT STT UTCCP UTCSHIFT",
    "local": "LDL STL",
    "sync": "BAR DEPBAR LDGDEPBAR SYNCS MEMBAR FENCE WARPGROUP WARPGROUPSET WARPSYNC ERRBAR"
    " CGAERRBAR BSSY BSYNC BREAK BMOV YIELD NANOSLEEP ARRIVES UTCBAR UTCATOMSWS UVIRTCOUNT"
    " USETMAXREG USETSHMSZ UTMACMDFLUSH UCGABAR_ARV UCGABAR_WAIT ACQBULK PREEXIT",
    "branch": "BRA BRX BRXU JMP JMX CALL RET EXIT BPT KILL",
    OTHER: "NOP",
}
_CLASS_OF = {word: name for name, words in _CLASSES.items() for word in words.split()}
CLASSES = tuple(_CLASSES)

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$"
)
_LABEL = re.compile(r"^([.$\w]+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_WIDTH = re.compile(r"\.(?:U|S)?(8|16|32|64|128)(?=\.|$)")
_MMA = {
    "884": (8, 8, 4),
    "8816": (8, 8, 16),
    "8832": (8, 8, 32),
    "1684": (16, 8, 4),
    "1688": (16, 8, 8),
    "16816": (16, 8, 16),
    "16832": (16, 8, 32),
    "16864": (16, 8, 64),
}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Attributes:
        address: byte offset in the kernel.
        opcode: with its modifiers, ``"HMMA.16816.F32.BF16"``.
        predicate: ``"P0"``, ``"!UP1"``, ``""``; ``"!PT"`` never executes.
        operands: the rest of the line.
    """

    address: int
    opcode: str
    predicate: str = ""
    operands: str = ""

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """One of `CLASSES`. What never executes (``@!PT``) is "other": it is issued, no more."""
        if self.predicate == "!PT":
            return OTHER
        known = _CLASS_OF.get(self.base)
        return known or _CLASS_OF.get(self.base.removeprefix("U"), OTHER)

    @property
    def uniform(self) -> bool:
        """Whether it runs once per warp, in the uniform datapath."""
        return self.base.startswith("U") and self.base not in _CLASS_OF

    @property
    def width(self) -> int:
        """Bytes per lane of a load or store: the modifier, or 4."""
        if self.base in ("LDSM", "STSM"):
            return 4 * int(self.opcode[-1]) if self.opcode[-1] in "24" else 4
        found = _WIDTH.findall(self.opcode)
        return int(found[-1]) // 8 if found else 4

    @property
    def flops(self) -> float:
        """Floating-point operations of a tensor-core instruction for each warp that executes it.

        A warpgroup's instruction (HGMMA) is shared by four warps. 0 where the shape is not in the
        opcode (UTCHMMA) and for other instructions.
        """
        if self.kind != TENSOR:
            return 0.0
        for part in self.opcode.split(".")[1:]:
            if part in _MMA:
                m, n, k = _MMA[part]
                return 2.0 * m * n * k
            if shape := re.fullmatch(r"(\d+)x(\d+)x(\d+)", part):
                m, n, k = map(int, shape.groups())
                return 2.0 * m * n * k / 4
        return 0.0

    @property
    def operand_bytes(self) -> float:
        """Bytes that a warpgroup's product reads from shared memory, for each of its four warps.

        Both operands where the first one is a descriptor too, else the second: 32 bytes of each of
        the 64 rows and of the N columns. 0 for other instructions, and for UTCHMMA, which does not
        show its shape.
        """
        shape = re.search(r"\.64x(\d+)x", self.opcode)
        if self.base not in ("HGMMA", "QGMMA", "IGMMA") or not shape:
            return 0.0
        first = self.operands.split(",")[1].strip()
        rows = 64 if first.startswith("gdesc") else 0
        return 32 * (rows + int(shape[1])) / 4

    @property
    def operand_type(self) -> str | None:
        """Of a tensor-core instruction: a key of `chips.Chip.tensor`; None where not shown."""
        if self.kind != TENSOR:
            return None
        if self.base in ("HMMA", "HGMMA"):
            return "tf32" if "TF32" in self.opcode else "bf16" if "BF16" in self.opcode else "fp16"
        return {
            "IMMA": "int8",
            "IGMMA": "int8",
            "UTCIMMA": "int8",
            "QMMA": "fp8",
            "QGMMA": "fp8",
            "UTCQMMA": "fp8",
            "DMMA": "fp64",
        }.get(self.base)


@dataclass(frozen=True)
class SassLoop:
    """A natural loop of the control flow.

    Attributes:
        start, end: addresses of its first and its last instruction.
        depth: 1 for a loop that no other encloses.
        instructions: of one trip; those of loops inside of it (waits, mostly, whose trips are
            unknown) are not among them.
        innermost: no loop inside of it holds tensor-core instructions.
    """

    start: int
    end: int
    depth: int
    instructions: tuple[Instruction, ...]
    innermost: bool

    @property
    def has_tensor(self) -> bool:
        return any(i.kind == TENSOR for i in self.instructions)


@dataclass(frozen=True)
class Resources:
    """What ``cuobjdump -res-usage`` says: registers per thread, bytes of stack per thread."""

    registers: int
    stack: int


def disassemble(cubin: bytes) -> str:
    """The listing of ``nvdisasm -c``.

    Raises:
        RuntimeError: the disassembler failed.
    """
    return _tool("nvdisasm", ("-ndf", "-c"), cubin)


def resources(cubin: bytes, kernel: str) -> Resources:
    """Raises RuntimeError where the tool failed or does not know the kernel."""
    listing = _tool("cuobjdump", ("-res-usage",), cubin)
    found = re.search(rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage does not list {kernel!r}: {listing.strip()!r}")
    return Resources(int(found[1]), int(found[2]))


def _tool(name: str, options: tuple[str, ...], cubin: bytes) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [path, *options, str(file)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{path} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in order, and where its labels point (an index into them)."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str, kernel: str) -> Listing:
    """Read the section of one kernel from the disassembler's listing.

    Raises:
        ValueError: the listing has no such kernel.
    """
    lines = iter(text.splitlines())
    section = f".text.{kernel},"
    if not any(section in line and ".section" in line for line in lines):
        raise ValueError(f"the listing has no kernel {kernel!r}")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if line.split(maxsplit=1)[:1] == [".section"]:
            break
        if found := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(int(address, 16), opcode, predicate or "", operands))
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
    return Listing(tuple(instructions), labels)


def spilled(instructions: tuple[Instruction, ...]) -> tuple[int, int]:
    """Bytes per thread that the code stores to and loads from local memory, each place once."""
    return tuple(sum(i.width for i in instructions if i.base == base) for base in ("STL", "LDL"))  # type: ignore[return-value]


def loops(listing: Listing) -> list[SassLoop]:
    """The loops of the kernel, in the order of their first instruction.

    A loop is a back edge whose target dominates its source, with all that reaches the source
    without passing the target. (A backward branch alone is not enough: the compiler moves waits to
    the end of the kernel, and they branch back into the middle of a loop.) Loops with one head are
    one loop. A block that branches to itself alone, as behind the kernel's end, is no loop of it
    unless it can be reached.
    """
    if not listing.instructions:
        return []
    blocks, successors = _blocks(listing)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    predecessors: dict[int, list[int]] = {}
    for source, targets in successors.items():
        for target in targets:
            predecessors.setdefault(target, []).append(source)
    for source in dominators:
        for target in successors[source]:
            if target not in dominators[source]:
                continue
            body = bodies.setdefault(target, {target})
            stack = [source]
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack += [p for p in predecessors.get(block, ()) if p in dominators]
    code = listing.instructions

    def tensor(body: set[int]) -> bool:
        return any(code[i].kind == TENSOR for b in body for i in range(*blocks[b]))

    found = []
    for head, body in sorted(bodies.items()):
        inside = [other for other in bodies.values() if other < body]
        own = sorted(body.difference(*inside))
        instructions = tuple(code[i] for b in own for i in range(*blocks[b]))
        found.append(
            SassLoop(
                start=code[blocks[head][0]].address,
                end=instructions[-1].address,
                depth=1 + sum(body < other for other in bodies.values()),
                instructions=instructions,
                innermost=not any(tensor(other) for other in inside),
            )
        )
    return found


_JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "RET", "EXIT", "KILL"}


def _leaves(instruction: Instruction, labels: dict[str, int]) -> tuple[bool, int | None]:
    """Whether control may go elsewhere than to the next instruction, and where to."""
    target = _TARGET.search(instruction.operands)
    at = labels.get(target[1]) if target else None
    if instruction.base == "CALL":
        # A far jump within the kernel is written as a call that does not return.
        jump = at is not None and target is not None and target[1].startswith(".L")
        return jump, at if jump else None
    if instruction.base == "RET":
        return True, None
    return instruction.base in _JUMPS, at


def _blocks(listing: Listing) -> tuple[list[tuple[int, int]], dict[int, list[int]]]:
    """Basic blocks as ranges of instruction indices, and the successors of each."""
    code, labels = listing.instructions, listing.labels
    leaves = [_leaves(i, labels) for i in code]
    reconverge: dict[str, int] = {}
    for at, instruction in enumerate(code):
        barrier = instruction.operands.partition(",")[0].strip()
        target = _TARGET.search(instruction.operands)
        if instruction.base == "BSSY" and target and target[1] in labels:
            reconverge[barrier] = labels[target[1]]
        elif instruction.base == "BSYNC" and barrier in reconverge:
            leaves[at] = (True, reconverge[barrier])
    heads = {0, *labels.values()}
    for at, (jumps, target) in enumerate(leaves):
        if jumps:
            heads |= {at + 1} | ({target} if target is not None else set())
    starts = sorted(at for at in heads if at < len(code))
    blocks = list(zip(starts, [*starts[1:], len(code)], strict=True))
    index = {start: number for number, start in enumerate(starts)}
    successors: dict[int, list[int]] = {}
    for number, (_, end) in enumerate(blocks):
        last = code[end - 1]
        jumps, target = leaves[end - 1]
        next_ones = {index[target]} if jumps and target in index else set()
        conditional = bool(last.predicate) or _guarded(last)
        if (not jumps or conditional) and end in index:
            next_ones.add(index[end])
        successors[number] = sorted(next_ones)
    _follow_tables(listing, blocks, successors)
    return blocks, successors


def _follow_tables(
    listing: Listing, blocks: list[tuple[int, int]], successors: dict[int, list[int]]
) -> None:
    """Let jumps through a table (BRX, of warp specialisation) lead to what nothing else leads to.

    The listing does not name their targets.
    """
    tables = [
        at for at, (_, end) in enumerate(blocks) if "BRX" in listing.instructions[end - 1].base
    ]
    while tables:
        reached = _reached(successors)
        lost = next((at for at in range(len(blocks)) if at not in reached), None)
        if lost is None:
            return
        successors[tables[0]].append(lost)


def _guarded(instruction: Instruction) -> bool:
    """``BRA.U UP0, `(target)`` and ``BRA P0, ...`` carry their condition among the operands."""
    return bool(re.match(r"!?~?U?P\d", instruction.operands))


def _reached(successors: dict[int, list[int]]) -> set[int]:
    stack, seen = [0], {0}
    while stack:
        for target in successors[stack.pop()]:
            if target not in seen:
                seen.add(target)
                stack.append(target)
    return seen


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached from block 0: the blocks on every path to it."""
    reached = sorted(_reached(successors))
    predecessors: dict[int, list[int]] = {block: [] for block in reached}
    for block in reached:
        for target in successors[block]:
            predecessors[target].append(block)
    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            new = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def count(instructions: tuple[Instruction, ...]) -> dict[str, int]:
    """Instructions of each of `CLASSES`, and "total"."""
    tally = Counter(i.kind for i in instructions)
    return {name: tally[name] for name in CLASSES} | {"total": len(instructions)}
