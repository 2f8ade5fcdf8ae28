"""The matrix products inside the loops of Triton's GPU dialect (TTGIR): the last stage that names
their shapes on every architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

_TYPES = {
    "f16": "fp16",
    "bf16": "bf16",
    "f32": "tf32",
    "f64": "fp64",
    "i8": "int8",
    "f8E4M3FN": "fp8",
    "f8E5M2": "fp8",
}
_BYTES = {"fp16": 2, "bf16": 2, "tf32": 4, "fp64": 8, "int8": 1, "fp8": 1}
_INSTRUCTION_BYTES = 32  # of one row of the left operand that one tensor-core instruction takes
_TENSOR_MEMORY = "tensor_memory_encoding"

_DOT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\s(?P<rest>.*)$")
_SHAPE = re.compile(
    r"(?:tensor|memdesc)<(?P<dims>(?:\d+x)+)(?P<type>\w+)"
    r"(?:,\s*(?P<layout>#\w+))?(?:,\s*(?P<space>#[\w.]+))?"
)
_LAYOUT = re.compile(r"^(#\w+) = #\w+\.(?P<kind>\w+)<\{?(?P<body>.*?)\}?>")
_NUMBERS = re.compile(r"(\w+) = (?:\[([\d, ]*)\]|(\d+))")
_BRACES = re.compile(r"\{[^{}]*\}")
_LOOP = re.compile(r"\bscf\.(for|while)\b")


@dataclass(frozen=True)
class Dot:
    """One matrix product (batch, M, K) x (batch, K, N).

    Attributes:
        m, n, k, batch: the shape that a CTA multiplies, padding included.
        operand_type: of the operands: a key of `chips.Chip.tensor`, or "fp64".
        instructions: tensor-core instructions that each warp executes for it (on sm_100: that one
            warp issues); 0 where it runs in the FMA units (fp32 in full precision).
        operand_bytes: what sm_100's tensor cores read of shared memory for it; 0 elsewhere.
    """

    m: int
    n: int
    k: int
    operand_type: str
    instructions: int
    batch: int = 1
    operand_bytes: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class IrLoop:
    """An innermost loop with matrix products: one trip of it, as Triton wrote it."""

    dots: tuple[Dot, ...]

    @property
    def flops(self) -> int:
        """Of the products that tensor cores compute."""
        return sum(dot.flops for dot in self.dots if dot.instructions)

    @property
    def fma_flops(self) -> int:
        """Of the products that the FMA units compute."""
        return sum(dot.flops for dot in self.dots if not dot.instructions)

    @property
    def instructions(self) -> int:
        return sum(dot.instructions for dot in self.dots)

    @property
    def operand_bytes(self) -> int:
        return sum(dot.operand_bytes for dot in self.dots)


def dot_loops(ttgir: str) -> list[IrLoop]:
    """The loops with matrix products and with no loop inside that has some, in textual order.

    Raises:
        ValueError: a product of a form that is not known; the message holds its line.
    """
    layouts = dict(_layouts(ttgir))
    open_regions: list[_Region] = []
    found: list[tuple[int, IrLoop]] = []
    order = 0
    for line in ttgir.splitlines():
        if match := _DOT.search(line):
            dot = _dot(match[1], match["rest"], layouts)
            for region in reversed(open_regions):
                if region.loop:
                    region.dots.append(dot)
                    break
        # What is balanced within the line is an attribute; what is left opens and closes regions.
        rest = line
        while (shorter := _BRACES.sub("", rest)) != rest:
            rest = shorter
        loop = bool(_LOOP.search(rest))
        for brace in re.findall("[{}]", rest):
            if brace == "{":
                # The second region of `scf.while` (`} do {`) is as much a part of the loop.
                again = rest.strip().startswith("} do")
                open_regions.append(_Region(loop or again, order, []))
                order += 1
                continue
            if not open_regions:
                continue
            closed = open_regions.pop()
            if closed.loop and closed.dots and not closed.nested:
                found.append((closed.order, IrLoop(tuple(closed.dots))))
            if closed.dots or closed.nested:
                for region in open_regions:
                    region.nested = region.nested or closed.loop
    return [loop for _, loop in sorted(found, key=lambda pair: pair[0])]


def warp_specialised(ttgir: str) -> bool:
    """Whether warps of a CTA run different code, so that no loop speaks for all of them."""
    return "ttg.warp_specialize" in ttgir


@dataclass
class _Region:
    loop: bool
    order: int
    dots: list[Dot]
    nested: bool = False


def _layouts(ttgir: str):
    for line in ttgir.splitlines():
        if match := _LAYOUT.match(line):
            values = {
                name: [int(v) for v in many.split(",")] if many else [int(one)] if one else []
                for name, many, one in _NUMBERS.findall(match["body"])
            }
            yield match[1], (match["kind"], values)


def _dot(op: str, rest: str, layouts: dict) -> Dot:
    types = [
        ([int(d) for d in found["dims"].split("x")[:-1]], *found.group("type", "layout", "space"))
        for found in _SHAPE.finditer(rest[rest.rfind(" : ") :] if op != "tt.dot" else rest)
    ]
    if len(types) < 3:
        raise ValueError(f"cannot read the shapes of {op}: {rest[:200]!r}")
    (left, left_type, _, left_space), (right, *_), (result, _, layout, _) = types[:3]
    m, k, n = left[-2], left[-1], right[-1]
    if left_type not in _TYPES or result[-2:] != [m, n]:
        raise ValueError(f"cannot read the types of {op}: {rest[:200]!r}")
    operand = _TYPES[left_type]
    batch = prod(left[:-2])
    kind, values = layouts.get(layout, ("", {}))
    count = batch * _instructions(m, n, k, operand, kind, values)
    read = 0
    if kind == _TENSOR_MEMORY:
        rows = values["blockM"][0] if left_space == "#smem" else 0
        read = count * _INSTRUCTION_BYTES * (rows + min(n, values["blockN"][0], 256))
    return Dot(m, n, k, operand, count, batch, read)


def _instructions(m: int, n: int, k: int, operand: str, kind: str, values: dict) -> int:
    """Tensor-core instructions per warp for one product, by the layout of its result."""
    steps = max(1, k * _BYTES[operand] // _INSTRUCTION_BYTES)
    if kind == _TENSOR_MEMORY:
        rows, columns = values["blockM"][0], min(values["blockN"][0], 256)
        return _up(m, rows) * _up(n, columns) * steps
    if kind != "nvidia_mma":
        return 0
    warps_m, warps_n = values["warpsPerCTA"][-2:]
    shape_m, shape_n = values["instrShape"][-3:-1] if len(values["instrShape"]) > 2 else (16, 8)
    if operand == "fp64":
        shape_m, shape_n, steps = 8, 8, k // 4
    return _up(m, shape_m * warps_m) * _up(n, shape_n * warps_n) * steps


def _up(size: int, unit: int) -> int:
    return -(-size // unit)
