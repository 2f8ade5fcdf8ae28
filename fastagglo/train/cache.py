"""Teacher features of fixed crops, kept on disk: what was computed once is read from then on.

An entry is found by the address of the view (the image file's bytes, the crop, its size, the
decoder: `fastagglo.data.fixed`) in a folder named by the teacher's identity (its weights, settings
and modules), so that whatever changes, an entry of before is not found any more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo import interop
from fastagglo.data import GroupViews
from fastagglo.data.fixed import stack_features
from fastagglo.errors import UserError
from fastagglo.features import Features
from fastagglo.teachers import Teacher, TeacherSpec, base, teacher_files, weights_hash
from fastagglo.train.config import RunConfig, TeacherSettings
from fastagglo.train.feature_store import FeatureStore, relative_error
from fastagglo.train.targets import load_one_teacher, teacher_features
from fastagglo.train.teacher_speed import Sample

FORMAT = 1
"""Counted up when entries of before must not be used: it is part of every identity."""

_PACKAGES = {
    "builtin": "efficientnet-lite-pytorch",
    "timm": "timm",
    "open_clip": "open_clip_torch",
    "transformers": "transformers",
}
_CODE = {
    "builtin": ("builtin.py", "hog.py"),
    "timm": ("timm_models.py",),
    "open_clip": ("open_clip_models.py", "timm_models.py"),
    "transformers": ("transformers_models.py",),
}
_KNOWN = "teachers"  # folder of what is known of teachers from their files

Update = tuple[Sequence[int], Features]
"""Rows of a group, and features of these rows."""


class LazyTeacher:
    """A teacher that is loaded when it is first asked for features.

    Args:
        spec: what it takes and gives.
        device: where it will live.
        load: makes it.
        feature_errors: as `Teacher.feature_errors`, measured when it was last loaded.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        device: torch.device,
        load: Callable[[], Teacher],
        feature_errors: dict[str, float] | None = None,
    ) -> None:
        self.spec, self.device, self._load = spec, device, load
        self.feature_errors = feature_errors or {}
        self.teacher: Teacher | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def seen(self) -> Counter[tuple[int, int]]:
        """As `Teacher.seen`."""
        return Counter() if self.teacher is None else self.teacher.seen

    def flops(self, height: int, width: int) -> int | None:
        """As `Teacher.flops`; None before it is loaded."""
        return None if self.teacher is None else self.teacher.flops(height, width)

    def __call__(self, images: Tensor) -> Features:
        """As `Teacher.forward`."""
        if self.teacher is None:
            self.teacher = self._load()
        return self.teacher(images)


class StoredFeatures:
    """What the data workers read: `fastagglo.data.fixed.FeatureReader`."""

    def __init__(self, stores: dict[str, FeatureStore]) -> None:
        self.stores = stores

    def read(self, teacher: str, address: bytes) -> Features | None:
        """The features of one view, or None."""
        store = self.stores.get(teacher)
        return None if store is None else store.read(address)


