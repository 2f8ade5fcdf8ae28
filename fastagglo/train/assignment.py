"""Who takes which images of a step: equal work, not equal counts.

A step's time is that of its slowest rank, and an image of 1152 pixels costs a hundred times one of
128. Images of one group cost the same, so that spreading them is filling bins to a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Bins = Sequence[int] | np.ndarray


def spread(
    costs: Sequence[float], counts: Sequence[int], bins: Sequence[Bins], total: int
) -> np.ndarray:
    """Give each image to the bin with the least work so far, the costliest images first.

    This is the longest-processing-time rule (Graham 1969): the fullest bin holds at most 4/3 of
    what it would in the best assignment, and, with images to spare, at most one of the cheapest
    images more than the emptiest. Bins that this leaves without any image get one from others.

    Args:
        costs: of one image of each kind, above 0.
        counts: images of each kind.
        bins: the bins that may take each kind, ascending.
        total: number of bins.

    Returns:
        ``(kinds, total)`` int64: images of each kind in each bin. The same on every machine.

    Raises:
        ValueError: fewer images than bins, or a bin that no kind may fill.
    """
    # Whole numbers, so that no rounding differs between machines.
    unit = max(costs) / 1_000_000
    whole = [max(1, round(cost / unit)) for cost in costs]
    loads = np.zeros(total, dtype=np.int64)
    found = np.zeros((len(costs), total), dtype=np.int64)
    for kind in sorted(range(len(costs)), key=lambda k: (-whole[k], k)):
        allowed = np.asarray(bins[kind])
        found[kind, allowed] = _fill(loads[allowed], whole[kind], counts[kind])
        loads[allowed] += found[kind, allowed] * whole[kind]
    for empty in np.flatnonzero(found.sum(axis=0) == 0):
        _give_one(found, bins, int(empty))
    return found


def idle_share(loads: np.ndarray) -> float:
    """Expected share of a step that ranks spend waiting for the slowest of them.

    Args:
        loads: ``(rounds, ranks)``: work of each rank between two meetings of all ranks.
    """
    return 1.0 - float(loads.sum()) / (float(loads.max(axis=1).sum()) * loads.shape[1])


def _fill(loads: np.ndarray, cost: int, count: int) -> np.ndarray:
    """How many of ``count`` equal items each bin gets when each goes to the lowest bin."""
    low, high = int(loads.min()), int(loads.min()) + cost * (count + 1)
    while low < high:  # the lowest level to which all bins can be filled with enough items
        level = (low + high) // 2
        if int(np.maximum((level - loads) // cost, 0).sum()) >= count:
            high = level
        else:
            low = level + 1
    given = np.maximum((low - loads) // cost, 0)
    surplus = int(given.sum()) - count
    if surplus:
        # Of bins that the last items fill to the level, the last ones go without.
        full = np.flatnonzero((given > 0) & (loads + given * cost == low))
        given[full[len(full) - surplus :]] -= 1
    return given


def _give_one(found: np.ndarray, bins: Sequence[Bins], empty: int) -> None:
    """Give an image to a bin that has none: the shortest chain of moves from a bin with two."""
    moves: dict[int, tuple[int, int]] = {}  # from a bin: which kind, to which bin
    reached = [empty]
    for bin_ in reached:
        for kind in range(len(found) - 1, -1, -1):
            allowed = np.asarray(bins[kind])
            if bin_ not in allowed:
                continue
            for donor in allowed[found[kind, allowed] > 0].tolist():
                if donor == empty or donor in moves:
                    continue
                moves[donor] = (kind, bin_)
                reached.append(donor)
                if found[:, donor].sum() > 1:
                    while donor != empty:
                        kind, taker = moves[donor]
                        found[kind, donor] -= 1
                        found[kind, taker] += 1
                        donor = taker
                    return
    raise ValueError(f"bin {empty} of {found.shape[1]} is left without an image")
