"""What token merging is measured on: a language model's bridge, and layers that merge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: for test ids.
        images: N.
        grid: rows and columns of each image's tokens.
        channels: of a token.
        keep: tokens that are left of each image, the protected ones included.
        partition: of the merge.
        stride: of the windows that a destination each is taken from.
        protect: leading tokens (CLS, registers).
        heads: keys of as many heads, of 64 channels each, are compared; 0: the tokens themselves.
        backward: with the gradient of the tokens.
        size: bytes of an element.
    """

    name: str
    images: int
    grid: tuple[int, int]
    channels: int
    keep: int
    partition: str = "strided"
    stride: tuple[int, int] = (2, 2)
    protect: int = 0
    heads: int = 0
    backward: bool = False
    size: int = 4

    @property
    def tokens(self) -> int:
        """Of each image."""
        return self.protect + math.prod(self.grid)

    @property
    def destinations(self) -> int:
        """Of each image."""
        if self.partition == "alternate":
            return self.tokens // 2 - self.protect // 2
        (h, w), (rows, columns) = self.grid, self.stride
        return -(-h // rows) * -(-w // columns)

    @property
    def compared(self) -> int:
        """Channels of what is compared."""
        return 64 if self.heads else self.channels

    @property
    def flops(self) -> int:
        """Of the product of sources and destinations, which the choice cannot do without."""
        sources = math.prod(self.grid) - self.destinations
        return 2 * self.images * sources * self.destinations * self.compared

    @property
    def bytes(self) -> int:
        """Of tokens and keys, read, and what is left, written; with the backward the gradient."""
        read = self.tokens * (self.channels + 64 * self.heads)
        written = (self.keep + self.tokens * self.backward) * self.channels
        return self.images * (read + written) * self.size

    @property
    def id(self) -> str:
        return f"{self.name}-{self.images}{'-backward' * self.backward}"

    @property
    def label(self) -> str:
        """For plots."""
        grid = "x".join(map(str, self.grid))
        return f"{self.name}: {self.images}x{grid}x{self.channels} -> {self.keep}"

    @property
    def peers(self) -> tuple[str, ...]:
        """Who takes part beside us, by name in ``merge_peers.PEERS``.

        No windows with a protected token; nothing to unmerge from the product alone.
        """
        windows = () if self.protect else ("tomesd", "unshuffle", "bicubic")
        return ("eager", *windows, *(() if self.backward else ("product",)))

    @property
    def facts(self) -> dict[str, Any]:
        """What the results say of a case."""
        return {
            "label": self.label,
            "partition": self.partition,
            "stride": None if self.partition == "alternate" else self.stride,
            "protect": self.protect,
            "metric": f"keys of {self.heads} heads, averaged" if self.heads else "the tokens",
            "pass": "forward+backward" if self.backward else "forward",
            "flops": self.flops,
            "bytes": self.bytes,
        }


def bridge(images: int, side: int, channels: int, tokens: int, step: int) -> Case:
    """Once at the encoder's output, as RADIOv2.5 does for a language model (arXiv 2412.07679)."""
    return Case("bridge", images, (side, side), channels, tokens, stride=(step, step))


def halved(images: int, side: int, channels: int) -> Case:
    """Half of the tokens, from windows of 2 x 2, as in Stable Diffusion (arXiv 2303.17604)."""
    return Case("half", images, (side, side), channels, side * side // 2)


def layer(images: int, side: int, heads: int, merged: int) -> Case:
    """A layer of ToMe (arXiv 2210.09461): alternate, by the keys of attention, CLS protected."""
    shape = (side, side), 64 * heads, side * side + 1 - merged
    return Case("layer", images, *shape, partition="alternate", protect=1, heads=heads)


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on ``"cuda"`` or ``"cpu"``."""
    if quick:
        found = [bridge(2, 12, 32, 16, 3), halved(2, 8, 32), layer(2, 7, 2, 8)]
    elif device == "cpu":
        found = [bridge(1, 72, 1280, 256, 5), bridge(4, 32, 768, 256, 2)]
        found += [halved(1, 72, 1280), layer(4, 24, 12, 64)]
    else:
        found = [bridge(8, 72, 1280, 256, 5), bridge(32, 32, 1024, 256, 2)]
        found += [halved(8, 72, 1280), layer(64, 24, 16, 64), bridge(2, 128, 1280, 256, 8)]
    found = [replace(case, size=4 if device == "cpu" else 2) for case in found]
    return found + [replace(case, backward=True) for case in found]