class FeatureCache:
    """The stored features of a run's teachers, and the teachers for what is not stored.

    Args:
        config: the run; ``config.cache.folder`` is set.
        device: where the teachers live.
        strict: a shard that cannot be written is an error; else it is a warning, and the end of
            storing.
        sample: for `load_one_teacher`.

    Attributes:
        teachers: by name, in the recipe's order. One whose files are known here is not loaded
            before it has something to compute.
        stores: its features on disk, by name.
        reader: for `CropStream`.
        read, computed: views since the start, over all teachers.
        errors: with ``strict``, by teacher, the largest error of storage so far, where it has any
            (see `relative_error`).

    Raises:
        UserError: the folder cannot be used, or a teacher cannot be loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        strict: bool = False,
        sample: Sample | None = None,
    ) -> None:
        self.config, self.device, self.strict, self.sample = config, device, strict, sample
        self.folder = Path(config.cache.folder or "").expanduser()
        self.store = config.cache.store
        self._check_folder()
        self.teachers: dict[str, Teacher | LazyTeacher] = {}
        self.stores: dict[str, FeatureStore] = {}
        for name, settings in config.teachers.items():
            teacher, dtype, identity = self._open(name, settings)
            self.teachers[name] = teacher
            place = self.folder / f"{identity}-{config.cache.storage}"
            self.stores[name] = FeatureStore(place, dtype, config.cache.storage)
        self.reader = StoredFeatures(self.stores)
        self.read = self.computed = 0
        self.errors: dict[str, float] = {}

    # Features of a batch.

    def features(self, groups: Sequence[GroupViews]) -> list[dict[str, Features]]:
        """As `targets.teacher_features`, but only what is not stored goes through the teachers.

        What has just been computed goes through the storage's dtype too, so that a run does not
        depend on what was stored before it.
        """
        found: list[dict[str, Features]] = [{} for _ in groups]
        for name in self.teachers:
            seen = [index for index, group in enumerate(groups) if name in group.teachers]
            each = self._of_one(name, [groups[index] for index in seen]) if seen else []
            for index, features in zip(seen, each, strict=True):
                found[index][name] = features
        return found

    def flush(self) -> None:
        """Put on disk what is waiting for it.

        Raises:
            UserError: it cannot be written.
        """
        for store in self.stores.values():
            self._storing(store.flush)

    def _storing(self, write: Callable[[], None]) -> None:
        if not self.store:
            return
        try:
            write()
        except UserError as error:
            if self.strict:
                raise
            # A long run does not end because a disk that only saves it time is full.
            warnings.warn(f"no more features are stored: {error}", stacklevel=3)
            self.store = False

    def counts(self) -> dict[str, int]:
        """For a log: views read and computed since the start, and damaged entries."""
        damaged = sum(len(store.damaged) for store in self.stores.values())
        return {"read": self.read, "computed": self.computed, "damaged": damaged}

    def _of_one(self, name: str, groups: Sequence[GroupViews]) -> list[Features]:
        """One teacher's features of each group."""
        store = self.stores[name]
        # What the worker has read, then what has been stored since it looked.
        known: list[list[Update]] = []
        asked: list[list[int]] = []
        for group in groups:
            addresses = group.addresses.get(name)
            if addresses is None:  # no fixed crops: nothing is stored
                known.append([])
                asked.append(list(range(len(group.teachers[name]))))
                continue
            late = {row: store.read(addresses[row]) for row in group.missing[name]}
            rows = [row for row, features in late.items() if features is not None]
            asked.append([row for row in late if row not in rows])
            known.append([])
            if (read := group.features.get(name)) is not None:
                known[-1].append((range(len(addresses)), read))
            if (stacked := stack_features([late[row] for row in rows])) is not None:
                known[-1].append((rows, stacked))
            self.read += len(addresses) - len(asked[-1])
        # A group of no images has nothing stored, and features of no rows all the same.
        some = [i for i in range(len(groups)) if asked[i] or not known[i]]
        fresh = self._compute(name, groups, asked, some)
        return [
            self._joined([*known[i], *([] if fresh[i] is None else [(asked[i], fresh[i])])])
            for i in range(len(groups))
        ]

    def _compute(
        self,
        name: str,
        groups: Sequence[GroupViews],
        asked: Sequence[list[int]],
        some: Sequence[int],
    ) -> list[Features | None]:
        """Features of the asked rows of some groups, and their way to the disk."""
        views = []
        for i in some:
            view = groups[i].teachers[name]
            if len(asked[i]) < len(view):
                view = view[torch.tensor(asked[i], device=view.device)]
            views.append(GroupViews(view, {name: view}))
        found: list[Features | None] = [None] * len(groups)
        if not views:
            return found
        computed = teacher_features({name: self.teachers[name]}, views, self.config.teachers)
        for i, features in zip(some, computed, strict=True):
            found[i] = self._keep(name, groups[i], asked[i], features[name])
        return found

    def _keep(
        self, name: str, group: GroupViews, rows: Sequence[int], features: Features
    ) -> Features:
        """The features as they come back from the disk, on the way to it."""
        store, addresses = self.stores[name], group.addresses.get(name)
        if addresses is None:
            return features
        self.computed += len(rows)
        parts = store.encode(features)
        self._storing(lambda: store.put([addresses[row] for row in rows], parts))
        decoded = store.decode(parts)
        if self.strict and self.config.cache.storage != "teacher":
            single = [
                Features(
                    *(None if v is None else v[row] for v in (decoded.summary, decoded.spatial))
                )
                for row in range(len(rows))
            ]
            found = relative_error(features, single)
            self.errors[name] = max([self.errors.get(name, 0.0), *(e or 0.0 for e in found)])
        return decoded

    def _joined(self, updates: Sequence[Update]) -> Features:
        """One group's features in float32 on the device, later updates over earlier ones."""
        if len(updates) == 1:  # of all rows
            features = updates[0][1]
            return Features(*(self._moved(v) for v in (features.summary, features.spatial)))
        count = 1 + max(row for rows, _ in updates for row in rows)
        parts: list[Tensor | None] = []
        for part in ("summary", "spatial"):
            whole = None
            for rows, features in updates:
                value = self._moved(getattr(features, part))
                if value is None:
                    continue
                if whole is None:
                    whole = value.new_zeros(count, *value.shape[1:])
                whole[torch.tensor(list(rows), device=whole.device)] = value
            parts.append(whole)
        return Features(*parts)

    def _moved(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self.device, torch.float32)

    # What a teacher is.

    def _check_folder(self) -> None:
        if self.folder.is_dir():
            writable = os.access(self.folder, os.W_OK)
        elif not self.store:
            raise UserError(
                f"setting cache.folder: {self.folder} is no folder, and without cache.store none "
                "is made; build it first (train.py cache)"
            )
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"setting cache.folder: cannot make {self.folder}: {error.strerror}"
                ) from error
            writable = True
        if self.store and not writable:
            raise UserError(
                f"setting cache.folder: {self.folder} cannot be written to; choose another folder, "
                "or only read it (--cache.no-store)"
            )

    def _open(
        self, name: str, settings: TeacherSettings
    ) -> tuple[Teacher | LazyTeacher, torch.dtype, str]:
        """A teacher, loaded only if its files are not known here; its dtype and identity."""

        def load() -> Teacher:
            return load_one_teacher(name, settings, self.device, self.sample)

        key = _files_key(settings)
        note = None if key is None else self.folder / _KNOWN / f"{key}.json"
        if note is not None and (known := _read_note(note)) is not None:
            spec = TeacherSpec(name=name, **known["spec"])
            return (
                LazyTeacher(spec, self.device, load, known.get("feature_errors", {})),
                getattr(torch, known["dtype"]),
                known["identity"],
            )
        teacher = load()
        identity = teacher_identity(teacher, settings)
        dtype = str(teacher.dtype).removeprefix("torch.")
        if note is not None and self.store:
            spec = dataclasses.asdict(teacher.spec)
            del spec["name"]
            _write_note(
                note,
                {
                    "identity": identity,
                    "dtype": dtype,
                    "spec": spec,
                    "feature_errors": teacher.feature_errors,
                    **_described(settings),
                },
            )
        return teacher, teacher.dtype, identity


