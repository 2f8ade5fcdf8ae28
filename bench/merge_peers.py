"""The ways to have fewer tokens: ours, merging as one writes it from the papers, and windows.

"eager" and "tomesd" merge as we do and are compared with us; "unshuffle" and "bicubic" do another
job, for as many tokens or the nearest number that their windows give; "product" is the matrix
product of sources and destinations alone, from operands that are ready: no way to choose by all
similarities takes less. Index tensors and grids are made before the clock starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.engine import Unavailable
from bench.merge_cases import Case
from fastagglo.ops import merge_tokens, unmerge_tokens, use_backend

Shrink = Callable[[Tensor], tuple[Tensor, ...]]
Spread = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """The inputs of a case, the same for all peers.

    Attributes:
        case: what they are for.
        x: (N, L, C), a leaf; its gradient is asked for if ``case.backward``.
        keys: (N, L, heads, 64) that are compared, or None.
    """

    case: Case
    x: Tensor
    keys: Tensor | None

    @classmethod
    def of(cls, case: Case, device: str) -> Batch:
        """Smooth features with noise, as an encoder's are: bfloat16 on CUDA, float32 on a CPU."""
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        random = torch.Generator(device).manual_seed(0)

        def features(channels: int) -> Tensor:
            coarse = [max(1, side // 4) for side in case.grid]
            smooth = torch.randn(case.images, channels, *coarse, generator=random, device=device)
            smooth = F.interpolate(smooth, size=case.grid, mode="bilinear").flatten(2).mT
            first = smooth.new_zeros(case.images, case.protect, channels)
            x = torch.cat([first, smooth], 1)
            return (x + torch.randn(x.shape, generator=random, device=device) / 2).to(dtype)

        x = features(case.channels).requires_grad_(case.backward)
        keys = features(64 * case.heads) if case.heads else None
        return cls(case, x, None if keys is None else keys.unflatten(2, (case.heads, 64)))

    @property
    def metric(self) -> Tensor:
        """(N, L, D): what is compared."""
        return self.x.detach() if self.keys is None else self.keys.mean(2)


@dataclass(frozen=True)
class Run:
    """A peer made ready for a batch.

    Attributes:
        batch: its inputs.
        shrink: from x to fewer tokens, and what else comes of it.
        merge: from x to fewer tokens, their sizes, and how to spread tokens over those that they
            were merged from; None if the peer does not merge.
        constants: what it reads beside x and keys.
        info: nothing.
    """

    batch: Batch
    shrink: Shrink
    merge: Callable[[Tensor], tuple[Tensor, Tensor, Spread]] | None = None
    constants: tuple[Tensor, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        given = (self.batch.x, self.batch.keys, *self.constants)
        return sum(x.nbytes for x in given if x is not None)

    def __call__(self) -> tuple[Tensor, ...]:
        """What is timed: fewer tokens, and the gradient of x for one of ones."""
        x = self.batch.x
        out = self.shrink(x)
        if not out[0].requires_grad:
            return out
        return (*out, *torch.autograd.grad(out[0], x, torch.ones_like(out[0])))

    def results(self) -> dict[str, Tensor]:
        """By original token: the merged one, (N, L, C), its size, (N, L), and the gradient of x.

        Nothing of a peer that does not merge.
        """
        if self.merge is None:
            return {}
        x = self.batch.x.detach().requires_grad_()
        merged, size, spread = self.merge(x)
        random = torch.Generator(x.device).manual_seed(1)
        upstream = torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)
        tokens = spread(merged)
        (gradient,) = torch.autograd.grad(tokens, x, upstream)
        sizes = spread(size[..., None])[..., 0]
        return {"tokens": tokens.detach(), "sizes": sizes, "gradient": gradient}


def _fastagglo(batch: Batch) -> Run:
    case, backend = batch.case, "triton" if batch.x.is_cuda else "torch"

    def merge(x: Tensor) -> tuple[Tensor, Tensor, Spread]:
        with use_backend(backend):
            found = merge_tokens(
                x,
                case.keep,
                metric=batch.keys,
                partition=case.partition,
                grid=case.grid,
                protect=case.protect,
                stride=case.stride,
            )
        return found.x, found.size, lambda y: unmerge_tokens(y, found)

    return Run(batch, lambda x: merge(x)[:2], merge)


def _eager(batch: Batch) -> Run:
    """Both papers in plain PyTorch: all similarities, argmax, a sort, gathers and scatters."""
    case, device = batch.case, batch.x.device
    place = torch.arange(case.tokens, device=device)
    if case.partition == "alternate":
        chosen = place % 2 == 1
    else:
        row, column = (place - case.protect) // case.grid[1], (place - case.protect) % case.grid[1]
        chosen = (row % case.stride[0] == 0) & (column % case.stride[1] == 0)
    chosen[: case.protect] = False
    a, b = place[~chosen], place[chosen]
    merges = case.tokens - case.keep

    def merge(x: Tensor) -> tuple[Tensor, Tensor, Spread]:
        with torch.no_grad():
            metric = x if batch.keys is None else batch.keys.mean(2)
            metric = metric / metric.norm(dim=-1, keepdim=True)
            scores = metric[:, a] @ metric[:, b].transpose(1, 2)
            scores[:, : case.protect] = -math.inf
            best, into = scores.max(-1)
            order = best.argsort(dim=-1, descending=True)
            gone, stays = order[:, :merges, None], order[:, merges:, None]
            into = into.gather(1, gone[..., 0])[..., None]

        def reduce(y: Tensor) -> Tensor:
            c = y.shape[-1]
            source, destination = y[:, a], y[:, b]
            moved = source.gather(1, gone.expand(-1, -1, c))
            destination = destination.scatter_add(1, into.expand(-1, -1, c), moved)
            return torch.cat([source.gather(1, stays.expand(-1, -1, c)), destination], 1)

        def spread(y: Tensor) -> Tensor:
            c = y.shape[-1]
            alone, destination = y.split([len(a) - merges, len(b)], 1)
            out = y.new_zeros(len(x), case.tokens, c)
            out[:, b] = destination
            out.scatter_(1, a[stays].expand(-1, -1, c), alone)
            return out.scatter_(
                1, a[gone].expand(-1, -1, c), destination.gather(1, into.expand(-1, -1, c))
            )

        size = torch.ones_like(x[..., :1])
        total = reduce(size)
        return reduce(x * size) / total, total[..., 0], spread

    return Run(batch, lambda x: merge(x)[:2], merge)


def _tomesd(batch: Batch) -> Run:
    """ToMe for Stable Diffusion, with the same destinations: the first token of each window."""
    case = batch.case
    (h, w), (rows, columns) = case.grid, case.stride
    if h % rows or w % columns:
        raise Unavailable(f"its windows of {rows} x {columns} do not divide a grid of {h} x {w}")
    try:
        from tomesd.merge import bipartite_soft_matching_random2d
    except ImportError:
        raise Unavailable("tomesd is not installed: pip install tomesd") from None

    def matched(x: Tensor) -> tuple[Callable[..., Tensor], Spread]:
        return bipartite_soft_matching_random2d(
            x.detach(), w, h, columns, rows, case.tokens - case.keep, no_rand=True
        )

    def merge(x: Tensor) -> tuple[Tensor, Tensor, Spread]:
        mean, spread = matched(x)
        sizes = mean(torch.ones_like(x[..., :1]), mode="sum")
        return mean(x), sizes[..., 0], spread

    return Run(batch, lambda x: (matched(x)[0](x),), merge)


def _unshuffle(batch: Batch) -> Run:
    """Windows side by side in the channels: C times the cells of a window, for fewer tokens."""
    case = batch.case
    h, w = case.grid
    steps = [s for s in range(2, min(h, w) + 1) if h % s == w % s == 0]
    if not steps:
        raise Unavailable(f"no window divides a grid of {h} x {w}")
    step = min(steps, key=lambda s: abs(math.log(h * w / s**2 / case.keep)))

    def shrink(x: Tensor) -> tuple[Tensor]:
        x = x.view(len(x), h // step, step, w // step, step, case.channels)
        return (x.transpose(2, 3).reshape(len(x), h * w // step**2, -1),)

    return Run(batch, shrink)


def _bicubic(batch: Batch) -> Run:
    case = batch.case
    h = round(math.sqrt(case.keep * case.grid[0] / case.grid[1]))
    size = h, round(case.keep / h)

    def shrink(x: Tensor) -> tuple[Tensor]:
        x = x.unflatten(1, case.grid).permute(0, 3, 1, 2)
        small = F.interpolate(x, size=size, mode="bicubic", antialias=True)
        return (small.permute(0, 2, 3, 1).flatten(1, 2),)

    return Run(batch, shrink)


def _product(batch: Batch) -> Run:
    """Sources times destinations, of unit vectors that lie ready."""
    case, metric = batch.case, F.normalize(batch.metric[:, batch.case.protect :], dim=-1)
    source, destination = metric.split([metric.shape[1] - case.destinations, case.destinations], 1)
    source, destination = source.contiguous(), destination.contiguous()
    return Run(batch, lambda _: (source @ destination.mT,), constants=(source, destination))


PEERS: dict[str, tuple[str, Callable[[Batch], Run]]] = {
    "fastagglo": ("fastagglo", _fastagglo),
    "eager": ("eager, from the papers", _eager),
    "tomesd": ("tomesd, without its random choice", _tomesd),
    "unshuffle": ("pixel unshuffle", _unshuffle),
    "bicubic": ("bicubic downsampling", _bicubic),
    "product": ("the matching product alone", _product),
}
"""By name: what it is in words, and what makes it ready for a batch."""
