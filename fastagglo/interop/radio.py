"""RADIO's published weights as students, and students under RADIO's names; no remote code.

The names are facts of the published files (``radio_names.py``); nothing of RADIO's code is used.
Its weights carry their own licences, some of them non-commercial.
"""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo.errors import UserError, require
from fastagglo.interop.radio_config import describe
from fastagglo.interop.radio_folder import transformers_config
from fastagglo.interop.radio_names import (
    Layout,
    RadioReport,
    constants,
    entries,
    find_layout,
    report,
)
from fastagglo.model import Student, StudentConfig
from fastagglo.model.io import apart

__all__ = [
    "RadioMismatch",
    "RadioReport",
    "RadioStudent",
    "from_radio",
    "load_radio",
    "radio_parameters",
    "save_radio",
    "to_radio",
]

METADATA = "fastagglo"  # where a file of ours keeps the configuration


class RadioMismatch(UserError):
    """A state dict that does not fit RADIO's layout.

    Attributes:
        report: the :class:`RadioReport` with every name.
    """

    def __init__(self, message: str, report: RadioReport) -> None:
        super().__init__(message)
        self.report = report


class RadioStudent(Student):
    """A student with the weights of a RADIO checkpoint.

    Attributes:
        layout: how the checkpoint called its entries.
        carried: its entries that are no parameters of a student (input statistics, summary
            indices, and tensors that image features do not need), to be written back.
        report: how the checkpoint differed from the layout.
    """

    def __init__(
        self,
        config: StudentConfig,
        layout: Layout,
        carried: Mapping[str, Tensor],
        report: RadioReport,
    ) -> None:
        super().__init__(config)
        self.layout = layout
        self.carried = dict(carried)
        self.report = report


