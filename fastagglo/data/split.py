"""Held-out data: whole photos, and a strip of every training photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from numbers import Real

from fastagglo.data.plan import check_float
from fastagglo.data.source import Mixture, Source, Subset
from fastagglo.errors import UserError


@dataclass(frozen=True)
class Split:
    """A source in two parts.

    Attributes:
        train: the photos to train on, except for their held-out strip.
        held_out: the photos that are held out whole; may be empty.
        region: the part of each training photo's width, at its right edge, that is held out.
    """

    train: Source
    held_out: Subset
    region: float


def split(
    source: Source, photos: float | Sequence[str] | None = None, region: float = 0.3
) -> Split:
    """Hold out whole photos and the right strip of every other photo.

    Photos say how the student does on subjects it never saw, strips how it does on unseen parts of
    subjects it knows; a handful of training photos teaches nothing of the first.

    Args:
        source: all photos. A mixture stays one: each of its sources is split.
        photos: the share of photos to hold out, chosen by a hash of the key, so that a photo stays
            on its side when others come or go (at least one, unless 0 or there is one photo
            alone); or the keys to hold out; or None for the source's own choice (the built-in
            photos have one), else 0.1.
        region: the share of each training photo's width that is held out; 0 for none. Give it to
            :class:`CropStream` and :func:`eval_views`.

    Raises:
        UserError: an unknown key, or all photos held out.
        TypeError, ValueError: an argument of another kind or out of range.
    """
    region = check_region(region)
    if photos is None:
        photos = source.held_out or 0.1
    held_out = set(_chosen(source, photos))
    if len(held_out) == len(source):
        raise UserError(f"all {len(source)} photos are held out: leave some to train on")
    kept = (index for index in range(len(source)) if index not in held_out)
    return Split(_restrict(source, list(kept)), Subset(source, sorted(held_out)), region)


def check_region(region: float) -> float:
    """``region`` as a float in [0, 1): the share of the width that is held out."""
    region = check_float("region", region, 0.0, 1.0)
    if region == 1:
        raise ValueError("region must be below 1, got 1.0: nothing would be left to train on")
    return region


def region_start(width: int, region: float) -> int:
    """The first column of the held-out strip of an image; training uses those before it.

    With a strip at all (``region`` > 0) it is at least one column wide.
    """
    return width - ceil(width * region)


def _chosen(source: Source, photos: float | Sequence[str]) -> list[int]:
    keys = [source.key(index) for index in range(len(source))]
    if isinstance(photos, Real):
        share = check_float("photos", photos, 0.0, 1.0)
        hashes = [_unit_hash(key) for key in keys]
        chosen = [index for index, value in enumerate(hashes) if value < share]
        if not chosen and share > 0 and len(keys) > 1:
            chosen = [min(range(len(keys)), key=hashes.__getitem__)]
        return chosen
    if isinstance(photos, str) or not isinstance(photos, Sequence):
        raise TypeError(f"photos must be a share or a list of keys, got {photos!r}")
    if unknown := [key for key in photos if key not in set(keys)]:
        raise UserError(
            f"photos to hold out that the source does not have: {', '.join(map(repr, unknown[:5]))}"
            f"; its {len(keys)} keys are like {', '.join(map(repr, keys[:5]))}"
        )
    wanted = set(photos)
    return [index for index, key in enumerate(keys) if key in wanted]


def _unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _restrict(source: Source, indices: list[int]) -> Source:
    """The images of ``indices`` as a source; a mixture keeps its proportions."""
    if not isinstance(source, Mixture):
        return Subset(source, indices)
    locals_of: list[list[int]] = [[] for _ in source.sources]
    for index in indices:
        part, local = source.locate(index)
        locals_of[part].append(local)
    parts = []
    for child, weight, local in zip(source.sources, source.weights, locals_of, strict=True):
        if not local:
            raise UserError(f"every photo of a {type(child).__name__} of the mixture is held out")
        parts.append((_restrict(child, local), weight))
    return Mixture(parts)
