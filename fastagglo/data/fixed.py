"""Fixed crops: the same few crops of each photo in every epoch, and an address for what is seen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch

from fastagglo.data.crops import Box
from fastagglo.data.order import generator
from fastagglo.data.plan import GroupPlan, StepPlan
from fastagglo.data.source import Source
from fastagglo.features import Features

_FIXED = 4  # a stream of random numbers of its own, beside those of fastagglo.data.order


class FeatureReader(Protocol):
    """Gives stored features of views; called in the worker processes."""

    def read(self, teacher: str, address: bytes) -> Features | None:
        """The features of one view, without a batch axis, or None if there are none."""
        ...


class StoredViews:
    """What is known of one group's views, gathered row by row.

    Args:
        names: of the teachers.
        reader: gives their stored features; None if nothing is stored.
    """

    def __init__(self, names: Sequence[str], reader: FeatureReader | None) -> None:
        self._reader = reader
        self._addresses: dict[str, list[bytes]] = {name: [] for name in names}
        self._rows: dict[str, list[Features | None]] = {name: [] for name in names}

    def look(self, teacher: str, address: bytes) -> bool:
        """Add a teacher's view of the next row: are its features stored?"""
        found = None if self._reader is None else self._reader.read(teacher, address)
        self._addresses[teacher].append(address)
        self._rows[teacher].append(found)
        return found is not None

    def fields(self) -> dict[str, Any]:
        """``addresses``, ``features`` and ``missing`` of the group's ``GroupViews``."""
        stacked = {name: stack_features(rows) for name, rows in self._rows.items()}
        return {
            "addresses": {name: tuple(found) for name, found in self._addresses.items()},
            "features": {name: found for name, found in stacked.items() if found is not None},
            "missing": {
                name: tuple(row for row, found in enumerate(rows) if found is None)
                for name, rows in self._rows.items()
            },
        }


def fixed_generator(seed: int, key: str, crop: int) -> np.random.Generator:
    """The random numbers of a photo's crop number ``crop``, wherever in a run it comes.

    They follow the photo's key and not its index, so that its crops stay the same when photos are
    added or held out.
    """
    return generator(seed, _FIXED, int.from_bytes(_digest(key.encode()), "big"), crop)


def view_address(file: bytes, how: tuple[object, ...], box: Box, flip: bool, size: int) -> bytes:
    """16 bytes that stand for the pixels of a view: equal for equal pixels, and for no others.

    Args:
        file: digest of the image file's bytes (:func:`file_digest`).
        how: whatever else the pixels of a view depend on.
        box: in the file's pixels.
        flip: whether the view is mirrored.
        size: its side in pixels.
    """
    place = (*how, *(float(edge) for edge in box), bool(flip), size)
    return _digest(file + rendering() + repr(place).encode())


@cache
def rendering() -> bytes:
    """Digest of what this installation makes of two test pictures.

    Another decoder, another version of it, or another filter of the resizing gives other pixels
    from the same file and box. They are part of each view's address, by way of the views of a JPEG,
    larger and smaller than its crops, and of a PNG, on each of the ways that views are made.
    """
    from fastagglo.data.stream import CropStream
    from fastagglo.data.views import eval_views

    source, small, large = _Probe(), GroupPlan(32, 2, {"a": 48}), GroupPlan(224, 2, {"a": 48})
    plan = StepPlan((small, large, replace(small, shift_std=1.0)))
    groups = [
        *CropStream(source, lambda step: plan, seed=0)[0].groups,
        *eval_views(source, small, "photos"),
    ]
    views = [view for group in groups for view in (group.student, group.teachers["a"])]
    return _digest(b"".join(view.numpy().tobytes() for view in views))


class _Probe(Source):
    """One picture of waves and edges, as a JPEG and as a PNG."""

    def __init__(self) -> None:
        from PIL import Image

        y, x = np.mgrid[:360, :480]
        waves = [np.sin(x / 7 + y / 31), np.cos(x * y / 9000), np.sign(np.sin(x / 40 - y / 23))]
        pixels = (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
        self._files = []
        for kind in ("JPEG", "PNG"):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, kind)
            self._files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        return self._files[index]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def stack_features(rows: Sequence[Features | None]) -> Features | None:
    """Features of single views as those of a batch, zeros where a row is None; None if all are."""
    some = next((row for row in rows if row is not None), None)
    if some is None:
        return None
    parts = []
    for part in ("summary", "spatial"):
        like = getattr(some, part)
        if like is None:
            parts.append(None)
            continue
        found = [torch.zeros_like(like) if row is None else getattr(row, part) for row in rows]
        parts.append(torch.stack(found))
    return Features(*parts)
