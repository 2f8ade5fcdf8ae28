"""Where a teacher's weights are: files on disk, the local Hugging Face cache, the hub."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagglo.errors import UserError, require

# Seconds to wait for the hub's first answer. The library's default of 10 is tried several times
# over; on a machine without a network the answer is no, and should come quickly.
HUB_TIMEOUT = 5.0


def existing(checkpoint: str | Path, name: str) -> Path:
    """The path, checked to exist."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise UserError(
            f"teacher {name!r}: checkpoint={str(checkpoint)!r} does not exist; give a folder or a "
            f".safetensors or .pth file"
        )
    return path


def find_weights(path: Path, names: Sequence[str], name: str) -> Path:
    """The weight file: ``path`` itself, or the first of ``names`` in the folder ``path``."""
    if path.is_file():
        return path
    for candidate in names:
        if (path / candidate).is_file():
            return path / candidate
    raise UserError(f"teacher {name!r}: no weights in {path}; looked for {', '.join(names)}")


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Read a state dict without running code from the file.

    Args:
        path: a ``.safetensors`` file, or a torch file (``.pth``, ``.pt``, ``.bin``) of tensors,
            possibly wrapped as ``{"state_dict": ...}`` or ``{"model": ...}``.
        name: of the teacher, for messages.

    Raises:
        UserError: unreadable, not tensors, or a pickle that would run code.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = require("safetensors.torch", extra="teachers").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"teacher {name!r}: {path} is no plain torch file of tensors, and files that run code "
            f"are not loaded; save its state_dict with safetensors"
        ) from error
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise UserError(f"teacher {name!r}: cannot read {path}: {one_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not (
        isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values())
    ):
        raise UserError(f"teacher {name!r}: {path} holds no state dict (names to tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a configuration file that lies beside weights."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"teacher {name!r}: cannot read {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"teacher {name!r}: {path} holds no JSON object")
    return content


def hub_folder(
    repo: str, weights: Sequence[str], extras: Sequence[str], *, name: str, allow_download: bool
) -> Path:
    """A folder with a repository's files: from the local cache, else downloaded.

    Args:
        repo: ``organisation/name`` on the Hugging Face hub.
        weights: patterns of weight files, best first; one of them must be there.
        extras: patterns of other files, e.g. ``config.json``.
        name: of the teacher, for messages.
        allow_download: ask the hub if the cache has no weights (``HF_HUB_OFFLINE=1`` forbids too).

    Raises:
        UserError: no weights; one line that says how to get them onto this machine.
    """
    hub = require("huggingface_hub", extra="teachers", purpose=f"teacher {name!r}")
    offline = require("huggingface_hub.constants", extra="teachers").HF_HUB_OFFLINE
    reason = "they are not in the local cache"
    for local in (True, False):
        if not local and (offline or not allow_download):
            reason += " and downloads are off"
            break
        for pattern in weights:
            try:
                folder = Path(
                    hub.snapshot_download(
                        repo,
                        allow_patterns=[pattern, *extras],
                        local_files_only=local,
                        etag_timeout=HUB_TIMEOUT,
                    )
                )
            except Exception as error:  # the hub's errors share no base over its versions
                if not local:
                    reason = one_line(error)
                    break  # another pattern will not mend the connection or the permission
                continue
            if any(folder.glob(pattern)):
                return folder
    raise UserError(
        f"teacher {name!r}: no weights of {repo} ({reason}): run `hf download {repo}` on a "
        f"connected machine and set checkpoint to the folder"
    )


def one_line(error: BaseException, limit: int = 240) -> str:
    """An error's text for a message of one line, cut to ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
