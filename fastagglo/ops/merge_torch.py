"""Token merging in PyTorch alone: the backend "torch".

Similarities are matrix products of a few rows at a time, never the whole matrix; means and sums of
slots are embedding bags, which need neither atomics nor a weighted copy of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastagglo.ops.partition import Round

# Bytes of one block of similarities, and of one block of widened tokens: small enough to stay in a
# CPU's cache, large enough for its matrix product.
_BLOCK_BYTES = 4 << 20

# A matrix product rounds equal pairs of tokens differently at different places of the matrix.
# Similarities closer than _DOUBT are therefore computed again in float64 and compared in steps of
# 1 / _STEPS, which makes a tie a tie: the error of the first product is well under _DOUBT, the
# error of the second well under a step.
_DOUBT = {torch.float32: 4e-6, torch.float64: 4e-12}
_STEPS = {torch.float32: 2.0**24, torch.float64: 2.0**40}


def match(
    metric: Tensor, size: Tensor | None, images: Sequence[tuple[int, int, Sequence[Round]]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots of the tokens after all rounds.

    Args:
        metric: (T, D), what is compared.
        size: (T,) in at least float32, or None for ones.
        images: of each image its tokens, how many of them are protected, and its rounds.

    Returns:
        The slot of each token within its image and among all slots, (T,) int64, -1 for tokens of no
        image; the tokens in the order of their slots, within a slot by position, those of no image
        last, (T,) int32; and where each slot begins in that order, (slots + 1,) int32.

    Raises:
        ValueError: on the CPU: NaN or infinity, or a size that is not positive and finite.
    """
    tokens, device = metric.shape[0], metric.device
    index = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    slot = index.clone()
    if size is None:
        size = torch.ones(tokens, dtype=_wide(metric.dtype), device=device)
    start = row = 0
    with full_precision(device):
        for image, (length, protect, rounds) in enumerate(images):
            rows = slice(start, start + length)
            if device.type == "cpu":
                _check_image(metric[rows], size[rows], image)
            index[rows] = assign(metric[rows], size[rows], rounds, protect)
            slot[rows] = index[rows] + row
            start += length
            row += length - sum(merges for *_, merges in rounds)
    return index, slot, *group(slot, row)


