"""One call for weights on disk, whoever wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastagglo.errors import UserError
from fastagglo.interop.radio import load_radio
from fastagglo.model import Student, load_student

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
        path: a folder that ``save_student`` or ``train.py`` wrote, or a RADIO checkpoint: a
            ``.safetensors`` file, a torch.hub file (``.pth.tar``) or a transformers folder.
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
    if _is_saved_student(folder):
        given = {"teachers": teachers, "num_heads": num_heads, "cls_tokens": cls_tokens}
        given |= {"upsample": upsample, "strict": None if strict else strict}
        if extra := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"load: {', '.join(extra)} only apply to RADIO checkpoints; {folder} is a saved "
                "student, which says all by itself"
            )
        student = load_student(folder, device).eval()
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


def _is_saved_student(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "format" in values
