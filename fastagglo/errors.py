"""Errors that a user can mend, and optional packages."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from difflib import get_close_matches
from types import ModuleType


class UserError(Exception):
    """A problem with a setting, a file or the installation.

    The message is one line that names the setting or the file and says what to do; ``train.py``
    prints it without a traceback and exits with status 2.
    """


def require(module: str, *, extra: str, purpose: str = "") -> ModuleType:
    """Import an optional package where it is used.

    Args:
        module: the name to import, e.g. ``"timm"`` or ``"timm.optim"``.
        extra: the extra of fastagglo that installs it.
        purpose: what needs it, e.g. ``"timm teachers"``; it starts the error message.

    Raises:
        UserError: the package is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A missing dependency *of* the package is as much the user's problem, under its own name.
        subject = purpose or f"this part of fastagglo ({module})"
        raise UserError(
            f"{subject} needs the package {(error.name or module).split('.')[0]!r}, which is not "
            f'installed: pip install "fastagglo[{extra}]"'
        ) from error


def suggestion(name: object, known: Collection[str]) -> str:
    """What an error about an unknown name ends with: the nearest known name, or all of them."""
    near = get_close_matches(str(name), list(known), n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(map(repr, known)) or 'none'}"