def group(slot: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The tokens by slot, those of slot -1 last, and where each slot begins; both int32."""
    place = slot.where(slot >= 0, slots)
    order = place.argsort(stable=True)
    starts = torch.searchsorted(place[order], torch.arange(slots + 1, device=slot.device))
    return order.int(), starts.int()


def merge(
    x: Tensor, size: Tensor | None, slot: Tensor, order: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Size-weighted means (R, C) and summed sizes (R,) of the tokens (T, C) of each slot."""
    wide = _wide(x.dtype)
    if size is None:
        total = starts.diff().to(wide)
    else:
        total = _segment_sum(size[:, None], None, order, starts, wide)[:, 0].contiguous()
    merged = _segment_sum(x, _share(size, total, slot), order, starts, x.dtype)
    if x.device.type == "cpu" and not _finite(merged):
        # The metric was fine (it was checked), so this is a token beside it.
        raise ValueError("merge_tokens: x has NaN or infinity; drop or mend those tokens first")
    return merged, total


def merge_backward(grad: Tensor, size: Tensor | None, total: Tensor, slot: Tensor) -> Tensor:
    """Gradient of the tokens (T, C): each takes its share of its slot's."""
    return _gather(grad, _share(size, total, slot), slot)


def unmerge(y: Tensor, slot: Tensor) -> Tensor:
    """The row of its slot for each token (T, C), zeros where there is none."""
    return _gather(y, None, slot)


def unmerge_backward(grad: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The sum of the gradients (T, C) of each slot's tokens, (R, C)."""
    return _segment_sum(grad, None, order, starts, grad.dtype)


# --- matching one image


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 may choose the tokens."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _finite(x: Tensor) -> bool:
    # Both ends of the range in one pass and without a mask of x's size.
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def _check_image(metric: Tensor, size: Tensor, image: int) -> None:
    if not _finite(metric):
        token = int((~metric.isfinite()).any(-1).nonzero()[0])
        raise ValueError(
            f"merge_tokens: token {token} of image {image} has NaN or infinity in what is "
            f"compared (metric, by default x); drop or mend such tokens first"
        )
    if not _finite(size) or bool((size <= 0).any()):
        token = int((~(size.isfinite() & (size > 0))).nonzero()[0])
        raise ValueError(
            f"merge_tokens: size must be positive and finite, got {size[token].item()} for token "
            f"{token} of image {image}"
        )


def assign(metric: Tensor, size: Tensor, rounds: Sequence[Round], protect: int) -> Tensor:
    """Slot of each of one image's tokens after the rounds."""
    slot = torch.arange(len(size), device=size.device)
    metric, size = metric[protect:], size[protect:]
    for number, (sources, destinations, merges) in enumerate(rounds, start=1):
        sources, destinations = sources.to(size.device), destinations.to(size.device)
        moved = _play(metric, sources, destinations, merges)
        slot[protect:] = moved[slot[protect:] - protect] + protect
        if number < len(rounds):
            rows = len(size) - merges
            slots = group(moved, rows)
            total = _segment_sum(size[:, None], None, *slots, size.dtype)[:, 0]
            share = _share(size, total, moved)
            metric = _segment_sum(metric, share, *slots, _wide(metric.dtype))
            size = total
    return slot


def _play(metric: Tensor, sources: Tensor, destinations: Tensor, merges: int) -> Tensor:
    """One round: the position after it of each token before it."""
    similarity, best = _best_destinations(metric, sources, destinations)
    partner = destinations[best]
    chosen = slice(None)
    if merges < len(sources):
        chosen = _most_similar(metric, similarity, sources, partner, merges)
    stays = torch.ones(len(metric), dtype=torch.bool, device=metric.device)
    stays[sources[chosen]] = False
    moved = stays.cumsum(0) - 1
    moved[sources[chosen]] = moved[partner[chosen]]
    return moved


def _best_destinations(
    metric: Tensor, sources: Tensor, destinations: Tensor
) -> tuple[Tensor, Tensor]:
    """Highest similarity of each source and the destination that has it, block by block."""
    wide = _wide(metric.dtype)
    target = _unit(metric, destinations, wide)
    similarity = torch.empty(len(sources), dtype=wide, device=metric.device)
    best = torch.empty_like(sources)
    row_bytes = max(target.shape) * target.element_size()
    for rows in torch.arange(len(sources), device=metric.device).split(_rows(row_bytes)):
        block = _products(_unit(metric, sources[rows], wide), target)
        similarity[rows], best[rows] = block.max(1)
        least = similarity[rows] - _DOUBT[wide]
        second = block.scatter_(1, best[rows, None], -torch.inf).amax(1)
        close = (second >= least).nonzero()[:, 0]
        if len(close):
            near = (block[close] >= least[close, None]).any(0)
            near[best[rows[close]]] = True
            rivals = near.nonzero()[:, 0]
            best[rows[close]] = _exactly_best(
                metric, sources[rows[close]], destinations[rivals], rivals, wide
            )
        del block  # before there is another
    return similarity, best


def _exactly_best(
    metric: Tensor, sources: Tensor, destinations: Tensor, numbers: Tensor, wide: torch.dtype
) -> Tensor:
    """The number of each source's most similar destination in steps of float64, block by block."""
    unit = _unit(metric, sources, torch.float64)
    best = numbers[0].repeat(len(sources))
    highest = unit.new_full((len(sources),), -torch.inf)
    step = _rows(max(unit.shape) * unit.element_size())
    for columns in torch.arange(len(numbers), device=metric.device).split(step):
        target = _unit(metric, destinations[columns], torch.float64)
        steps, place = _products(unit, target).mul_(_STEPS[wide]).round_().max(1)
        better = steps > highest  # not at a tie: that goes to the lower position
        highest = torch.where(better, steps, highest)
        best = torch.where(better, numbers[columns][place], best)
    return best


def _most_similar(
    metric: Tensor, similarity: Tensor, sources: Tensor, partner: Tensor, count: int
) -> Tensor:
    """Which ``count`` sources have the highest similarity to their partners, ties by position."""
    wide = similarity.dtype
    last = similarity.topk(count).values[-1]
    sure = similarity > last + _DOUBT[wide]
    doubtful = ((similarity >= last - _DOUBT[wide]) & ~sure).nonzero()[:, 0]
    exact = [
        (_unit(metric, sources[rows], torch.float64) * _unit(metric, partner[rows], torch.float64))
        .sum(1)
        .mul_(_STEPS[wide])
        .round_()
        for rows in doubtful.split(_rows(metric.shape[1] * 8))
    ]
    order = torch.cat(exact).argsort(descending=True, stable=True)
    sure = sure.nonzero()[:, 0]
    return torch.cat([sure, doubtful[order[: count - len(sure)]]])


def _unit(metric: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    tokens = metric[rows].to(dtype)
    return tokens.div_(torch.linalg.vector_norm(tokens, dim=1, keepdim=True).clamp_min_(1e-12))


def _products(a: Tensor, b: Tensor) -> Tensor:
    similarity = a @ b.T
    if similarity.device.type != "cpu":  # there NaN was refused
        similarity.masked_fill_(similarity.isnan(), -torch.inf)
    return similarity


# --- moving tokens


def _rows(row_bytes: int) -> int:
    return max(1, _BLOCK_BYTES // max(row_bytes, 1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _share(size: Tensor | None, total: Tensor, slot: Tensor) -> Tensor:
    """Weight of each token in its slot's mean: exactly 1 for a token alone."""
    if len(total) == 0:
        return torch.zeros_like(slot, dtype=total.dtype)
    whole = total[slot.clamp_min(0)]
    return whole.reciprocal_() if size is None else size / whole


def _segment_sum(
    x: Tensor, weight: Tensor | None, order: Tensor, starts: Tensor, dtype: torch.dtype
) -> Tensor:
    """``out[r] = sum of weight[t] * x[t] over the tokens t of slot r``, (R, C) in ``dtype``.

    An embedding bag is such a sum over the rows of a table: deterministic, and without a weighted
    copy of ``x``. Half precision is widened a block of slots at a time.
    """
    rows = len(starts) - 1
    if x.numel() == 0 or rows == 0:
        return torch.zeros(rows, x.shape[1], dtype=dtype, device=x.device)
    wide = _wide(x.dtype)
    order = order[: int(starts[-1])]
    if weight is not None:
        weight = weight.to(wide)[order]
    if x.dtype == wide == dtype:
        return F.embedding_bag(
            order, x.contiguous(), starts[:-1], mode="sum", per_sample_weights=weight
        )
    out = torch.empty(rows, x.shape[1], dtype=dtype, device=x.device)
    bounds = starts.tolist()
    step = _rows(len(order) * x.shape[1] * 4 // rows)
    for first in range(0, rows, step):
        bags = slice(first, min(first + step, rows))
        tokens = slice(bounds[bags.start], bounds[bags.stop])
        part = x[order[tokens]].to(wide)
        out[bags] = F.embedding_bag(
            torch.arange(len(part), dtype=starts.dtype, device=x.device),
            part,
            starts[:-1][bags] - tokens.start,
            mode="sum",
            per_sample_weights=None if weight is None else weight[tokens],
        )
    return out


def _gather(y: Tensor, weight: Tensor | None, slot: Tensor) -> Tensor:
    """``out[t] = weight[t] * y[slot[t]]``, zero where the slot is -1; (T, C) in y's dtype."""
    if y.numel() == 0:
        return y.new_zeros(len(slot), y.shape[1])
    out = y.index_select(0, slot.clamp_min(0))
    if weight is not None:
        for rows in torch.arange(len(slot), device=y.device).split(_rows(y.shape[1] * 4)):
            block = slice(int(rows[0]), int(rows[-1]) + 1)
            out[block] = out[block].to(weight.dtype).mul_(weight[block, None])
    return out.masked_fill_((slot < 0)[:, None], 0.0)
