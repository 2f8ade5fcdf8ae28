"""Students on disk: ``model.safetensors`` and ``config.json`` in one folder; no pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo.errors import UserError, require
from fastagglo.model.config import StudentConfig
from fastagglo.model.positions import resize_table
from fastagglo.model.student import Student

__all__ = ["WarmStart", "load_student", "save_student", "warm_start"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1
MODEL_TYPE = "fastagglo"  # how transformers' AutoConfig tells whose configuration it is
_SHOWN = 5  # names an error lists of each kind


def save_student(student: Student, folder: str | os.PathLike[str]) -> None:
    """Write a student; an interrupted save leaves the previous one, or an error at loading.

    Each file is written under a temporary name, flushed to the disk and renamed. The weights carry
    a copy of the configuration, so that a pair from two different saves cannot be loaded.

    Args:
        student: on any device; dtypes are kept.
        folder: made if it does not exist.

    Raises:
        TypeError: not a :class:`Student` (pass the module itself, not its DDP or compiled wrapper).
        UserError: the folder cannot be written, or safetensors is not installed.
    """
    if not isinstance(student, Student):
        raise TypeError(f"save_student: expected a Student, got {type(student).__name__}")
    safetensors = require("safetensors", extra="train", purpose="save_student")
    save_file = require("safetensors.torch", extra="train", purpose="save_student").save_file
    folder = Path(folder)
    values = {"format": FORMAT, "model_type": MODEL_TYPE, **student.config.to_dict()}
    config = json.dumps(values, indent=2) + "\n"
    state = apart(student.state_dict())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(
            folder / WEIGHTS,
            lambda path: save_file(state, path, {"format": "pt", "config": config}),
        )
        _replace(folder / CONFIG, lambda path: Path(path).write_text(config, encoding="utf-8"))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot save the student to {folder}: {error}") from error


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none in the memory of another, as safetensors wants them."""
    found, taken = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return found


def load_student(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Student:
    """The student that :func:`save_student` wrote, bit for bit, in training mode.

    Args:
        folder: holds ``model.safetensors`` and ``config.json``.
        device: where the weights go.

    Raises:
        UserError: a file is missing, damaged, from another format or of another student; the
            message names the parameters that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config, text = _read_config(folder / CONFIG)
    state, metadata = _read_weights(folder / WEIGHTS, device)
    if metadata.get("config", text) != text:
        raise UserError(
            f"{folder}: {CONFIG} is not the one that {WEIGHTS} was saved with (an interrupted save "
            "or an edited file); save the student again or restore both files"
        )
    with torch.device("meta"):
        student = Student(config)
    expected = student.state_dict()
    problems = {
        "missing": [n for n in expected if n not in state],
        "unexpected": [n for n in state if n not in expected],
        "of another shape": [
            f"{n} {tuple(state[n].shape)}, expected {tuple(t.shape)}"
            for n, t in expected.items()
            if n in state and state[n].shape != t.shape
        ],
    }
    if found := [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]:
        raise UserError(f"{folder / WEIGHTS} does not fit {CONFIG}; parameters {'; '.join(found)}")
    student.load_state_dict(state, assign=True)
    return student


@dataclass(frozen=True)
class WarmStart:
    """What :func:`warm_start` did, by parameter name.

    Attributes:
        copied: taken as they were.
        resized: position tables that were interpolated to the student's grid.
        skipped: in the source but not taken, with the reason.
        untouched: parameters of the student that the source does not give.
    """

    copied: tuple[str, ...]
    resized: tuple[str, ...]
    skipped: Mapping[str, str]
    untouched: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"warm start: {len(self.copied)} copied, {len(self.resized)} resized, "
            f"{len(self.skipped)} skipped, {len(self.untouched)} untouched"
        )


@torch.no_grad()
def warm_start(
    student: Student, source: str | os.PathLike[str] | Mapping[str, Tensor]
) -> WarmStart:
    """Copy into a student whatever fits of another one, trunk and heads, by name and shape.

    CLS tokens and heads carry their teacher's name, so teachers may be added, dropped or put in
    another order. A position table of another size is resized (bilinear). The student keeps its
    dtype and device.

    Args:
        student: changed in place.
        source: a folder of :func:`save_student`, a safetensors file, or a state dict.

    Returns:
        a :class:`WarmStart`: what was copied, resized, skipped and why, and left untouched.

    Raises:
        TypeError: ``student`` is not a :class:`Student`.
        UserError: the file is missing or damaged, or nothing in it fits.
    """
    if not isinstance(student, Student):
        raise TypeError(f"warm_start: expected a Student, got {type(student).__name__}")
    if isinstance(source, Mapping):
        state, label = dict(source), "the state"
    else:
        path = Path(source)
        path = path / WEIGHTS if path.is_dir() else path
        state, label = _read_weights(path, "cpu")[0], str(path)
    own = student.state_dict()
    copied, resized, skipped = [], [], {}
    for name, value in state.items():
        target = own.get(name)
        if target is None:
            skipped[name] = "the student has no such parameter"
        elif not isinstance(value, Tensor):
            skipped[name] = f"not a tensor but {type(value).__name__}"
        elif value.shape == target.shape:
            target.copy_(value)
            copied.append(name)
        elif name == "positions.table" and _is_table(value, target.shape[-1]):
            target.copy_(resize_table(value, student.positions.grid))
            resized.append(name)
        else:
            skipped[name] = f"shape {tuple(value.shape)}, the student's is {tuple(target.shape)}"
    if not copied and not resized:
        reasons = _some(
            [f"{name}: {reason}" for name, reason in skipped.items()] or ["it is empty"]
        )
        raise UserError(f"warm start: nothing in {label} fits the student ({reasons})")
    taken = {*copied, *resized}
    untouched = tuple(name for name in own if name not in taken)
    return WarmStart(tuple(copied), tuple(resized), skipped, untouched)


def _is_table(value: Tensor, width: int) -> bool:
    side = round(value.shape[1] ** 0.5) if value.dim() == 3 else 0
    return side > 0 and value.shape == (1, side * side, width) and value.is_floating_point()


def _replace(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then take its place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; the saved one is as readable as any other new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself; a system that cannot open folders has no such call to make."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_config(path: Path) -> tuple[StudentConfig, str]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; save_student writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(
            f"{path} has format {found!r}, this version of fastagglo reads format {FORMAT}"
        )
    del values["format"]
    values.pop("model_type", None)  # older students have none
    try:
        return StudentConfig.from_dict(values), text
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _read_weights(path: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, str]]:
    safetensors = require("safetensors", extra="train", purpose="loading a student")
    if not path.exists():
        raise UserError(f"{path} does not exist; save_student writes it")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
