"""Where every token lies in a student that is being exported, whose sizes may be symbols."""

from __future__ import annotations

import torch
from torch import Tensor

from fastagglo.model.packing import Geometry, Windows
from fastagglo.ops.exporting import layout_of_runs

__all__ = ["exported_geometry"]


def exported_geometry(
    grids: tuple[tuple[int, int, int], ...], prefix: int, window: int | None, device: torch.device
) -> Geometry:
    """What ``geometry`` of ``packing.py`` gives, by operators that a graph can hold.

    Args and result are those; the numbers may be symbols.
    """

    def count(n: int) -> Tensor:
        return torch.arange(n, device=device)

    images = sum(n for n, _, _ in grids)
    # Per group (images, rows): where its prefix tokens and its patches lie in either order.
    apart, packed, ids, units, orders, places = [], [], [], [], [], []
    image = patch = 0
    for n, h, w in grids:
        size = h * w
        each = count(n)[:, None]
        apart.append(
            (
                (image + each) * prefix + count(prefix),
                images * prefix + patch + each * size + count(size),
            )
        )
        start = image * prefix + patch + each * (prefix + size)
        packed.append((start + count(prefix), start + prefix + count(size)))
        ids.append((image + each).expand(n, size).flatten())
        along = count(torch.sym_max(h, w)).float() / torch.sym_max(torch.sym_max(h, w) - 1, 1)
        grid = torch.stack(torch.meshgrid(along[:h], along[:w], indexing="ij"), dim=-1)
        units.append(grid.expand(n, h, w, 2).flatten(0, 2))
        if window is not None:
            cut, joined = (h // window, window, w // window, window), (h // window, w // window)
            order = count(size).view(cut).transpose(1, 2).flatten()
            orders.append(start + prefix + order)
            place = count(size).view(*joined, window, window).transpose(1, 2).flatten()
            places.append(images * prefix + patch + each * size + place)
        image, patch = image + n, patch + n * size
    prefix_at = torch.cat([tokens.flatten() for tokens, _ in packed])
    windows = None
    if window is not None:
        enter = torch.cat([prefix_at, *(order.flatten() for order in orders)])
        leave = [
            torch.cat([tokens, place], dim=1).flatten()
            for (tokens, _), place in zip(apart, places, strict=True)
        ]
        runs = [(n * (h // window) * (w // window), window**2) for n, h, w in grids]
        windows = Windows(enter, torch.cat(leave), layout_of_runs(runs, device))
    return Geometry(
        grids,
        images * prefix,
        layout_of_runs([(n, prefix + h * w) for n, h, w in grids], device),
        layout_of_runs([(n, h * w) for n, h, w in grids], device),
        torch.cat([torch.cat(rows, dim=1).flatten() for rows in apart]),
        torch.cat([prefix_at, *(patches.flatten() for _, patches in packed)]),
        torch.cat(ids),
        torch.cat(units),
        windows,
    )
