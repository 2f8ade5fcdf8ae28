"""What the kernels of merge.py know of images, rounds and positions: one buffer of integers.

All of it follows from shapes (and the seed of random destinations), so it is made on the host,
where nothing has to wait for the tokens, and can be kept for the next batch of these shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

# Columns of the table that a round has of its images, int32.
TOKEN = tl.constexpr(0)  # first of the image's tokens
LENGTH = tl.constexpr(1)  # of them
FIXED = tl.constexpr(2)  # of these, protected
ROW = tl.constexpr(3)  # first of the image's slots
ENTRY = tl.constexpr(4)  # first row of what is compared of its unprotected tokens
FREE = tl.constexpr(5)  # unprotected tokens before the round
SOURCES = tl.constexpr(6)
DESTINATIONS = tl.constexpr(7)
MERGES = tl.constexpr(8)
SOURCE_LIST = tl.constexpr(9)  # where in the buffer: positions of the sources,
DESTINATION_LIST = tl.constexpr(10)  # of the destinations,
ROLES = tl.constexpr(11)  # and of each position the number of the source there, or -1
SOURCE = tl.constexpr(12)  # the image's first source among all sources of the round
DESTINATION = tl.constexpr(13)  # and its first destination
BITS = tl.constexpr(14)  # that the image's last slot has
COLUMNS = tl.constexpr(15)

# Destinations of a program of the kernel that computes their norms.
NORM_ROWS = 32


class Image(NamedTuple):
    """One image's merge.

    Attributes:
        length: its tokens.
        fixed: of these, the leading ones that stay.
        rounds: for each round the positions of the sources and of the destinations, ascending,
            among the unprotected tokens that are left (int64 on the CPU), and how many are merged.
    """

    length: int
    fixed: int
    rounds: Sequence[tuple[Tensor, Tensor, int]]


class Round(NamedTuple):
    """Where a round's parts are in the buffer, and how long they and its results are."""

    table: int
    norm_work: int
    norm_programs: int
    match_work: int
    match_programs: int
    sources: int
    destinations: int
    rows: int


class Plan(NamedTuple):
    """All that the kernels need to know beside tokens; it depends on shapes alone.

    Attributes:
        buffer: int32 on the CPU: tables of images, lists of positions, work lists.
        rounds: at least one.
        images, tokens: how many there are of them, tokens of no image left out.
        tile_rows: sources of a program in the first round and in later ones.
    """

    buffer: Tensor
    rounds: tuple[Round, ...]
    images: int
    tokens: int
    tile_rows: tuple[int, int]


def make_plan(images: Sequence[Image], tile_rows: tuple[int, int]) -> Plan:
    """Lay out the rounds of all images; images that need fewer than others pause in the last ones.

    Args:
        images: in the order of their tokens.
        tile_rows: sources of a program in the first round and in later ones: the rows of
            :func:`tiles_for`.
    """
    parts: list[Tensor] = []
    size = 0
    listed: dict[int, tuple[int, Tensor]] = {}  # equal images share their lists

    def put(values: Tensor | Sequence[Sequence[int]]) -> int:
        nonlocal size
        part = torch.as_tensor(values, dtype=torch.int32, device="cpu").reshape(-1)
        parts.append(part)
        size += len(part)
        return size - len(part)

    def put_once(values: Tensor) -> int:
        if id(values) not in listed:
            listed[id(values)] = put(values), values
        return listed[id(values)][0]

    def work(counts: Sequence[int], order: Sequence[int], step: int) -> tuple[int, int]:
        items = [(image, first) for image in order for first in range(0, counts[image], step)]
        return put(items), len(items)

    rounds = []
    roles: dict[int, Tensor] = {}
    left = [image.length - image.fixed for image in images]
    entries = [image.fixed for image in images]
    starts = [0]
    for image in images:
        starts.append(starts[-1] + image.length)
    for number in range(max((len(image.rounds) for image in images), default=1) or 1):
        table, counts = [], []
        row = source = destination = 0
        for which, image in enumerate(images):
            merges, lists = 0, (0, 0, 0)
            counts.append((0, 0))
            if number < len(image.rounds):
                sources, destinations, merges = image.rounds[number]
                counts[-1] = len(sources), len(destinations)
                if id(sources) not in roles:
                    role = torch.full((left[which],), -1, dtype=torch.int32, device="cpu")
                    role[sources] = torch.arange(len(sources), dtype=torch.int32, device="cpu")
                    roles[id(sources)] = role
                lists = (*map(put_once, (sources, destinations, roles[id(sources)])),)
            kept = image.fixed + left[which] - merges
            entry = entries[which] + (starts[which] if number == 0 else 0)
            table.append(
                (starts[which], image.length, image.fixed, row, entry, left[which])
                + (*counts[-1], merges, *lists, source, destination)
                + (max(kept - 1, 0).bit_length(),)
            )
            left[which] -= merges
            entries[which] = row + image.fixed
            row, source, destination = (
                row + kept,
                source + counts[-1][0],
                destination + counts[-1][1],
            )
        # Programs that take longest come first.
        order = sorted(range(len(images)), key=lambda image: -counts[image][1])
        rounds.append(
            Round(
                put(table),
                *work([d for _, d in counts], order, NORM_ROWS),
                *work([s for s, _ in counts], order, tile_rows[number > 0]),
                source,
                destination,
                row,
            )
        )
    buffer = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32, device="cpu")
    return Plan(buffer, tuple(rounds), len(images), starts[-1], tile_rows)