def from_radio(
    state: Mapping[str, Tensor],
    args: Mapping[str, Any] | argparse.Namespace | None = None,
    *,
    teachers: Sequence[str] | None = None,
    num_heads: int | None = None,
    cls_tokens: int | None = None,
    upsample: Mapping[str, int] | None = None,
    strict: bool = True,
) -> RadioStudent:
    """The student of a RADIO state dict, in evaluation mode.

    Its tensors become the parameters, not copies of them, and keep their dtypes and devices. On
    the meta device this checks names and shapes and costs no memory.

    Args:
        state: tensors under the names of a torch.hub file, of a transformers folder, or of
            transformers' own ``RadioModel``, after any prefix.
        args: what the checkpoint says of its training (``args`` of a hub file, ``config.json`` of
            a folder): teachers, their CLS tokens, cells per patch.
        teachers: all teachers' names in the order of their CLS tokens, where ``args`` lacks them
            and the order is not a published one. Files that count teachers get these names.
        num_heads: attention heads, for trunks of a width that is not published.
        cls_tokens: how many token rows are CLS tokens, where nothing says it.
        upsample: cells per patch and side of a teacher's spatial head, where ``args`` lacks them.
        strict: raise if anything is missing, unexpected or misshapen. Otherwise such entries are
            left out, parameters without one keep their initial values, and ``report`` names them.

    Raises:
        TypeError: ``state`` is not a mapping of names to tensors.
        RadioMismatch: (a UserError) ``strict``, and something does not fit; all names are in its
            ``report``.
        UserError: no RADIO trunk in it, or something that neither it nor the arguments say.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"from_radio: state must be a mapping, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"from_radio: {name!r} must be a tensor, got {kind}")
    options = {
        "teachers": teachers,
        "num_heads": num_heads,
        "cls_tokens": cls_tokens,
        "upsample": upsample,
    }
    return _build(state, state.__getitem__, _arguments(args), options, strict, "the state dict")


def load_radio(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    teachers: Sequence[str] | None = None,
    num_heads: int | None = None,
    cls_tokens: int | None = None,
    upsample: Mapping[str, int] | None = None,
    strict: bool = True,
) -> RadioStudent:
    """The student of a RADIO checkpoint on disk, in evaluation mode; no code of its folder is run.

    Args:
        path: a ``.safetensors`` file, a torch file (``.pth``, ``.pth.tar``, ``.pt``, ``.bin``; read
            with ``weights_only``), or a transformers folder with ``config.json``.
        device: where the weights go.
        dtype: of the parameters; None keeps the file's.
        teachers, num_heads, cls_tokens, upsample, strict: as of :func:`from_radio`.

    Raises:
        UserError: the file is missing, damaged or no RADIO checkpoint; otherwise as
            :func:`from_radio`.
    """
    options = {
        "teachers": teachers,
        "num_heads": num_heads,
        "cls_tokens": cls_tokens,
        "upsample": upsample,
    }
    file = open_weights(Path(path), device)
    student = _build(file.shapes, file.read, file.args, options, strict, str(path))
    return student if dtype is None else student.to(dtype)


def radio_parameters(path: Path, num_heads: int | None = None) -> dict[str, Tensor] | None:
    """A student's parameters from a RADIO checkpoint, for a warm start.

    Args:
        path: as of :func:`load_radio`.
        num_heads: as of :func:`from_radio`, for a width that is not published.

    Returns:
        by the student's names, or None if the file has no RADIO trunk in it.

    Raises:
        UserError: as of :func:`load_radio`.
    """
    file = open_weights(path, "cpu")
    try:
        find_layout(file.shapes)
    except ValueError:
        return None
    known = METADATA in file.args
    return load_radio(path, num_heads=None if known else num_heads).state_dict()


def to_radio(student: Student, layout: str | None = None) -> dict[str, Tensor]:
    """The student's state under RADIO's names.

    Args:
        student: any student. One that came from a RADIO checkpoint gives every entry of it back,
            bit for bit where nothing was trained.
        layout: ``"hub"``, ``"transformers"`` or ``"native"``; see ``radio_names.py``. None is the
            checkpoint's own layout, and ``"hub"`` for other students.

    Returns:
        detached tensors, which share memory with the student where they can.

    Raises:
        TypeError: not a student.
        ValueError: an unknown layout, or heads under ``"native"``, which has none.
    """
    if not isinstance(student, Student):
        raise TypeError(f"to_radio: expected a Student, got {type(student).__name__}")
    if isinstance(student, RadioStudent) and layout in (None, student.layout.style):
        return _written(student, student.layout) | student.carried
    return _written(student, Layout.of("hub" if layout is None else layout))


def _written(student: Student, layout: Layout) -> dict[str, Tensor]:
    if layout.style == "native" and student.config.heads:
        raise ValueError(
            "to_radio: layout 'native' has no names for heads; use 'transformers' or 'hub'"
        )
    own = {name: value.detach() for name, value in student.state_dict().items()}
    state: dict[str, Tensor] = {}
    for entry in entries(student.config, layout):
        state |= entry.write(own)
    return state | constants(student.config, layout)


def save_radio(student: Student, path: str | os.PathLike[str], layout: str | None = None) -> None:
    """Write a student under RADIO's names.

    Args:
        student: any student; its configuration goes into the file's metadata, so that
            :func:`load_radio` needs no arguments.
        path: a ``.safetensors`` file, whose folder exists; or a folder, which is made, for
            ``transformers.AutoModel``: its own ``RadioModel`` reads the trunk, without remote
            code (heads are written too; it has none, and says so).
        layout: of a file, as of :func:`to_radio`. A folder is always ``"transformers"``.

    Raises:
        TypeError, ValueError: as of :func:`to_radio`.
        UserError: the file cannot be written, safetensors is not installed, or a folder is wanted
            of a student that RadioModel cannot be: with ``patch_bias`` or ``final_norm``, say.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        kept = isinstance(student, RadioStudent) and layout in (None, student.layout.style)
        heads = dict(student.layout.heads) if kept else {}
        _write(path, to_radio(student, layout), student.config, heads)
        return
    if not isinstance(student, Student):
        raise TypeError(f"save_radio: expected a Student, got {type(student).__name__}")
    if path.suffix in (".pth", ".pt", ".bin", ".tar"):
        raise UserError(f"save_radio: {path} must end in .safetensors, or be a folder")
    if layout not in (None, "transformers"):
        raise ValueError(f"layout of a folder must be 'transformers', got {layout!r}")
    values = transformers_config(student.config)
    state = _written(student, Layout.of("transformers"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    _write(path / "model.safetensors", state, student.config, {})


def _write(
    path: Path, state: Mapping[str, Tensor], config: StudentConfig, heads: Mapping[str, str]
) -> None:
    safetensors = require("safetensors", extra="train", purpose="save_radio")
    save_file = require("safetensors.torch", extra="train", purpose="save_radio").save_file
    state = apart(state)
    known = {"config": config.to_dict(), "heads": heads}
    try:
        save_file(state, path, {"format": "pt", METADATA: json.dumps(known)})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _build(
    state: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    args: Mapping[str, Any],
    options: dict[str, Any],
    strict: bool,
    label: str,
) -> RadioStudent:
    try:
        root = find_layout(state).root
        ours = {name: value for name, value in state.items() if name.startswith(root)}
        if METADATA in args:
            known = json.loads(args[METADATA])
            config = StudentConfig.from_dict(known["config"])
            layout = replace(find_layout(ours), heads=known["heads"])
            if given := [name for name, value in options.items() if value is not None]:
                raise ValueError(f"it says all by itself; leave out {', '.join(given)}")
        else:
            config, layout = describe(_Values(ours, read), args, **options)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{label}: {error}") from error
    found = report(config, layout, {name: tuple(v.shape) for name, v in ours.items()})
    if strict and not found.ok:
        raise RadioMismatch(
            f"{label}: entries {found}; strict=False leaves out what does not fit", found
        )
    wrong = {*found.missing, *found.misshapen}
    carried = {
        name: read(name)
        for name in (*constants(config, layout), *found.unused)
        if name in ours and name not in found.misshapen
    }
    # Without values of its own where the file gives all.
    with torch.device("meta" if not wrong else "cpu"):
        student = RadioStudent(config, layout, carried, found)
    own = student.state_dict()
    values: dict[str, Tensor] = {}
    for entry in entries(config, layout):
        if wrong.isdisjoint(entry.names):
            values |= entry.read({name: read(name) for name in entry.names}, own)
    student.load_state_dict(values, strict=not wrong, assign=True)
    if wrong and values:
        first = next(iter(values.values()))
        student.to(first.device)
        for name, value in student.state_dict(keep_vars=True).items():
            if name not in values and value.is_floating_point():
                value.data = value.data.to(first.dtype)
    return student.requires_grad_(True).eval()


class _Values(Mapping[str, Tensor]):
    """Shapes by name, but the values of the few entries that say how a model is built."""

    def __init__(self, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self._shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> Tensor:
        small = name.endswith(("summary_idxs", "norm_mean", "norm_std"))
        return self._read(name) if small and name in self._shapes else self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _arguments(args: object) -> dict[str, Any]:
    """Training arguments as one flat mapping."""
    if args is None:
        return {}
    values = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    inner = values.pop("args", None)
    if inner is not None:  # a transformers folder's config.json keeps them inside
        values = {**values, **(inner if isinstance(inner, Mapping) else vars(inner))}
    return values


@dataclass(frozen=True)
class _File:
    shapes: Mapping[str, Tensor]  # on the meta device
    read: Callable[[str], Tensor]
    args: Mapping[str, Any]


def open_weights(path: Path, device: torch.device | str) -> _File:
    """The tensors of a file or a folder, and what stands beside them; nothing is read yet."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    args: dict[str, Any] = {}
    folder = path if path.is_dir() else path.parent if path.name.startswith("model.") else None
    if folder is not None and (folder / "config.json").exists():
        try:
            args = _arguments(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        names = ["model.safetensors", "pytorch_model.bin"]
        if index.exists():
            try:
                parts = sorted(
                    set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} cannot be read as an index: {error!r}") from error
            return _safetensors([path / part for part in parts], device, args)
        for name in names:
            if (path / name).exists():
                return _open_file(path / name, device, args)
        raise UserError(f"{path} has none of {', '.join(names)}, {index.name}")
    return _open_file(path, device, args)


def _open_file(path: Path, device: torch.device | str, args: dict[str, Any]) -> _File:
    if path.suffix == ".safetensors":
        return _safetensors([path], device, args)
    return _torch_file(path, device, args)


def _safetensors(paths: Sequence[Path], device: torch.device | str, args: dict[str, Any]) -> _File:
    safetensors = require("safetensors", extra="train", purpose="loading RADIO's weights")
    shapes, where = {}, {}
    for path in paths:
        try:
            file = safetensors.safe_open(path, framework="pt", device=str(device))
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118
                shapes[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
                where[name] = file
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error
        if METADATA in metadata:
            args = {**args, METADATA: metadata[METADATA]}
    return _File(shapes, lambda name: where[name].get_tensor(name), args)


def _torch_file(path: Path, device: torch.device | str, args: dict[str, Any]) -> _File:
    try:
        # Training arguments are a Namespace, which is data; no other class is let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{path} cannot be read with weights_only ({reason}); if you trust it, save its "
            "'state_dict' alone as safetensors and load that"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a checkpoint's dict")
    state = content.get("state_dict_ema", content.get("state_dict", content))
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    shapes = {name: torch.empty(value.shape, device="meta") for name, value in state.items()}
    return _File(
        shapes, lambda name: state[name].to(device), {**args, **_arguments(content.get("args"))}
    )
