"""The order in which the images of a source come: a pure function of seed and position.

A position counts the images of a run, over all ranks and epochs. Nothing here depends on what was
asked before, so that any worker can compute any step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from fastagglo.data.source import Mixture, Source

T = TypeVar("T")

SHARDS_MIXED = 8
"""Samples of this many shards are shuffled together, so that a shard of one class does not make
batches of one class, while reading stays within a few files."""

_BLOCK = 10_000  # positions over which a mixture keeps its proportions

# First number of each stream of random numbers, so that no two streams are the same.
_SHARD_ORDER, _SAMPLE_ORDER, _BLOCK_ORDER, _SAMPLE = range(4)


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Random numbers of their own for each (seed, stream of non-negative ints)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)))


def sample_generator(seed: int, position: int, attempt: int) -> np.random.Generator:
    """The random numbers of one image of a run: its crop, flip and shifts."""
    return generator(seed, _SAMPLE, position, attempt)


class _Recent:
    """The last few results of a function that is costly to call."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._values: OrderedDict[tuple[int, ...], object] = OrderedDict()

    def get(self, key: tuple[int, ...], make: Callable[[], T]) -> T:
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._keep:
                self._values.popitem(last=False)
        return self._values[key]  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type[_Recent], tuple[int]]:
        return _Recent, (self._keep,)


class ShardOrder:
    """Epochs over shards: shards shuffled, then samples within each few shards.

    Every image comes once in each epoch of ``sum(shards)`` positions.

    Args:
        shards: images in each shard; their indices are consecutive.
        seed: of the whole order.
        path: numbers that tell this order from others of the same seed.
    """

    def __init__(self, shards: Sequence[int], seed: int, path: tuple[int, ...] = ()) -> None:
        self.sizes = np.asarray(shards, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.total = int(self.sizes.sum())
        self.seed = seed
        self.path = path
        self._recent = _Recent(4)  # two epochs meet in a batch

    def index(self, position: int) -> int:
        """The image at a position."""
        window, offset = self._window(position)
        return int(window[offset])

    def epoch(self, position: int) -> int:
        """How often every image has come before a position."""
        return position // self.total

    def replacement(self, position: int, random: np.random.Generator) -> int:
        """Another image for a position, from the same few shards."""
        window, _ = self._window(position)
        return int(window[random.integers(len(window))])

    def _window(self, position: int) -> tuple[np.ndarray, int]:
        """The shuffled images of a few shards, and the place of a position among them."""
        epoch, within = divmod(position, self.total)
        shards, ends = self._recent.get((epoch,), lambda: self._shard_order(epoch))
        number = int(np.searchsorted(ends, within, side="right"))
        window = self._recent.get(
            (epoch, number), lambda: self._sample_order(epoch, number, shards)
        )
        return window, within - int(ends[number]) + len(window)

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        random = generator(self.seed, _SHARD_ORDER, *self.path, epoch)
        shards = random.permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[shards])
        last = np.arange(SHARDS_MIXED, len(ends) + SHARDS_MIXED, SHARDS_MIXED) - 1
        return shards, ends[np.minimum(last, len(ends) - 1)]

    def _sample_order(self, epoch: int, number: int, shards: np.ndarray) -> np.ndarray:
        random = generator(self.seed, _SAMPLE_ORDER, *self.path, epoch, number)
        chosen = shards[number * SHARDS_MIXED : (number + 1) * SHARDS_MIXED]
        parts = [self.starts[shard] + np.arange(self.sizes[shard]) for shard in chosen]
        return random.permutation(np.concatenate(parts))


class MixtureOrder:
    """Interleaves the orders of several sources in fixed proportions.

    Each block of 10,000 positions holds the same number of each source, shuffled.
    """

    def __init__(self, mixture: Mixture, seed: int, path: tuple[int, ...] = ()) -> None:
        self.orders = [
            make_order(source, seed, (*path, number))
            for number, source in enumerate(mixture.sources)
        ]
        self.starts = mixture.starts
        self.counts = _shares(mixture.weights, _BLOCK)
        self.seed = seed
        self.path = path
        self._recent = _Recent(2)

    def index(self, position: int) -> int:
        """The image at a position."""
        part, local = self._part(position)
        return int(self.starts[part]) + self.orders[part].index(local)

    def epoch(self, position: int) -> int:
        """How often every image of the position's source has come before it."""
        part, local = self._part(position)
        return self.orders[part].epoch(local)

    def replacement(self, position: int, random: np.random.Generator) -> int:
        """Another image for a position, from the same source."""
        part, local = self._part(position)
        return int(self.starts[part]) + self.orders[part].replacement(local, random)

    def _part(self, position: int) -> tuple[int, int]:
        block, within = divmod(position, _BLOCK)
        parts, ranks = self._recent.get((block,), lambda: self._block(block))
        part = int(parts[within])
        return part, block * int(self.counts[part]) + int(ranks[within])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        random = generator(self.seed, _BLOCK_ORDER, *self.path, block)
        parts = random.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        ranks = np.empty(len(parts), dtype=np.int64)  # how many of the same part come before
        for part, count in enumerate(self.counts):
            ranks[parts == part] = np.arange(count)
        return parts, ranks


def make_order(source: Source, seed: int, path: tuple[int, ...] = ()) -> ShardOrder | MixtureOrder:
    """The order of a source's images for a seed."""
    if isinstance(source, Mixture):
        return MixtureOrder(source, seed, path)
    return ShardOrder(source.shards, seed, path)


def _shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole shares of ``total``, each at least 1, by largest remainder."""
    exact = np.asarray(weights) * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for _ in range(int(abs(total - counts.sum()))):
        missing = exact - counts
        if counts.sum() < total:
            counts[missing.argmax()] += 1
        else:  # small weights were rounded up: the largest share gives
            counts[counts.argmax()] -= 1
    return counts