def teacher_identity(teacher: Teacher, settings: TeacherSettings) -> str:
    """32 hex digits for all that a teacher's features depend on beside its input."""
    spec = dataclasses.asdict(teacher.spec)
    del spec["name"]  # the run's name for it
    return _hash(
        {
            **_described(settings),
            "weights": weights_hash(teacher),
            "modules": repr(teacher.tower),
            "dtype": str(teacher.dtype),
            "spec": spec,
        }
    )


def _described(settings: TeacherSettings) -> dict[str, Any]:
    """The settings that change what a teacher says of a view."""
    package = _PACKAGES[settings.source]
    speed: dict[str, Any] = {}
    if settings.keep_float32:
        speed["keep_float32"] = sorted(settings.keep_float32)
    if settings.patch:
        speed["patch"] = _digest(Path(interop.__file__).parent.glob("*.py"))
    if settings.quantise != "none":
        speed["quantise"] = f"{settings.quantise} {_release('torchao')}"
    if settings.compile:
        speed["compile"] = torch.__version__
    return speed | {
        "format": FORMAT,
        "source": settings.source,
        "model": settings.model,
        "layer": settings.layer,
        "dtype": settings.dtype,
        "mosaic": settings.mosaic,
        "summary": settings.summary_weight > 0,
        "package": f"{package} {_release(package)}",
        "code": _code(settings.source),
    }


@cache
def _code(source: str) -> str:
    """Digest of our own code around a library's model, which has no weights to tell it by."""
    folder = Path(base.__file__).parent
    return _digest(folder / name for name in ("base.py", "precision.py", *_CODE[source]))


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _files_key(settings: TeacherSettings) -> str | None:
    """32 hex digits for a teacher's settings and the bytes of its files; None if not known yet."""
    files = teacher_files(settings.source, settings.model, settings.checkpoint)
    if files is None:
        return None
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return _hash({**_described(settings), "files": digests})


def _hash(described: dict[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    for setting in ("mean", "std"):
        known["spec"][setting] = tuple(known["spec"][setting])
    return known


def _write_note(path: Path, known: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"setting cache.folder: {path} cannot be written ({error.strerror}); make room, or "
            "choose another folder"
        ) from error
