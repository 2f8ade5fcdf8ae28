"""What the adaptor heads are measured on, and what each of their passes costs at least.

python -m bench.heads_cases      # FLOPs, bytes and roofline of each pass, for the GPU's shapes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastagglo.kernels.mlp import Cost, pointwise_cost, product_cost

PEERS_OF_ALL = ("fastagglo", "kept", "eager", "compile")

# Of an H100 SXM's data sheet: dense bfloat16 FLOP/s, and bytes/s.
ROOF = (989e12, 3.35e12)


@dataclass(frozen=True)
class Case:
    """The spatial heads of some teachers over one x, forward and backward, x's gradient too.

    Attributes:
        name: for test ids.
        tokens: rows of x.
        width: channels of x.
        heads: of each teacher, hidden and output channels.
        blocks: residual blocks of each head.
    """

    name: str
    tokens: int
    width: int
    heads: tuple[tuple[int, int], ...]
    blocks: int = 0

    @property
    def label(self) -> str:
        """For plots."""
        outs, hidden = ("/".join(dict.fromkeys(str(h[i]) for h in self.heads)) for i in (1, 0))
        blocks = f", {self.blocks} blocks" if self.blocks else ""
        return f"{self.tokens}×{self.width} -> {hidden} -> {outs}{blocks}"

    @property
    def flops(self) -> int:
        """Of the products: each layer's forward, weight gradient and input gradient."""
        return sum(cost.flops for _, cost in passes(self, 1))


def passes(case: Case, size: int) -> Iterator[tuple[str, Cost]]:
    """Each pass over memory of the heads, where cuBLAS multiplies: in words, and its cost.

    Args:
        size: bytes of an element.
    """
    m, k = case.tokens, case.width
    yield "first layers, forward", product_cost("linear", m, sum(h for h, _ in case.heads), k, size)
    for hidden, out in case.heads:
        steps = [(hidden, True)] * case.blocks + [(out, False)]
        for n, residual in steps:
            name = f"{hidden} -> {n}"
            act = pointwise_cost("norm_gelu_forward", m, hidden, size)
            yield f"{name}: LayerNorm, GELU", act
            yield f"{name}: product", product_cost("linear", m, n, hidden, size, extra=residual)
            yield f"{name}: LayerNorm, GELU again", act
            yield (
                f"{name}: weight gradient",
                product_cost("weight_grad", m, n, hidden, size, grad_size=size),
            )
            yield f"{name}: input gradient", product_cost("input_grad", m, n, hidden, size)
            yield (
                f"{name}: gradient of GELU, LayerNorm",
                pointwise_cost("norm_gelu_backward", m, hidden, size),
            )
        first = f"{k} -> {hidden}"
        yield (
            f"{first}: weight gradient",
            product_cost("weight_grad", m, hidden, k, size, grad_size=size),
        )
        yield f"{first}: input gradient", product_cost("input_grad", m, hidden, k, size)


OUTPUTS = (1024, 1152, 1280, 1536)


def cases(device: str, quick: bool) -> list[Case]:
    """What each peer is timed on, on ``"cuda"`` or ``"cpu"``."""
    if quick:
        return [Case("small", 50, 48, ((64, 40), (72, 56))), Case("deep", 50, 48, ((64, 40),), 2)]
    if device == "cpu":
        # radio-v2.5-b's heads, on 8 images of 16 x 16 patches.
        return [
            Case("four-heads", 8 * 16 * 16, 768, tuple((1024, out) for out in OUTPUTS)),
            Case("deep", 4 * 16 * 16, 768, ((1024, 1024), (1024, 1280)), 2),
        ]
    hidden = (1520, 1520, 2560, 2560)
    return [
        Case("four-heads", 46_080, 1280, tuple(zip(hidden, OUTPUTS, strict=True))),
        Case("deep", 46_080, 1280, tuple((1520, out) for out in OUTPUTS), 2),
    ]


def peers_of(quick: bool) -> tuple[str, ...]:
    """Who takes part, by name in ``heads_peers.PEERS``: compiling is not quick."""
    return tuple(name for name in PEERS_OF_ALL if not (quick and name == "compile"))


def facts(case: Case, size: int) -> dict[str, Any]:
    """What the results say of a case."""
    costs = [cost for _, cost in passes(case, size)]
    return {
        "label": case.label,
        "tokens": case.tokens,
        "width": case.width,
        "heads": [f"{hidden} -> {out}" for hidden, out in case.heads],
        "blocks": case.blocks,
        "pass": "forward+backward",
        "flops": case.flops,
        "moved_mb": round(sum(cost.bytes for cost in costs) / 1e6, 1),
    }


def main() -> None:
    """Print the passes of the GPU's cases, alike ones together."""
    flops, bandwidth = ROOF
    for case in cases("cuda", quick=False):
        print(f"{case.name}: {case.label}, bfloat16")
        print(
            f"roofline of {flops / 1e12:g} TFLOP/s and {bandwidth / 1e12:g} TB/s, not a measurement"
        )
        print(f"    {'':42} {'GFLOP':>8} {'MB':>8} {'us':>8}")
        lines: dict[str, list[Cost]] = {}
        for name, cost in passes(case, 2):
            lines.setdefault(name, []).append(cost)
        lines["all"] = [cost for costs in lines.values() for cost in costs]
        for name, costs in lines.items():
            whole = sum(costs[1:], costs[0])
            seconds = sum(cost.seconds(flops, bandwidth) for cost in costs)
            times = f"{len(costs)} x " if len(costs) > 1 and name != "all" else ""
            figures = (whole.flops / 1e9, whole.bytes / 1e6, seconds * 1e6)
            print(f"    {times + name:42}" + "".join(f" {figure:8.1f}" for figure in figures))


if __name__ == "__main__":
    main()
