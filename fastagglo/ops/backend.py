"""Which implementation an op runs: by device, ``with`` block or environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import TracebackType

import torch
import triton

from fastagglo.errors import UserError

ENVIRONMENT_VARIABLE = "FASTAGGLO_BACKEND"

# Kernels are wrapped for the interpreter when they are defined, so this holds for the process.
INTERPRETED = triton.knobs.runtime.interpret

# Every backend that some op has, and the device type that it runs on (None: any device).
_DEVICE_OF = {"torch": None, "triton": "cuda", "xformers": "cuda"}
_NAMES = ", ".join(map(repr, _DEVICE_OF))

# A context variable and not a global: another thread, a data-loading one say, keeps its own choice.
_chosen: ContextVar[str | None] = ContextVar("fastagglo_backend", default=None)

# The latest choice again, for tracing: torch.compile reads and guards a global in every release
# that we support, a context variable only in the newest.
_traced: str | None = None


class use_backend:
    """Make the ops called inside a ``with`` block run one backend.

    Blocks nest, the innermost one counts, and the choice belongs to the thread that made it. An op
    remembers the backend of its forward for its backward. Two cases need care: activation
    checkpointing repeats a forward during the backward, on a thread of its own for CUDA, so choose
    with the environment variable ``FASTAGGLO_BACKEND`` there, which the whole process sees; and
    ``torch.compile`` wants the block outside the compiled function, which it then compiles once for
    each backend. While threads choose unlike backends, tracing may see another thread's choice.

    Args:
        name: ``"torch"`` (all ops, all devices), ``"triton"`` (CUDA; on a CPU in Triton's
            interpreter, if the process began with ``TRITON_INTERPRET=1``) or ``"xformers"``
            (attention alone, CUDA). An op that lacks the backend, or cannot run it on its tensors,
            raises ``ValueError`` when called: a backend asked for by name is never replaced.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: ``name`` is no backend.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"use_backend takes a string, one of {_NAMES}; got {name!r}")
        if name not in _DEVICE_OF:
            raise ValueError(f"there is no backend {name!r}: use one of {_NAMES}")
        self.name = name
        self._tokens: list[Token[str | None]] = []

    def __enter__(self) -> None:
        global _traced
        self._tokens.append(_chosen.set(self.name))
        _traced = self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _traced
        _chosen.reset(self._tokens.pop())
        _traced = _chosen.get()


def resolve(
    op: str,
    device: torch.device,
    available: tuple[str, ...],
    unable: Mapping[str, str | None] | None = None,
) -> str:
    """The backend that ``op`` runs on tensors of ``device``.

    An enclosing ``use_backend`` decides; without one the environment variable
    ``FASTAGGLO_BACKEND``; without that (or with an empty one) the device: ``"triton"`` on CUDA for
    the ops that have it, else ``"torch"``. A compiled graph keeps the variable's value of its
    first call.

    Args:
        op: the op's public name, for errors.
        device: where its tensors live.
        available: the backends that the op has; ``"torch"`` is always one of them.
        unable: why a backend cannot run this very call; it is then no default.

    Raises:
        ValueError: the backend asked for is not one of ``available``, does not run on ``device`` or
            is unable.
        UserError: the environment variable names no backend.
    """
    name = _traced if torch.compiler.is_compiling() else _chosen.get()
    asked_by = f"use_backend({name!r})"
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE, "")
        asked_by = f"{ENVIRONMENT_VARIABLE}={name}"
        if not name:
            able = "triton" in available and not (unable or {}).get("triton")
            return "triton" if device.type == "cuda" and able else "torch"
        if name not in _DEVICE_OF:
            raise UserError(
                f"{asked_by}: there is no such backend; set one of {_NAMES} or unset it"
            )
    if name not in available:
        raise ValueError(
            f"{op} has no backend {name!r}, asked for by {asked_by}: it has "
            f"{', '.join(map(repr, available))}"
        )
    needed = _DEVICE_OF[name]
    if name == "triton" and INTERPRETED and device.type == "cpu":
        needed = None
    if needed is not None and device.type != needed:
        raise ValueError(
            f"{op}: the backend {name!r}, asked for by {asked_by}, runs on {needed} tensors, got "
            f"tensors on {device}; move them or use the backend 'torch'"
        )
    if reason := (unable or {}).get(name):
        raise ValueError(
            f"{op}: the backend {name!r}, asked for by {asked_by}, cannot run this call: {reason}; "
            "use the backend 'torch'"
        )
    return name
