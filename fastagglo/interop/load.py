"""One call for weights on disk, whoever wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastagglo.errors import UserError
from fastagglo.interop.radio import load_radio, open_weights
from fastagglo.model import Student, StudentConfig, load_student
from fastagglo.model.io import MODEL_TYPE

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    teachers: Sequence[str] | None = None,
    num_heads: int | None = None,
    cls_tokens: int | None = None,
    upsample: Mapping[str, int] | None = None,
    strict: bool = True,
) -> Student:
    """A student from disk, ready to give features: evaluation mode, no network, no remote code.

    Args:
        path: a folder that ``save_student``, ``train.py`` or a ``save_pretrained`` of ours wrote,
            or a RADIO checkpoint: a ``.safetensors`` file, a torch.hub file (``.pth.tar``) or a
            transformers folder.
        device: where the weights go.
        dtype: of the parameters; None keeps the file's.
        teachers, num_heads, cls_tokens, upsample, strict: for RADIO checkpoints that do not say;
            see :func:`fastagglo.interop.from_radio`.

    Raises:
        UserError: the files are missing, damaged or of neither kind, or what they hold does not
            fit; the message names the entries that are missing, unexpected or of another shape.
    """
    folder = Path(path)
    if folder.name == "model.safetensors":
        folder = folder.parent
    kind = _kind(folder)
    if kind is not None:
        given = {"teachers": teachers, "num_heads": num_heads, "cls_tokens": cls_tokens}
        given |= {"upsample": upsample, "strict": None if strict else strict}
        if extra := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"load: {', '.join(extra)} only apply to RADIO checkpoints; {folder} is a saved "
                "student, which says all by itself"
            )
        read = load_student if kind == "student" else _load_model
        student = read(folder, device).eval()
        return student if dtype is None else student.to(dtype)
    return load_radio(
        path,
        device,
        dtype,
        teachers=teachers,
        num_heads=num_heads,
        cls_tokens=cls_tokens,
        upsample=upsample,
        strict=strict,
    )


def _kind(folder: Path) -> str | None:
    """``"student"`` of save_student, ``"model"`` of a FastaggloModel, None for anything else."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict):
        return None
    if "format" in values:
        return "student"
    return "model" if values.get("model_type") == MODEL_TYPE and "student" in values else None


def from_pairs(values: Mapping[str, Any]) -> StudentConfig:
    """A configuration from its fields, of which ``heads`` may be a list of pairs."""
    return StudentConfig.from_dict({**values, "heads": dict(values.get("heads", {}))})


def _load_model(folder: Path, device: torch.device | str) -> Student:
    """The student in a folder that transformers wrote."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))["student"]
        config = from_pairs(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    file = open_weights(folder, device)
    state = {name.removeprefix("student."): file.read(name) for name in file.shapes}
    with torch.device("meta"):
        student = Student(config)
    try:
        student.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit its config.json: {error}") from error
    return student.requires_grad_(True)
