"""The ways to run the adaptor heads of several teachers: ours, and those that a trainer has today.

Everyone has the same weights, and gives the outputs and the gradients of x and of all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.engine import Unavailable
from bench.heads_cases import Case
from bench.measure import once
from fastagglo.ops import AdaptorHeads, HeadSpec, use_backend

Heads = Callable[[Tensor], list[Tensor]]


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@dataclass(frozen=True)
class Batch:
    """The inputs of a case, the same for all peers.

    Attributes:
        case: what they are for.
        x: a leaf.
        upstream: gradients of the outputs.
        state: weights, by the names of ``AdaptorHeads``.
    """

    case: Case
    x: Tensor
    upstream: list[Tensor]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """Random inputs: bfloat16 on CUDA, float32 on a CPU. Always the same for a case."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        random = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device, dtype=dtype)

        x = draw(case.tokens, case.width).requires_grad_()
        upstream = [draw(case.tokens, out) for _, out in case.heads]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = _ours(case).to(device, dtype).state_dict()
        # Linear weights are small at the start: larger ones give gradients that can be compared.
        state = {k: v * 2 if v.dim() == 2 else v for k, v in state.items()}
        return cls(case, x, upstream, state)


@dataclass(frozen=True)
class Run:
    """A peer made ready for a batch.

    Attributes:
        heads: from x to the outputs.
        batch: what it is ready for.
        parameters: of all heads, in the order of ``Batch.state``.
        compiled: ``compile_seconds`` of what is compiled.
    """

    heads: Heads
    batch: Batch
    parameters: list[Tensor]
    compiled: Mapping[str, float] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        return sum(t.nbytes for t in (self.batch.x, *self.batch.upstream, *self.parameters))

    def __call__(self) -> list[Tensor]:
        """What is timed."""
        outputs = self.heads(self.batch.x)
        leaves = [self.batch.x, *self.parameters]
        return [*outputs, *torch.autograd.grad(outputs, leaves, self.batch.upstream)]

    def results(self) -> dict[str, Tensor]:
        """The outputs, and the gradients of x and of each parameter."""
        outputs = [f"output {i}" for i in range(len(self.batch.upstream))]
        names = [*outputs, *(f"gradient of {name}" for name in ("x", *self.batch.state))]
        return {name: value.detach() for name, value in zip(names, self(), strict=True)}

    @property
    def info(self) -> dict[str, Any]:
        """What autograd keeps, and what compiling took."""
        return {"saved_bytes": self.saved_bytes()} | dict(self.compiled)

    def saved_bytes(self) -> int:
        """What autograd keeps between forward and backward beyond x and the parameters.

        Each block of memory counts once. A compiled graph keeps its own, which it shows too.
        """
        given = (self.batch.x, *self.parameters)
        seen = {t.untyped_storage().data_ptr() for t in given} | {0}
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            storage = t.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = self.heads(self.batch.x)
        del outputs
        return total


def _ours(case: Case, recompute: bool = True) -> AdaptorHeads:
    specs = {
        str(i): HeadSpec(spatial=out, hidden=hidden, blocks=case.blocks)
        for i, (hidden, out) in enumerate(case.heads)
    }
    return AdaptorHeads(case.width, specs, recompute)


def _fastagglo(batch: Batch, recompute: bool = True) -> Run:
    module = _ours(batch.case, recompute).to(batch.x.device, batch.x.dtype)
    module.load_state_dict(batch.state)
    backend = "triton" if batch.x.is_cuda else "torch"

    def heads(x: Tensor) -> list[Tensor]:
        with use_backend(backend):
            return [spatial for _, spatial in module(None, x).values()]

    return Run(heads, batch, list(module.parameters()))


def _kept(batch: Batch) -> Run:
    return _fastagglo(batch, recompute=False)


def _eager(batch: Batch, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> Run:
    case, values = batch.case, iter(batch.state.values())
    modules = nn.ModuleList()
    for hidden, out in case.heads:
        blocks = (
            _Residual(norm(hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(case.blocks)
        )
        last = (norm(hidden), nn.GELU(), nn.Linear(hidden, out))
        modules.append(nn.Sequential(nn.Linear(case.width, hidden), *blocks, *last))
    modules.to(batch.x.device, batch.x.dtype)
    modules.load_state_dict({name: next(values) for name in modules.state_dict()})
    return Run(lambda x: [m(x) for m in modules], batch, list(modules.parameters()))


def _compile(batch: Batch) -> Run:
    eager = _eager(batch)
    run = replace(eager, heads=torch.compile(eager.heads, dynamic=False))
    return replace(run, compiled={"compile_seconds": once(run, batch.x.device.type)})


def _liger(batch: Batch) -> Run:
    if not batch.x.is_cuda:
        raise Unavailable("liger-kernel needs CUDA")
    try:
        from liger_kernel.transformers.layer_norm import LigerLayerNorm
    except ImportError:
        raise Unavailable("liger-kernel is not installed: pip install liger-kernel") from None
    return _eager(batch, lambda width: LigerLayerNorm(width, eps=1e-5, bias=True))


def _fla(batch: Batch) -> Run:
    if not batch.x.is_cuda:
        raise Unavailable("fla-core needs CUDA")
    try:
        from fla.modules import LayerNorm
    except ImportError:
        raise Unavailable("fla-core is not installed: pip install fla-core") from None
    return _eager(batch, lambda width: LayerNorm(width, bias=True, eps=1e-5))


PEERS: dict[str, tuple[str, Callable[[Batch], Run]]] = {
    "fastagglo": ("fastagglo", _fastagglo),
    "kept": ("fastagglo, recompute=False", _kept),
    "eager": ("eager twin (nn.Sequential)", _eager),
    "compile": ("torch.compile of the eager twin", _compile),
    "liger": ("eager twin, liger-kernel's LayerNorm", _liger),
    "fla": ("eager twin, fla-core's LayerNorm", _fla),
}
"""By name: what it is in words, and what makes it ready for a batch."""
