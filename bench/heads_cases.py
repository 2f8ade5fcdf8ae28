"""What the adaptor heads are measured on, and what each of their passes costs at least.

python -m bench.heads_cases      # FLOPs, bytes and roofline of each pass, for the GPU's shapes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastagglo.kernels.mlp import Cost, pointwise_cost, product_cost

EAGER = ("kept", "eager")
CUDA = (*EAGER, "compile", "liger", "fla")

# Of an H100 SXM's data sheet: dense bfloat16 FLOP/s, and bytes/s.
ROOF = (989e12, 3.35e12)


@dataclass(frozen=True)
class Case:
    """The spatial heads of some teachers over one x, forward and backward, x's gradient too.

    Attributes:
        id: for tests and results.
        tokens: rows of x.
        width: channels of x.
        heads: of each teacher, hidden and output channels.
        blocks: residual blocks of each head.
        size: bytes of an element.
        peers: who takes part beside us, by name in ``heads_peers.PEERS``.
    """

    id: str
    tokens: int
    width: int
    heads: tuple[tuple[int, int], ...]
    blocks: int = 0
    size: int = 4
    peers: tuple[str, ...] = EAGER

    @property
    def label(self) -> str:
        """For plots."""
        outs, hidden = ("/".join(dict.fromkeys(str(h[i]) for h in self.heads)) for i in (1, 0))
        blocks = f", {self.blocks} blocks" if self.blocks else ""
        return f"{self.tokens}×{self.width} -> {hidden} -> {outs}{blocks}"

    @property
    def flops(self) -> int:
        """Of the products: each layer's forward, weight gradient and input gradient."""
        return sum(cost.flops for _, cost in passes(self))

    @property
    def parameters(self) -> int:
        """Of all heads together."""
        last = sum(2 * h + (h + 1) * out for h, out in self.heads)
        first = sum((self.width + 1) * h for h, _ in self.heads)
        return first + last + sum(self.blocks * (2 * h + (h + 1) * h) for h, _ in self.heads)

    @property
    def bytes(self) -> int:
        """Of x, the weights and the outputs' gradients, read; of outputs and gradients, written."""
        outputs = self.tokens * sum(out for _, out in self.heads)
        return 2 * self.size * (self.tokens * self.width + self.parameters + outputs)

    @property
    def facts(self) -> dict[str, Any]:
        """What the results say of a case."""
        return {
            "label": self.label,
            "tokens": self.tokens,
            "width": self.width,
            "heads": [f"{hidden} -> {out}" for hidden, out in self.heads],
            "blocks": self.blocks,
            "pass": "forward+backward",
            "flops": self.flops,
            "bytes": self.bytes,
            "moved_mb": round(sum(cost.bytes for _, cost in passes(self)) / 1e6, 1),
        }


def passes(case: Case) -> Iterator[tuple[str, Cost]]:
    """Each pass over memory of our heads, where cuBLAS multiplies: in words, and its cost."""
    m, k, size = case.tokens, case.width, case.size
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
    """What is measured on ``"cuda"`` or ``"cpu"``. Compiling takes 20 s: on a CPU once."""
    size = 2 if device == "cuda" else 4
    if quick:
        return [
            Case("small", 50, 48, ((64, 40), (72, 56)), size=size),
            Case("deep", 50, 48, ((64, 40),), 2, size=size),
        ]
    if device == "cpu":
        # radio-v2.5-b's heads, on 8 images of 16 x 16 patches.
        four = tuple((1024, out) for out in OUTPUTS)
        return [
            Case("four-heads", 8 * 16 * 16, 768, four, peers=CUDA[1:]),  # `kept` has its turn below
            Case("deep", 2 * 16 * 16, 768, ((1024, 1024), (1024, 1280)), 2),
        ]
    hidden = (1520, 1520, 2560, 2560)
    four, deep = tuple(zip(hidden, OUTPUTS, strict=True)), tuple((1520, out) for out in OUTPUTS)
    return [
        Case("four-heads", 46_080, 1280, four, size=size, peers=CUDA),
        Case("deep", 46_080, 1280, deep, 2, size=size, peers=CUDA),
    ]


def main() -> None:
    """Print the passes of the GPU's cases, alike ones together."""
    flops, bandwidth = ROOF
    for case in cases("cuda", quick=False):
        print(f"{case.id}: {case.label}, bfloat16")
        print(
            f"roofline of {flops / 1e12:g} TFLOP/s and {bandwidth / 1e12:g} TB/s, not a measurement"
        )
        print(f"    {'':42} {'GFLOP':>8} {'MB':>8} {'us':>8}")
        lines: dict[str, list[Cost]] = {}
        for name, cost in passes(case):
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
