"""Checkpoints that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastagglo.errors import UserError

FILE_NAME = "checkpoint.pt"
FORMAT = 1


def save_checkpoint(state: dict[str, Any], folder: Path) -> Path:
    """Write a checkpoint beside the last one, then put it in its place.

    A run that is killed, or a disk that fills up, while this runs leaves the last checkpoint as it
    was.

    Raises:
        UserError: it could not be written; the message names the file and what is still there.
    """
    path = folder / FILE_NAME
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's zip writer raises RuntimeError on a full disk
        partial.unlink(missing_ok=True)
        kept = (
            f"the checkpoint before it is intact, go on with --resume {folder}"
            if path.exists()
            else "there is none before it"
        )
        raise UserError(
            f"checkpoint {path}: cannot be written ({_reason(error)}); {kept}, after making room"
        ) from error
    return path


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any]:
    """Read a run's checkpoint; tensors and plain values only, never code.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"run {folder}: it has no {FILE_NAME}, so it cannot be resumed; start anew "
            f"(--out {folder} --overwrite)"
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise damaged(folder, error) from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT or not isinstance(state.get("config"), dict):
        raise damaged(folder, ValueError(f"its format is {found}, expected {FORMAT}"))
    return state


def damaged(folder: Path, error: BaseException) -> UserError:
    """The error to raise for a checkpoint that does not hold what it should."""
    return UserError(
        f"checkpoint {folder / FILE_NAME}: cannot be read ({_reason(error)}); it is damaged or was "
        f"written by another program: put a copy back, or start anew (--out {folder} --overwrite)"
    )


def _reason(error: BaseException) -> str:
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
