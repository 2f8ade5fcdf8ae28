"""Teacher features on disk, in shards that are complete or absent.

A shard is a safetensors file: a crop is looked up by its address and read at its place in the file,
in any order and by any number of processes (webdataset's tars are read from end to end, which
shuffled epochs are not).
"""

from __future__ import annotations

import os
import time
import uuid
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo.errors import UserError, require
from fastagglo.features import Features

SHARD_BYTES = 64 * 2**20
"""A shard is written when this much is waiting, or this long after its first features came: so
much work is lost to a kill."""
SHARD_SECONDS = 30.0

_LOOK_SECONDS = 1.0  # between two looks for shards that other processes have written
_OPEN_SHARDS = 64
_STALE_SECONDS = 3600.0  # an unfinished file this old is a killed writer's
_LARGEST_FLOAT16 = 65504.0
_PARTS = ("summary", "spatial", "step", "middle")
_SUFFIX = ".safetensors"

Parts = dict[str, Tensor]


class FeatureStore:
    """Features of one teacher by the addresses of the views that it saw.

    Args:
        folder: its own; made when the first shard is written.
        dtype: the teacher's own: features in it come back bit by bit.
        storage: ``"teacher"`` for that dtype; ``"bfloat16"`` or ``"float16"``; or ``"int8"``: the
            map in 255 steps from the least to the largest value of each channel of each image,
            off by at most half a step, and the summary, a small part, in the teacher's dtype.

    Attributes:
        damaged: shards and entries that could not be read.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, storage: str) -> None:
        self.folder, self.dtype, self.storage = folder, dtype, storage
        self.damaged: list[str] = []
        self._format = require("safetensors", extra="train", purpose="the feature cache")
        self._shards: list[Path] = []
        self._known: set[str] = set()
        self._index: dict[bytes, tuple[int, int]] = {}  # address -> shard and row
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._waiting: dict[bytes, Parts] = {}
        self._waiting_bytes, self._waiting_since, self._looked = 0, 0.0, float("-inf")
        self.refresh()

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path, torch.dtype, str]]:
        return FeatureStore, (self.folder, self.dtype, self.storage)

    def __len__(self) -> int:
        return len(self._index.keys() | self._waiting.keys())

    def __contains__(self, address: bytes) -> bool:
        return address in self._waiting or address in self._index

    def addresses(self) -> list[bytes]:
        """Of all that is on disk, in the order of the shards."""
        return sorted(self._index, key=self._index.__getitem__)

    def nbytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in set(self._shards))

    # Reading.

    def read(self, address: bytes) -> Features | None:
        """The features of one view, in the dtype of storage (int8: float32), or None.

        An entry whose checksum is wrong counts as not there.
        """
        parts = self._waiting.get(address)
        if parts is not None:
            return self.decode(parts)
        if address not in self._index:
            self.refresh(_LOOK_SECONDS)
        place = self._index.get(address)
        if place is None:
            return None
        try:
            parts, expected = self._row(*place)
            whole = checksum(parts) == expected
        except (OSError, KeyError, IndexError, self._format.SafetensorError):
            whole = False
        if not whole:
            self._report(f"row {place[1]} of {self._shards[place[0]]}")
            del self._index[address]
            return None
        return self.decode(parts)

    def refresh(self, after: float = 0.0) -> None:
        """Look for new shards, unless the last look was less than ``after`` seconds ago."""
        if time.monotonic() - self._looked < after:
            return
        self._looked = time.monotonic()
        try:
            found = [e for e in os.scandir(self.folder) if e.name.endswith(_SUFFIX)]
        except FileNotFoundError:
            return
        # Of an entry that was damaged and made again the newer one counts.
        for entry in sorted(found, key=lambda e: (e.stat().st_mtime_ns, e.name)):
            if entry.name not in self._known:
                self._add(Path(entry.path))

    def _add(self, path: Path) -> None:
        self._known.add(path.name)
        try:
            with self._format.safe_open(path, framework="pt") as file:
                rows = file.get_tensor("addresses").numpy()
        except (OSError, self._format.SafetensorError) as error:
            self._report(f"{path} ({error})")
            return
        self._shards.append(path)
        number = len(self._shards) - 1
        self._index.update((row.tobytes(), (number, at)) for at, row in enumerate(rows))

    def _row(self, shard: int, row: int) -> tuple[Parts, int]:
        if shard not in self._open:
            self._open[shard] = self._format.safe_open(self._shards[shard], framework="pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        file = self._open[shard]
        names = set(file.keys())
        parts = {name: file.get_slice(name)[row] for name in _PARTS if name in names}
        return parts, int(file.get_slice("checksums")[row])

    def _report(self, what: str) -> None:
        self.damaged.append(what)
        warnings.warn(f"feature cache: {what} is damaged and not used", stacklevel=3)

    # The form in which features are kept.

    def encode(self, features: Features) -> Parts:
        """Features as they are stored, on their device; shapes may have a batch axis.

        Raises:
            UserError: a feature is too large for float16.
        """
        kept = self.dtype if self.storage in ("teacher", "int8") else _dtype(self.storage)
        parts = {}
        for name in ("summary", "spatial"):
            value = getattr(features, name)
            if value is None:
                continue
            if kept is torch.float16 and self.dtype is not kept:
                largest = value.abs().nan_to_num(posinf=0).amax().item() if value.numel() else 0.0
                if largest > _LARGEST_FLOAT16:
                    raise UserError(
                        f"setting cache.storage is 'float16', which ends at {_LARGEST_FLOAT16:g}: "
                        f"a teacher's features reach {largest:.4g}; take bfloat16 or teacher"
                    )
            parts[name] = value.to(kept)
        if self.storage == "int8" and features.spatial is not None:
            value = features.spatial.float()
            low, high = value.amin((-3, -2)), value.amax((-3, -2))
            step, middle = (high - low) / 254, (high + low) / 2
            scale = torch.where(step > 0, step, 1)[..., None, None, :]
            steps = ((value - middle[..., None, None, :]) / scale).round().clamp(-127, 127)
            parts |= {"spatial": steps.to(torch.int8), "step": step, "middle": middle}
        return parts

    def decode(self, parts: Mapping[str, Tensor]) -> Features:
        """What `encode` kept, on its device."""
        summary, spatial = parts.get("summary"), parts.get("spatial")
        if "step" in parts:
            step, middle = (parts[name][..., None, None, :] for name in ("step", "middle"))
            spatial = parts["spatial"] * step + middle
        return Features(summary, spatial)

    # Writing.

    def put(self, addresses: Sequence[bytes], parts: Mapping[str, Tensor]) -> None:
        """Keep the features of some views; what is there already, or is not finite, is left out.

        Args:
            addresses: of ``N`` views.
            parts: of `encode`, with a batch axis of ``N``.

        Raises:
            UserError: a shard cannot be written.
        """
        parts = {name: value.cpu() for name, value in parts.items()}
        for row, address in enumerate(addresses):
            own = {name: value[row].clone() for name, value in parts.items()}
            finite = all(bool(v.isfinite().all()) for v in own.values() if v.is_floating_point())
            if address in self or not finite:
                continue
            if not self._waiting:
                self._waiting_since = time.monotonic()
            self._waiting[address] = own
            self._waiting_bytes += sum(value.nbytes for value in own.values())
        late = time.monotonic() - self._waiting_since > SHARD_SECONDS
        if self._waiting and (self._waiting_bytes > SHARD_BYTES or late):
            self.flush()

    def flush(self) -> None:
        """Write what is waiting: a shard for each shape of features.

        Raises:
            UserError: it cannot be written; what was on disk before is intact.
        """
        by_shape: dict[tuple[object, ...], list[bytes]] = {}
        for address, parts in self._waiting.items():
            shape = tuple((name, tuple(value.shape)) for name, value in parts.items())
            by_shape.setdefault(shape, []).append(address)
        for addresses in by_shape.values():
            rows = [self._waiting[address] for address in addresses]
            tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            tensors["addresses"] = torch.tensor([list(a) for a in addresses], dtype=torch.uint8)
            tensors["checksums"] = torch.tensor([checksum(row) for row in rows])
            self._add(self._write(addresses, tensors))
        self._waiting.clear()
        self._waiting_bytes = 0

    def _write(self, addresses: Sequence[bytes], tensors: Parts) -> Path:
        name = blake2b(b"".join(addresses), digest_size=16).hexdigest()
        path = self.folder / f"{name}{_SUFFIX}"
        partial = self.folder / f"{name}.{uuid.uuid4().hex}.partial"
        save = require("safetensors.torch", extra="train", purpose="the feature cache").save
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(save(tensors))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise UserError(
                f"setting cache.folder: {path} cannot be written ({error.strerror}); what was "
                "stored before is intact: make room, or choose another folder"
            ) from error
        return path

    def sweep(self) -> None:
        """Remove what killed writers have left unfinished."""
        for path in self.folder.glob("*.partial"):
            with suppress(OSError):  # another process was faster
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def relative_error(features: Features, others: Sequence[Features | None]) -> list[float | None]:
    """How far the features of each view are from others: the larger of map and summary.

    The root mean square of the difference over that of the features of all these views about
    their mean of each channel.

    Args:
        features: ``(N, ...)``.
        others: of ``N`` views, each without a batch axis, or None.

    Returns:
        A figure for each view, None where the other is; infinite where shapes differ.
    """
    found: list[float | None] = [None if other is None else 0.0 for other in others]
    for part in ("summary", "spatial"):
        value = getattr(features, part)
        if value is None:
            continue
        value = value.float()
        flat = value.flatten(0, -2)
        # A single summary is no deviation from a mean.
        deviation = (flat - flat.mean(0) if len(flat) > 1 else flat).square().mean().sqrt()
        for row, other in enumerate(others):
            if other is None:
                continue
            theirs = getattr(other, part)
            error = float("inf")
            if theirs is not None and theirs.shape == value[row].shape:
                off = (theirs.float() - value[row]).square().mean().sqrt()
                error = float(off / deviation) if off > 0 else 0.0
            found[row] = max(found[row] or 0.0, error if error == error else float("inf"))
    return found


def checksum(parts: Mapping[str, Tensor]) -> int:
    """CRC-32 of one entry's bytes."""
    found = 0
    for name in _PARTS:
        if name in parts:
            flat = parts[name].contiguous().flatten().view(torch.uint8)
            found = zlib.crc32(flat.numpy(), found)
    return found


def _dtype(name: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]
